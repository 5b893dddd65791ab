"""The fusion methods that the suites compare, each at unit scale; lengths are chosen on validation data, the same for all.

A method's result is a direction in weight space. Its length is chosen from ``LENGTHS`` times the mean length of the task
vectors, so that no method is favoured by the grid that its paper happened to use. ``fixed`` rows are taken as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pefusion_jax as pf
from pefusion_jax import fusion

LENGTHS = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)


class Context(NamedTuple):
    """What a method may know besides the adapters.

    Attributes:
      adapted: the model that directions are scored with.
      params: its base parameters.
      tasks: the tasks.
      statistics: ``() -> `` task name -> statistics of its own tuned model on its own training inputs.
    """

    adapted: pf.Adapted
    params: Any
    tasks: list[Any]
    statistics: Callable[[], Mapping[str, Any]]

    def objective(self, kind: str, examples: int) -> fusion.Objective:
        """Entropy or cross-entropy of a fused change on a few validation examples of every task."""
        return fusion.objective(self.adapted, self.params, self.tasks, kind, examples=examples, batch_size=16)  # type: ignore[arg-type]


Options = Callable[[Context], Mapping[str, fusion.Fusion]]


class Method(NamedTuple):
    """One row of the tables.

    Attributes:
      data: what of the tasks it needs beyond the adapters: ``"none"``, ``"statistics"`` (moments stored with each adapter),
        ``"unlabelled"`` or ``"labelled"`` examples (of the validation split).
      options: context -> label of a setting -> fusion method; the setting is chosen on validation data with the length.
      fixed: nothing is chosen on validation data: the first setting at scale 1.
      low_rank: for changes that are low-rank pairs only.
    """

    data: str
    options: Options
    fixed: bool = False
    low_rank: bool = False


def _one(make: Callable[[], fusion.Fusion]) -> Options:
    return lambda context: {"": make()}


def _each(name: str, values: tuple[float, ...], make: Callable[[float], fusion.Fusion]) -> Options:
    return lambda context: {f"{name} {value:g}": make(value) for value in values}


def _gram(**options: Any) -> Options:
    return lambda context: {"": fusion.gram(context.statistics(), **options)}


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
    "Core Space, TIES": Method("none", _one(lambda: fusion.core_space(fusion.ties(0.5))), low_rank=True),
    "Core Space, isotropic": Method("none", _one(lambda: fusion.core_space(isotropize=True)), low_rank=True),
    "SVC + task arithmetic": Method("none", _one(lambda: fusion.svc(fusion.task_arithmetic(1.0)))),
    "WUDI": Method("none", _one(fusion.wudi)),
    "Fisher": Method("statistics", lambda context: {"": fusion.fisher(context.statistics())}),
    "RegMean": Method("statistics", lambda context: {"": fusion.regmean(context.statistics(), off_diagonal=0.9)}),
    "Kronecker": Method("statistics", _gram()),
    "Kronecker, scale 1": Method("statistics", _gram(), fixed=True),
    "AdaMerging, task-wise": Method(
        "unlabelled",
        lambda context: {
            "": fusion.adamerging(context.objective("entropy", 48), layerwise=False, steps=60, learning_rate=1e-2)
        },
        fixed=True,
    ),
    "AdaMerging, layer-wise": Method(
        "unlabelled",
        lambda context: {"": fusion.adamerging(context.objective("entropy", 48), steps=60, learning_rate=1e-2)},
        fixed=True,
    ),
    "LoraHub": Method(
        "labelled", lambda context: {"": fusion.lorahub(context.objective("cross_entropy", 16), budget=40)}, fixed=True
    ),
    "aTLAS": Method(
        "labelled", lambda context: {"": fusion.atlas(context.objective("cross_entropy", 48), steps=60)}, fixed=True
    ),
}
