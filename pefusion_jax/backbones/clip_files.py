"""CLIP in Hugging Face's files: the tables of names and the three families."""

from __future__ import annotations

from pefusion_jax.backbones import names, patches, vision
from pefusion_jax.backbones.clip import Clip, ClipText, ClipVision
from pefusion_jax.backbones.clip_configs import ClipConfig, ClipTextConfig, ClipVisionConfig
from pefusion_jax.backbones.family import Family

__all__ = ["CLIP", "CLIP_TEXT", "CLIP_VISION", "name_table", "text_table", "vision_table"]


def text_table(config: ClipTextConfig) -> dict[str, names.Entry]:
    """The table of canonical names of a text tower, in the loop layout."""
    width = config.hidden_size
    table = names.embedding("embeddings/token_embedding", "embeddings.token_embedding", config.vocab_size, width)
    at = "embeddings/position_embedding"
    table |= names.embedding(at, at.replace("/", "."), config.max_position_embeddings, width)
    table |= vision.stack_table(config.stack, "encoder.layers")
    table |= names.norm("final_layer_norm", "final_layer_norm", width)
    if config.projection:
        table |= names.linear("text_projection", "text_projection", width, config.projection_dim, bias=False)
    return table


def vision_table(config: ClipVisionConfig) -> dict[str, names.Entry]:
    """The table of canonical names of an image tower, in the loop layout."""
    width, (rows, columns) = config.hidden_size, patches.grid_of(config)
    table = {"embeddings/class_embedding": names.Entry("embeddings.class_embedding", (width,))}
    at = "embeddings/patch_embedding"
    table |= names.conv(at, at.replace("/", "."), config.num_channels, width, config.patch_size, bias=False)
    at = "embeddings/position_embedding"
    table |= names.embedding(at, at.replace("/", "."), 1 + rows * columns, width)
    for name in ("pre_layrnorm", "post_layernorm"):
        table |= names.norm(name, name, width)
    table |= vision.stack_table(config.stack, "encoder.layers")
    if config.projection:
        table |= names.linear("visual_projection", "visual_projection", width, config.projection_dim, bias=False)
    return table


def name_table(config: ClipConfig) -> dict[str, names.Entry]:
    """The table of canonical names of both towers together, in the loop layout."""
    table = {"logit_scale": names.Entry("logit_scale", ())}
    for tower, rows in (("text_model", text_table(config.text)), ("vision_model", vision_table(config.vision))):
        table |= {f"{tower}/{path}": entry._replace(name=f"{tower}.{entry.name}") for path, entry in rows.items()}
    for name, width in (("text_projection", config.text.hidden_size), ("visual_projection", config.vision.hidden_size)):
        table |= names.linear(name, name, width, config.projection_dim, bias=False)
    return table


CLIP = Family(
    name="CLIP",
    model_types=("clip",),
    architectures=("CLIPModel",),
    read_config=ClipConfig.from_dict,
    write_config=ClipConfig.to_dict,
    build=Clip,
    table=name_table,
    ignored=r"(text|vision)_model\.embeddings\.position_ids",
)
CLIP_TEXT = Family(
    name="CLIP text",
    model_types=("clip_text_model",),
    architectures=("CLIPTextModel", "CLIPTextModelWithProjection"),
    read_config=ClipTextConfig.from_dict,
    write_config=ClipTextConfig.to_dict,
    build=ClipText,
    table=text_table,
    prefix="text_model.",
    heads=("text_projection.",),
    ignored=r"embeddings\.position_ids",
)
CLIP_VISION = Family(
    name="CLIP vision",
    model_types=("clip_vision_model",),
    architectures=("CLIPVisionModel", "CLIPVisionModelWithProjection"),
    read_config=ClipVisionConfig.from_dict,
    write_config=ClipVisionConfig.to_dict,
    build=ClipVision,
    table=vision_table,
    prefix="vision_model.",
    heads=("visual_projection.",),
    ignored=r"embeddings\.position_ids",
)
