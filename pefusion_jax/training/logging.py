"""Progress bar and metrics file of a run. Neither waits for the device more often than it is told to."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pefusion_jax.files import write_atomically
from pefusion_jax.training.step import NonFiniteError, describe_bad

# A step that has been dispatched holds its batch on the device; this bounds how many do.
_MOST_PENDING = 64


class MetricsFile:
    """A JSON-lines file: one object a line, each with a ``step``; a resumed run goes on where the saved state stands.

    Args:
      path: the file; its folder is made. An existing file is continued.
      after: number of steps already made. Lines of later steps, and a last line that a crash cut off, are dropped, so that no
        step stands twice.

    Raises:
      ValueError: if a line in the middle of the file is not a JSON object with a step.
    """

    def __init__(self, path: str | os.PathLike[str], after: int) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._drop_later(after)
        self._file = self.path.open("a", buffering=1, encoding="utf-8")

    def _drop_later(self, after: int) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = []
        for number, line in enumerate(lines, start=1):
            try:
                step = json.loads(line)["step"]
            except (ValueError, TypeError, KeyError) as error:
                if number == len(lines):
                    break
                raise ValueError(
                    f"{self.path}, line {number}: not a JSON object with a 'step'; pass another log_file, or remove this one"
                ) from error
            if step <= after:
                kept.append(line + "\n")
        write_atomically(self.path, "".join(kept).encode())

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line."""
        self._file.write(json.dumps(dict(record), allow_nan=False) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class Monitor:
    """Collects the metrics of dispatched steps, fetches them in groups, and stops the run where one is not finite.

    Args:
      total: number of steps of the whole run.
      start: number of steps already made.
      every: steps between two log records; also the number of steps between two fetches.
      log: metrics file, or ``None``.
      progress: whether to show a bar; ``None`` shows it where standard error is a terminal.
      names: the trained leaves, whose paths appear in errors.
      label: name of the run, shown by the bar.
      tasks: names of several tasks that are trained together. Records then have ``loss/NAME``, the mean over the task's rows
        since the record before (in this process), where it had any.
    """

    def __init__(
        self,
        total: int,
        start: int,
        every: int,
        log: MetricsFile | None,
        progress: bool | None,
        names: Any,
        label: str,
        tasks: Sequence[str] = (),
    ) -> None:
        from tqdm import tqdm

        self._tasks = tuple(tasks)
        self._task_sums = np.zeros((2, len(self._tasks)))

        self._every, self._total, self._log, self._names, self._label = every, total, log, names, label
        self._pending: list[tuple[int, Any]] = []
        self._clock: float | None = None
        self._first = start
        self._examples = 0.0
        shown = sys.stderr.isatty() if progress is None else progress
        self._bar = tqdm(total=total, initial=start, desc=label, unit="step", disable=not shown)

    def push(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of update number ``step``, still being computed; with several tasks also their ``task_rows``.

        Fetches what is due up to the step before it, so that the device always has a step to work on meanwhile.
        """
        if self._clock is None:
            # The first step is not timed: its call returns only after it has been compiled.
            self._clock, self._first = time.perf_counter(), step
        if self._pending and (self._pending[-1][0] % self._every == 0 or len(self._pending) >= _MOST_PENDING):
            self.flush()
        self._pending.append((step, metrics))

    def flush(self) -> None:
        """Waits for all steps pushed so far.

        Raises:
          NonFiniteError: naming the first step whose loss, gradient or update is not finite.
        """
        steps, self._pending = self._pending, []
        if not steps:
            return
        record = None
        for (step, _), metrics in zip(steps, jax.device_get([m for _, m in steps]), strict=True):
            if not metrics["finite"]:
                raise NonFiniteError(
                    f"{self._label}: step {step} is not finite: {describe_bad(self._names, metrics)}. Its update was not made. "
                    "Lower the learning rate, lengthen the warm-up, or look at that batch"
                )
            if step > self._first:
                self._examples += float(metrics["examples"])
            if self._tasks:
                self._task_sums += np.asarray([metrics["task_losses"], metrics["task_rows"]], np.float64)
            if step % self._every == 0 or step == self._total:
                record = self._record(step, metrics)
                if self._log is not None:
                    self._log.write(record)
        self._bar.update(len(steps))
        if record is not None:
            self._bar.set_postfix(loss=f"{record['loss']:.4g}", examples_per_second=f"{record['examples_per_second']:.0f}")

    def _record(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        now = time.perf_counter()
        started = now if self._clock is None else self._clock
        speed = self._examples / max(now - started, 1e-9)
        self._clock, self._examples = now, 0.0
        rate = float(metrics["learning_rate"])
        of_tasks = {f"loss/{name}": loss / rows for name, loss, rows in zip(self._tasks, *self._task_sums, strict=True) if rows}
        self._task_sums[:] = 0
        return {
            "step": step,
            "loss": float(metrics["loss"]),
            "grad_norm": float(metrics["grad_norm"]),
            "learning_rate": None if rate != rate else rate,
            "examples_per_second": speed,
            **of_tasks,
        }

    def note(self, record: Mapping[str, Any]) -> None:
        """Writes a record of another kind, such as a validation score."""
        if self._log is not None:
            self._log.write(record)

    def close(self) -> None:
        """Closes bar and file."""
        self._bar.close()
        if self._log is not None:
            self._log.close()
