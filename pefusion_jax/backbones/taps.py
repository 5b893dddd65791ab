"""Named identity modules: places where an adapter method can reach an activation that no layer's input or output is."""

from __future__ import annotations

import flax.linen as nn
import jax


class Tap(nn.Module):
    """The identity, under a name that rules can address: ``y = x``.

    It has no parameters and compiles to nothing. A method interceptor that matches its path may replace the result. The module
    that it stands in must have parameters, or modules with parameters.
    """

    @nn.compact
    def __call__(self, x: jax.Array, source: jax.Array | None = None) -> jax.Array:
        """Returns ``x``.

        Args:
          x: the activation.
          source: the input of the sublayer whose output ``x`` is, for methods that run beside the sublayer.
        """
        return x
