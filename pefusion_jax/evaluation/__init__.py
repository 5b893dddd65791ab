"""Evaluation: scores with standard errors, exact sweeps over coefficients, comparison tables and plots."""

from pefusion_jax.evaluation.plots import plot_cosine, plot_scores, plot_sweep
from pefusion_jax.evaluation.report import Comparison, Row
from pefusion_jax.evaluation.scores import Scores, evaluate, evaluate_base, predict
from pefusion_jax.evaluation.sweep import (
    Best,
    Cached,
    best_coefficients,
    cache_outputs,
    subset_grid,
    sweep,
    sweep_trees,
)

__all__ = [
    "Best",
    "Cached",
    "Comparison",
    "Row",
    "Scores",
    "best_coefficients",
    "cache_outputs",
    "evaluate",
    "evaluate_base",
    "plot_cosine",
    "plot_scores",
    "plot_sweep",
    "predict",
    "subset_grid",
    "sweep",
    "sweep_trees",
]
