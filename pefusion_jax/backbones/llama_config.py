"""The configuration of Llama-style decoders: what their ``config.json`` may say, in the forms of transformers 4 and 5."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax.backbones import configs

__all__ = ["LlamaConfig", "Rope"]

_NAMES = {"llama": "Llama", "qwen2": "Qwen2"}
_HEADS = {"causal": "ForCausalLM", "classes": "ForSequenceClassification", None: "Model"}
# Fields that no field below has, which change nothing about the forward pass. The last three are in SmolLM2's file.
_HARMLESS = frozenset(
    "sliding_window max_window_layers layer_types pretraining_tp is_llama_config transformers.js_config".split()
)
_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions: pair ``i`` of a head turns by ``position * theta ** (-2 i / head_dim)``, scaled for longer contexts.

    ``rope_type``: ``default``; ``linear`` divides the frequencies by ``factor``; ``llama3`` does so for wavelengths above
    ``original_max_position_embeddings / low_freq_factor``, not for those below the same over ``high_freq_factor``, and
    interpolates in between.
    """

    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        configs.validate(self)
        if self.rope_type not in _ROPE_FIELDS:
            known = ", ".join(_ROPE_FIELDS)
            raise ValueError(f"Rope.rope_type={self.rope_type[:40]!r} is not implemented; implemented: {known}")
        for name in ("rope_theta", "factor", "low_freq_factor"):
            if not 1e-3 <= getattr(self, name) <= 1e15:
                raise ValueError(f"Rope.{name} must be positive, from 0.001 to 1e15, not {getattr(self, name)!r}")
        if not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(
                f"Rope.high_freq_factor={self.high_freq_factor} must be above low_freq_factor={self.low_freq_factor}"
            )
        if self.rope_type == "llama3" and self.original_max_position_embeddings is None:
            raise ValueError("Rope.original_max_position_embeddings must be given for rope_type='llama3'")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Rope:
        """Reads ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (transformers 4).

        Raises:
          ValueError: if both forms are given, or for what is not implemented.
        """
        forms = [name for name in ("rope_parameters", "rope_scaling") if raw.get(name)]
        if len(forms) > 1:
            raise ValueError(
                "this config.json has rope_parameters and rope_scaling: delete one of them from a copy of the file"
            )
        given = raw[forms[0]] if forms else {}
        if not isinstance(given, Mapping):
            raise ValueError(f"{forms[0]} must be a mapping, not {str(given)[:80]!r}")
        fields = {str(name): value for name, value in given.items()}
        kind = fields.pop("rope_type", fields.get("type", "default"))
        fields.pop("type", None)
        if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
            raise ValueError(
                f"{forms[0]}: rope_type={str(kind)[:40]!r} is not implemented; implemented: {', '.join(_ROPE_FIELDS)}"
            )
        fields.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
        part = fields.pop("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
        if isinstance(part, bool) or part not in (1.0, None):
            raise ValueError(f"partial_rotary_factor={str(part)[:40]!r} is not implemented (implemented: 1.0)")
        if kind == "llama3":
            fields.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings", 2048))
        wanted = {"rope_theta", *_ROPE_FIELDS[kind]}
        if set(fields) != wanted:
            raise ValueError(f"rope_type={kind!r} takes the fields {sorted(wanted)}, not {str(sorted(fields))[:200]}")
        return cls(rope_type=kind, **fields)

    def to_dict(self) -> dict[str, Any]:
        """The fields of a ``config.json`` in the form that transformers 4 and 5 both read."""
        scaling = {name: getattr(self, name) for name in ("rope_type", *_ROPE_FIELDS[self.rope_type])}
        return {"rope_theta": self.rope_theta, "rope_scaling": None if self.rope_type == "default" else scaling}

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians that each of the ``head_dim / 2`` pairs turns by in one position, float32 as in transformers."""
        plain = (1.0 / np.float32(self.rope_theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)).astype(
            np.float32
        )
        slow = plain / np.float32(self.factor)
        if self.rope_type != "llama3":
            return slow  # the factor of the default type is 1
        assumed = self.original_max_position_embeddings or 1
        wavelength = 2 * math.pi / plain
        smooth = (assumed / wavelength - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        between = (1 - smooth) * slow + smooth * plain
        scaled = np.where(wavelength > assumed / self.low_freq_factor, slow, between)
        return np.where(wavelength < assumed / self.high_freq_factor, plain, scaled).astype(np.float32)

    def rotations(self, positions: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines ``[batch or 1, 1, seq, head_dim]`` of positions ``[batch or 1, seq]``."""
        turns = positions.astype(jnp.float32)[:, None, :, None] * self.frequencies(head_dim)[None, None, None, :]
        turns = jnp.concatenate([turns, turns], axis=-1)
        return jnp.cos(turns), jnp.sin(turns)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a decoder; field names and defaults are Hugging Face's Llama's, except ``model_type``, ``rope``, ``head``.

    ``head`` is ``"causal"``, ``"classes"`` or None: which one the weights have.
    """

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    pad_token_id: Any = None
    bos_token_id: Any = None
    eos_token_id: Any = None
    num_labels: int = 2
    head: str | None = "causal"
    rope: Rope = Rope()

    def __post_init__(self) -> None:
        configs.validate(self)
        if self.model_type not in _NAMES or self.head not in _HEADS:
            raise ValueError(f"LlamaConfig: model_type={self.model_type[:40]!r}, head={self.head!r} is not implemented")
        if self.model_type == "qwen2" and (self.attention_bias or self.mlp_bias):
            raise ValueError("LlamaConfig: Qwen2 has biases on query, key and value only; attention_bias is Llama's")
        if self.head_dim is None:
            configs.require_multiple(self, "hidden_size", "num_attention_heads")
        # Written out, so that equal models have equal configurations.
        object.__setattr__(self, "num_key_value_heads", self.kv_heads)
        object.__setattr__(self, "head_dim", self.head_size)
        configs.require_multiple(self, "num_attention_heads", "num_key_value_heads")
        if self.head_size % 2:
            raise ValueError(f"LlamaConfig: head_dim={self.head_dim} must be even, its dimensions turn in pairs")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            ids = value if isinstance(value, (list, tuple)) else [value]
            if not all(i is None or (isinstance(i, int) and not isinstance(i, bool) and abs(i) < 2**31) for i in ids):
                raise ValueError(f"LlamaConfig.{name} must be a token id, not {str(value)[:80]!r}")
            if value is not ids:
                continue
            if name != "eos_token_id":
                raise ValueError(f"LlamaConfig.{name} must be one token id, not {str(value)[:80]!r}")
            object.__setattr__(self, name, tuple(ids))

    @property
    def kv_heads(self) -> int:
        """``num_key_value_heads``, by default as many as there are heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """``head_dim``, by default the heads' share of ``hidden_size``."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def output_bias(self) -> bool:
        return self.attention_bias

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], tensors: Mapping[str, Any] | None = None, model_type: str = "llama"
    ) -> LlamaConfig:
        """Reads the dictionary of a ``config.json``.

        Args:
          raw: the dictionary.
          tensors: canonical names of the weights' file (see ``family.canonical``), which decide on the head. Where they
            show none, a tied one may still be there: then, and without tensors, the architecture in ``raw`` decides.
          model_type: ``"llama"`` or ``"qwen2"``.

        Raises:
          ValueError: naming every field or value that is not implemented.
        """
        own = {field.name for field in dataclasses.fields(cls)} - {"model_type", "rope", "head", "num_labels"}
        if model_type == "qwen2":
            own -= {"attention_bias", "mlp_bias"}
        only = {
            "model_type": (model_type,),
            "quantization_config": (None,),
            "rope_interleaved": (False, None),
            "use_mrope": (False, None),
            "is_decoder": (False, True, None),
            "is_encoder_decoder": (False, None),
            "add_cross_attention": (False, None),
        }
        rope = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "use_sliding_window"}
        configs.refuse_unknown(raw, _NAMES[model_type], own, only, _HARMLESS | rope)
        fields = {name: raw[name] for name in own if name in raw}
        fields["num_labels"] = configs.num_labels(raw)
        if fields.get("attention_dropout", 0.0) is None:
            del fields["attention_dropout"]
        if model_type == "qwen2":  # whose other defaults are Llama's
            fields = {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768} | fields
        config = cls(model_type=model_type, rope=Rope.from_dict(raw), head=_head(raw, tensors), **fields)
        _refuse_window(raw, config.num_hidden_layers)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The dictionary of a ``config.json`` from which transformers builds the same model."""
        raw = {key: value for key, value in dataclasses.asdict(self).items() if key not in ("rope", "head")}
        dropped = {"attention_bias", "mlp_bias"} if self.model_type == "qwen2" else set()
        dropped |= set() if self.head == "classes" else {"num_labels"}
        raw = {key: list(value) if isinstance(value, tuple) else value for key, value in raw.items() if key not in dropped}
        return raw | self.rope.to_dict() | {"architectures": [_NAMES[self.model_type] + _HEADS[self.head]]}


def _head(raw: Mapping[str, Any], tensors: Mapping[str, Any] | None) -> str | None:
    if tensors is not None and "score.weight" in tensors:
        return "classes"
    if tensors is not None and "lm_head.weight" in tensors:
        return "causal"
    architectures = raw.get("architectures") or ()
    if not isinstance(architectures, (list, tuple)):
        raise ValueError(f"architectures must be a list, not {str(architectures)[:80]!r}")
    named = " ".join(map(str, architectures))
    if not named:
        return "causal" if tensors is None or raw.get("tie_word_embeddings") is True else None
    return next((head for head, ending in _HEADS.items() if head is not None and ending in named), None)


def _refuse_window(raw: Mapping[str, Any], layers: int) -> None:
    """Raises a ValueError if any layer attends to a window only."""
    kinds = raw.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, (list, tuple)) or any(kind != "full_attention" for kind in kinds):
            raise ValueError(f"layer_types={str(kinds)[:120]} is not implemented (implemented: 'full_attention' everywhere)")
        return
    first = raw.get("max_window_layers", 28)
    inactive = raw.get("sliding_window", 4096) is None or (isinstance(first, int) and first >= layers)
    if raw.get("use_sliding_window") and not inactive:
        raise ValueError(
            f"use_sliding_window={str(raw['use_sliding_window'])[:40]} with max_window_layers={str(first)[:40]} of {layers} "
            "layers is not implemented: every layer must attend to everything before it"
        )
