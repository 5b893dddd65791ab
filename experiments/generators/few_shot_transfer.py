"""New tasks from a few examples of each class: what a model that was trained on other tasks is worth to them.

    python experiments/suites/fetch.py --kind text
    python experiments/generators/few_shot_transfer.py --out experiments/few_shot_transfer

Trained on the six tasks of the repository; the new ones are of other packages. Ways: from nothing, from the shared adapter,
from HyperFormer++ with the mean task embedding, and from PHA by retrieval (the nearest prototype, or their mixture), without
tuning and with the new prototype alone or with it and the hyper-network tuned. (On an encoder PHA has no other parameters, so
this is everything.) Each way's rate is chosen on the validation split of the first new task at the middle number of shots,
and then fixed. Resumable.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a run as a script

import pefusion_jax as pf
from experiments.generators.approaches import APPROACHES, tune
from experiments.rates import best_rate
from experiments.rows import Rows, clock, markdown, write_tables
from experiments.suites import data
from experiments.suites.fetch import default_root
from pefusion_jax import generators
from pefusion_jax.evaluation import plot_curves
from pefusion_jax.runs import FILE, load_run, save_run
from pefusion_jax.tasks.task import stream

SOURCES = ("shared adapter", "HyperFormer++", "PHA")
NEW = "new"
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
PROTOTYPE_RATES = (1e-2, 3e-2, 1e-1)  # entries of a prototype are of size 1, and Adam moves one by about the rate a step


@dataclasses.dataclass(frozen=True)
class Settings:
    """Compares starts for new tasks with few examples.

    Example:  python experiments/generators/few_shot_transfer.py --out experiments/few_shot_transfer --shots 4 16
    """

    out: Path
    """Folder of scores, table and plot."""
    work: Path | None = None
    """Folder of the models trained on the known tasks; by default in the cache."""
    data: Path | None = None
    """Folder that experiments/suites/fetch.py filled; by default in the cache."""
    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """The encoder."""
    targets: tuple[str, ...] = ("bbc", "tweets", "reuters")
    """New tasks, of the text suite."""
    shots: tuple[int, ...] = (4, 16, 32)
    """Training examples of each class."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the examples and their order."""
    source_steps: int = 150
    """Updates of each known task."""
    source_rates: tuple[float, float, float] = (3e-3, 1e-3, 1e-3)
    """Peak rates on the known tasks: shared adapter, HyperFormer++, PHA; from low_data's table."""
    steps: int = 40
    """Updates on the new task."""
    batch_size: int = 16
    """Examples of an update."""
    validation_examples: int = 150
    """Validation examples of the first new task, for the rates."""
    test_examples: int = 300
    """Test examples of each new task."""


