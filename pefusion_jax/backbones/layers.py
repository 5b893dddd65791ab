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


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Turns the loop layout (``encoder/layer/N/...``) into the scan layout (leading axis of layers).

    Any tree with the same leaves in every layer will do, adapters included; a stacked one is returned as it is.

    Raises:
      ValueError: if layers are missing in between or differ in structure.
    """
    layers = params.get("encoder", {}).get("layer", {})
    if not layers or not all(key.isdigit() for key in layers):
        return dict(params)
    if set(layers) != {str(layer) for layer in range(len(layers))}:
        raise ValueError(f"layers must be numbered 0 to {len(layers) - 1} to be stacked, found: {sorted(layers)}")
    in_order = [layers[str(layer)] for layer in range(len(layers))]
    trees.require_same_structure({f"layer {layer}": tree for layer, tree in enumerate(in_order)})
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *in_order)
    return {**params, "encoder": {**params["encoder"], "layer": stacked}}


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`stack_layers`; a tree in the loop layout is returned as it is.

    Raises:
      ValueError: if the leading axes differ.
    """
    layers = params.get("encoder", {}).get("layer", {})
    if not layers or all(key.isdigit() for key in layers):
        return dict(params)
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(layers)}
    if len(counts) != 1 or counts == {()}:
        raise ValueError(f"the leaves below encoder/layer have different leading axes: {sorted(counts)}")
    loop = {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(counts.pop()[0])}
    return {**params, "encoder": {**params["encoder"], "layer": loop}}
