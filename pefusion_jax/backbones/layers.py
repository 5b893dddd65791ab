"""What several backbones share: activations by Hugging Face's names, a strict layer norm, and the two layer layouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pefusion_jax import trees


def _gelu(x: jax.Array) -> jax.Array:
    """:math:`x\\,\\Phi(x)`. jax.nn.gelu goes by erfc, which costs three times erf on a CPU and differs by 1e-6."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.7071067811865476))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


class LayerNorm(nn.LayerNorm):
    """``scale * (x - mean) / sqrt(var + eps) + bias`` over the last axis, in float32, returned in ``dtype``.

    Flax's own mixes dtypes implicitly when input or parameters are bfloat16, which strict promotion forbids.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # no mask
        scale = self.param("scale", self.scale_init, (x.shape[-1],), self.param_dtype).astype(jnp.float32)
        bias = self.param("bias", self.bias_init, (x.shape[-1],), self.param_dtype).astype(jnp.float32)
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, -1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + self.epsilon)
        lead = (1,) * (x.ndim - 1)
        return (x * scale.reshape(*lead, -1) + bias.reshape(*lead, -1)).astype(self.dtype)


class RMSNorm(nn.RMSNorm):
    """``scale * x / sqrt(mean(x^2) + eps)`` over the last axis, in float32, returned in ``dtype``; no mean, no bias."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # no mask
        scale = self.param("scale", self.scale_init, (x.shape[-1],), self.param_dtype).astype(jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + self.epsilon)
        return (x * scale.reshape(*(1,) * (x.ndim - 1), -1)).astype(self.dtype)


# Names that the numbered layers of a model stand under; the outermost one counts (T5 has a "layer" inside its "block").
STACKS = frozenset({"layer", "layers", "block"})


def stack_layers(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Turns the loop layout (``encoder/layer/N/...``) into the scan layout (leading axis of layers).

    Any tree with the same leaves in every layer will do, adapters included; what is stacked already is returned as it is.

    Raises:
      ValueError: if layers are missing in between or differ in structure.
    """

    def stack(layers: Mapping[str, Any]) -> Any:
        if not layers or not all(key.isdigit() for key in layers):
            return dict(layers)
        if set(layers) != {str(layer) for layer in range(len(layers))}:
            raise ValueError(f"layers must be numbered 0 to {len(layers) - 1} to be stacked, found: {sorted(layers)}")
        in_order = [layers[str(layer)] for layer in range(len(layers))]
        trees.require_same_structure({f"layer {layer}": tree for layer, tree in enumerate(in_order)})
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *in_order)

    return _at_stacks(tree, stack)


def unstack_layers(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`stack_layers`; a tree in the loop layout is returned as it is.

    Raises:
      ValueError: if the leading axes differ.
    """

    def unstack(layers: Mapping[str, Any]) -> Any:
        if not layers or all(key.isdigit() for key in layers):
            return dict(layers)
        counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(layers)}
        if len(counts) != 1 or counts == {()}:
            raise ValueError(f"the leaves below a stack of layers have different leading axes: {sorted(counts)}")
        return {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(counts.pop()[0])}

    return _at_stacks(tree, unstack)


def _at_stacks(tree: Mapping[str, Any], change: Callable[[Mapping[str, Any]], Any]) -> dict[str, Any]:
    """Applies ``change`` to the outermost nodes whose name is in ``STACKS``."""
    out: dict[str, Any] = {}
    for name, node in tree.items():
        if not isinstance(node, Mapping):
            out[name] = node
        else:
            out[name] = change(node) if name in STACKS else _at_stacks(node, change)
    return out
