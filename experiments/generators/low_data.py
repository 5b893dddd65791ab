"""Few examples a task: prototype-based hyper-adapters beside the ways of tuning that their paper compares them with.

    python experiments/generators/low_data.py --out experiments/low_data --examples 100 500 --seeds 0 1 2
    python experiments/generators/low_data.py --suite glue --data /folder/with/glue --out experiments/low_data_glue

Each seed draws other examples. Rates are chosen on the validation split with the smallest number of examples and the first
seed, and then fixed; the test split is scored once a row. All numbers of examples get the same number of updates, and so do all
approaches: those that start from prompts of single tasks spend half of theirs on these. Resumable: rows that are in
``OUT/rows.json`` are not made again.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a run as a script

import pefusion_jax as pf
from experiments.generators.approaches import APPROACHES, PROMPTS, Approach, Tuned, tune
from experiments.rates import best_rate
from experiments.rows import Rows, clock, markdown, write_tables
from experiments.suites import data
from pefusion_jax import generators
from pefusion_jax.evaluation import plot_curves, plot_matrix, plot_ranking
from pefusion_jax.tasks.task import stream


@dataclasses.dataclass(frozen=True)
class Settings:
    """Compares ways of tuning on few examples a task.

    Example:  python experiments/generators/low_data.py --out experiments/low_data --examples 100 --seeds 0 1 2
    """

    out: Path
    """Folder of scores, tables and plots."""
    suite: Literal["embedded", "glue"] = "embedded"
    """The six tasks of the repository, or GLUE from --data."""
    data: Path | None = None
    """Folder that holds glue/."""
    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """The encoder."""
    examples: tuple[int, ...] = (100,)
    """Training examples of each task."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the examples, the start and the order."""
    approaches: tuple[str, ...] = tuple(APPROACHES)
    """Which ways of tuning."""
    steps: int = 100
    """Updates of each task, whatever its number of examples; all tasks together get as many as all tasks apart."""
    rate: float | None = None
    """Peak learning rate of all approaches; by default it is chosen for each."""
    batch_size: int = 16
    """Examples of an update."""
    validation_examples: int = 100
    """Validation examples of each task that rates are chosen on."""
    test_examples: int = 300
    """Test examples of each task."""


