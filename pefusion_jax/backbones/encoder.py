"""The parts that post-norm text encoders share: ``x = LN(x + Attention(x)); x = LN(x + W2 act(W1 x))``.

BERT, RoBERTa and MPNet are made of these (``text_encoder.py`` is the whole); what they differ in is in their own files.
Parameter paths below ``encoder``, where BERT's and RoBERTa's attention is :class:`Attention` and MPNet brings its own::

    layer/N/attention/self/{query,key,value}/{kernel,bias}
    layer/N/attention/output/{dense/{kernel,bias}, LayerNorm/{scale,bias}}
    layer/N/intermediate/dense/{kernel,bias}
    layer/N/output/{dense/{kernel,bias}, LayerNorm/{scale,bias}}

Taps (:class:`Tap`) of a layer, each ``[batch, seq, d_model]`` unless said otherwise::

    attention/self/tap_{query,key,value}    after the projections; key and value may get positions put in front,
                                            which every query then attends to
    attention/self/tap_context              attention's output, before the output projection
    intermediate/tap_hidden                 after the activation, [batch, seq, d_ff]
    output/tap_output                       the feed-forward output, before dropout and the residual sum; its source is the
                                            feed-forward input
    tap_block                               the block's output
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pefusion_jax.backbones.layers import ACTIVATIONS, LayerNorm
from pefusion_jax.backbones.taps import Tap


class EncoderOutput(NamedTuple):
    """What a text encoder returns; what does not apply is None.

    ``last_hidden_state [batch, seq, d_model]``; ``pooler_output [batch, d_model]``; ``hidden_states``: the
    embeddings and every block's output, each ``[batch, seq, d_model]``; ``logits [batch, seq, vocab]`` of a masked
    language model or ``[batch, classes]`` of a sequence classifier.
    """

    last_hidden_state: jax.Array
    pooler_output: jax.Array | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    logits: jax.Array | None = None


Hidden = tuple[jax.Array, ...] | None


def read_inputs(
    model: str,
    input_ids: jax.Array | Mapping[str, jax.Array],
    others: Mapping[str, jax.Array | None],
    longest: int,
    given_positions: int,
) -> tuple[jax.Array, dict[str, jax.Array | None]]:
    """Checks the inputs of a text encoder, given as single arrays or as one mapping.

    Args:
      model: the model's name, for messages.
      input_ids: ``[batch, seq]``, or a mapping with input_ids and any of the names in ``others``.
      others: the arrays beside input_ids; ``position_ids`` may be ``[1, seq]``.
      longest: how many tokens the position table has rows for.
      given_positions: the same where position_ids are given.

    Returns:
      The ids and the other arrays by name; the attention mask is boolean.

    Raises:
      ValueError: if a name or a shape is wrong, or if the sequence is longer than the position table.
    """
    if isinstance(input_ids, Mapping):
        if "input_ids" not in input_ids or set(input_ids) - {"input_ids", *others}:
            raise ValueError(f"{model} takes a mapping with input_ids and any of {tuple(others)}, not {list(input_ids)}")
        if any(array is not None for array in others.values()):
            raise ValueError(f"{model} takes either one mapping or single arrays, not both")
        others = {name: input_ids.get(name) for name in others}
        input_ids = input_ids["input_ids"]
    ids = jnp.asarray(input_ids)
    if ids.ndim != 2:
        raise ValueError(f"{model}: input_ids must be [batch, seq], not of shape {ids.shape}")
    most = longest if others["position_ids"] is None else given_positions
    if ids.shape[1] > most:
        raise ValueError(f"{model}: the sequence has {ids.shape[1]} tokens, the model at most {most}: truncate when tokenizing")
    for name, array in others.items():
        allowed = {ids.shape, (1, ids.shape[1])} if name == "position_ids" else {ids.shape}
        if array is not None and jnp.shape(array) not in allowed:
            raise ValueError(f"{model}: {name} has shape {jnp.shape(array)}, input_ids has {ids.shape}")
    arrays = {name: None if array is None else jnp.asarray(array) for name, array in others.items()}
    mask = arrays["attention_mask"]
    return ids, arrays | {"attention_mask": None if mask is None else mask.astype(bool)}


def positions_after_padding(ids: jax.Array, pad: int) -> jax.Array:
    """Positions that count the tokens other than padding: ``pad + 1, pad + 2, ...``; padding itself stands at ``pad``.

    Args:
      ids: ``[batch, seq]``.
      pad: the id of padding.

    Returns:
      ``[batch, seq]`` int32.

    Reference: Ott et al., "fairseq: A Fast, Extensible Toolkit for Sequence Modeling", 2019 (``make_positions``).
    """
    kept = (ids != pad).astype(jnp.int32)
    return jnp.cumsum(kept, axis=1) * kept + jnp.int32(pad)


class Part(nn.Module):
    """What every part needs to know."""

    config: Any
    dtype: Any
    deterministic: bool

    def dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(features, dtype=self.dtype, name=name, kernel_init=nn.initializers.normal(0.02))

    def norm(self, name: str = "LayerNorm") -> LayerNorm:
        return LayerNorm(epsilon=self.config.layer_norm_eps, dtype=self.dtype, name=name)

    def dropout(self, x: jax.Array, rate: float) -> jax.Array:
        return nn.Dropout(rate, deterministic=self.deterministic)(x)

    def parts(self) -> dict[str, Any]:
        return {"config": self.config, "dtype": self.dtype, "deterministic": self.deterministic}


class Embeddings(Part):
    """``dropout(LN(word + token type + position))``; ``token_types`` is the number of rows, 0 for no such table."""

    token_types: int

    def setup(self) -> None:
        def table(rows: int) -> nn.Embed:
            init = nn.initializers.normal(0.02)
            return nn.Embed(rows, self.config.hidden_size, dtype=self.dtype, embedding_init=init)

        self.word_embeddings = table(self.config.vocab_size)
        self.position_embeddings = table(self.config.max_position_embeddings)
        if self.token_types:
            self.token_type_embeddings = table(self.token_types)
        self.LayerNorm = LayerNorm(epsilon=self.config.layer_norm_eps, dtype=self.dtype)
        self.drop = nn.Dropout(self.config.hidden_dropout_prob, deterministic=self.deterministic)

    def __call__(self, input_ids: jax.Array, token_type_ids: jax.Array | None, position_ids: jax.Array) -> jax.Array:
        x = self.word_embeddings(input_ids)
        if self.token_types:
            x = x + self.token_type_embeddings(jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids)
        return self.drop(self.LayerNorm(x + self.position_embeddings(position_ids)))

    def decode(self, x: jax.Array) -> jax.Array:
        return self.word_embeddings.attend(x)


class SelfAttention(Part):
    """``softmax(q k^T / sqrt(d_head) + bias) v``; the projections' names are the family's."""

    projections: tuple[str, str, str] = ("query", "key", "value")

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, bias: jax.Array | None) -> jax.Array:
        return self.attend(x, mask, bias)

    def attend(self, x: jax.Array, mask: jax.Array | None, bias: jax.Array | None) -> jax.Array:
        heads, width = self.config.num_attention_heads, self.config.hidden_size
        query, key, value = (
            Tap(name=f"tap_{tap}")(self.dense(width, name)(x))
            for tap, name in zip(("query", "key", "value"), self.projections, strict=True)
        )
        # Heads in front: plain batched products, which XLA's CPU backend runs a fifth faster than the einsum over [b, s, h, d].
        query, key, value = (y.reshape(*y.shape[:2], heads, width // heads).swapaxes(1, 2) for y in (query, key, value))
        # Scores and softmax are float32 whatever the compute dtype.
        scores = jnp.matmul(query, key.swapaxes(2, 3), preferred_element_type=jnp.float32)
        scores = scores * jnp.float32((width // heads) ** -0.5)
        prefix = key.shape[2] - query.shape[2]  # positions that a method put in front of keys and values
        if bias is not None:  # [1, heads, seq, seq]; positions in front have no place in the text, so no bias
            scores = scores + (jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (prefix, 0))) if prefix > 0 else bias)
        if mask is not None:
            if prefix > 0:
                mask = jnp.pad(mask, ((0, 0), (prefix, 0)), constant_values=True)
            # A finite minimum: a row without any kept position attends uniformly instead of giving NaN.
            scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        weights = self.dropout(weights, self.config.attention_probs_dropout_prob)
        context = jnp.matmul(weights, value).swapaxes(1, 2)
        return Tap(name="tap_context")(context.reshape(*x.shape[:2], width))


class ResidualOutput(Part):
    """``LayerNorm(dropout(dense(x)) + residual)``, the end of both halves of a block."""

    tapped: bool

    @nn.compact
    def __call__(self, x: jax.Array, residual: jax.Array) -> jax.Array:
        x = self.dense(self.config.hidden_size, "dense")(x)
        if self.tapped:
            x = Tap(name="tap_output")(x, residual)
        return self.norm()(self.dropout(x, self.config.hidden_dropout_prob) + residual)


class Attention(Part):
    """The attention half of a block, with BERT's names."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, bias: jax.Array | None) -> jax.Array:
        context = SelfAttention(**self.parts(), name="self")(x, mask, bias)
        return ResidualOutput(**self.parts(), tapped=False, name="output")(context, x)


