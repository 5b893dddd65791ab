"""Named identity modules: places where an adapter method can reach an activation that no layer's input or output is."""

from __future__ import annotations

import flax.linen as nn
import jax


class Tap(nn.Module):
    """The identity, under a name that rules can address: ``y = x``.

    It has no parameters and compiles to nothing. A method interceptor that matches its path may replace the result.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x
