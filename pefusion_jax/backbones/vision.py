"""What ViT, DINOv2 and CLIP share: the pre-norm block, its stack and its names.

A block is ``x = x + s1 * Attention(LN(x)); x = x + s2 * FFN(LN(x))``; only DINOv2 has the learned scales ``s``. The three
families differ in the names of its parts, which a :class:`Layout` holds:

    ViT     {layernorm_before,layernorm_after} attention/{attention/{query,key,value},output/dense}
            intermediate/dense output/dense
    DINOv2  {norm1,norm2} attention/{attention/{query,key,value},output/dense} mlp/{fc1,fc2} layer_scale{1,2}/lambda1
            or with SwiGLU mlp/{gate_proj,up_proj,down_proj}
    CLIP    {layer_norm1,layer_norm2} self_attn/{q_proj,k_proj,v_proj,out_proj} mlp/{fc1,fc2}

Taps (:class:`Tap`) of a block: ``tap_{query,key,value,context}`` stand beside the query projection (``attention/attention/`` or
``self_attn/``), ``tap_hidden`` in ``intermediate/`` or ``mlp/``, ``tap_output`` in ``output/`` or ``mlp/``, before any layer
scale, whose source is the normed feed-forward input, and ``tap_block`` in the block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pefusion_jax.backbones import names
from pefusion_jax.backbones.layers import ACTIVATIONS, LayerNorm
from pefusion_jax.backbones.taps import Tap

# What older files carry for every model: nothing of it reaches an encoder's forward pass.
LEGACY = frozenset(
    """bad_words_ids diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_scores remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens
    begin_suppress_tokens temperature tf_legacy_loss tie_word_embeddings top_k top_p typical_p use_bfloat16""".split()
)
ONLY: dict[str, tuple[Any, ...]] = {
    "is_decoder": (False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}

Hidden = tuple[jax.Array, ...] | None
INIT = nn.initializers.normal(0.02)


class Layout(NamedTuple):
    """The names of a block's parts.

    ``nested``: the projections stand in ``attention/attention`` and the output projection is ``attention/output/dense``.
    ``mlp``: the feed-forward network is ``mlp/{fc1,fc2}``, not ``intermediate/dense`` and ``output/dense``.
    """

    norms: tuple[str, str]
    attention: str
    projections: tuple[str, str, str]
    nested: bool
    mlp: bool


class Stack(NamedTuple):
    """The shape of a stack of blocks; hashable. ``residual_dropout`` and ``drop_path`` act on both branches of a block."""

    layout: Layout
    layers: int
    width: int
    hidden: int
    heads: int
    act: str
    eps: float
    bias: bool = True  # of query, key and value
    swiglu: bool = False
    layer_scale: float | None = None  # the initial value; None: there is none
    residual_dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0


class _Part(nn.Module):
    stack: Stack
    dtype: Any
    deterministic: bool

    def dense(self, features: int, name: str, bias: bool = True) -> nn.Dense:
        return nn.Dense(features, use_bias=bias, dtype=self.dtype, name=name, kernel_init=INIT)

    def dropout(self, x: jax.Array, rate: float, per_example: bool = False) -> jax.Array:
        axes = tuple(range(1, x.ndim)) if per_example else ()
        return nn.Dropout(rate, broadcast_dims=axes, deterministic=self.deterministic)(x)

    def parts(self) -> dict[str, Any]:
        return {"stack": self.stack, "dtype": self.dtype, "deterministic": self.deterministic}


class _SelfAttention(_Part):
    out: str | None  # the output projection's name where it stands here

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        heads, width = self.stack.heads, self.stack.width
        query, key, value = (
            Tap(name=f"tap_{role}")(self.dense(width, name, self.stack.bias)(x))
            for role, name in zip(("query", "key", "value"), self.stack.layout.projections, strict=True)
        )
        query, key, value = (y.reshape(*y.shape[:2], heads, width // heads).swapaxes(1, 2) for y in (query, key, value))
        # Scores and softmax are float32 whatever the compute dtype.
        scores = jnp.matmul(query, key.swapaxes(2, 3), preferred_element_type=jnp.float32)
        scores = scores * jnp.float32((width // heads) ** -0.5)
        if mask is not None:
            prefix = key.shape[2] - mask.shape[2]
            if prefix > 0:  # positions that a method put in front of keys and values
                mask = jnp.pad(mask, ((0, 0), (0, 0), (prefix, 0)), constant_values=True)
            # A finite minimum: a row without any kept position attends uniformly instead of giving NaN.
            scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        weights = self.dropout(weights, self.stack.attention_dropout)
        context = jnp.matmul(weights, value).swapaxes(1, 2)
        context = Tap(name="tap_context")(context.reshape(*x.shape[:2], width))
        return context if self.out is None else self.dense(width, self.out)(context)


class _Output(_Part):
    """A projection back to the model's width, in a module of its own."""

    tapped: bool

    @nn.compact
    def __call__(self, x: jax.Array, source: jax.Array | None = None) -> jax.Array:
        x = self.dense(self.stack.width, "dense")(x)
        return Tap(name="tap_output")(x, source) if self.tapped else x


class _NestedAttention(_Part):
    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        context = _SelfAttention(**self.parts(), out=None, name="attention")(x, mask)
        return _Output(**self.parts(), tapped=False, name="output")(context)


