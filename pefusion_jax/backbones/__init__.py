"""Flax Linen models of our own, with Hugging Face's parameter names."""

from pefusion_jax.backbones import bert
from pefusion_jax.backbones.bert import Bert, BertConfig, BertOutput
from pefusion_jax.backbones.family import Family
from pefusion_jax.backbones.layers import stack_layers, unstack_layers
from pefusion_jax.backbones.taps import Tap

# A new backbone is one file and one row here.
FAMILIES: tuple[Family, ...] = (bert.FAMILY,)

__all__ = ["FAMILIES", "Bert", "BertConfig", "BertOutput", "Family", "Tap", "stack_layers", "unstack_layers"]