def main(settings: Settings) -> None:
    say = clock()
    settings.out.mkdir(parents=True, exist_ok=True)
    names = ("model", "source_steps", "source_rates", "steps", "batch_size", "validation_examples", "test_examples")
    rows = Rows(settings.out / "rows.json", {name: getattr(settings, name) for name in names})
    model, params = pf.load_pretrained(settings.model)
    tokenizer = pf.load_tokenizer(settings.model)
    known = pf.tasks.embedded_tasks(model, params, tokenizer, buckets=(16, 32))
    new = data.text_tasks(model, params, tokenizer, settings.data, names=settings.targets, buckets=(16, 32))
    labelled = {task.name: dataclasses.replace(task, name=NEW, test=task.test[: settings.test_examples]) for task in new}
    data.require_same(rows, [*known, *new])
    work = settings.work or default_root() / "adapters" / "few_shot"
    sources = trained(settings, model, params, known, work, say)
    ways = _ways(sources, params)

    def score(way: str, task: Any, few: Any, rate: float, seed: int, split: str) -> pf.evaluation.Scores:
        adapted, start = ways[way](few)
        if rate:
            how: dict[str, Any] = {"steps": settings.steps, "batch_size": settings.batch_size, "progress": False}
            tree = pf.finetune(
                adapted, params, few, adapters=start, learning_rate=rate, seed=seed, devices=jax.devices()[:1], **how
            )
        else:
            tree = start
        return pf.evaluate(adapted, params, tree, [task], split=split)

    middle = settings.shots[len(settings.shots) // 2]
    for way in ways:
        untuned = way.endswith("as it is")
        rate_key = f"rate/{way}/{settings.targets[0]}/{middle}/{settings.seeds[0]}"
        if rate_key not in rows:
            task = next(iter(labelled.values()))
            trial = dataclasses.replace(task, validation=task.validation[: settings.validation_examples])
            few = few_of(trial, middle, settings.seeds[0])

            def validated(rate: float, way: str = way, trial: Any = trial, few: Any = few) -> float:
                return score(way, trial, few, rate, settings.seeds[0], "validation").mean

            rates = (0.0,) if untuned else PROTOTYPE_RATES if way.endswith("prototype") else RATES
            chosen = best_rate(validated, rates, lambda text, way=way: say(f"{way}, {text}"))  # type: ignore[misc]
            rows.put(rate_key, **chosen)
        for name, task in labelled.items():
            for shots in settings.shots:
                for seed in settings.seeds:
                    key = f"{way}/{name}/{shots}/{seed}"
                    if key not in rows:
                        rate = rows[rate_key]["rate"]
                        found = score(way, task, few_of(task, shots, seed), rate, seed, "test")
                        rows.put(key, way=way, task=name, shots=shots, seed=seed, rate=rate, score=found.mean)
                        say(f"{way}, {name}, {shots} shots, seed {seed}: {found.mean:.3f}")
    write(rows.found, settings.out)


def few_of(task: Any, shots: int, seed: int) -> Any:
    """The task with so many training examples of each class, or as many as there are."""
    _, labels = task.arrays("train")
    order = stream(len(labels), 0, len(labels), seed)
    chosen = [int(i) for label in range(len(task.classes)) for i in order[labels[order] == label][:shots]]
    return dataclasses.replace(task, train=[task.train[i] for i in sorted(chosen)])


def trained(settings: Settings, model: Any, params: Any, known: Any, work: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The models of the known tasks: name -> (tunable model, tree); trained, or read if they are there."""
    out = {}
    names = tuple(task.name for task in known)
    for name, rate in zip(SOURCES, settings.source_rates, strict=True):
        folder = work / name.replace(" ", "_").replace("+", "p")
        approach = APPROACHES[name]
        if not (folder / FILE).is_file():
            adapted = approach.build(model, names)
            how = {"steps": settings.source_steps, "batch_size": settings.batch_size, "rate": rate, "seed": 0}
            tree = tune(approach, adapted, params, known, **how).trees[""]  # type: ignore[arg-type]
            made = {"methods": adapted.origin.methods, "generator": adapted.origin.generator}  # type: ignore[union-attr]
            save_run(folder, tree, model=settings.model, params=params, **made, **how)  # type: ignore[arg-type]
            say(f"trained {name} on {', '.join(names)}")
        run = load_run(folder, (model, params))
        asked = {"steps": settings.source_steps, "batch_size": settings.batch_size, "rate": rate}
        if {key: run.spec.get(key) for key in asked} != asked:
            raise ValueError(f"{folder} was trained with other settings than {asked}; name another --work folder")
        out[name] = (run.adapted, run.tree)
    return out


def _ways(sources: dict[str, Any], params: Any) -> dict[str, Callable[[Any], tuple[pf.Adapted, Any]]]:
    """Name -> ``few-shot task -> (tunable model, start)``."""
    shared, of_all = sources["shared adapter"]
    former, former_tree = sources["HyperFormer++"]
    pha, pha_tree = sources["PHA"]

    @functools.cache
    def grown(tuned: str) -> pf.Adapted:
        """One model for all new tasks, which go by one name: what is compiled for one serves them all."""
        larger = generators.add_task(pha, pha_tree, NEW, pha.tasks[0])[0].origin
        generator = dataclasses.replace(larger.generator, tune=tuned)  # type: ignore[union-attr]
        return pf.generate(larger.inner, generator)  # type: ignore[union-attr,arg-type]

    def retrieved(few: Any, soft: bool, tuned: str) -> tuple[pf.Adapted, Any]:
        found = generators.retrieve(pha, params, pha_tree, few)
        return grown(tuned), generators.add_task(pha, pha_tree, NEW, found.shares() if soft else found)[1]

    mean = np.full(len(former.tasks), 1 / len(former.tasks), np.float32)
    middle = generators.add_task(former, former_tree, NEW, mean)

    ways: dict[str, Callable[[Any], tuple[pf.Adapted, Any]]] = {
        "from nothing": lambda few: (shared, None),
        "shared adapter, as it is": lambda few: (shared, of_all),
        "shared adapter": lambda few: (shared, of_all),
        "HyperFormer++, mean embedding": lambda few: middle,
    }
    for soft, kind in ((False, "nearest"), (True, "mixture")):
        ways[f"PHA, {kind}, as it is"] = lambda few, soft=soft: retrieved(few, soft, "hypernetwork")  # type: ignore[misc]
        for tuned, what in (("prototypes", "prototype"), ("hypernetwork", "prototype and network")):
            ways[f"PHA, {kind}, {what}"] = lambda few, soft=soft, tuned=tuned: retrieved(few, soft, tuned)  # type: ignore[misc]
    return ways


def write(found: dict[str, Any], out: Path) -> None:
    """``results.md``, ``results.csv`` and a plot of the mean over tasks against shots."""
    runs = [row for row in found.values() if "way" in row]
    shots = sorted({row["shots"] for row in runs})
    curves: dict[str, dict[float, tuple[float, float]]] = {}
    for row in runs:
        way, count = row["way"], row["shots"]
        if count in curves.get(way, {}):
            continue
        by_seed: dict[int, list[float]] = {}
        for other in runs:
            if other["way"] == way and other["shots"] == count:
                by_seed.setdefault(other["seed"], []).append(other["score"])
        means = [float(np.mean(scores)) for scores in by_seed.values()]
        curves.setdefault(way, {})[count] = (float(np.mean(means)), float(np.std(means, ddof=1)) if len(means) > 1 else 0.0)
    cells = [[way, *(f"{p[s][0]:.3f} ± {p[s][1]:.3f}" if s in p else "" for s in shots)] for way, p in curves.items()]
    header = ["way", *(f"{count} shots" for count in shots)]
    write_tables(out, markdown(header, cells), columns=header, lines=cells)
    plot_curves(curves, out / "few_shot.png", x="examples of each class", y="mean score of new tasks", log_x=True)


if __name__ == "__main__":
    main(tyro.cli(Settings))
