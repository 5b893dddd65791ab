"""Adapter methods: mathematics only, one file a family."""

from pefusion_jax.methods.bottleneck import Bottleneck, houlsby, parallel, pfeiffer
from pefusion_jax.methods.full import FullFineTuning
from pefusion_jax.methods.lora import LoRA
from pefusion_jax.methods.prompt import PromptTuning, prompt_from_tokens, prompt_similarity

__all__ = [
    "Bottleneck",
    "FullFineTuning",
    "LoRA",
    "PromptTuning",
    "houlsby",
    "parallel",
    "pfeiffer",
    "prompt_from_tokens",
    "prompt_similarity",
]
