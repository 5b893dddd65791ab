"""The fusion methods that the suites compare, each at unit scale; lengths are chosen on validation data, the same for all.

A method's result is a direction in weight space. Its length is chosen from ``scoring.LENGTHS`` times the mean length of the
task vectors, so that no method is favoured by the grid that its paper happened to use. ``fixed`` rows are taken as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import pefusion_jax as pf
from experiments.suites.kinds import Kind, Tuned
from pefusion_jax import evaluation, fusion


class Context(NamedTuple):
    """What a method may know besides the adapters.

    Attributes:
      adapted: the model that directions are scored with.
      params: its base parameters.
      tasks: the tasks.
      tuned: the single-task models.
      statistics: ``() -> `` task name -> statistics of its own tuned model on its own training inputs.
      outputs: ``() -> `` features on the validation split, where the model is linear in the network.
      grouped: ``() -> `` the same by layer.
      reference: task name -> validation score of its own model.
    """

    adapted: pf.Adapted
    params: Any
    tasks: list[Any]
    tuned: Tuned
    statistics: Callable[[], Mapping[str, Any]]
    outputs: Callable[[], evaluation.Cached]
    grouped: Callable[[], evaluation.Grouped]
    reference: Mapping[str, float]

    def objective(self, kind: str, examples: int) -> fusion.Objective:
        """Entropy or cross-entropy of a fused change on a few validation examples of every task."""
        return fusion.objective(self.adapted, self.params, self.tasks, kind, examples=examples, batch_size=16)  # type: ignore[arg-type]


Options = Callable[[Context], Mapping[str, fusion.Fusion | pf.Delta]]


class Method(NamedTuple):
    """One row of the tables.

    Attributes:
      data: what of the tasks it needs beyond the adapters: ``"none"``, ``"statistics"`` (moments stored with each adapter),
        ``"unlabelled"`` or ``"labelled"`` examples (of the validation split).
      options: context -> label of a setting -> fusion method, or what it gives; the setting is chosen on validation data with
        the length.
      fixed: the length is the method's own.
      tuned: a setting is chosen on labelled examples even so.
      only: the tunings that it is for: low-rank pairs (``"pairs"``), LoRA run as it is (``"lora"``), or a model that is
        linear in the network (``"network"``); ``""`` for all.
    """

    data: str
    options: Options
    fixed: bool = False
    tuned: bool = False
    only: Literal["", "pairs", "lora", "network"] = ""


def _one(make: Callable[[], fusion.Fusion]) -> Options:
    return lambda context: {"": make()}


def _matched(make: Callable[[], fusion.Fusion]) -> Options:
    return _one(lambda: fusion.match_norm(make()))


def _each(name: str, values: tuple[float, ...], make: Callable[[float], fusion.Fusion]) -> Options:
    return lambda context: {f"{name} {value:g}": make(value) for value in values}


def _fisher(context: Context) -> dict[str, fusion.Fusion]:
    return {"": fusion.fisher(context.statistics())}


def _regmean(context: Context) -> dict[str, fusion.Fusion]:
    return {"": fusion.regmean(context.statistics(), off_diagonal=0.9)}


def _gram(context: Context) -> dict[str, fusion.Fusion]:
    return {"": fusion.gram(context.statistics())}


def _factors(scales: tuple[float, ...]) -> Options:
    """LoRA's A and B added up apart, as the papers do: no fusion of weight changes, since the product is not linear in them."""

    def options(context: Context) -> dict[str, pf.Delta]:
        tuned = context.tuned
        fused = {
            scale: pf.fuse(fusion.task_arithmetic(scale), tuned.trees, space="adapter", init=tuned.start) for scale in scales
        }
        return {f"scale {scale:g}": tuned.adapted.deltas(context.params, tree) for scale, tree in fused.items()}

    return options


def _searched(loss: str, layerwise: bool) -> Options:
    return lambda context: {
        "": fusion.adamerging(context.objective(loss, 24), layerwise=layerwise, steps=30, learning_rate=2e-2)
    }


def _solved(loss: Any, layerwise: bool) -> Options:
    """Coefficients from cached features; the penalty is chosen by validation score, with labels also against a grid."""

    def options(context: Context) -> dict[str, fusion.Fusion]:
        cached = context.grouped() if layerwise else context.outputs()
        reference = [context.reference[task.name] for task in context.tasks]
        if loss == "cross_entropy":
            found = [evaluation.best_combination(cached, context.tasks, losses=(loss,), reference=reference)]
            labels = [found[0].source]
        else:
            penalties = (1e-3, 1e-2, 1e-1)
            found = [evaluation.solve_coefficients(cached, context.tasks, loss=loss, l2=l2) for l2 in penalties]
            labels = [f"l2 {l2:g}" for l2 in penalties]
        if layerwise:
            return {label: cached.fusion(one.coefficients) for label, one in zip(labels, found, strict=True)}
        return {label: fusion.task_arithmetic(one.by_name()) for label, one in zip(labels, found, strict=True)}

    return options


