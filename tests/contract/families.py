"""One tiny transformers model of every family, made random, saved, and loaded by us: what the suite of families walks."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import transformers

import pefusion_jax as pf


class Row(NamedTuple):
    """A family: how transformers makes a tiny one, what it is fed, which layers get LoRA.

    ``output`` picks one array of the outputs; ``generates`` says whether the family generates tokens; ``their_output``
    is the name of the same array in transformers' outputs.
    """

    name: str
    make: Callable[[], torch.nn.Module]
    inputs: dict[str, np.ndarray]
    targets: str
    their_targets: tuple[str, ...]
    output: str = "last_hidden_state"
    generates: bool = False


IDS = np.array([[5, 7, 9, 11, 13, 2], [3, 8, 21, 6, 2, 1]], np.int32)
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]], np.int32)
LEFT = np.array([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]], np.int32)
TEXT = {"input_ids": IDS, "attention_mask": MASK}
IMAGES = {"pixel_values": np.random.default_rng(0).normal(size=(2, 3, 12, 12)).astype(np.float32)}
ENCODER = dict(
    vocab_size=29, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, max_position_embeddings=12
)
VISION = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=24,
    image_size=12,
    patch_size=4,
    num_channels=3,
)
DECODER = dict(
    vocab_size=29,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=24,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
T5 = dict(vocab_size=29, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu")
CLIP_TEXT = {**ENCODER, "eos_token_id": 2, "pad_token_id": 1}


def _clip() -> torch.nn.Module:
    config = transformers.CLIPConfig(text_config=CLIP_TEXT, vision_config=VISION, projection_dim=10)
    return transformers.CLIPModel(config)


# A new backbone is one row here.
ROWS = [
    Row(
        "BERT",
        lambda: transformers.BertModel(transformers.BertConfig(**ENCODER)),
        TEXT,
        r".*/(query|value)",
        ("query", "value"),
    ),
    Row(
        "RoBERTa",
        lambda: transformers.RobertaModel(transformers.RobertaConfig(**ENCODER, type_vocab_size=1)),
        TEXT,
        r".*/(query|value)",
        ("query", "value"),
    ),
    Row("MPNet", lambda: transformers.MPNetModel(transformers.MPNetConfig(**ENCODER)), TEXT, r".*/attn/(q|v)", ("q", "v")),
    Row(
        "ViT",
        lambda: transformers.ViTModel(transformers.ViTConfig(**VISION)),
        IMAGES,
        r".*/(query|value)",
        ("q_proj", "v_proj"),
    ),
    Row(
        "DeiT",
        lambda: transformers.DeiTModel(transformers.DeiTConfig(**VISION)),
        IMAGES,
        r".*/(query|value)",
        ("q_proj", "v_proj"),
    ),
    Row(
        "DINOv2",
        lambda: transformers.Dinov2Model(
            transformers.Dinov2Config(**{k: v for k, v in VISION.items() if k != "intermediate_size"})
        ),
        IMAGES,
        r".*/(query|value)",
        ("q_proj", "v_proj"),
    ),
    Row(
        "DINOv2 with registers",
        lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(
                **{k: v for k, v in VISION.items() if k != "intermediate_size"}, num_register_tokens=2
            )
        ),
        IMAGES,
        r".*/(query|value)",
        ("q_proj", "v_proj"),
    ),
    Row("CLIP", _clip, {**TEXT, **IMAGES}, r".*/(q_proj|v_proj)", ("q_proj", "v_proj"), "logits_per_image"),
    Row(
        "CLIP text",
        lambda: transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**CLIP_TEXT, projection_dim=10)),
        TEXT,
        r".*/(q_proj|v_proj)",
        ("q_proj", "v_proj"),
        "text_embeds",
    ),
    Row(
        "CLIP vision",
        lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION, projection_dim=10)),
        IMAGES,
        r".*/(q_proj|v_proj)",
        ("q_proj", "v_proj"),
        "image_embeds",
    ),
    Row(
        "T5",
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, pad_token_id=0, decoder_start_token_id=0)),
        {**TEXT, "decoder_input_ids": IDS[:, :4]},
        r".*/(q|v)",
        ("q", "v"),
        "logits",
        generates=True,
    ),
    Row(
        "Llama",
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)),
        {"input_ids": IDS},
        r".*/(q_proj|v_proj)",
        ("q_proj", "v_proj"),
        "logits",
        generates=True,
    ),
    Row(
        "Qwen2",
        lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**DECODER, tie_word_embeddings=True)),
        {"input_ids": IDS},
        r".*/(q_proj|v_proj)",
        ("q_proj", "v_proj"),
        "logits",
        generates=True,
    ),
]
NAMES = [row.name for row in ROWS]
# One family of each kind of block; the others' layouts are compared in tests/backbones.
DISTINCT = ["BERT", "MPNet", "DINOv2", "CLIP text", "CLIP vision", "T5", "Llama"]


class Family(NamedTuple):
    """A row with its random model on disk, and what we make of it."""

    row: Row
    reference: torch.nn.Module
    folder: Path
    model: Any
    params: Any

    def picked(self, outputs: Any) -> jax.Array:
        """The array of the outputs that is compared."""
        return getattr(outputs, self.row.output)


_FOLDERS = tempfile.TemporaryDirectory(prefix="pefusion-families-")


@functools.cache
def family(name: str) -> Family:
    """Makes, saves and loads the tiny model of a family."""
    row = next(row for row in ROWS if row.name == name)
    torch.manual_seed(NAMES.index(name))
    reference = row.make().eval()
    with torch.no_grad():
        for path, parameter in reference.named_parameters():
            # Trivial norms and biases would hide mistakes.
            around = 1.0 if parameter.ndim == 1 and path.endswith("weight") else 0.0
            parameter.copy_(around + torch.randn_like(parameter) * 0.2)
    folder = Path(_FOLDERS.name) / name.replace(" ", "-")
    reference.save_pretrained(folder)
    return Family(row, reference, folder, *pf.load_pretrained(folder))


def theirs(made: Family, model: torch.nn.Module | None = None) -> np.ndarray:
    """The same array from transformers."""
    tensors = {key: torch.tensor(value) for key, value in made.row.inputs.items()}
    with torch.no_grad():
        return getattr((model or made.reference)(**tensors), made.row.output).numpy()
