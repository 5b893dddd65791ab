"""The configurations of CLIP and of its towers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pefusion_jax.backbones import configs, patches, vision

LAYOUT = vision.Layout(
    norms=("layer_norm1", "layer_norm2"),
    attention="self_attn",
    projections=("q_proj", "k_proj", "v_proj"),
    nested=False,
    mlp=True,
)
# "dropout" stands in old files; no version of transformers ever read it.
_HARMLESS = {"dropout", *vision.LEGACY}


def _stack(config: ClipTextConfig | ClipVisionConfig) -> vision.Stack:
    return vision.Stack(
        layout=LAYOUT,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        hidden=config.intermediate_size,
        heads=config.num_attention_heads,
        act=config.hidden_act,
        eps=config.layer_norm_eps,
        attention_dropout=config.attention_dropout,
    )


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """The shape of CLIP's text tower; names and defaults are Hugging Face's, except ``projection``: whether it has one."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    eos_token_id: int = 49407
    projection: bool = False

    def __post_init__(self) -> None:
        configs.validate(self)
        configs.require_multiple(self, "hidden_size", "num_attention_heads")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], tensors: Mapping[str, Any] | None = None) -> ClipTextConfig:
        """Reads the dictionary of a ``config.json``.

        Args:
          raw: the dictionary.
          tensors: canonical names of the weights' file, which decide on the projection. Without them the architecture does.

        Raises:
          ValueError: naming every field or value that this file does not implement.
        """
        return cls(**_read(cls, raw, "clip_text_model", "text_projection.weight", tensors))

    def to_dict(self) -> dict[str, Any]:
        """The dictionary of a ``config.json`` from which transformers builds the same model."""
        fields = dataclasses.asdict(self)
        name = "CLIPTextModelWithProjection" if fields.pop("projection") else "CLIPTextModel"
        return {"model_type": "clip_text_model", "architectures": [name], **fields}

    @property
    def stack(self) -> vision.Stack:
        """The shape of the blocks."""
        return _stack(self)


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig:
    """The shape of CLIP's image tower; names and defaults are Hugging Face's, except ``projection``: whether it has one.

    ``image_size`` and ``patch_size`` are held as ``(height, width)``, but have to be square: CLIP's are.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: Any = (224, 224)
    patch_size: Any = (32, 32)
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    projection: bool = False

    def __post_init__(self) -> None:
        configs.validate(self)
        configs.require_multiple(self, "hidden_size", "num_attention_heads")
        patches.set_pairs(self, "image_size", "patch_size")
        patches.grid_of(self)
        for field in ("image_size", "patch_size"):
            height, width = getattr(self, field)
            if height != width:
                raise ValueError(f"ClipVisionConfig.{field} must be square, not {height} x {width}, as in transformers")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], tensors: Mapping[str, Any] | None = None) -> ClipVisionConfig:
        """Reads the dictionary of a ``config.json``; as in :class:`ClipTextConfig`."""
        return cls(**_read(cls, raw, "clip_vision_model", "visual_projection.weight", tensors))

    def to_dict(self) -> dict[str, Any]:
        """The dictionary of a ``config.json`` from which transformers builds the same model."""
        fields = patches.plain_sizes(self)
        name = "CLIPVisionModelWithProjection" if fields.pop("projection") else "CLIPVisionModel"
        return {"model_type": "clip_vision_model", "architectures": [name], **fields}

    @property
    def stack(self) -> vision.Stack:
        """The shape of the blocks."""
        return _stack(self)


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """The shape of a CLIP model: its towers, which have no projection of their own, and the common space."""

    text: ClipTextConfig = ClipTextConfig()
    vision: ClipVisionConfig = ClipVisionConfig()
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592

    def __post_init__(self) -> None:
        configs.validate(self)
        if self.text.projection or self.vision.projection:
            raise ValueError("the towers of a ClipConfig have no projection of their own: leave projection=False")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], tensors: Mapping[str, Any] | None = None) -> ClipConfig:
        """Reads the dictionary of a ``config.json``. ``tensors`` decide nothing here.

        Raises:
          ValueError: naming every field or value that this file does not implement.
        """
        del tensors
        own = {"projection_dim", "logit_scale_init_value"}
        towers: dict[str, Any] = {"text": ClipTextConfig, "vision": ClipVisionConfig}
        nested = {f"{tower}_config{suffix}" for tower in towers for suffix in ("", "_dict")}
        configs.refuse_unknown(raw, "CLIP", own | nested, {"model_type": ("clip",), **vision.ONLY}, _HARMLESS)
        fields: dict[str, Any] = {key: raw[key] for key in own if raw.get(key) is not None}
        for tower, kind in towers.items():
            # In older files the second stands beside the first and, as in transformers, replaces it with all its defaults.
            given = raw.get(f"{tower}_config_dict")
            given = raw.get(f"{tower}_config") if given is None else given
            given = {} if given is None else given
            if not isinstance(given, Mapping):
                raise ValueError(f"{tower}_config must be an object, not {type(given).__name__}")
            # Towers of a whole have neither architecture nor projection.
            given = {key: value for key, value in given.items() if key != "architectures"}
            fields[tower] = kind.from_dict({"model_type": f"clip_{tower}_model", **given})
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """The dictionary of a ``config.json`` from which transformers builds the same model."""
        towers = {"text_config": self.text.to_dict(), "vision_config": self.vision.to_dict()}
        for tower in towers.values():
            del tower["architectures"]
        rest = {"projection_dim": self.projection_dim, "logit_scale_init_value": self.logit_scale_init_value}
        return {"model_type": "clip", "architectures": ["CLIPModel"], **rest, **towers}


def _read(
    kind: type, raw: Mapping[str, Any], model_type: str, projection: str, tensors: Mapping[str, Any] | None
) -> dict[str, Any]:
    own = {field.name for field in dataclasses.fields(kind)} - {"projection"}
    configs.refuse_unknown(raw, "CLIP", own, {"model_type": (model_type,), **vision.ONLY}, _HARMLESS)
    headed = "WithProjection" in str(raw.get("architectures")) if tensors is None else projection in tensors
    return {**{key: raw[key] for key in own if key in raw}, "projection": headed}
