r"""Second moments of a tuned model at its adapted layers: what they are, how they are made small, and their files.

For a layer :math:`y = x W` of one task's model, the two matrices

.. math:: G = E[x x^\top] \in R^{in \times in}, \qquad S = E[g g^\top] \in R^{out \times out}, \quad
   g = \nabla_y \log p(\hat y | x)

say how much a change of the weight costs that task: :math:`\mathrm{tr}(\Delta W^\top G\, \Delta W\, S)` approximates the
expected squared change of the log-likelihood (Kronecker-factored Fisher information).
:func:`~pefusion_jax.statistics.statistics` collects them; closed-form fusion methods and
:func:`~pefusion_jax.penalty.interference_penalty` use them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spectral:
    r"""The symmetric matrix :math:`U \mathrm{diag}(\lambda) U^\top + \mathrm{diag}(d)`.

    Attributes:
      vectors: :math:`U` ``[*batch, n, k]``, orthonormal columns; :math:`k = 0` for a diagonal matrix.
      values: :math:`\lambda` ``[*batch, k]``.
      diagonal: :math:`d` ``[*batch, n]``.
    """

    vectors: jax.Array
    values: jax.Array
    diagonal: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix, ``[*batch, n, n]``."""
        return (*self.diagonal.shape, self.diagonal.shape[-1])

    def __getitem__(self, layer: int) -> Spectral:
        """One entry of the first batch axis."""
        return Spectral(self.vectors[layer], self.values[layer], self.diagonal[layer])


