"""BERT encoders (BERT, MiniLM and their kin) in Flax Linen, with Hugging Face's parameter names.

Parameter paths are Hugging Face's names with ``/`` for ``.``, without the prefix ``bert.`` of headed models::

    embeddings/{word,position,token_type}_embeddings/embedding      embeddings/LayerNorm/{scale,bias}
    encoder/layer/N/attention/self/{query,key,value}/{kernel,bias}
    encoder/layer/N/attention/output/{dense/{kernel,bias}, LayerNorm/{scale,bias}}
    encoder/layer/N/intermediate/dense/{kernel,bias}
    encoder/layer/N/output/{dense/{kernel,bias}, LayerNorm/{scale,bias}}
    pooler/dense/{kernel,bias}                                 (where the checkpoint has one)
    cls/predictions/{transform/{dense,LayerNorm}/..., bias}    (masked language models; the decoder is tied)

With ``scan_layers=True`` the ``N`` is gone and every leaf below ``encoder/layer`` has a leading axis of layers.

Taps (:class:`Tap`) of a layer, each ``[batch, seq, d_model]`` unless said otherwise::

    attention/self/tap_{query,key,value}    after the projections; key and value may get positions put in front,
                                            which every query then attends to
    attention/self/tap_context              attention's output, before the output projection
    intermediate/tap_hidden                 after the activation, [batch, seq, d_ff]
    output/tap_output                       the feed-forward output, before the residual sum
    tap_block                               the block's output

Reference: Devlin, Chang, Lee, Toutanova, "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding", 2019.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pefusion_jax.backbones import configs, names
from pefusion_jax.backbones.family import Family
from pefusion_jax.backbones.layers import ACTIVATIONS, LayerNorm
from pefusion_jax.backbones.taps import Tap

__all__ = ["FAMILY", "Bert", "BertConfig", "BertOutput", "name_table"]

# Fields of config.json that change nothing about the forward pass, and those with the only values that are implemented.
_HARMLESS = frozenset(
    """directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type""".split()
)
_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("bert",),
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "tie_encoder_decoder": (False, None),
    "tie_word_embeddings": (True, None),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The shape of a BERT model; field names and defaults are Hugging Face's, except ``pooler`` and ``masked_lm``.

    These two say which heads the weights have.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pooler: bool = True
    masked_lm: bool = False

    def __post_init__(self) -> None:
        configs.validate(self)
        configs.require_multiple(self, "hidden_size", "num_attention_heads")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], tensors: Mapping[str, Any] | None = None) -> BertConfig:
        """Reads the dictionary of a ``config.json``.

        Args:
          raw: the dictionary.
          tensors: canonical names of the weights' file (see ``family.canonical``), which decide on pooler and masked-LM
            head. Without them the architecture in ``raw`` does.

        Raises:
          ValueError: naming every field or value that this file does not implement.
        """
        own = {field.name for field in dataclasses.fields(cls)} - {"pooler", "masked_lm"}
        configs.refuse_unknown(raw, "BERT", own, _ONLY, _HARMLESS)
        if tensors is None:
            masked_lm = any("MaskedLM" in str(name) for name in raw.get("architectures") or ())
            pooler = not masked_lm
        else:
            masked_lm = any(name.startswith("cls.predictions.") for name in tensors)
            pooler = any(name.startswith("pooler.") for name in tensors)
        return cls(**{key: raw[key] for key in own if key in raw}, pooler=pooler, masked_lm=masked_lm)

    def to_dict(self) -> dict[str, Any]:
        """The dictionary of a ``config.json`` from which transformers builds the same model."""
        fields = {key: value for key, value in dataclasses.asdict(self).items() if key not in ("pooler", "masked_lm")}
        architecture = "BertForMaskedLM" if self.masked_lm else "BertModel"
        return {"model_type": "bert", "architectures": [architecture], **fields}


class BertOutput(NamedTuple):
    """What a :class:`Bert` returns; what does not apply is None.

    ``last_hidden_state [batch, seq, d_model]``; ``pooler_output [batch, d_model]``; ``hidden_states``: the
    embeddings and every block's output, each ``[batch, seq, d_model]``; ``logits [batch, seq, vocab]``.
    """

    last_hidden_state: jax.Array
    pooler_output: jax.Array | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    logits: jax.Array | None = None


Hidden = tuple[jax.Array, ...] | None


class _Part(nn.Module):
    """What every part needs to know."""

    config: BertConfig
    dtype: Any
    deterministic: bool

    def dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(features, dtype=self.dtype, name=name, kernel_init=nn.initializers.normal(0.02))

    def norm(self) -> LayerNorm:
        return LayerNorm(epsilon=self.config.layer_norm_eps, dtype=self.dtype, name="LayerNorm")

    def dropout(self, x: jax.Array, rate: float) -> jax.Array:
        return nn.Dropout(rate, deterministic=self.deterministic)(x)

    def parts(self) -> dict[str, Any]:
        return {"config": self.config, "dtype": self.dtype, "deterministic": self.deterministic}


class _Embeddings(_Part):
    def setup(self) -> None:
        def table(rows: int) -> nn.Embed:
            init = nn.initializers.normal(0.02)
            return nn.Embed(rows, self.config.hidden_size, dtype=self.dtype, embedding_init=init)

        self.word_embeddings = table(self.config.vocab_size)
        self.position_embeddings = table(self.config.max_position_embeddings)
        self.token_type_embeddings = table(self.config.type_vocab_size)
        self.LayerNorm = LayerNorm(epsilon=self.config.layer_norm_eps, dtype=self.dtype)
        self.drop = nn.Dropout(self.config.hidden_dropout_prob, deterministic=self.deterministic)

    def __call__(self, input_ids: jax.Array, token_type_ids: jax.Array, position_ids: jax.Array) -> jax.Array:
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        return self.drop(self.LayerNorm(x + self.position_embeddings(position_ids)))

    def decode(self, x: jax.Array) -> jax.Array:
        return self.word_embeddings.attend(x)


class _SelfAttention(_Part):
    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        heads, width = self.config.num_attention_heads, self.config.hidden_size
        query, key, value = (Tap(name=f"tap_{name}")(self.dense(width, name)(x)) for name in ("query", "key", "value"))
        # Heads in front: plain batched products, which XLA's CPU backend runs a fifth faster than the einsum over [b, s, h, d].
        query, key, value = (y.reshape(*y.shape[:2], heads, width // heads).swapaxes(1, 2) for y in (query, key, value))
        # Scores and softmax are float32 whatever the compute dtype.
        scores = jnp.matmul(query, key.swapaxes(2, 3), preferred_element_type=jnp.float32)
        scores = scores * jnp.float32((width // heads) ** -0.5)
        if mask is not None:
            prefix = key.shape[2] - mask.shape[1]
            if prefix > 0:  # positions that a method put in front of keys and values
                mask = jnp.pad(mask, ((0, 0), (prefix, 0)), constant_values=True)
            # A finite minimum: a row without any kept position attends uniformly instead of giving NaN.
            scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        weights = self.dropout(weights, self.config.attention_probs_dropout_prob)
        context = jnp.matmul(weights, value).swapaxes(1, 2)
        return Tap(name="tap_context")(context.reshape(*x.shape[:2], width))


class _ResidualOutput(_Part):
    """``LayerNorm(dropout(dense(x)) + residual)``, the end of both halves of a block."""

    tapped: bool

    @nn.compact
    def __call__(self, x: jax.Array, residual: jax.Array) -> jax.Array:
        x = self.dense(self.config.hidden_size, "dense")(x)
        if self.tapped:
            x = Tap(name="tap_output")(x)
        return self.norm()(self.dropout(x, self.config.hidden_dropout_prob) + residual)


class _Attention(_Part):
    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        context = _SelfAttention(**self.parts(), name="self")(x, mask)
        return _ResidualOutput(**self.parts(), tapped=False, name="output")(context, x)


class _Intermediate(_Part):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.dense(self.config.intermediate_size, "dense")(x)
        return Tap(name="tap_hidden")(ACTIVATIONS[self.config.hidden_act](x))


class _Block(_Part):
    keep: bool  # whether the block's output is collected as well as carried

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        x = _Attention(**self.parts(), name="attention")(x, mask)
        hidden = _Intermediate(**self.parts(), name="intermediate")(x)
        x = _ResidualOutput(**self.parts(), tapped=True, name="output")(hidden, x)
        x = Tap(name="tap_block")(x)
        return x, x if self.keep else None


class _LoopedBlocks(_Part):
    keep: bool
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, Hidden]:
        block = nn.remat(_Block) if self.remat else _Block
        kept = []
        for layer in range(self.config.num_hidden_layers):
            x, _ = block(**self.parts(), keep=self.keep, name=str(layer))(x, mask)
            kept.append(x)
        return x, tuple(kept) if self.keep else None


class _Encoder(_Part):
    keep: bool
    scan_layers: bool
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, Hidden]:
        if not self.scan_layers:
            return _LoopedBlocks(**self.parts(), keep=self.keep, remat=self.remat, name="layer")(x, mask)
        scanned = nn.scan(
            # Inside a scan, common subexpressions cannot undo the rematerialisation.
            nn.remat(_Block, prevent_cse=False) if self.remat else _Block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=self.config.num_hidden_layers,
        )
        x, kept = scanned(**self.parts(), keep=self.keep, name="layer")(x, mask)
        return x, None if kept is None else tuple(kept)


class _Pooler(_Part):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.dense(self.config.hidden_size, "dense")(x[:, 0]))


class _Transform(_Part):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.dense(self.config.hidden_size, "dense")(x)
        return self.norm()(ACTIVATIONS[self.config.hidden_act](x))


class _Predictions(_Part):
    @nn.compact
    def __call__(self, x: jax.Array, embeddings: _Embeddings) -> jax.Array:
        bias = self.param("bias", nn.initializers.zeros_init(), (self.config.vocab_size,))
        logits = embeddings.decode(_Transform(**self.parts(), name="transform")(x))
        return logits + bias.astype(self.dtype)[None, None, :]


class _MaskedLMHead(_Part):
    @nn.compact
    def __call__(self, x: jax.Array, embeddings: _Embeddings) -> jax.Array:
        return _Predictions(**self.parts(), name="predictions")(x, embeddings)


class Bert(nn.Module):
    """A BERT encoder, post-norm: ``x = LN(x + Attention(x)); x = LN(x + W2 act(W1 x))``.

    Attributes:
      config: the model's shape.
      dtype: of the computation; parameters may be float32 or the same. Softmax and norms are float32 in any case.
      scan_layers: one traced block scanned over stacked parameters instead of a loop (see ``stack_layers``).
      remat: recompute each block in the backward pass instead of storing its activations.
    """

    config: BertConfig
    dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array | Mapping[str, jax.Array],
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        *,
        deterministic: bool = True,
        output_hidden_states: bool = False,
    ) -> BertOutput:
        """Runs the encoder.

        Args:
          input_ids: token ids ``[batch, seq]``, or a mapping with the names of the array arguments.
          attention_mask: ``[batch, seq]``, non-zero = keep; all by default.
          token_type_ids: ``[batch, seq]``; zeros by default.
          position_ids: ``[batch, seq]`` or ``[1, seq]``; 0, 1, 2, ... by default.
          deterministic: False switches dropout on, which needs ``rngs={"dropout": key}``.
          output_hidden_states: also return every block's output.

        Raises:
          ValueError: if a shape is wrong or the sequence is longer than the position table.
        """
        arrays: tuple[jax.Array | None, ...] = (attention_mask, token_type_ids, position_ids)
        if isinstance(input_ids, Mapping):
            allowed = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
            if "input_ids" not in input_ids or set(input_ids) - set(allowed):
                raise ValueError(f"Bert takes a mapping with input_ids and any of {allowed[1:]}, not {list(input_ids)}")
            if any(array is not None for array in arrays):
                raise ValueError("Bert takes either one mapping or single arrays, not both")
            arrays = tuple(input_ids.get(name) for name in allowed[1:])
            input_ids = input_ids["input_ids"]
        ids = jnp.asarray(input_ids)
        self._check_shapes(ids, *arrays)
        mask, types, positions = (None if array is None else jnp.asarray(array) for array in arrays)
        mask = None if mask is None else mask.astype(bool)
        types = jnp.zeros_like(ids) if types is None else types
        positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :] if positions is None else positions

        parts = {"config": self.config, "dtype": self.dtype, "deterministic": deterministic}
        embeddings = _Embeddings(**parts, name="embeddings")
        first = embeddings(ids, types, positions)
        encoder = _Encoder(**parts, keep=output_hidden_states, scan_layers=self.scan_layers, remat=self.remat, name="encoder")
        last, kept = encoder(first, mask)
        return BertOutput(
            last_hidden_state=last,
            pooler_output=_Pooler(**parts, name="pooler")(last) if self.config.pooler else None,
            hidden_states=(first, *kept) if kept is not None else None,
            logits=_MaskedLMHead(**parts, name="cls")(last, embeddings) if self.config.masked_lm else None,
        )

    def _check_shapes(self, ids: jax.Array, *others: Any) -> None:
        if ids.ndim != 2:
            raise ValueError(f"Bert: input_ids must be [batch, seq], not of shape {ids.shape}")
        if ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"Bert: the sequence has {ids.shape[1]} tokens, the model at most "
                f"{self.config.max_position_embeddings}: truncate when tokenizing"
            )
        for name, array in zip(("attention_mask", "token_type_ids", "position_ids"), others, strict=True):
            allowed = {ids.shape, (1, ids.shape[1])} if name == "position_ids" else {ids.shape}
            if array is not None and jnp.shape(array) not in allowed:
                raise ValueError(f"Bert: {name} has shape {jnp.shape(array)}, input_ids has {ids.shape}")


def name_table(config: BertConfig) -> dict[str, names.Entry]:
    """The table of canonical names of a configuration, in the loop layout."""
    width, hidden = config.hidden_size, config.intermediate_size
    table: dict[str, names.Entry] = {}
    for kind, rows in (
        ("word", config.vocab_size),
        ("position", config.max_position_embeddings),
        ("token_type", config.type_vocab_size),
    ):
        table |= names.embedding(f"embeddings/{kind}_embeddings", f"embeddings.{kind}_embeddings", rows, width)
    layers = [f"encoder.layer.{layer}" for layer in range(config.num_hidden_layers)]
    denses, norms = [], ["embeddings.LayerNorm"]
    for layer in layers:
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            denses.append((f"{layer}.attention.{part}", width, width))
        denses.append((f"{layer}.intermediate.dense", width, hidden))
        denses.append((f"{layer}.output.dense", hidden, width))
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    if config.pooler:
        denses.append(("pooler.dense", width, width))
    if config.masked_lm:
        denses.append(("cls.predictions.transform.dense", width, width))
        norms.append("cls.predictions.transform.LayerNorm")
        table["cls/predictions/bias"] = names.Entry("cls.predictions.bias", (config.vocab_size,))
    for name, inputs, outputs in denses:
        table |= names.linear(name.replace(".", "/"), name, inputs, outputs)
    for name in norms:
        table |= names.norm(name.replace(".", "/"), name, width)
    return table


FAMILY = Family(
    name="BERT",
    model_types=("bert",),
    architectures=("BertModel", "BertForMaskedLM", "BertForPreTraining"),
    read_config=BertConfig.from_dict,
    write_config=BertConfig.to_dict,
    build=Bert,
    table=name_table,
    prefix="bert.",
    heads=("cls.",),
    renames=((r"\.LayerNorm\.gamma$", ".LayerNorm.weight"), (r"\.LayerNorm\.beta$", ".LayerNorm.bias")),
    # The constant 0, 1, 2, ..., and the next-sentence head of pretraining, which this model does not have.
    ignored=r"embeddings\.position_ids|cls\.seq_relationship\.(weight|bias)",
    copies=lambda config: (
        {
            "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        }
        if config.masked_lm
        else {}
    ),
)
