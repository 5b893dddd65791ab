"""The shape of a T5 model: its ``config.json``, of transformers 4 or 5, and the names of its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from pefusion_jax.backbones import configs, names
from pefusion_jax.backbones.layers import ACTIVATIONS

__all__ = ["T5Config", "copies", "name_table"]

# Fields of config.json that change nothing about the forward pass, and those with the only values that are implemented.
_HARMLESS = frozenset("n_positions output_past is_encoder_decoder".split())
_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("t5",),
    "is_decoder": (False, None),
    "tie_encoder_decoder": (False, None),
    "tie_word_embeddings": (True, False, None),
    "scale_decoder_outputs": (True, False),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}
TokenIds = int | tuple[int, ...] | None  # one, several, or none
_MAX_DISTANCE = 2**20  # a table of this size is looked up in


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The shape of a T5 model; field names and defaults are Hugging Face's, except the last three.

    ``decoder`` and ``lm_head`` say which parts there are, ``tied`` whether the language-modelling head is the transposed
    embedding table. ``feed_forward_proj`` is ``ACT`` or ``gated-ACT``, where ``gated-gelu`` means the tanh approximation.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    pad_token_id: TokenIds = 0
    eos_token_id: TokenIds = 1
    decoder_start_token_id: TokenIds = 0
    scale_decoder_outputs: bool = True
    decoder: bool = True
    lm_head: bool = True
    tied: bool = True

    def __post_init__(self) -> None:
        configs.validate(self)
        if not 0 < self.layer_norm_epsilon < 1:
            raise ValueError(f"T5Config.layer_norm_epsilon must lie in (0, 1), not {self.layer_norm_epsilon!r}")
        for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
            ids = getattr(self, name)
            several = ids if isinstance(ids, tuple) and name == "eos_token_id" else () if ids is None else (ids,)
            if not all(type(token) is int and 0 <= token <= configs.MAX_SIZE for token in several):
                raise ValueError(f"T5Config.{name} must be a token id, not {str(ids)[:120]}")
        gated, activation = self.feed_forward
        if activation not in ACTIVATIONS or self.feed_forward_proj not in (activation, f"gated-{activation}", "gated-gelu"):
            known = ", ".join(ACTIVATIONS)
            given = self.feed_forward_proj[:120]
            raise ValueError(
                f"T5Config.feed_forward_proj={given!r} is not implemented; implemented, alone or after 'gated-': {known}"
            )
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4:
            raise ValueError(f"T5Config.relative_attention_num_buckets must be at least 4, not {buckets}")
        exact = buckets // (2 if self.decoder else 4)
        if not exact < distance <= _MAX_DISTANCE:
            raise ValueError(
                f"T5Config.relative_attention_max_distance must exceed {exact}, up to where each distance has a bucket of its "
                f"own among relative_attention_num_buckets={buckets}, and be at most {_MAX_DISTANCE}, not {distance}"
            )

    @property
    def decoder_layers(self) -> int:
        """Blocks of the decoder: as many as the encoder has, unless said otherwise."""
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    @property
    def feed_forward(self) -> tuple[bool, str]:
        """Whether the feed-forward layer is gated, and its activation."""
        gated = self.feed_forward_proj.startswith("gated-")
        activation = self.feed_forward_proj.removeprefix("gated-")
        return gated, "gelu_new" if gated and activation == "gelu" else activation

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], tensors: Mapping[str, Any] | None = None) -> T5Config:
        """Reads the dictionary of a ``config.json``, of transformers 4 or 5.

        Transformers 5 writes ``tie_word_embeddings: true`` for every T5. So the head is untied if the field says so or if
        the weights hold a head that differs from the embeddings. The decoder's output is scaled by ``d_model**-0.5`` as
        ``scale_decoder_outputs`` says; without this field, unless ``tie_word_embeddings`` is false.

        Args:
          raw: the dictionary.
          tensors: canonical names of the weights' file, with arrays (see ``family.canonical``), which decide on decoder and
            head. Without them the architecture in ``raw`` does.

        Raises:
          ValueError: naming every field or value that this file does not implement.
        """
        own = {field.name for field in dataclasses.fields(cls)} - {"scale_decoder_outputs", "decoder", "lm_head", "tied"}
        configs.refuse_unknown(raw, "T5", own, _ONLY, _HARMLESS | {"dense_act_fn", "is_gated_act"})
        architectures = raw.get("architectures") or ()
        if not isinstance(architectures, (list, tuple)):
            raise ValueError(f"architectures must be a list of names, not {type(architectures).__name__}")
        present = {} if tensors is None else tensors
        encoder_only = "T5EncoderModel" in architectures or (not architectures and tensors is not None)
        decoder = not encoder_only or any(name.startswith("decoder.") for name in present)
        lm_head = decoder and ("lm_head.weight" in present or "T5Model" not in architectures)
        tie = raw.get("tie_word_embeddings") is not False
        fields = {key: raw[key] for key in own if key in raw}
        if isinstance(fields.get("eos_token_id"), list):
            fields["eos_token_id"] = tuple(fields["eos_token_id"])
        if fields.get("decoder_start_token_id") is None:
            fields.pop("decoder_start_token_id", None)
        config = cls(
            **fields,
            scale_decoder_outputs=raw.get("scale_decoder_outputs", tie),
            decoder=decoder,
            lm_head=lm_head,
            tied=not lm_head or (tie and not _differ(present)),
        )
        derived = {"is_gated_act": config.feed_forward[0], "dense_act_fn": config.feed_forward[1]}
        for field, value in derived.items():
            if raw.get(field) is not None and raw[field] != value:
                raise ValueError(
                    f"{field} contradicts feed_forward_proj={config.feed_forward_proj!r}, which makes it {value!r}; "
                    "remove the one that is wrong"
                )
        return config

    def to_dict(self) -> dict[str, Any]:
        """The dictionary of a ``config.json`` from which transformers 4 and 5 build the same model."""
        ours = ("decoder", "lm_head", "tied")
        fields = {key: value for key, value in dataclasses.asdict(self).items() if key not in ours}
        gated, activation = self.feed_forward
        return {
            "model_type": "t5",
            "architectures": [
                "T5EncoderModel" if not self.decoder else "T5ForConditionalGeneration" if self.lm_head else "T5Model"
            ],
            **fields,
            "num_decoder_layers": self.decoder_layers,
            "is_gated_act": gated,
            "dense_act_fn": activation,
            # What transformers 4 reads; without a head it only tells the scaling.
            "tie_word_embeddings": self.tied if self.lm_head else self.scale_decoder_outputs,
            "is_encoder_decoder": self.decoder,
            "eos_token_id": list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id,
        }


def _differ(present: Mapping[str, Any]) -> bool:
    """Whether head and embeddings are arrays of different values; descriptions of tensors differ by shape only."""
    if "lm_head.weight" not in present or "shared.weight" not in present:
        return False
    head, shared = present["lm_head.weight"], present["shared.weight"]
    if isinstance(head, np.ndarray) and isinstance(shared, np.ndarray):
        return not np.array_equal(head, shared)
    return tuple(head.shape) != tuple(shared.shape)


def name_table(config: T5Config) -> dict[str, names.Entry]:
    """The table of canonical names of a configuration, in the loop layout."""
    width, inner = config.d_model, config.num_heads * config.d_kv
    table = names.embedding("shared", "shared", config.vocab_size, width)
    gated = config.feed_forward[0]
    for stack, layers in (("encoder", config.num_layers), ("decoder", config.decoder_layers)):
        if stack == "decoder" and not config.decoder:
            continue
        table |= names.embedding(
            f"{stack}/relative_attention_bias",
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias",
            config.relative_attention_num_buckets,
            config.num_heads,
        )
        attentions = ["SelfAttention"] + (["EncDecAttention"] if stack == "decoder" else [])
        for layer in range(layers):
            block = f"{stack}.block.{layer}.layer"
            denses = []
            for part, attention in enumerate(attentions):
                denses += [(f"{part}.{attention}.{name}", width, inner) for name in "qkv"]
                denses.append((f"{part}.{attention}.o", inner, width))
            last = f"{len(attentions)}.DenseReluDense"
            denses += [(f"{last}.{name}", width, config.d_ff) for name in (("wi_0", "wi_1") if gated else ("wi",))]
            denses.append((f"{last}.wo", config.d_ff, width))
            for name, inputs, outputs in denses:
                name = f"{block}.{name}"
                table |= names.linear(name.replace(".", "/"), name, inputs, outputs, bias=False)
            for part in range(len(attentions) + 1):
                name = f"{block}.{part}.layer_norm"
                table |= names.norm(name.replace(".", "/"), name, width, bias=False)
        table |= names.norm(f"{stack}/final_layer_norm", f"{stack}.final_layer_norm", width, bias=False)
    if config.lm_head and not config.tied:
        table |= names.linear("lm_head", "lm_head", width, config.vocab_size, bias=False)
    return table


def copies(config: T5Config) -> dict[str, str]:
    """Tensors that a file may repeat, and what they are copies of."""
    tied = ["encoder.embed_tokens.weight"]
    tied += ["decoder.embed_tokens.weight"] if config.decoder else []
    tied += ["lm_head.weight"] if config.lm_head and config.tied else []
    return dict.fromkeys(tied, "shared.weight")
