"""Evaluation: scores with standard errors, exact sweeps over coefficients, analysis of task vectors, tables, plots, pages."""

from pefusion_jax.evaluation.analysis import (
    Disentanglement,
    Interference,
    LossPlane,
    disentanglement_error,
    interference,
    loss_plane,
)
from pefusion_jax.evaluation.analysis_plots import plot_disentanglement, plot_layers, plot_loss_plane, plot_matrix
from pefusion_jax.evaluation.batched import evaluate_many
from pefusion_jax.evaluation.conversion import Conversions, conversion_similarity, conversions
from pefusion_jax.evaluation.exact import Combination, Solution, Subsets, best_combination, solve_coefficients, solve_subsets
from pefusion_jax.evaluation.geometry import (
    LayerNorms,
    Overlap,
    Pairwise,
    cosine,
    layer_norms,
    sign_conflicts,
    subspace_overlap,
)
from pefusion_jax.evaluation.groups import Grouped, cache_groups
from pefusion_jax.evaluation.page import Page, write_page
from pefusion_jax.evaluation.plots import plot_curves, plot_ranking, plot_scores, plot_sweep
from pefusion_jax.evaluation.report import Comparison, Row
from pefusion_jax.evaluation.scores import Scores, accuracy_scores, evaluate, evaluate_base, predict
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
    "accuracy_scores",
    "Best",
    "Cached",
    "Combination",
    "Conversions",
    "Comparison",
    "Disentanglement",
    "Grouped",
    "Interference",
    "LayerNorms",
    "LossPlane",
    "Overlap",
    "Page",
    "Pairwise",
    "Row",
    "Scores",
    "Solution",
    "Subsets",
    "best_coefficients",
    "best_combination",
    "cache_groups",
    "cache_outputs",
    "conversion_similarity",
    "conversions",
    "cosine",
    "disentanglement_error",
    "evaluate",
    "evaluate_base",
    "evaluate_many",
    "interference",
    "layer_norms",
    "loss_plane",
    "plot_curves",
    "plot_disentanglement",
    "plot_layers",
    "plot_loss_plane",
    "plot_matrix",
    "plot_ranking",
    "plot_scores",
    "plot_sweep",
    "predict",
    "sign_conflicts",
    "solve_coefficients",
    "solve_subsets",
    "subset_grid",
    "subspace_overlap",
    "sweep",
    "sweep_trees",
    "write_page",
]