def main(settings: Settings) -> None:
    say = clock()
    unknown = sorted(set(settings.approaches) - set(APPROACHES))
    if unknown:
        raise ValueError(f"--approaches {' '.join(unknown)}: none of {', '.join(APPROACHES)}")
    names = ("suite", "model", "steps", "rate", "batch_size", "validation_examples", "test_examples")
    rows = Rows(settings.out / "rows.json", {name: getattr(settings, name) for name in names})
    settings.out.mkdir(parents=True, exist_ok=True)
    model, params = pf.load_pretrained(settings.model)
    draw = tasks_of(settings, model, params)
    first = draw(min(settings.examples), settings.seeds[0])
    data.require_same(rows, first, f"tasks/{min(settings.examples)}/{settings.seeds[0]}")
    task_names = tuple(task.name for task in first)
    say(f"{settings.model}; tasks: {', '.join(task_names)}")

    def rate_of(name: str) -> str:
        return f"rate/{name}/{min(settings.examples)}/{settings.seeds[0]}"

    def how(approach: Approach) -> dict[str, Any]:
        return {"steps": settings.steps // (1 if approach.start is None else 2), "batch_size": settings.batch_size}

    @functools.cache
    def built(name: str) -> Any:
        return APPROACHES[name].build(model, task_names)

    def started(approach: Approach, adapted: Any, tasks: Any, seed: int) -> tuple[Any, int]:
        """Where training starts, if not at the model's own start: with prompts that each task trained alone; their size."""
        if approach.start is None:
            return None, 0
        if rate_of(PROMPTS) not in rows:
            raise ValueError(f"the rate of {PROMPTS!r} is not known yet; put it before the others in --approaches")
        rate = rows[rate_of(PROMPTS)]["rate"]
        made = tune(APPROACHES[PROMPTS], built(PROMPTS), params, tasks, rate=rate, seed=seed, **how(approach))
        return approach.start(adapted, params, tasks, made.trees, seed), made.trained

    for name in settings.approaches:
        approach, adapted = APPROACHES[name], built(name)
        if rate_of(name) not in rows and settings.rate is not None:
            rows.put(rate_of(name), rate=settings.rate)
        if rate_of(name) not in rows:
            seed = settings.seeds[0]
            start, _ = started(approach, adapted, first, seed)

            def validated(rate: float, approach: Any = approach, adapted: Any = adapted, start: Any = start) -> float:
                tuned = tune(approach, adapted, params, first, rate=rate, seed=settings.seeds[0], start=start, **how(approach))
                return tuned.scores(params, first, "validation").mean

            chosen = best_rate(validated, approach.rates, lambda text, name=name: say(f"{name}, {text}"))  # type: ignore[misc]
            rows.put(rate_of(name), **chosen)
        for count in settings.examples:
            for seed in settings.seeds:
                key = f"{name}/{count}/{seed}"
                if key in rows:
                    continue
                tasks = draw(count, seed)
                data.require_same(rows, tasks, f"tasks/{count}/{seed}")
                start, before = started(approach, adapted, tasks, seed)
                rate = rows[rate_of(name)]["rate"]
                tuned = tune(approach, adapted, params, tasks, rate=rate, seed=seed, start=start, **how(approach))
                scores = tuned.scores(params, tasks, "test")
                more = retrieval(tuned, params, tasks, f"{_slug(name)}_{count}_{seed}", settings.out)
                trained = tuned.trained + before
                rows.put(key, approach=name, examples=count, seed=seed, trained=trained, **more, **scores.to_dict())
                say(f"{name}, {count} examples, seed {seed}: {scores.mean:.3f}")
        write(rows.found, settings.out)
        jax.clear_caches()  # hardly anything is shared between approaches


def tasks_of(settings: Settings, model: Any, params: Any) -> Callable[[int, int], list[Any]]:
    """``(examples, seed) -> tasks``: heads see no more examples than the training does."""
    tokenizer = pf.load_tokenizer(settings.model)

    def draw(count: int, seed: int) -> list[Any]:
        if settings.suite == "embedded":
            made = []
            for rows in pf.tasks.embedded("all").values():
                if count > len(rows.train):
                    raise ValueError(f"--examples {count}: {rows.name} has {len(rows.train)} training examples; ask for fewer")
                train = rows.train.picked(stream(len(rows.train), 0, count, seed))
                few = rows._replace(train=train)
                made.append(pf.tasks.text_task(few, model, params, tokenizer, buckets=(16, 32)))
        elif settings.data is None:
            raise ValueError("the suite glue reads a local extract: name the folder that holds glue/ with --data")
        else:
            made = data.glue_tasks(model, params, tokenizer, settings.data, train_size=count, train_seed=seed)
        return [
            dataclasses.replace(
                task,
                validation=task.validation[: settings.validation_examples],
                test=task.test[: settings.test_examples],
            )
            for task in made
        ]

    return draw


def _slug(name: str) -> str:
    return re.sub(r"\W+", "_", name.lower())


def retrieval(tuned: Tuned, params: Any, tasks: Any, name: str, out: Path) -> dict[str, Any]:
    """Share of each task's validation examples that are nearest to its own prototype, and plots; nothing for models without."""
    generator = tuned.adapted.origin.generator if tuned.adapted.origin else None
    if not getattr(generator, "contrasts", False):
        return {}
    tree, names = tuned.trees[""], tuned.adapted.tasks
    table = generators.retrieval_table(tuned.adapted, params, tree, tasks, split="validation")
    votes = [[table[task][other] for other in names] for task in names]
    shown = {"rows": "task of the examples", "columns": "nearest prototype", "centre": None, "percent": True}
    plot_matrix(votes, names, out / f"retrieval_{name}.png", label="% of the validation examples", **shown)  # type: ignore[arg-type]
    unit = tree["tasks"] / np.linalg.norm(tree["tasks"], axis=1, keepdims=True)
    plot_matrix(unit @ unit.T, names, out / f"prototypes_{name}.png", label="cosine of prototypes")
    return {"retrieval": {task: table[task][task] for task in names}}


COLUMNS = ("approach", "examples", "seeds", "trained parameters", "mean", "mean sd", "worst task", "retrieval")


def write(found: Mapping[str, Any], out: Path) -> None:
    """``results.md``, ``results.csv`` and the plot of accuracy against examples."""
    groups: dict[tuple[str, int], list[Any]] = {}
    for row in found.values():
        if "approach" in row:
            groups.setdefault((row["approach"], row["examples"]), []).append(row)
    lines = []
    for (name, count), rows in groups.items():
        means = [row["mean"] for row in rows]
        spread = float(np.std(means, ddof=1)) if len(means) > 1 else None
        worst = float(np.mean([min(row["scores"].values()) for row in rows]))
        hits = [np.mean(list(row["retrieval"].values())) for row in rows if "retrieval" in row]
        found_of = float(np.mean(hits)) if hits else None
        lines.append((name, count, len(rows), rows[0]["trained"], float(np.mean(means)), spread, worst, found_of))
    lines.sort(key=lambda line: (line[1], -line[4]))
    write_tables(out, markdown(COLUMNS, lines), columns=COLUMNS, lines=lines)
    curves: dict[str, dict[float, tuple[float, float]]] = {}
    for name, count, *_, mean, spread, _, _ in lines:
        curves.setdefault(name, {})[count] = (float(mean), float(spread or 0))
    counts = sorted({line[1] for line in lines})
    if len(counts) > 1:
        plot_curves(curves, out / "low_data.png", x="training examples of each task", y="mean score", log_x=True)
    elif counts:
        only = {name: curve[counts[0]] for name, curve in curves.items()}
        plot_ranking({f"{counts[0]} training examples of each task": only}, out / "low_data.png", x="mean score", lines={})


if __name__ == "__main__":
    main(tyro.cli(Settings))
