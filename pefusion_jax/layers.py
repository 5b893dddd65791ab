"""Linear layers of Linen as one thing: what they contract, what they produce, and how a factor pair goes through them.

Taps are described in the same words, as layers without a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pefusion_jax.backbones.taps import Tap

# A layer is applied with another weight by cloning it; its own interception must leave such a clone alone.
_CLONE = "pefusion_layer_with_another_kernel"


class Layer(NamedTuple):
    """A linear layer as a method sees it, free of Linen.

    Attributes:
      path: slash path of the module; under a scan the path inside the scanned body, one for all layers.
      kernel: name of the weight parameter, ``kernel`` or ``embedding``; empty for a tap, which has none.
      inputs: axes of the weight that are contracted with the input, as their sizes; of a tap the last axis of its source,
        none where it has no source.
      outputs: axes of the weight that appear in the output, as their sizes.
      a_shape: ``rank -> `` shape of the factor that reads the input, ``[*batch, *inputs, rank]``.
      b_shape: ``rank -> `` shape of the factor that writes the output, ``[*batch, rank, *outputs]``.
      fan_in: number of inputs of one output, for initialisers; 1 for an embedding, whose input is one-hot.
      pair: ``(x, a, b) -> x A B`` with the layer's own contraction, never multiplying ``A B`` out.
      rows: ``x -> [*batch, *positions, in]``, what the weight, read as a matrix ``[*batch, in, out]``, is multiplied by:
        for a convolution the patches. ``None`` for an embedding, whose input is one-hot.
      place: ``([*batch, *positions, out], y) -> `` the same numbers in the shape of the layer's output ``y``.
      features: ``y -> [*batch, *positions, out]``, the inverse of ``place``.
    """

    path: str
    kernel: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    a_shape: Callable[[int], tuple[int, ...]]
    b_shape: Callable[[int], tuple[int, ...]]
    fan_in: int
    pair: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    rows: Callable[[jax.Array], jax.Array] | None
    place: Callable[[jax.Array, jax.Array], jax.Array]
    features: Callable[[jax.Array], jax.Array]


def input_of(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """The input of a call that ``describe`` describes: of a tap its source, or its value where it has none."""
    if isinstance(module, Tap):
        source = args[1] if len(args) > 1 else kwargs.get("source")
        if source is not None:
            return source
        return args[0] if args else kwargs["x"]
    return args[0] if args else next(iter(kwargs.values()))


def describe(module: nn.Module, method: str, args: Any, kwargs: Any) -> Layer | None:
    """Describes the layer or tap whose method is being called, or ``None`` if this is neither's own call."""
    if module.name == _CLONE:
        return None
    path = "/".join(module.path)
    if isinstance(module, nn.Embed) and method in ("__call__", "attend"):
        table: tuple[int, ...] = module.get_variable("params", "embedding").shape
        return Layer(
            path=path,
            kernel="embedding",
            inputs=table[-2:-1],
            outputs=table[-1:],
            a_shape=lambda r: (table[-2], r),
            b_shape=lambda r: (r, table[-1]),
            fan_in=1,
            pair=_lookup if method == "__call__" else _attend,
            rows=None,
            place=_reshaped,
            features=lambda y: y,
        )
    if method != "__call__":
        return None
    if isinstance(module, Tap):
        return _tap(path, *args, **kwargs)
    if isinstance(module, nn.Einsum):
        given = args[1] if len(args) > 1 else kwargs.get("einsum_str")
        return _einsum_layer(path, module, given or module.einsum_str)
    if isinstance(module, (nn.Dense, nn.DenseGeneral, nn.Conv)):
        shape: tuple[int, ...] = module.get_variable("params", "kernel").shape
        features = module.features
        count = len(features) if isinstance(features, Sequence) else 1
        if getattr(module, "batch_dims", ()) or getattr(module, "feature_group_count", 1) != 1:
            # A factor pair that is shared by groups or batch entries is not a change of this weight.
            return None
        if getattr(module, "mask", None) is not None:
            # Nor is a pair a change of the masked weight, in which some entries stay zero.
            return None
        inputs, outputs = shape[: len(shape) - count], shape[len(shape) - count :]

        def pair(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
            low = module.clone(features=a.shape[-1], use_bias=False, parent=None, name=_CLONE)
            return jnp.tensordot(low.apply({"params": {"kernel": a}}, x), b, 1, precision=module.precision)

        def rows(x: jax.Array) -> jax.Array:
            if isinstance(module, nn.Dense):
                return x
            # The identity as the weight: every input of a position comes out as a feature of its own.
            identity = jnp.eye(math.prod(inputs), dtype=x.dtype).reshape(*inputs, -1)
            whole = module.clone(
                features=math.prod(inputs), use_bias=False, precision=jax.lax.Precision.HIGHEST, parent=None, name=_CLONE
            )
            return whole.apply({"params": {"kernel": identity}}, x)

        return Layer(
            path=path,
            kernel="kernel",
            inputs=inputs,
            outputs=outputs,
            a_shape=lambda r: (*inputs, r),
            b_shape=lambda r: (r, *outputs),
            fan_in=math.prod(inputs),
            pair=pair,
            rows=rows,
            place=_reshaped,
            features=lambda y: y.reshape(*y.shape[: y.ndim - count], -1),
        )
    return None


def _tap(path: str, x: jax.Array, source: jax.Array | None = None) -> Layer:
    inputs = () if source is None else source.shape[-1:]

    def pair(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        raise ValueError(f"{path!r} is a tap: it has no weight that a pair of factors could change")

    return Layer(
        path=path,
        kernel="",
        inputs=inputs,
        outputs=x.shape[-1:],
        a_shape=lambda r: (*inputs, r),
        b_shape=lambda r: (r, x.shape[-1]),
        fan_in=math.prod(inputs),
        pair=pair,
        rows=lambda given: given,
        place=_reshaped,
        features=lambda y: y,
    )


def _lookup(ids: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.take(a, ids, axis=0) @ b


def _reshaped(rows: jax.Array, y: jax.Array) -> jax.Array:
    return rows.reshape(y.shape)


def _attend(query: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """A tied output head uses the table transposed: x (A B)' = (x B') A'."""
    return (query @ b.T) @ a.T


def _einsum_layer(path: str, module: nn.Einsum, equation: str | None) -> Layer | None:
    """Rewrites ``X,K->Y`` as ``X,A->Z`` and ``Z,B->Y``, where Z keeps what X and Y share and has one new axis, the rank."""
    if equation is None:
        return None
    left, result = equation.replace(" ", "").split("->")
    source, kernel = left.split(",")
    sizes: dict[str, int] = dict(zip(kernel, module.get_variable("params", "kernel").shape, strict=False))
    if "." in kernel or len(sizes) != len(kernel):
        return None
    batch = "".join(c for c in kernel if c in source and c in result)
    inputs = "".join(c for c in kernel if c not in result)
    outputs = "".join(c for c in kernel if c not in source)
    if not inputs or not outputs or len(batch + inputs + outputs) != len(kernel):
        return None
    rank = next(c for c in "rstuvwxyzabcdefghijklmnopq" if c not in source + kernel + result)
    middle = "".join(c for c in result if c not in outputs) + rank
    interleaved = kernel != batch + inputs + outputs
    if interleaved and (batch or 1 in sizes.values()):
        raise ValueError(
            f"{path!r}: the weight of the einsum {equation!r} has its input axes between its output axes together with a batch "
            "axis or an axis of size 1, which has no factor layout; order the weight's axes as batch, inputs, outputs"
        )
    batch_shape = tuple(sizes[c] for c in batch)
    in_shape, out_shape = tuple(sizes[c] for c in inputs), tuple(sizes[c] for c in outputs)
    # Where the weight interleaves inputs and outputs, B keeps the weight's axis order with ones in place of the inputs, so
    # that the shapes of the leaves alone say how the pair multiplies out (see deltas.LowRank.axes).
    spread = tuple(1 if c in inputs else sizes[c] for c in kernel)

    def pair(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        z = jnp.einsum(f"{source},{batch}{inputs}{rank}->{middle}", x, a, precision=module.precision)
        b = b.reshape(*batch_shape, b.shape[len(batch_shape)], *out_shape)
        return jnp.einsum(f"{middle},{batch}{rank}{outputs}->{result}", z, b, precision=module.precision)

    positions = "".join(c for c in result if c not in kernel)

    def rows(x: jax.Array) -> jax.Array:
        ordered = jnp.einsum(f"{source}->{batch}{positions}{inputs}", x)
        return ordered.reshape(*ordered.shape[: ordered.ndim - len(inputs)], -1)

    def place(rows: jax.Array, y: jax.Array) -> jax.Array:
        wide = rows.reshape(*rows.shape[:-1], *out_shape)
        return jnp.einsum(f"{batch}{positions}{outputs}->{result}", wide)

    def features(y: jax.Array) -> jax.Array:
        ordered = jnp.einsum(f"{result}->{batch}{positions}{outputs}", y)
        return ordered.reshape(*ordered.shape[: ordered.ndim - len(outputs)], -1)

    return Layer(
        path=path,
        kernel="kernel",
        inputs=in_shape,
        outputs=out_shape,
        a_shape=lambda r: (*batch_shape, *in_shape, r),
        b_shape=lambda r: (r, *spread) if interleaved else (*batch_shape, r, *out_shape),
        fan_in=math.prod(in_shape),
        pair=pair,
        rows=rows,
        place=place,
        features=features,
    )