METHODS: dict[str, Method] = {
    "average": Method("none", _one(fusion.average), fixed=True),
    "task arithmetic": Method("none", _one(lambda: fusion.task_arithmetic(1.0))),
    "TIES": Method("none", _each("density", (0.2, 0.5), fusion.ties)),
    "DARE + TIES": Method("none", _each("density", (0.5,), lambda d: fusion.dare(d, then="ties"))),
    "DELLA": Method("none", _each("density", (0.5,), fusion.della)),
    "Breadcrumbs": Method("none", _each("density", (0.5,), lambda d: fusion.breadcrumbs(d, 0.01, 1.0))),
    "MagMax": Method("none", _one(lambda: fusion.magmax(1.0))),
    "Consensus TA": Method("none", _each("threshold", (0.2, 0.4), lambda t: fusion.consensus(t, 1.0))),
    "PCB": Method("none", _each("ratio", (0.1, 0.2), fusion.pcb)),
    "LiNeS + task arithmetic": Method("none", _each("beta", (0.5, 1.0), lambda b: fusion.lines(fusion.average(), beta=b))),
    "Model Stock": Method("none", _one(fusion.model_stock)),
    "TSV-M": Method("none", _each("directions", (2, 8), lambda k: fusion.tsv_m(directions=int(k)))),
    "Iso-C": Method("none", _one(fusion.iso_c)),
    "Iso-CTS": Method("none", _one(fusion.iso_cts)),
    "KnOTS-TIES": Method("none", _one(fusion.knots)),
    "Core Space, TIES": Method("none", _one(lambda: fusion.core_space(fusion.ties(0.5))), only="pairs"),
    "Core Space, isotropic": Method("none", _one(lambda: fusion.core_space(isotropize=True)), only="pairs"),
    "SVC + task arithmetic": Method("none", _one(lambda: fusion.svc(fusion.task_arithmetic(1.0)))),
    "WUDI": Method("none", _one(fusion.wudi)),
    # At the mean length of the task vectors: what each is worth where there is nothing to choose a length on.
    "task arithmetic, norm matched": Method("none", _matched(fusion.average), fixed=True),
    "TIES, norm matched": Method("none", _matched(fusion.ties), fixed=True),
    "TSV-M, norm matched": Method("none", _matched(fusion.tsv_m), fixed=True),
    "Iso-C, norm matched": Method("none", _matched(fusion.iso_c), fixed=True),
    "SVC, norm matched": Method("none", _matched(lambda: fusion.svc(fusion.task_arithmetic(1.0))), fixed=True),
    "WUDI, norm matched": Method("none", _matched(fusion.wudi), fixed=True),
    "Fisher": Method("statistics", _fisher),
    "RegMean": Method("statistics", _regmean),
    "Kronecker": Method("statistics", _gram),
    # At the length that the statistics give.
    "Fisher, scale 1": Method("statistics", _fisher, fixed=True),
    "RegMean, scale 1": Method("statistics", _regmean, fixed=True),
    "Kronecker, scale 1": Method("statistics", _gram, fixed=True),
    "task arithmetic in factor space": Method(
        "none", _factors((0.125, 0.2, 0.3, 0.45, 0.7, 1.0)), fixed=True, tuned=True, only="lora"
    ),
    "average in factor space": Method("none", _factors((1 / 8,)), fixed=True, only="lora"),
    "AdaMerging, task-wise": Method("unlabelled", _searched("entropy", False), fixed=True, only="lora"),
    "AdaMerging, layer-wise": Method("unlabelled", _searched("entropy", True), fixed=True, only="lora"),
    "LoraHub": Method(
        "labelled",
        lambda context: {"": fusion.lorahub(context.objective("cross_entropy", 16), budget=40)},
        fixed=True,
        only="lora",
    ),
    "aTLAS": Method(
        "labelled",
        lambda context: {"": fusion.atlas(context.objective("cross_entropy", 24), steps=30, learning_rate=0.1)},
        fixed=True,
        only="lora",
    ),
    "exact, task-wise, least squares": Method("unlabelled", _solved("least_squares", False), only="network"),
    "exact, layer-wise, least squares": Method("unlabelled", _solved("least_squares", True), only="network"),
    "exact, task-wise, entropy": Method("unlabelled", _solved("entropy", False), fixed=True, tuned=True, only="network"),
    "exact, task-wise, labels": Method("labelled", _solved("cross_entropy", False), fixed=True, only="network"),
    "exact, layer-wise, labels": Method("labelled", _solved("cross_entropy", True), fixed=True, only="network"),
}
# The kinds of tuning that are controls get these rows only.
CONTROLS = (
    "average",
    "task arithmetic",
    "task arithmetic, norm matched",
    "TIES",
    "TSV-M",
    "Iso-C",
    "RegMean",
    "RegMean, scale 1",
    "Kronecker",
    "Kronecker, scale 1",
)


def suits(name: str, kind: Kind) -> bool:
    """Whether a kind of tuning gets a method's row."""
    linear = kind.mode == "network"
    wanted = {"": True, "pairs": not kind.full, "lora": kind.mode is None and not kind.full, "network": linear}
    return wanted[METHODS[name].only] and (not kind.control or name in CONTROLS)