Moment = jax.Array | Spectral


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """The moments of one parameter of a linear layer.

    Attributes:
      inputs: :math:`G` ``[*batch, in, in]``; diagonal (the frequencies of the rows) for an embedding; ``[1, 1]`` for a bias,
        which is the weight of a constant input.
      outputs: :math:`S` ``[*batch, out, out]``, or ``None`` where it was not collected.
      axes: order in which the parameter's axes are read as (batch, inputs, outputs); see :class:`~pefusion_jax.deltas.LowRank`.
    """

    inputs: Any
    outputs: Any = None
    axes: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    def __getitem__(self, layer: int) -> Moments:
        """The moments of one of the layers that a scan has stacked."""
        outputs = None if self.outputs is None else self.outputs[layer]
        return Moments(self.inputs[layer], outputs, None if self.axes is None else tuple(axis - 1 for axis in self.axes[1:]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """What one tuned model knows of its own data, for closed-form fusion. A pytree.

    Attributes:
      moments: path of a parameter -> :class:`Moments`; layers that a scan stacks have a path each, ``.../layer/3/...``.
      fisher: path of a parameter -> diagonal Fisher information of its elements, of its shape; empty if not collected.
      examples: number of examples they were collected from.
    """

    moments: dict[str, Moments]
    fisher: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    examples: int = dataclasses.field(default=0, metadata={"static": True})

    def size(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def __repr__(self) -> str:
        parts = [f"{len(self.moments)} parameters' moments", f"{len(self.fisher)} parameters' Fisher diagonals"]
        return f"Statistics({', '.join(parts)}, {self.examples} examples, {self.size():,} bytes)"


def diagonal_moment(values: jax.Array) -> Spectral:
    """The diagonal matrix of ``[*batch, n]`` values."""
    empty = jnp.zeros((*values.shape, 0), values.dtype)
    return Spectral(empty, empty[..., 0, :], values)


def diagonal_matrix(values: jax.Array) -> jax.Array:
    """``[*batch, n]`` -> ``[*batch, n, n]``."""
    n = values.shape[-1]
    return values[..., None] * jnp.eye(n, dtype=values.dtype).reshape(*(1,) * (values.ndim - 1), n, n)


def dense_moment(moment: Moment) -> jax.Array:
    """A moment as ``[*batch, n, n]``."""
    if not isinstance(moment, Spectral):
        return moment
    scaled = moment.vectors * moment.values[..., None, :]
    product = jnp.matmul(scaled, jnp.swapaxes(moment.vectors, -1, -2), precision=jax.lax.Precision.HIGHEST)
    return product + diagonal_matrix(moment.diagonal)


def moment_diagonal(moment: Moment) -> jax.Array:
    """The diagonal ``[*batch, n]`` of a moment."""
    if not isinstance(moment, Spectral):
        return jnp.diagonal(moment, axis1=-2, axis2=-1)
    return moment.diagonal + jnp.sum(jnp.square(moment.vectors) * moment.values[..., None, :], axis=-1)


def moment_trace(moment: Moment) -> jax.Array:
    """The trace ``[*batch]`` of a moment."""
    return jnp.sum(moment_diagonal(moment), axis=-1)


def times(moment: Moment, x: jax.Array) -> jax.Array:
    """``M x`` for ``x [*batch, n, m]``; a compressed moment is not multiplied out."""
    if not isinstance(moment, Spectral):
        return jnp.matmul(moment, x, precision=jax.lax.Precision.HIGHEST)
    out = moment.diagonal[..., None] * x
    if moment.values.shape[-1]:
        low = jnp.matmul(jnp.swapaxes(moment.vectors, -1, -2), x, precision=jax.lax.Precision.HIGHEST)
        out = out + jnp.matmul(moment.vectors, moment.values[..., None] * low, precision=jax.lax.Precision.HIGHEST)
    return out


def times_right(x: jax.Array, moment: Moment) -> jax.Array:
    """``x M`` for ``x [*batch, m, n]``."""
    if not isinstance(moment, Spectral):
        return jnp.matmul(x, moment, precision=jax.lax.Precision.HIGHEST)
    return jnp.swapaxes(times(moment, jnp.swapaxes(x, -1, -2)), -1, -2)


def compress_statistics(statistics: Statistics, *, rank: int | None = None, budget: int | None = None) -> Statistics:
    r"""Replaces moments by their leading eigenvectors and the diagonal of what remains.

    .. math:: M \approx U_k \Lambda_k U_k^\top + \mathrm{diag}(M - U_k \Lambda_k U_k^\top)

    Diagonal and trace are kept exactly. A matrix stays whole where that takes no more room. With a budget, eigenvectors are
    bought one by one where they explain the largest share of a matrix's trace for their size, over all matrices, so that a
    larger budget never describes any matrix worse.

    Args:
      statistics: as collected; what is compressed already is left as it is.
      rank: number of eigenvectors of every matrix, or
      budget: largest size of the result in bytes, the Fisher diagonals (which stay) included.

    Raises:
      ValueError: if not exactly one of the two is given, or the budget is too small for the diagonals alone.
    """
    if (rank is None) == (budget is None):
        raise ValueError(f"give either rank (of every matrix) or budget (bytes in all), not rank={rank}, budget={budget}")
    if rank is not None and rank < 0:
        raise ValueError(f"rank={rank} must be 0 or more")
    found = {
        (path, side): value
        for path, moments in statistics.moments.items()
        for side in ("inputs", "outputs")
        if (value := getattr(moments, side)) is not None and not isinstance(value, Spectral)
    }
    # On the host in float64: this is done once for each matrix, and remainders are small differences.
    exact = {name: np.asarray(value, np.float64) for name, value in found.items()}
    spectra = {name: np.linalg.eigh(value) for name, value in exact.items()}
    if budget is None:
        ranks = {name: int(rank or 0) for name in found}
    else:
        ranks = _within(statistics, found, spectra, budget)
    kept: dict[Any, Any] = {name: _truncate(value, exact[name], spectra[name], ranks[name]) for name, value in found.items()}
    moments: dict[str, Any] = {
        path: dataclasses.replace(m, **{side: kept[path, side] for side in ("inputs", "outputs") if (path, side) in kept})
        for path, m in statistics.moments.items()
    }
    return dataclasses.replace(statistics, moments=moments)


def _truncate(matrix: jax.Array, exact: np.ndarray, spectrum: Any, rank: int) -> Moment:
    n = matrix.shape[-1]
    if rank * (n + 1) + n >= n * n:
        return matrix
    values, vectors = spectrum[0][..., n - rank :], spectrum[1][..., n - rank :]
    explained = np.sum(np.square(vectors) * values[..., None, :], axis=-1)
    # Rounding aside, what remains of a positive semi-definite matrix has a diagonal of zeros and more.
    rest = np.maximum(np.diagonal(exact, axis1=-2, axis2=-1) - explained, 0.0)
    return Spectral(*(jnp.asarray(part, matrix.dtype) for part in (vectors, values, rest)))


def _within(statistics: Statistics, found: Mapping[Any, jax.Array], spectra: Mapping[Any, Any], budget: int) -> dict[Any, int]:
    spent = statistics.size()
    offers = []
    for name, matrix in found.items():
        n, batch, width = matrix.shape[-1], math.prod(matrix.shape[:-2]), matrix.dtype.itemsize
        spent -= (n * n - n) * batch * width
        values = np.sort(spectra[name][0].reshape(-1, n).sum(0))[::-1]
        total = max(float(values.sum()), float(np.finfo(np.float32).tiny))
        cost = (n + 1) * batch * width
        most = (n * n - n) * batch * width
        offers += [
            (-float(value) / total / cost, k, str(name), name, min(cost, most - k * cost))
            for k, value in enumerate(values)
            if k * cost < most
        ]
    if spent > budget:
        raise ValueError(f"budget={budget:,} bytes is too small: the diagonals alone take {spent:,}; raise it to at least that")
    ranks = dict.fromkeys(found, 0)
    for *_, name, cost in sorted(offers, key=lambda offer: offer[:3]):
        if spent + cost > budget:
            break
        spent += cost
        ranks[name] += 1
    return ranks