class _Intermediate(_Part):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Tap(name="tap_hidden")(ACTIVATIONS[self.stack.act](self.dense(self.stack.hidden, "dense")(x)))


class _Mlp(_Part):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, hidden, source = self.stack.width, self.stack.hidden, x
        if self.stack.swiglu:
            x = jax.nn.silu(self.dense(hidden, "gate_proj")(x)) * self.dense(hidden, "up_proj")(x)
        else:
            x = ACTIVATIONS[self.stack.act](self.dense(hidden, "fc1")(x))
        x = Tap(name="tap_hidden")(x)
        return Tap(name="tap_output")(self.dense(width, "down_proj" if self.stack.swiglu else "fc2")(x), source)


class _LayerScale(_Part):
    initial: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.constant(self.initial)
        scale = self.param("lambda1", init, (self.stack.width,), jnp.float32)
        return x * scale.astype(self.dtype)[None, None, :]


class _Block(_Part):
    keep: bool  # whether the block's output is collected as well as carried

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        layout, parts = self.stack.layout, self.parts()
        y = self.norm(layout.norms[0])(x)
        if layout.nested:
            y = _NestedAttention(**parts, name=layout.attention)(y, mask)
        else:
            y = _SelfAttention(**parts, out="out_proj", name=layout.attention)(y, mask)
        x = x + self.branch(y, "layer_scale1")
        y = self.norm(layout.norms[1])(x)
        if layout.mlp:
            y = _Mlp(**parts, name="mlp")(y)
        else:
            y = _Output(**parts, tapped=True, name="output")(_Intermediate(**parts, name="intermediate")(y), y)
        x = Tap(name="tap_block")(x + self.branch(y, "layer_scale2"))
        return x, x if self.keep else None

    def norm(self, name: str) -> LayerNorm:
        return LayerNorm(epsilon=self.stack.eps, dtype=self.dtype, name=name)

    def branch(self, y: jax.Array, scale: str) -> jax.Array:
        if self.stack.layer_scale is not None:
            y = _LayerScale(**self.parts(), initial=self.stack.layer_scale, name=scale)(y)
        return self.dropout(self.dropout(y, self.stack.residual_dropout), self.stack.drop_path, per_example=True)


class _LoopedBlocks(_Part):
    keep: bool
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, Hidden]:
        block = nn.remat(_Block) if self.remat else _Block
        kept = []
        for layer in range(self.stack.layers):
            x, _ = block(**self.parts(), keep=self.keep, name=str(layer))(x, mask)
            kept.append(x)
        return x, tuple(kept) if self.keep else None


class Encoder(_Part):
    """A stack of blocks under ``node``: ``(x [batch, seq, d], mask [batch or 1, seq, seq]) -> (x, every block's or None)``."""

    node: str
    keep: bool
    scan_layers: bool
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, Hidden]:
        if not self.scan_layers:
            return _LoopedBlocks(**self.parts(), keep=self.keep, remat=self.remat, name=self.node)(x, mask)
        scanned = nn.scan(
            # Inside a scan, common subexpressions cannot undo the rematerialisation.
            nn.remat(_Block, prevent_cse=False) if self.remat else _Block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=self.stack.layers,
        )
        x, kept = scanned(**self.parts(), keep=self.keep, name=self.node)(x, mask)
        return x, None if kept is None else tuple(kept)


def stack_table(stack: Stack, node: str) -> dict[str, names.Entry]:
    """The rows of a stack of blocks below ``node`` (dots), in the loop layout."""
    layout, width, hidden = stack.layout, stack.width, stack.hidden
    table: dict[str, names.Entry] = {}
    for layer in range(stack.layers):
        at = f"{node}.{layer}"
        inner = f"{at}.{layout.attention}" + (".attention" if layout.nested else "")
        denses = [(f"{inner}.{name}", width, width, stack.bias) for name in layout.projections]
        out = "output.dense" if layout.nested else "out_proj"
        denses.append((f"{at}.{layout.attention}.{out}", width, width, True))
        if not stack.swiglu:
            first, second = ("mlp.fc1", "mlp.fc2") if layout.mlp else ("intermediate.dense", "output.dense")
            denses += [(f"{at}.{first}", width, hidden, True), (f"{at}.{second}", hidden, width, True)]
        else:
            path = f"{at}.mlp".replace(".", "/")
            # On disk the two are one tensor, gate first; in transformers 5's memory they are apart, as here.
            for i, name in enumerate(("gate_proj", "up_proj")):
                source = f"{at}.mlp.weights_in"
                table[f"{path}/{name}/kernel"] = names.Entry(f"{source}.weight", (2 * hidden, width), (1, 0), (i, 2))
                table[f"{path}/{name}/bias"] = names.Entry(f"{source}.bias", (2 * hidden,), None, (i, 2))
            table |= names.linear(f"{path}/down_proj", f"{at}.mlp.weights_out", hidden, width)
        for name, inputs, outputs, bias in denses:
            table |= names.linear(name.replace(".", "/"), name, inputs, outputs, bias)
        for name in layout.norms:
            table |= names.norm(f"{at}.{name}".replace(".", "/"), f"{at}.{name}", width)
        if stack.layer_scale is not None:
            for i in (1, 2):
                name = f"{at}.layer_scale{i}.lambda1"
                table[name.replace(".", "/")] = names.Entry(name, (width,))
    return table
