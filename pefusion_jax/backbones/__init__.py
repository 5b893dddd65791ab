"""Flax Linen models of our own, with Hugging Face's parameter names."""

from pefusion_jax.backbones.bert import Bert, BertConfig, BertOutput
from pefusion_jax.backbones.taps import Tap

__all__ = ["Bert", "BertConfig", "BertOutput", "Tap"]
