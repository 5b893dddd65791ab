"""Low-rank adaptation of linear layers."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax.deltas import LowRank
from pefusion_jax.layers import Layer
from pefusion_jax.rules import Leaves


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    r"""Adds a trained low-rank product to the weight of each matched layer.

    .. math:: y = x W + b + s\,(x A) B, \qquad s = \alpha / r \quad (\alpha / \sqrt r \text{ if rank-stabilised})

    :math:`A` ``[inputs, rank]`` starts uniform in :math:`\pm 1/\sqrt{\text{fan-in}}`, :math:`B` ``[rank, outputs]`` at zero,
    so the model starts unchanged. Works on ``nn.Dense``, ``nn.DenseGeneral``, ``nn.Einsum``, ``nn.Conv`` (A is a convolution
    with ``rank`` outputs, B a 1 x 1 convolution) and ``nn.Embed`` (A is a table ``[rows, rank]``). Cost of a training
    gradient: 2.06 forward passes of the base model, because ``A B`` is never multiplied out.

    Attributes:
      rank: rank :math:`r` of the change.
      alpha: scale numerator :math:`\alpha`; ``None`` means ``rank``, a scale of 1.
      targets: regular expression that must match the whole slash path of a layer.
      rank_stabilized: divide by :math:`\sqrt r` in place of :math:`r`.
      dropout: probability with which an input element of the branch is dropped in training; none on embedding look-ups.
      freeze_a: keep A at its random start and train B alone.
      rank_pattern: regular expression -> rank, for paths that deviate; the first full match wins. One that matches no layer of
        the targets is an error of ``init``.
      alpha_pattern: the same for alpha.

    Example::

      LoRA(rank=16, alpha=32, targets=r".*/(query|value)", rank_pattern={r"encoder/layer/0/.*": 4})

    Reference: E. Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021; D. Kalajdzievski, A Rank Stabilization
    Scaling Factor for Fine-Tuning with LoRA, 2023; L. Zhang et al., LoRA-FA, 2023 (frozen A). We depart in one place: PEFT
    starts A at zero and B at random for embeddings; here A is random, with unit variance, and B zero for every layer.
    """

    targets: str
    rank: int = 8
    alpha: float | None = None
    rank_stabilized: bool = False
    dropout: float = 0.0
    freeze_a: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)

    acts_on: ClassVar[str] = "layers"
    names: ClassVar[tuple[str, ...]] = ("lora_a", "lora_b")

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.rank_pattern.values()):
            if rank < 1 or rank != int(rank):
                raise ValueError(f"rank must be a positive integer, got {rank}")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if alpha is not None and not math.isfinite(alpha):
                raise ValueError(f"alpha must be a finite number, got {alpha}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    def owns(self, leaf: str) -> str:
        """Nothing: the leaves are of a layer, not of a parameter."""
        return ""

    @property
    def patterns(self) -> tuple[str, ...]:
        """The regular expressions of the layers that deviate."""
        return (*self.rank_pattern, *self.alpha_pattern)

    @property
    def stochastic(self) -> bool:
        """Whether the branch needs a random key in training."""
        return self.dropout > 0.0

    def scale(self, path: str, rank: int) -> float:
        """The factor :math:`s` of the layer at ``path``."""
        alpha = _lookup(self.alpha_pattern, path, self.alpha)
        alpha = float(rank) if alpha is None else float(alpha)
        return alpha / math.sqrt(rank) if self.rank_stabilized else alpha / rank

    def leaves(self, site: Layer) -> dict[str, tuple[Callable[..., jax.Array], tuple[int, ...]]]:
        """``lora_a`` and ``lora_b`` with their initialisers and shapes."""
        rank = int(_lookup(self.rank_pattern, site.path, self.rank))
        if site.kernel == "embedding":
            start: Callable[..., jax.Array] = jax.nn.initializers.normal(1.0)
        else:
            bound = 1.0 / math.sqrt(site.fan_in)

            def start(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
                return jax.random.uniform(key, shape, dtype, -bound, bound)

        return {
            "lora_a": (start, site.a_shape(rank)),
            "lora_b": (jax.nn.initializers.zeros, site.b_shape(rank)),
        }

    def branch(self, layer: Layer, leaves: Leaves, x: Any, y: jax.Array, key: jax.Array | None) -> jax.Array:
        """:math:`s\\,(x A) B`, in the precision of the layer's output."""
        a, b = leaves["lora_a"].astype(y.dtype), leaves["lora_b"].astype(y.dtype)
        if key is not None and jnp.issubdtype(x.dtype, jnp.floating):
            kept = jax.random.bernoulli(key, 1.0 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1.0 - self.dropout), jnp.zeros_like(x))
        return layer.pair(x, a, b) * self.scale(layer.path, a.shape[-1])

    def change(self, path: str, leaves: Leaves, weights: Mapping[str, jax.Array]) -> dict[str, LowRank]:
        """The pair :math:`(A, s B)` of the layer's weight."""
        name = "embedding" if "embedding" in weights else "kernel"
        a, b = leaves["lora_a"], leaves["lora_b"]
        return {name: factor_pair(a, b, weights[name].shape) * self.scale(path, a.shape[-1])}

    def trained(self, leaves: Leaves) -> tuple[str, ...]:
        """Both factors, or B alone."""
        return ("lora_b",) if self.freeze_a else self.names

    def moving(self, leaves: Leaves) -> tuple[str, ...]:
        """At B = 0 the derivative in A vanishes identically, so only B moves a linearized model."""
        b = leaves["lora_b"]
        at_zero = not isinstance(b, jax.core.Tracer) and not np.any(np.asarray(b))
        return ("lora_b",) if at_zero else self.trained(leaves)


def _lookup(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((value for regex, value in pattern.items() if re.fullmatch(regex, path)), default)


def factor_pair(a: jax.Array, b: jax.Array, shape: tuple[int, ...]) -> LowRank:
    """Reads the leaves ``lora_a`` and ``lora_b`` as a matrix pair of a weight of the given shape.

    Leading axes that both have beyond the layer's own are batch axes: layers stacked by a scan, or experts.

    Args:
      a: ``[*batch, *inputs, rank]``.
      b: ``[*batch, rank, *outputs]``, or ``[*batch, rank, *weight axes]`` with ones in place of the inputs, for an einsum
        whose weight has its input axes between its output axes.
      shape: the weight's shape.

    Raises:
      TypeError: if the factors have different ranks.
    """
    rank = a.shape[-1]
    if b.ndim <= len(shape):
        batch = a.ndim + b.ndim - 2 - len(shape)
        axes = None
    else:
        ones = sum(1 for size in b.shape if size == 1) - (rank == 1)
        batch = a.ndim - 1 - ones
        spread = b.shape[:batch] + b.shape[batch + 1 :]
        is_input = [i for i in range(batch, len(shape)) if spread[i] == 1]
        axes = (*range(batch), *is_input, *(i for i in range(batch, len(shape)) if i not in is_input))
    if b.shape[batch] != rank:
        raise TypeError(f"A has rank {rank} and B {b.shape[batch]}")
    lead = shape[:batch]
    inputs = math.prod(a.shape[batch:-1])
    return LowRank(a=a.reshape(*lead, inputs, rank), b=b.reshape(*lead, rank, -1), shape=shape, axes=axes)
