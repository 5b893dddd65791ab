"""The main job from end to end: several tasks, one adapter each, one fused adapter for all, and an honest table.

Every choice (coefficients, densities, which fused adapter is kept) is made on validation examples; test examples are scored
once, at the end.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from pefusion_jax import evaluation, files, fusion, runs, tasks, trees
from pefusion_jax.adapt import Adapted, adapt
from pefusion_jax.deltas import Delta
from pefusion_jax.fusion import fuse
from pefusion_jax.interop import load_pretrained, load_tokenizer
from pefusion_jax.linearize import linearize
from pefusion_jax.methods import LoRA
from pefusion_jax.training import finetune

# Every point costs a non-linear model one pass over the validation examples of all tasks, so the grids are coarse.
SCALES = (0.2, 0.4, 0.6, 0.8, 1.0)
TIES_SCALES = (0.5, 1.0)
TIES_DENSITIES = (0.2, 0.5)
BATCH = 24  # divides the default numbers of examples: no row is computed to fill up a batch


_say = functools.partial(print, flush=True)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the quickstart, all recorded in ``config.json``."""

    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Hub id or folder of a BERT encoder."""
    tasks: tuple[str, ...] = ()
    """Embedded tasks; all six if none is named."""
    steps: int = 30
    """Training steps of each adapter."""
    batch_size: int = 16
    """Examples of a step."""
    rank: int = 16
    """Rank of the adapters."""
    alpha: float = 32.0
    """Scale numerator of the adapters."""
    targets: str = r".*/(query|value)"
    """Regular expression that must match the whole path of an adapted layer."""
    learning_rate: float = 3e-3
    """Peak learning rate of LoRA and of layer-wise linearized LoRA."""
    network_learning_rate: float = 3e-3
    """Peak learning rate of network-linearized LoRA."""
    max_length: int = 32
    """Longest text, in tokens."""
    validation_examples: int = 48
    """Validation examples of each task that choices are made on."""
    test_examples: int = 96
    """Test examples of each task."""
    seed: int = 0
    """Seed of adapters, data order and everything else random."""


class _Kind(NamedTuple):
    """One way of tuning, trained on every task."""

    key: str
    title: str
    adapted: Adapted
    trees: dict[str, Any]
    changes: dict[str, Delta]


class _Choice(NamedTuple):
    """A direction in weight space and how far to go along it, as chosen on validation examples."""

    name: str
    detail: str
    change: Delta
    validation: float
    scores: evaluation.Scores


def quickstart(
    out: str | os.PathLike[str], settings: Settings, *, overwrite: bool = False, say: Callable[[str], None] = _say
) -> evaluation.Comparison:
    """Runs the main job and writes its folder.

    Args:
      out: an empty folder, in which appear ``results.{txt,md,csv,json}``, ``config.json``, the plots (``scores.png``,
        ``sweep.png``, ``cosine_KIND.png``, each with its CSV), and runs for ``load_run``: ``KIND/TASK`` and ``KIND/fused``.
      settings: see :class:`Settings`.
      overwrite: replace a folder that is not empty.
      say: gets a line at each stage.

    Returns:
      The table that was written.

    Raises:
      FileExistsError: if ``out`` holds something already.
      ValueError: if the model's folder lies in ``out``.
    """
    began = time.monotonic()

    def stage(text: str) -> None:
        say(f"[{time.monotonic() - began:4.0f} s] {text}")

    files.require_apart(out, settings.model)
    with files.new_folder(out, overwrite) as folder:
        model, params = load_pretrained(settings.model)
        suite = _suite(settings, model, params)
        stage(f"{settings.model}: {trees.size(params):,} parameters; tasks: {', '.join(task.name for task in suite)}")

        method = LoRA(rank=settings.rank, alpha=settings.alpha, targets=settings.targets)
        lora = adapt(model, method)
        inputs = tasks.train_batch(suite[0], 0, settings.batch_size, settings.seed)["inputs"]
        phi0 = lora.init(jax.random.key(settings.seed), params, **inputs)
        network, layer = linearize(lora, phi0, "network"), linearize(lora, phi0, "layer")
        zero_shot = evaluation.evaluate_base(lora, params, suite, batch_size=BATCH)
        rows = [evaluation.Row("zero-shot", "base model", zero_shot)]
        stage(f"zero-shot: mean test accuracy {zero_shot.mean:.3f}")

        curves: dict[str, dict[str, np.ndarray]] = {}
        details: dict[str, Any] = {}
        for key, title, adapted, rate in (
            ("lora", "LoRA", lora, settings.learning_rate),
            ("network", "L-LoRA network", network, settings.network_learning_rate),
            ("layer", "L-LoRA layer", layer, settings.learning_rate),
        ):
            kind = _train(key, title, adapted, params, suite, settings, rate, phi0)
            trained = trees.size(adapted.trainable(kind.trees[suite[0].name]))
            stage(f"{title}: trained {len(suite)} adapters of {trained:,} parameters")
            # An adapter in its layers and the same change folded into the weights are the same function, so that one
            # compiled forward pass serves every plain model here. A network-linear model has its own.
            score = _network_scorer(kind, params, suite) if key == "network" else _plain_scorer(lora, params, suite)
            units = _units(kind)
            single = {name: score(unit, (1.0,), "test", None)[0] for name, unit in units.items()}
            own = _own(single)
            reference = _own({name: score(unit, (1.0,), "validation", name)[0] for name, unit in units.items()})
            shared = own if _usable(own) else None
            rows += [evaluation.Row(f"trained on {name}", title, scores, shared) for name, scores in single.items()]
            rows.append(evaluation.Row("single-task models", title, own))
            spaces = {f"{title}, weight space": _weight_space(kind)}
            if key == "lora":
                spaces["LoRA, adapter space"] = _adapter_space(kind, lora, params, phi0)
            chosen: list[_Choice] = []
            for space, directions in spaces.items():
                choices, curves[space] = _fusions(directions, score, reference)
                chosen = chosen or choices
                rows += [evaluation.Row(choice.name, space, choice.scores, shared) for choice in choices]
                details[space] = {c.name: {"chosen": c.detail, "validation": c.validation} for c in choices}
            best = max(chosen, key=lambda choice: choice.validation)
            kept = _mean(best.scores, own)
            what = "normalized mean" if shared else "mean"
            stage(f"{title}: single-task mean {own.mean:.3f}; {best.name} ({best.detail}) has a {what} of {kept:.3f}")
            _save(folder / key, settings, kind, best, params, method, phi0)
            evaluation.plot_matrix(
                trees.cosine({name: kind.changes[name].leaves for name in kind.changes}),
                list(kind.changes),
                folder / f"cosine_{key}.png",
                title=f"{title}: task vectors in weight space",
                label="cosine similarity",
            )

        comparison = evaluation.Comparison(tuple(rows), title="Test accuracy in percent")
        comparison.write(folder)
        shown = tuple(row for row in rows if not row.name.startswith("trained on "))
        evaluation.plot_scores(evaluation.Comparison(shown, title=comparison.title), folder / "scores.png")
        evaluation.plot_sweep(SCALES, curves, folder / "sweep.png", score_label="validation accuracy")
        files.write_json(
            folder / "config.json",
            {
                **dataclasses.asdict(settings),
                "choices": details,
                "seconds": round(time.monotonic() - began),
                "jax": jax.__version__,
            },
        )
    return comparison


def _suite(settings: Settings, model: Any, params: Any) -> list[tasks.Task]:
    suite = tasks.embedded_tasks(
        model,
        params,
        load_tokenizer(settings.model),
        settings.tasks or None,
        max_length=settings.max_length,
        buckets=sorted({16, 24, settings.max_length}),
    )
    return [
        dataclasses.replace(
            task, validation=task.validation[: settings.validation_examples], test=task.test[: settings.test_examples]
        )
        for task in suite
    ]


def _train(
    key: str, title: str, adapted: Adapted, params: Any, suite: Sequence[Any], settings: Settings, rate: float, phi0: Any
) -> _Kind:
    found = {
        task.name: finetune(
            adapted,
            params,
            task,
            adapters=phi0 if key == "lora" else adapted.init(None, params),
            steps=settings.steps,
            batch_size=settings.batch_size,
            learning_rate=rate,
            seed=settings.seed,
            devices=jax.devices()[:1],
        )
        for task in suite
    }
    return _Kind(key, title, adapted, found, {name: adapted.deltas(params, tree).dense() for name, tree in found.items()})


class _Direction(NamedTuple):
    """The weight-space change at each scale, and its coefficients in the task vectors where it is a combination of them."""

    at: Callable[[float], Delta]
    coefficients: np.ndarray | None


# (direction, scales, split, name of the only task to score or None for all) -> one Scores for each scale.
_Scorer = Callable[[_Direction, Sequence[float], str, str | None], list[evaluation.Scores]]


def _plain_scorer(lora: Adapted, params: Any, suite: Sequence[Any]) -> _Scorer:
    def score(direction: _Direction, scales: Sequence[float], split: str, only: str | None) -> list[evaluation.Scores]:
        here = [task for task in suite if only in (None, task.name)]
        return [evaluation.evaluate(lora, params, direction.at(s), here, split=split, batch_size=BATCH) for s in scales]

    return score


def _network_scorer(kind: _Kind, params: Any, suite: Sequence[Any]) -> _Scorer:
    """Exact and nearly free: T + 1 forward passes of a split give every combination of the task vectors at every scale."""
    cached = {
        split: evaluation.cache_outputs(kind.adapted, params, kind.trees, suite, split=split, batch_size=BATCH)
        for split in ("validation", "test")
    }

    def score(direction: _Direction, scales: Sequence[float], split: str, only: str | None) -> list[evaluation.Scores]:
        known, here = cached[split], [task for task in suite if only in (None, task.name)]
        if direction.coefficients is not None:
            table = evaluation.sweep(known, here, np.outer(scales, direction.coefficients))
        else:  # not a combination of the task vectors: one more pass, exact in the scale all the same
            change, moved = direction.at(1.0), {}
            for task in here:
                features, _ = evaluation.predict(kind.adapted, params, change, task, split=split, batch_size=BATCH)
                moved[task.name] = features - known.base[task.name]
            along = known._replace(names=("direction",), moved={name: value[None] for name, value in moved.items()})
            table = evaluation.sweep(along, here, np.asarray(scales)[:, None])
        return [evaluation.accuracy_scores(here, row, known.labels) for row in table]

    return score


def _units(kind: _Kind) -> dict[str, _Direction]:
    """The single-task models, as directions."""
    names = sorted(kind.changes)  # the order of coefficients in cached outputs
    return {name: _Direction(_straight(kind.changes[name]), np.eye(len(names))[names.index(name)]) for name in kind.changes}


def _usable(reference: Mapping[str, float]) -> bool:
    """Whether scores can be divided by these: a model that gets nothing right is no reference."""
    return min(reference.values()) > 0


def _mean(scores: evaluation.Scores, reference: Mapping[str, float]) -> float:
    """Mean normalized score, or the plain mean where a reference score is 0."""
    return scores.normalized(reference).mean if _usable(reference) else scores.mean


def _own(scores: Mapping[str, evaluation.Scores]) -> evaluation.Scores:
    """Each single-task model on its own task."""
    return evaluation.Scores(
        {name: of[name] for name, of in scores.items()},
        {name: of.stderr[name] for name, of in scores.items()},
        {name: of.counts[name] for name, of in scores.items()},
    )


def _fusions(directions: Mapping[str, _Direction], score: _Scorer, reference: evaluation.Scores) -> tuple[list[_Choice], Any]:
    """Chooses each method's coefficients by :func:`_mean` on validation, then scores it on test, once."""
    tasks_count = len(reference)

    def choose(
        name: str, options: Sequence[tuple[str, _Direction, Sequence[float]]]
    ) -> tuple[_Choice, list[evaluation.Scores]]:
        tried = [
            (_mean(scores, reference), label, direction, scale, scores)
            for label, direction, scales in options
            for scale, scores in zip(scales, score(direction, scales, "validation", None), strict=True)
        ]
        best = max(tried, key=lambda entry: entry[0])  # the first of equals: the smallest scale
        _, label, direction, scale, _ = best
        detail = f"{label}scale {scale:g}"
        test = score(direction, (scale,), "test", None)[0]
        return _Choice(name, detail, direction.at(scale), best[0], test), [entry[4] for entry in tried]

    average, _ = choose("average", [("", directions["sum"], (1.0 / tasks_count,))])
    arithmetic, curve = choose("task arithmetic", [("", directions["sum"], SCALES)])
    densities = [(f"density {d:g}, ", directions[f"ties {d:g}"], TIES_SCALES) for d in TIES_DENSITIES]
    elected, _ = choose("TIES", densities)
    shown = {name: np.asarray([scores[name] for scores in curve]) for name in reference}
    return [average, arithmetic, elected], shown


