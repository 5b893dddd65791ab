"""Parameter-efficient fine-tuning, partial linearization and multi-task fusion in JAX."""

# One noun and its verbs.
from pefusion_jax.adapt import Adapted, adapt
from pefusion_jax.deltas import Delta, LowRank, fold
from pefusion_jax.linearize import linearize

# Adapter methods.
from pefusion_jax.methods import FullFineTuning, LoRA

__all__ = ["Adapted", "Delta", "FullFineTuning", "LoRA", "LowRank", "adapt", "fold", "linearize"]
