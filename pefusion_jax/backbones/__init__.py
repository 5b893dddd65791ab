"""Flax Linen models of our own, with Hugging Face's parameter names."""

from pefusion_jax.backbones import bert, clip_files, dinov2, llama, mpnet, roberta, t5, vit
from pefusion_jax.backbones.bert import Bert, BertConfig, BertOutput
from pefusion_jax.backbones.clip import Clip, ClipConfig, ClipOutput, ClipText, ClipTextConfig, ClipVision, ClipVisionConfig
from pefusion_jax.backbones.clip_prompts import image_embeds_features, zero_shot_classifier
from pefusion_jax.backbones.dinov2 import Dinov2, Dinov2Config, Dinov2Output
from pefusion_jax.backbones.family import Family
from pefusion_jax.backbones.layers import stack_layers, unstack_layers
from pefusion_jax.backbones.llama import Llama, LlamaConfig, LlamaOutput
from pefusion_jax.backbones.mpnet import MPNet, MPNetConfig
from pefusion_jax.backbones.roberta import Roberta, RobertaConfig
from pefusion_jax.backbones.t5 import T5, T5Config, T5Output
from pefusion_jax.backbones.taps import Tap
from pefusion_jax.backbones.vit import Vit, VitConfig, VitOutput

# A new backbone is one file and one row here.
FAMILIES: tuple[Family, ...] = (
    bert.FAMILY,
    roberta.FAMILY,
    mpnet.FAMILY,
    llama.LLAMA,
    llama.QWEN2,
    t5.FAMILY,
    vit.VIT,
    vit.DEIT,
    dinov2.DINOV2,
    dinov2.DINOV2_REGISTERS,
    clip_files.CLIP,
    clip_files.CLIP_TEXT,
    clip_files.CLIP_VISION,
)

__all__ = [
    "Bert",
    "BertConfig",
    "BertOutput",
    "Clip",
    "ClipConfig",
    "ClipOutput",
    "ClipText",
    "ClipTextConfig",
    "ClipVision",
    "ClipVisionConfig",
    "Dinov2",
    "Dinov2Config",
    "Dinov2Output",
    "FAMILIES",
    "Family",
    "Llama",
    "LlamaConfig",
    "LlamaOutput",
    "MPNet",
    "MPNetConfig",
    "Roberta",
    "RobertaConfig",
    "T5",
    "T5Config",
    "T5Output",
    "Tap",
    "Vit",
    "VitConfig",
    "VitOutput",
    "image_embeds_features",
    "stack_layers",
    "unstack_layers",
    "zero_shot_classifier",
]