def _straight(change: Delta) -> Callable[[float], Delta]:
    return lambda scale: change * np.float32(scale)


def _directions(merge: Callable[[Any], Callable[[float], Delta]], count: int) -> dict[str, _Direction]:
    """Fused directions; ``merge`` applies a fusion method in one space and gives the weight-space change at each scale."""
    found = {"sum": _Direction(merge(fusion.task_arithmetic(scale=1.0)), np.ones(count))}
    for density in TIES_DENSITIES:
        found[f"ties {density:g}"] = _Direction(merge(fusion.ties(density=density, scale=1.0)), None)
    return found


def _weight_space(kind: _Kind) -> dict[str, _Direction]:
    return _directions(lambda method: _straight(fuse(method, kind.changes)), len(kind.changes))


def _adapter_space(kind: _Kind, lora: Adapted, params: Any, phi0: Any) -> dict[str, _Direction]:
    """A and B fused apart, as the papers did with plain LoRA; the change is then not linear in the scale."""
    moved = {name: jax.tree.map(np.subtract, tree, phi0) for name, tree in kind.trees.items()}

    def merge(method: Any) -> Callable[[float], Delta]:
        step = fuse(method, moved)
        return lambda scale: lora.deltas(params, jax.tree.map(lambda a, b: a + np.float32(scale) * b, phi0, step)).dense()

    return _directions(merge, len(moved))


def _save(folder: Path, settings: Settings, kind: _Kind, best: _Choice, params: Any, method: LoRA, phi0: Any) -> None:
    mode = None if kind.key == "lora" else kind.key
    common: dict[str, Any] = {"model": settings.model, "params": params, "methods": method, "mode": mode, "adapters0": phi0}
    common |= {"head": "zero_shot", "max_length": settings.max_length}  # as _suite has them
    for name, tree in kind.trees.items():
        runs.save_run(folder / name, tree, tasks=[name], **common)
    runs.save_run(folder / "fused", best.change, tasks=list(kind.trees), fusion=f"{best.name}, {best.detail}", **common)
