"""The metrics file holds each step once, whatever happened before, and nothing waits for the device."""

from __future__ import annotations

import json
import sys

import jax
import numpy as np
import pytest
import toy

from pefusion_jax.files import write_atomically
from pefusion_jax.training import NonFiniteError, finetune
from pefusion_jax.training.logging import MetricsFile, Monitor

ONE = jax.devices()[:1]


def metrics(step, finite=True):
    values = {"loss": step / 10, "grad_norm": 1.0, "examples": 8.0, "learning_rate": np.nan, "finite": finite, "bad": -1}
    return {name: np.asarray(value) for name, value in values.items()}


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_finetune_writes_what_it_did(tmp_path):
    adapted, params = toy.make_model()
    path = tmp_path / "new" / "log.jsonl"
    finetune(
        adapted, params, toy.make_task(), steps=25, batch_size=8, devices=ONE, log_file=path, schedule="constant", warmup=0
    )
    written = records(path)
    assert [r["step"] for r in written] == [10, 20, 25]
    assert {tuple(r) for r in written} == {("step", "loss", "grad_norm", "learning_rate", "examples_per_second")}
    assert all(r["learning_rate"] == pytest.approx(1e-3) and r["examples_per_second"] > 0 for r in written)
    finetune(
        adapted, params, toy.make_task(), steps=2, batch_size=8, devices=ONE, log_file=path, optimizer=toy.SGD, log_every=1
    )
    # A run that starts anew replaces the file; a foreign optimizer's rate is not known.
    assert [(r["step"], r["learning_rate"]) for r in records(path)] == [(1, None), (2, None)]


def test_resumed_file_drops_later_steps_and_a_cut_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "loss": 0.5}\n{"step": 20, "validation": 0.7}\n{"step": 30, "lo')
    file = MetricsFile(path, after=20)
    file.write({"step": 30, "loss": 0.25})
    # Line-buffered: there before the file is closed.
    assert [(r["step"], r.get("loss")) for r in records(path)] == [(10, 1.0), (20, 0.5), (20, None), (30, 0.25)]
    file.close()
    MetricsFile(path, after=10).close()
    assert [r["step"] for r in records(path)] == [10]
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


def test_file_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    for text in ("shopping\nlist\n", "[1]\n{}\n", '{"a": 1}\n{"step": 1}\n'):
        path.write_text(text)
        with pytest.raises(ValueError, match="line 1: not a JSON object with a 'step'"):
            MetricsFile(path, after=0)
        assert path.read_text() == text


def test_monitor_fetches_one_step_late(monkeypatch):
    fetched = []
    real = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(len(x)) or real(x))
    monitor = Monitor(100, 0, 4, None, False, {}, "run")
    for step in range(1, 10):
        monitor.push(step, metrics(step))
        assert sum(fetched) == (step - 1) // 4 * 4
    monitor.flush()
    assert sum(fetched) == 9
    # However rarely it logs, only so many batches are under way.
    monitor = Monitor(1000, 0, 1000, None, False, {}, "run")
    fetched.clear()
    for step in range(1, 200):
        monitor.push(step, metrics(step))
    assert fetched == [64, 64, 64]
    monitor.close()


def test_monitor_names_the_first_bad_step(tmp_path):
    log = MetricsFile(tmp_path / "log.jsonl", after=0)
    monitor = Monitor(10, 0, 1, log, False, {}, "run")
    for step in (1, 2):
        monitor.push(step, metrics(step))
    with pytest.raises(NonFiniteError, match=r"run: step 3 is not finite: loss 0\.3"):
        for step in (3, 4):
            monitor.push(step, metrics(step, finite=False))
    monitor.close()
    assert [r["step"] for r in records(tmp_path / "log.jsonl")] == [1, 2]


def test_bar_is_shown_on_a_terminal_only(capfd, monkeypatch):
    adapted, params = toy.make_model()
    settings = dict(steps=2, batch_size=8, devices=ONE)
    finetune(adapted, params, toy.make_task(), **settings)
    assert capfd.readouterr() == ("", "")
    finetune(adapted, params, toy.make_task(), progress=True, **settings)
    shown = capfd.readouterr().err
    assert "task 'toy'" in shown and "2/2" in shown and "loss=" in shown and "examples_per_second=" in shown
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    finetune(adapted, params, toy.make_task(), **settings)
    assert "2/2" in capfd.readouterr().err
    finetune(adapted, params, toy.make_task(), progress=False, **settings)
    assert capfd.readouterr() == ("", "")


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]
