"""Files at the border: safetensors, Hugging Face folders, and where models come from."""

from pefusion_jax.interop.hub import Folder, locate
from pefusion_jax.interop.images import load_image_processor
from pefusion_jax.interop.peft import load_peft, read_peft
from pefusion_jax.interop.peft_export import save_peft
from pefusion_jax.interop.pretrained import fingerprint, load_pretrained, load_tokenizer
from pefusion_jax.interop.safetensors import (
    TensorInfo,
    WeightFileError,
    check_finite,
    iter_safetensors,
    load_safetensors,
    read_header,
    read_metadata,
    save_safetensors,
)
from pefusion_jax.interop.saving import save_pretrained

__all__ = [
    "Folder",
    "TensorInfo",
    "WeightFileError",
    "check_finite",
    "fingerprint",
    "iter_safetensors",
    "load_image_processor",
    "load_peft",
    "load_pretrained",
    "load_safetensors",
    "load_tokenizer",
    "locate",
    "read_header",
    "read_metadata",
    "read_peft",
    "save_peft",
    "save_pretrained",
    "save_safetensors",
]
