"""Adapter methods: mathematics only, one file a family."""

from pefusion_jax.methods.full import FullFineTuning
from pefusion_jax.methods.lora import LoRA

__all__ = ["FullFineTuning", "LoRA"]
