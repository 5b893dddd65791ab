import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest


class TwoShapes(nn.Module):
    """A module of one's own, whose layers Linen numbers though their shapes differ."""

    @nn.compact
    def __call__(self, x):
        wide = nn.relu(nn.Dense(6)(x))
        return nn.Dense(4)(wide)


@pytest.fixture(scope="session")
def two_shapes():
    """Such a module, its parameters and an input."""
    x = jnp.ones((2, 3))
    return TwoShapes(), TwoShapes().init(jax.random.key(0), x)["params"], x