class _Intermediate(Part):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.dense(self.config.intermediate_size, "dense")(x)
        return Tap(name="tap_hidden")(ACTIVATIONS[self.config.hidden_act](x))


class _Block(Part):
    attention_kind: type[Part]
    keep: bool  # whether the block's output is collected as well as carried

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        x = self.attention_kind(**self.parts(), name="attention")(x, mask, bias)
        hidden = _Intermediate(**self.parts(), name="intermediate")(x)
        x = ResidualOutput(**self.parts(), tapped=True, name="output")(hidden, x)
        x = Tap(name="tap_block")(x)
        return x, x if self.keep else None


class _LoopedBlocks(Part):
    attention_kind: type[Part]
    keep: bool
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, bias: jax.Array | None) -> tuple[jax.Array, Hidden]:
        block = nn.remat(_Block) if self.remat else _Block
        kept = []
        for layer in range(self.config.num_hidden_layers):
            x, _ = block(**self.parts(), attention_kind=self.attention_kind, keep=self.keep, name=str(layer))(x, mask, bias)
            kept.append(x)
        return x, tuple(kept) if self.keep else None


class Encoder(Part):
    """The stack of blocks.

    Attributes:
      keep: also return every block's output.
      scan_layers: one traced block scanned over stacked parameters instead of a loop.
      remat: recompute each block in the backward pass.
      attention_kind: the module of a block's attention half.
    """

    keep: bool
    scan_layers: bool
    remat: bool
    attention_kind: type[Part] = Attention

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, Hidden]:
        bias = self.bias(x.shape[1])
        options = {**self.parts(), "attention_kind": self.attention_kind, "keep": self.keep, "name": "layer"}
        if not self.scan_layers:
            return _LoopedBlocks(**options, remat=self.remat)(x, mask, bias)
        scanned = nn.scan(
            # Inside a scan, common subexpressions cannot undo the rematerialisation.
            nn.remat(_Block, prevent_cse=False) if self.remat else _Block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=self.config.num_hidden_layers,
        )
        x, kept = scanned(**options)(x, mask, bias)
        return x, None if kept is None else tuple(kept)

    def bias(self, length: int) -> jax.Array | None:
        """What all layers add to their scores, ``[1, heads, length, length]`` float32; None here."""
        return None


class Pooler(Part):
    """``tanh(W x_0 + b)``: a vector for the sequence, from its first token."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.dense(self.config.hidden_size, "dense")(x[:, 0]))


class LMHead(Part):
    """The masked-LM head of RoBERTa and MPNet, tied: ``LN(gelu(W x)) E^T + b``; always gelu, whatever the blocks have."""

    @nn.compact
    def __call__(self, x: jax.Array, embeddings: Embeddings) -> jax.Array:
        bias = self.param("bias", nn.initializers.zeros_init(), (self.config.vocab_size,))
        x = ACTIVATIONS["gelu"](self.dense(self.config.hidden_size, "dense")(x))
        return embeddings.decode(self.norm("layer_norm")(x)) + bias.astype(self.dtype)[None, None, :]


class ClassificationHead(Part):
    """The sequence classifier of RoBERTa and MPNet: ``W2 tanh(W1 x_0)``, with dropout at ``rate`` before each product."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.dense(self.config.hidden_size, "dense")(self.dropout(x[:, 0], self.rate))
        return self.dense(self.config.classes, "out_proj")(self.dropout(jnp.tanh(x), self.rate))
