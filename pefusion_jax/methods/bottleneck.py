"""Bottleneck adapters: two small dense layers with a nonlinearity between, behind a layer or beside it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax import trees
from pefusion_jax.backbones.layers import ACTIVATIONS
from pefusion_jax.layers import Layer
from pefusion_jax.rules import Leaves

# The last dense layer of a block's attention (T5: of its self-attention) and of its feed-forward network, in all our backbones.
ATTENTION_OUTPUT = r".*/(attention/output/dense|attn/o|self_attn/(o_proj|out_proj)|SelfAttention/o)"
FEED_FORWARD_OUTPUT = r".*((?<!attention)/output/dense|/mlp/(fc2|down_proj)|/DenseReluDense/wo)"
# The same place behind the feed-forward network, which also knows the network's input.
FEED_FORWARD = r".*/tap_output"

Initializer = Callable[..., jax.Array]
_zeros, _ones = jax.nn.initializers.zeros, jax.nn.initializers.ones
# Of the weights down and up, without norm; biases are zero.
_FAN_IN = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_STARTS: dict[str, tuple[Initializer, Initializer]] = {
    "lora": (_FAN_IN, _zeros),
    "houlsby": (jax.nn.initializers.truncated_normal(1e-2),) * 2,
    "bert": (jax.nn.initializers.normal(0.02),) * 2,
    "normal": (jax.nn.initializers.normal(0.01),) * 2,
    "xavier": (jax.nn.initializers.variance_scaling(1e-8, "fan_avg", "uniform"),) * 2,
}
_EPSILON = 1e-5  # of the norm; PyTorch's default, which the adapters of HyperFormer and AdapterHub have


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bottleneck:
    r"""Adds a small network with one hidden layer to the output of each matched layer.

    .. math:: y' = y + s\,A(v), \qquad A(v) = \sigma(v D + d)\,U + u, \qquad
       v = y \text{ (sequential)} \quad\text{or}\quad v = x \text{ (parallel)}

    where the matched layer makes :math:`y` of :math:`x`. With ``norm`` :math:`A` ends in a LayerNorm. The leaves at a site are
    ``adapter_down`` ``[d_in, b]``, ``adapter_down_bias`` ``[b]``, ``adapter_up`` ``[b, d_out]``, ``adapter_up_bias``
    ``[d_out]``, and with ``norm`` ``adapter_norm_scale`` and ``adapter_norm_bias`` ``[d_out]``.

    Works on ``nn.Dense``, ``nn.DenseGeneral``, ``nn.Einsum`` and ``nn.Conv`` (parallel: of the patches), whose axes are
    flattened, and on taps (``backbones.Tap``): there :math:`y` is the tapped activation and :math:`x` the input of the sublayer
    that made it. :func:`houlsby`, :func:`pfeiffer` and :func:`parallel` have the targets of all backbones of this package.

    There is a nonlinearity between the two products, so no weights compute the same: the method does not fold, ``deltas``
    raises, and such adapters are fused as trees (``fuse(..., space="adapter")``) or linearized over the network.

    Attributes:
      targets: regular expression that must match the whole slash path of a layer or of a tap.
      bottleneck: width :math:`b` of the hidden layer.
      activation: :math:`\sigma`, by the name that Hugging Face's configurations have for it.
      placement: ``"sequential"`` or ``"parallel"``.
      norm: end in a LayerNorm, before :math:`s`.
      scale: the factor :math:`s`.
      dropout: probability with which an element of the hidden layer is dropped in training.
      init: how :math:`D` and :math:`U` start; biases start at zero. Only the first makes a model that starts unchanged.

        * ``"lora"``: D uniform in :math:`\pm 1/\sqrt{d_{in}}`, U zero (He et al.). With ``norm`` it is the norm's scale that
          starts at zero and U starts like D: behind a U of zero, a norm would blow the first step up to its full size.
        * ``"houlsby"``: both normal with deviation 0.01, cut off at two deviations (Houlsby et al.).
        * ``"bert"``: both normal with deviation 0.02 (AdapterHub).
        * ``"normal"``: both normal with deviation 0.01 (HyperFormer's code). With ``norm``, as there, the adapter starts at
          full size.
        * ``"xavier"``: both Xavier-uniform with a gain of 1e-4 (PHA's code).

    Example::

      Bottleneck(targets=r".*/tap_output", placement="parallel", bottleneck=64, init="xavier")  # PHA's encoder adapters

    Reference: N. Houlsby et al., Parameter-Efficient Transfer Learning for NLP, 2019; J. He et al., Towards a Unified View of
    Parameter-Efficient Transfer Learning, 2022 (parallel, scaled); R. Karimi Mahabadi et al., Parameter-efficient Multi-task
    Fine-tuning for Transformers via Shared Hypernetworks, 2021 (HyperFormer); H. Zhao et al., Prototype-based HyperAdapter for
    Sample-Efficient Multi-task Tuning, 2023 (PHA). Where we depart: AdapterHub drops elements of :math:`s\,A(v)` and has
    :math:`s` in front of the norm, which undoes it.
    """

    targets: str
    bottleneck: int = 64
    activation: str = "relu"
    placement: Literal["sequential", "parallel"] = "sequential"
    norm: bool = False
    scale: float = 1.0
    dropout: float = 0.0
    init: Literal["lora", "houlsby", "bert", "normal", "xavier"] = "lora"

    acts_on: ClassVar[str] = "layers"
    taps: ClassVar[bool] = True
    folds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.bottleneck < 1 or self.bottleneck != int(self.bottleneck):
            raise ValueError(f"bottleneck must be a positive integer, got {self.bottleneck}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        for field, known in (("activation", ACTIVATIONS), ("placement", ("sequential", "parallel")), ("init", _STARTS)):
            if getattr(self, field) not in known:
                raise ValueError(f"{field}={getattr(self, field)!r} is not one of {', '.join(map(repr, known))}")

    def owns(self, leaf: str) -> str:
        """Nothing: the leaves are of a layer, not of a parameter."""
        return ""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the leaves at each site."""
        dense = ("adapter_down", "adapter_down_bias", "adapter_up", "adapter_up_bias")
        return (*dense, "adapter_norm_scale", "adapter_norm_bias") if self.norm else dense

    @property
    def stochastic(self) -> bool:
        """Whether the branch needs a random key in training."""
        return self.dropout > 0.0

    def leaves(self, site: Layer) -> dict[str, tuple[Callable[..., jax.Array], tuple[int, ...]]]:
        """The leaves with their initialisers and shapes.

        Raises:
          ValueError: if the site has no input or output of one width: an embedding, a layer of experts, a parallel adapter at a
            tap without a source.
        """
        self._check(site)
        inputs = math.prod(site.inputs if self.placement == "parallel" else site.outputs)
        outputs = math.prod(site.outputs)
        down, up = _STARTS[self.init]
        quiet = self.init == "lora" and self.norm
        made = {
            "adapter_down": (down, (inputs, self.bottleneck)),
            "adapter_down_bias": (_zeros, (self.bottleneck,)),
            "adapter_up": (_FAN_IN if quiet else up, (self.bottleneck, outputs)),
            "adapter_up_bias": (_zeros, (outputs,)),
        }
        if self.norm:
            made |= {"adapter_norm_scale": (_zeros if quiet else _ones, (outputs,)), "adapter_norm_bias": (_zeros, (outputs,))}
        return made

    def branch(self, layer: Layer, leaves: Leaves, x: Any, y: jax.Array, key: jax.Array | None) -> jax.Array:
        """:math:`s\\,A(v)`, in the precision of the layer's output; the norm in float32."""
        self._check(layer)
        if self.placement == "parallel":
            # Every other layer has rows(); see _check.
            v = layer.rows(x).astype(y.dtype)  # type: ignore[misc]
        else:
            v = layer.features(y)
        hidden = ACTIVATIONS[self.activation](_dense(v, leaves, "adapter_down"))
        if key is not None and self.dropout:
            kept = jax.random.bernoulli(key, 1.0 - self.dropout, hidden.shape)
            hidden = jnp.where(kept, hidden / (1.0 - self.dropout), jnp.zeros_like(hidden))
        out = _dense(hidden, leaves, "adapter_up")
        if self.norm:
            wide = out.astype(trees.wide_dtype(out.dtype))
            wide = wide - jnp.mean(wide, -1, keepdims=True)
            wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + _EPSILON)
            scale, bias = (_row(leaves[f"adapter_norm_{name}"], wide) for name in ("scale", "bias"))
            out = (wide * scale + bias).astype(y.dtype)
        return layer.place(out, y) * self.scale

    def change(self, path: str, leaves: Leaves, weights: Mapping[str, jax.Array]) -> dict[str, Any]:
        """None: always raises a ValueError."""
        raise ValueError(
            f"the Bottleneck at {path!r} is no change of the weights: between its two products stands a nonlinearity "
            f"({self.activation}), which no weights compute. Fuse such adapters as trees, fuse(method, trees, "
            "space='adapter'), or train linearize(adapted, adapters0), whose outputs are linear in the displacement"
        )

    def trained(self, leaves: Leaves) -> tuple[str, ...]:
        """Every leaf."""
        return tuple(leaves)

    def moving(self, leaves: Leaves) -> tuple[str, ...]:
        """Without what stands before a factor of zero: D and its bias at U = 0; with a norm of scale zero all before it."""
        down, up = {"adapter_down", "adapter_down_bias"}, {"adapter_up", "adapter_up_bias"}
        still: set[str] = set()
        if _is_zero(leaves["adapter_up"]):
            still |= down
            if _is_zero(leaves["adapter_up_bias"]):
                still |= {"adapter_norm_scale"}  # the norm of zero is zero
        if "adapter_norm_scale" in leaves and _is_zero(leaves["adapter_norm_scale"]):
            still |= down | up
        return tuple(name for name in leaves if name not in still)

    def _check(self, site: Layer) -> None:
        if site.kernel == "embedding":
            raise ValueError(
                f"targets={self.targets!r} matches {site.path!r}, an embedding, which Bottleneck cannot adapt; narrow the "
                "targets"
            )
        if len(site.a_shape(1)) != len(site.inputs) + 1:
            raise ValueError(
                f"targets={self.targets!r} matches {site.path!r}, which has a weight for each of several inputs (experts?); "
                "Bottleneck adapts layers with one weight; narrow the targets"
            )
        if self.placement == "parallel" and not site.inputs:
            raise ValueError(
                f"targets={self.targets!r} matches the tap {site.path!r}, which is not told the input of the sublayer before "
                "it, so nothing can run parallel to that sublayer; use placement='sequential', or aim at a layer or at a tap "
                "that is called as tap(x, source)"
            )


def houlsby(**settings: Any) -> Bottleneck:
    r"""Adapters behind attention and behind the feed-forward network of every block, each before the residual sum.

    .. math:: x \leftarrow \mathrm{LN}(x + y + A(y)), \qquad y = \mathrm{Sublayer}(x)

    (in a pre-norm block without the outer norm). Equals AdapterHub's ``double_seq_bn``, whose activation is the default here.

    Args:
      **settings: of :class:`Bottleneck`, in place of its defaults or of these: the targets, which are those of all backbones of
        this package, and ``activation="swish"``.

    Reference: N. Houlsby et al., Parameter-Efficient Transfer Learning for NLP, 2019. Where we depart: in AdapterHub the
    block's dropout acts on :math:`y` before the adapter reads it, here on the sum after it, which makes a difference in
    training only. Cross-attention (T5's decoder) has no adapter, as in AdapterHub.
    """
    return Bottleneck(**{"targets": f"{ATTENTION_OUTPUT}|{FEED_FORWARD_OUTPUT}", "activation": "swish", **settings})


def pfeiffer(**settings: Any) -> Bottleneck:
    r"""Adapters behind the feed-forward network alone: half the parameters of :func:`houlsby`.

    .. math:: x \leftarrow \mathrm{LN}(x + y + A(y)), \qquad y = \mathrm{FFN}(x)

    Args:
      **settings: of :class:`Bottleneck`, in place of its defaults or of the targets.

    Reference: J. Pfeiffer et al., AdapterFusion: Non-Destructive Task Composition for Transfer Learning, 2021. Where we depart:
    AdapterHub's ``seq_bn`` has ``original_ln_before=True``, so that in a post-norm block its adapter reads the normed sum
    through the block's own norm, :math:`\mathrm{LN}(x + y + A(\mathrm{LN}(x + y)))`, and in a pre-norm block the sum
    :math:`x + y`. Ours reads :math:`y`, which is ``seq_bn[original_ln_before=False]``. Weights of the one are not weights of
    the other.
    """
    return Bottleneck(**{"targets": FEED_FORWARD_OUTPUT, **settings})


def parallel(**settings: Any) -> Bottleneck:
    r"""Adapters beside the feed-forward network, scaled.

    .. math:: x \leftarrow \mathrm{LN}(x + \mathrm{FFN}(v) + s\,A(v)), \qquad s = 4

    where :math:`v` is what the feed-forward network reads: :math:`x`, or in a pre-norm block the normed :math:`x` (there the
    outer norm is missing). Equals AdapterHub's ``par_bn`` in post-norm blocks. ``parallel(scale=1.0, init="xavier")`` is PHA's
    adapter. The sites are taps, so other methods may adapt the dense layers at the same time; a backbone that does not tell its
    tap the network's input is refused.

    Args:
      **settings: of :class:`Bottleneck`, in place of its defaults, or of the targets, the placement and ``scale=4.0``.

    Reference: J. He et al., Towards a Unified View of Parameter-Efficient Transfer Learning, 2022. Where we depart: the
    residual dropout of the block acts on the sum of network and adapter, in PHA on the network alone; in training only.
    """
    return Bottleneck(**{"targets": FEED_FORWARD, "placement": "parallel", "scale": 4.0, **settings})


def _row(vector: jax.Array, like: jax.Array) -> jax.Array:
    return vector.astype(like.dtype).reshape(*(1,) * (like.ndim - 1), -1)


def _dense(v: jax.Array, leaves: Leaves, name: str) -> jax.Array:
    return v @ leaves[name].astype(v.dtype) + _row(leaves[f"{name}_bias"], v)


def _is_zero(leaf: jax.Array) -> bool:
    return not isinstance(leaf, jax.core.Tracer) and not np.any(np.asarray(leaf))
