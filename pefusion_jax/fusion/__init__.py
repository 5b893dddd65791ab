"""Fusion: task trees in, one tree out. Pytree arithmetic without a model; see :func:`fuse`."""

from pefusion_jax.fusion.combine import fuse
from pefusion_jax.fusion.elementwise import average, task_arithmetic, ties, weighted_average
from pefusion_jax.fusion.geometric import model_stock, slerp
from pefusion_jax.fusion.masked import breadcrumbs, consensus, dare, magmax
from pefusion_jax.fusion.parts import (
    Fusion,
    chain,
    cut,
    disjoint_mean,
    drop,
    elect,
    largest,
    linear,
    reduce_mean,
    reduce_sum,
    rescale,
    shared,
    trim,
)

__all__ = [
    "Fusion",
    "average",
    "breadcrumbs",
    "chain",
    "consensus",
    "cut",
    "dare",
    "disjoint_mean",
    "drop",
    "elect",
    "fuse",
    "largest",
    "linear",
    "magmax",
    "model_stock",
    "reduce_mean",
    "reduce_sum",
    "rescale",
    "shared",
    "slerp",
    "task_arithmetic",
    "ties",
    "trim",
    "weighted_average",
]
