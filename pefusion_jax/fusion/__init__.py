"""Fusion: task trees in, one tree out. Pytree arithmetic without a model; see :func:`fuse`."""

from pefusion_jax.fusion.combine import fuse
from pefusion_jax.fusion.elementwise import average, task_arithmetic, ties, weighted_average
from pefusion_jax.fusion.parts import (
    Fusion,
    chain,
    disjoint_mean,
    elect,
    linear,
    reduce_mean,
    reduce_sum,
    rescale,
    trim,
)

__all__ = [
    "Fusion",
    "average",
    "chain",
    "disjoint_mean",
    "elect",
    "fuse",
    "linear",
    "reduce_mean",
    "reduce_sum",
    "rescale",
    "task_arithmetic",
    "ties",
    "trim",
    "weighted_average",
]
