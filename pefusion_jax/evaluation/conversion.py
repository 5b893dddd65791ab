"""What would turn each frozen weight into its trained LoRA factors, and how alike that is from layer to layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from pefusion_jax import trees
from pefusion_jax.evaluation.geometry import Pairwise, subspace_overlap
from pefusion_jax.generators.layout import layout_of

Orientation = Literal["paper", "official"]


class Conversions(NamedTuple):
    """The conversion matrices of one kind of module.

    Attributes:
      layers: numbers of the layers.
      a: ``[layer, out, rank]`` (``official``: ``[layer, in, rank]``), float64.
      b: ``[layer, in, rank]``, float64.
    """

    layers: tuple[int, ...]
    a: np.ndarray
    b: np.ndarray


def conversions(params: Any, adapters: Any, orientation: Orientation = "paper") -> dict[str, Conversions]:
    r"""The matrices that make LoRA's factors from the frozen weights, layer by layer, in float64.

    .. math:: K\,C_A = A, \quad C_B^\top K = B \qquad (\text{official: } K^\top C_A = A)

    solved exactly for a square kernel :math:`K`, by least squares of smallest norm for any other. Of adapters that
    :class:`~pefusion_jax.generators.CondLoRA` made they are its :math:`\theta`, the same in every layer.

    Args:
      params: base parameters, unfolded.
      adapters: of ``pf.LoRA``, on matrices.
      orientation: as in :class:`~pefusion_jax.generators.CondLoRA`.

    Returns:
      Kind of module (path with a star for the layer) -> its matrices.

    Raises:
      ValueError: if there is no LoRA, a kernel is no matrix or singular, or the orientation is unknown.

    Reference: H. Kim et al., A Single Linear Layer Yields Task-Adapted Low-Rank Matrices, 2024, equations 3 and 4; their code
    inverts in float32.
    """
    if orientation not in ("paper", "official"):
        raise ValueError(f"orientation={orientation!r} must be 'paper' or 'official'")
    base = params["params"] if isinstance(params.get("params"), Mapping) else params
    layout = layout_of(base, lambda path: True)
    gathered = layout.gather(trees.flat(adapters))
    kernels = {path: leaf for path, leaf in trees.flat(base).items() if path.endswith("/kernel")}
    found: dict[str, Conversions] = {}
    for site in sorted({role.rpartition("/")[0] for role in gathered if role.endswith("/lora_a")}):
        own = {path: leaf for path, leaf in kernels.items() if layout.role(path)[0] == f"{site}/kernel"}
        kernel = np.asarray(next(iter(layout.gather(own).values())), np.float64)
        a, b = (np.asarray(gathered[f"{site}/{name}"], np.float64) for name in ("lora_a", "lora_b"))
        if layout.layers(site) is None:
            kernel, a, b = kernel[None], a[None], b[None]
        if kernel.ndim != 3 or len(kernel) != len(a):
            raise ValueError(
                f"{site!r}: {len(a)} adapters for kernels {kernel.shape[1:]} in {len(kernel)} layers; the analysis is of LoRA "
                "on matrices, in every layer"
            )
        try:
            of_a = _solved(kernel if orientation == "paper" else kernel.swapaxes(1, 2), a)
            of_b = _solved(kernel.swapaxes(1, 2), b.swapaxes(1, 2))
        except np.linalg.LinAlgError as error:
            raise ValueError(f"{site!r}: a kernel has no inverse ({error})") from error
        found[site] = Conversions(tuple(range(len(a))), of_a, of_b)
    if not found:
        raise ValueError("the adapters have no leaf named lora_a; pass those of pf.LoRA, or what CondLoRA materialised")
    return found


def conversion_similarity(
    params: Any, adapters: Any, *, factor: Literal["a", "b"] = "a", k: int = 8, orientation: Orientation = "paper"
) -> dict[str, Pairwise]:
    r"""How far the conversion matrices of two layers span the same directions.

    .. math:: \phi(C_i, C_j) = \lVert U_i^\top U_j \rVert_F^2 / k \in [0, 1]

    with the first :math:`k` left singular vectors. Random matrices have :math:`k / n` on average, the ``baseline``.

    Args:
      params: base parameters.
      adapters: as for :func:`conversions`.
      factor: of :math:`A` or of :math:`B`.
      k: number of singular vectors; at most the rank counts.
      orientation: as for :func:`conversions`.

    Returns:
      Kind of module -> the matrix of layer pairs (``overall``), which :func:`plot_matrix` draws.

    Raises:
      ValueError: as :func:`conversions`, and for another factor.
    """
    if factor not in ("a", "b"):
        raise ValueError(f"factor={factor!r} must be 'a' or 'b'")
    out: dict[str, Pairwise] = {}
    for site, found in conversions(params, adapters, orientation).items():
        matrices = found.a if factor == "a" else found.b
        width = len(str(len(matrices)))
        overlap = subspace_overlap({f"{n + 1:0{width}d}": {"conversion": m} for n, m in enumerate(matrices)}, k=k)
        out[site] = overlap.inputs._replace(measure=f"conversion matrix of {factor.upper()}, {site}")
    return out


def _solved(matrices: np.ndarray, right: np.ndarray) -> np.ndarray:
    if matrices.shape[1] == matrices.shape[2]:
        return np.linalg.solve(matrices, right)
    return np.stack([np.linalg.lstsq(m, r, rcond=None)[0] for m, r in zip(matrices, right, strict=True)])
