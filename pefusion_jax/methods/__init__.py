"""Adapter methods: mathematics only, one file a family."""

from pefusion_jax.methods.bottleneck import Bottleneck, houlsby, parallel, pfeiffer
from pefusion_jax.methods.full import FullFineTuning
from pefusion_jax.methods.lora import LoRA

__all__ = ["Bottleneck", "FullFineTuning", "LoRA", "houlsby", "parallel", "pfeiffer"]
