"""Fusion: task trees in, one tree out. Pytree arithmetic without a model; see :func:`fuse`."""

from pefusion_jax.fusion.balanced import pcb
from pefusion_jax.fusion.closed_form import fisher, gram, gram_residual, project, regmean, regmean_shared
from pefusion_jax.fusion.combine import fuse
from pefusion_jax.fusion.composition import add_task, analogy, negate, remove_task
from pefusion_jax.fusion.conformance import peft_weighted_adapter
from pefusion_jax.fusion.cores import compress_then_merge, core_space, knots
from pefusion_jax.fusion.depth import lines
from pefusion_jax.fusion.elementwise import average, task_arithmetic, ties, weighted_average
from pefusion_jax.fusion.geometric import model_stock, slerp
from pefusion_jax.fusion.grouped import by_layer, by_tensor, per_group, whole
from pefusion_jax.fusion.localized import emr, tall_masks
from pefusion_jax.fusion.masked import breadcrumbs, consensus, dare, della, magmax, magnitude_prune
from pefusion_jax.fusion.norms import match_norm
from pefusion_jax.fusion.objectives import Objective, Term, objective
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
from pefusion_jax.fusion.search import Found, adamerging, atlas, lora_soups, lorahub
from pefusion_jax.fusion.sequential import regmean_pp
from pefusion_jax.fusion.spectral import cart, concat, iso_c, iso_cts, svc, svd, tsv_m
from pefusion_jax.fusion.wudi import wudi

__all__ = [
    "Found",
    "Fusion",
    "Objective",
    "Term",
    "adamerging",
    "add_task",
    "analogy",
    "atlas",
    "average",
    "breadcrumbs",
    "by_layer",
    "by_tensor",
    "cart",
    "chain",
    "compress_then_merge",
    "concat",
    "consensus",
    "core_space",
    "cut",
    "dare",
    "della",
    "disjoint_mean",
    "drop",
    "elect",
    "emr",
    "fisher",
    "fuse",
    "gram",
    "gram_residual",
    "iso_c",
    "iso_cts",
    "knots",
    "largest",
    "linear",
    "lines",
    "lora_soups",
    "lorahub",
    "magmax",
    "magnitude_prune",
    "match_norm",
    "model_stock",
    "negate",
    "objective",
    "pcb",
    "peft_weighted_adapter",
    "per_group",
    "project",
    "reduce_mean",
    "reduce_sum",
    "regmean",
    "regmean_pp",
    "regmean_shared",
    "remove_task",
    "rescale",
    "shared",
    "slerp",
    "svc",
    "svd",
    "tall_masks",
    "task_arithmetic",
    "ties",
    "trim",
    "tsv_m",
    "weighted_average",
    "whole",
    "wudi",
]
