"""Full fine-tuning of selected parameters, as a method like any other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from pefusion_jax.rules import Leaves

_SUFFIX = "_delta"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullFineTuning:
    r"""Trains the matched parameters themselves, as a difference from the base.

    .. math:: W' = W + D, \qquad D = 0 \text{ at the start}

    The difference is float32 whatever the base's precision, so small steps are not lost. A task vector in the sense of task
    arithmetic is exactly the adapter tree. Cost of a training gradient: 3 forward passes of the base model.

    Attributes:
      targets: regular expression that must match the whole slash path of a *parameter*: ``r".*"`` trains the whole model,
        ``r".*/bias"`` is BitFit.

    Reference: G. Ilharco et al., Editing Models with Task Arithmetic, 2023 (task vectors); E. Ben Zaken et al., BitFit, 2022.
    """

    targets: str

    acts_on: ClassVar[str] = "parameters"
    stochastic: ClassVar[bool] = False
    names: ClassVar[tuple[str, ...]] = ()

    def owns(self, leaf: str) -> str:
        """The name of the parameter that a leaf of this method changes, or the empty string."""
        return leaf.removesuffix(_SUFFIX) if leaf.endswith(_SUFFIX) else ""

    def leaves(self, site: tuple[str, jax.Array]) -> dict[str, tuple[Callable[..., jax.Array], tuple[int, ...]]]:
        """One leaf of the parameter's shape, named after it.

        Raises:
          ValueError: for a parameter that is not floating: it cannot move by fractions.
        """
        path, weight = site
        if not jnp.issubdtype(weight.dtype, jnp.floating):
            raise ValueError(f"targets={self.targets!r} matches {path!r}, which is {weight.dtype}; narrow it to floating ones")
        return {path.rpartition("/")[2] + _SUFFIX: (jax.nn.initializers.zeros, weight.shape)}

    def branch(self, layer: Any, leaves: Leaves, x: Any, y: jax.Array, key: jax.Array | None) -> jax.Array:
        """Not used: the change enters through the parameters."""
        raise ValueError("FullFineTuning acts on parameters and has no branch at a layer")

    def change(self, path: str, leaves: Leaves, weights: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The differences, under their parameters' names."""
        return {self.owns(name): leaf for name, leaf in leaves.items()}

    def trained(self, leaves: Leaves) -> tuple[str, ...]:
        """Every leaf."""
        return tuple(leaves)

    def moving(self, leaves: Leaves) -> tuple[str, ...]:
        """Every leaf."""
        return tuple(leaves)
