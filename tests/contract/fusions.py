"""The table of fusion methods that every guarantee of fusion is checked for, and the task trees they are checked on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pefusion_jax as pf
from pefusion_jax import fusion
from pefusion_jax.moments import Moments, Statistics


class Row(NamedTuple):
    """One method and where it departs from the contract, each departure with its reason.

    Attributes:
      name: of the function in ``pefusion_jax.fusion``, and what follows a dash.
      make: scale -> method.
      neutral: the method at the setting that gives one tree back as it is; by default ``make(1.0)``.
      alters: why one tree does not come back as it is at any setting; empty where it does.
      scaled: whether the scale multiplies the result, so that zero gives the base model.
      ordered: whether a task's name has a say: by the coefficient or the random draw that belongs to its place. All others
        are symmetric in the tasks.
      trees: number of task trees; the methods between two trees take 2.
      traced: whether it runs under ``jax.jit``; searches look at values.
      tolerance: of pairs against dense leaves, scanned against unrolled layers, one order against another.
    """

    name: str
    make: Callable[[Any], fusion.Fusion]
    neutral: Callable[[], fusion.Fusion] | None = None
    alters: str = ""
    scaled: bool = True
    ordered: bool = False
    trees: int = 3
    traced: bool = True
    tolerance: float = 1e-5


FOUND = "coefficients are found, which one step of a search need not bring to 1"
EQUAL = "singular values are made equal"
BY_NAME = {"a": 1.0, "b": 2.0, "c": -1.0}

# A new method is one row here.
METHODS = [
    Row("average", lambda s: fusion.average(), scaled=False),
    Row(
        "weighted_average",
        lambda s: fusion.weighted_average({name: s * w for name, w in BY_NAME.items()}),
        lambda: fusion.weighted_average([1]),
        ordered=True,
    ),
    Row("task_arithmetic", fusion.task_arithmetic),
    Row("ties", lambda s: fusion.ties(0.5, s), lambda: fusion.ties(1.0)),
    Row("ties-per_tensor", lambda s: fusion.ties(0.5, s, trim="per_tensor"), lambda: fusion.ties(1.0, trim="per_tensor")),
    Row("dare", lambda s: fusion.dare(0.5, s), lambda: fusion.dare(1.0), ordered=True),
    Row("dare-ties", lambda s: fusion.dare(0.5, s, then="ties"), lambda: fusion.dare(1.0, then="ties"), ordered=True),
    Row("della", lambda s: fusion.della(0.5, scale=s), lambda: fusion.della(1.0, 0.0, scale=1.0), ordered=True),
    Row("breadcrumbs", lambda s: fusion.breadcrumbs(0.5, 0.2, s), lambda: fusion.breadcrumbs(1.0, 0.0, 1.0)),
    Row("magmax", fusion.magmax),
    Row("magnitude_prune", lambda s: fusion.magnitude_prune(0.5, s), lambda: fusion.magnitude_prune(1.0)),
    Row("consensus", lambda s: fusion.consensus(0.4, s), lambda: fusion.consensus(0.4, 1.0, agree=1)),
    Row("tall_masks", lambda s: fusion.tall_masks("a"), scaled=False, ordered=True),
    Row("emr", lambda s: fusion.emr(), scaled=False),
    Row("emr-task", lambda s: fusion.emr("a"), scaled=False, ordered=True),
    Row("pcb", lambda s: fusion.pcb(0.2, s), alters="outliers are clamped and small scores weigh less"),
    Row("slerp", lambda s: fusion.slerp(0.3), fusion.average, scaled=False, ordered=True, trees=2),
    Row("model_stock", lambda s: fusion.model_stock(), scaled=False),
    Row(
        "lines",
        lambda s: fusion.lines(fusion.task_arithmetic(s), alpha=0.5, beta=0.5),
        lambda: fusion.lines(fusion.average(), alpha=1.0, beta=0.0),
    ),
    Row("match_norm", lambda s: fusion.match_norm(fusion.task_arithmetic(0.3), s), lambda: fusion.match_norm(fusion.average())),
    Row("match_norm-ties", lambda s: fusion.match_norm(fusion.ties(0.5), s), lambda: fusion.match_norm(fusion.ties(1.0))),
    Row("tsv_m", fusion.tsv_m),
    Row("tsv_m-directions", lambda s: fusion.tsv_m(s, directions=1), alters="one direction of several is kept"),
    Row("iso_c", fusion.iso_c, alters=EQUAL),
    Row("iso_cts", lambda s: fusion.iso_cts(s, common=0.5), alters=EQUAL),
    Row("svd", lambda s: fusion.svd(2, scale=s), lambda: fusion.svd(5)),
    Row("concat", lambda s: fusion.concat(scale=s)),
    Row("svc", lambda s: fusion.svc(fusion.task_arithmetic(s)), lambda: fusion.svc(fusion.average())),
    Row("wudi", lambda s: fusion.wudi(steps=5, learning_rate=1e-2, scale=s)),
    Row("cart", lambda s: fusion.cart(0.5), scaled=False),
    Row("knots", lambda s: fusion.knots(fusion.task_arithmetic(s))),
    # At a density below 1 the inner method would count entries, of which a dense leaf's coordinates have more, all zero.
    Row("knots-ties", lambda s: fusion.knots(fusion.ties(1.0), s), lambda: fusion.knots(fusion.average())),
    Row("core_space", lambda s: fusion.core_space(scale=s)),
    Row("core_space-ties", lambda s: fusion.core_space(fusion.ties(1.0, s)), lambda: fusion.core_space(fusion.average())),
    Row("core_space-isotropic", lambda s: fusion.core_space(scale=s, isotropize=True), alters=EQUAL),
    Row("compress_then_merge", lambda s: fusion.compress_then_merge(2, scale=s), alters="it is brought to a rank of 2"),
    # Each task comes with its own statistics, so that its name has a say.
    Row("fisher", lambda s: fusion.fisher(statistics(), scale=s), ordered=True),
    Row("regmean", lambda s: fusion.regmean(statistics(), scale=s), ordered=True),
    Row("gram", lambda s: fusion.gram(statistics(), scale=s, tolerance=1e-7, iterations=200), ordered=True, tolerance=1e-4),
    Row("adamerging", lambda s: fusion.adamerging(towards(), steps=3), alters=FOUND, scaled=False, traced=False),
    Row(
        "adamerging-tasks",
        lambda s: fusion.adamerging(towards(), layerwise=False, steps=3),
        alters=FOUND,
        scaled=False,
        traced=False,
    ),
    Row("atlas", lambda s: fusion.atlas(towards(), steps=3), alters=FOUND, scaled=False, traced=False),
    Row("lora_soups", lambda s: fusion.lora_soups(towards(), steps=3), alters=FOUND, scaled=False, traced=False),
    Row("lorahub", lambda s: fusion.lorahub(towards(), budget=12), alters=FOUND, scaled=False, ordered=True, traced=False),
]

TASKS = ("a", "b", "c")
RANKS = {"a": 1, "b": 3, "c": 2}
INPUTS, OUTPUTS = 7, 5


def changes(task: str, *, layers: int = 2, stacked: bool = False) -> pf.Delta:
    """A task's change: pairs of its own rank in each layer, a bias, and a matrix outside the layers that task c lacks.

    Tasks have something in common: their first factors are near each other, and so are their biases.
    """
    own, common = np.random.default_rng(TASKS.index(task)), np.random.default_rng(9)

    def normal(*shape: int, alike: bool = False) -> jax.Array:
        drawn = own.normal(size=shape)
        if alike:
            drawn[..., 0] += 2 * common.normal(size=shape[:1])
        return jnp.asarray(drawn, jnp.float32)

    def pair(rank: int) -> tuple[jax.Array, jax.Array]:
        return normal(INPUTS, rank, alike=True), normal(OUTPUTS, rank, alike=True).T

    pairs = [pair(RANKS[task]) for _ in range(layers)]
    biases = [normal(OUTPUTS, 1, alike=True)[:, 0] for _ in range(layers)]
    head = {} if task == "c" else {"head/kernel": pf.LowRank(normal(OUTPUTS, 1), normal(1, OUTPUTS), (OUTPUTS, OUTPUTS))}
    if stacked:
        a, b = (jnp.stack(factors) for factors in zip(*pairs, strict=True))
        kernel = pf.LowRank(a, b, (layers, INPUTS, OUTPUTS))
        return pf.Delta({"layer/query/kernel": kernel, "layer/query/bias": jnp.stack(biases), **head})
    leaves: dict[str, Any] = dict(head)
    for i, (a, b) in enumerate(pairs):
        leaves[f"layer/{i}/query/kernel"] = pf.LowRank(a, b, (INPUTS, OUTPUTS))
        leaves[f"layer/{i}/query/bias"] = biases[i]
    return pf.Delta(leaves)


@functools.cache
def statistics() -> dict[str, Statistics]:
    """Random moments and Fisher diagonals of every parameter, for each task."""
    rng = np.random.default_rng(5)

    # NumPy's arrays, since the first call may be under jit, whose values must not be kept.
    def moment(size: int) -> np.ndarray:
        factor = rng.normal(size=(size, 2 * size))
        return np.asarray(factor @ factor.T / size, np.float32)

    found = {}
    for task in TASKS:
        leaves = changes("a").leaves
        moments = {
            path: Moments(moment(1 if len(change.shape) == 1 else change.shape[0]), moment(change.shape[-1]))
            for path, change in leaves.items()
        }
        fishers = {path: np.asarray(rng.gamma(1.0, size=change.shape), np.float32) for path, change in leaves.items()}
        found[task] = Statistics(moments, fishers, 8)
    return found


def towards() -> fusion.Objective:
    """The squared distance from a fixed change, which is half of one task's."""
    leaves = (changes("a").dense() * 0.5).leaves
    return fusion.Objective((fusion.Term("distance", _distance, leaves, ({},)),))


def _distance(target: Any, fused: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    leaves = fused.dense().leaves if isinstance(fused, pf.Delta) else fused
    return sum(jnp.sum(jnp.square(leaves[path] - leaf)) for path, leaf in target.items()), jnp.float32(1)
