"""Fixtures of the contract suite; the table that they walk is in ``cases.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import LAYOUTS, METHODS, Case, build
from models import Wide, stack_layers


@pytest.fixture(params=[row.name for row in METHODS])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=LAYOUTS)
def case(request: pytest.FixtureRequest, name: str) -> Case:
    return build(name, request.param)


@pytest.fixture
def loop(name: str) -> Case:
    return build(name, "loop")


@pytest.fixture(scope="session")
def wide_model() -> Callable[[str], Any]:
    """A model for counting FLOPs: ``layout -> (model, params, inputs)``."""
    inputs = jnp.ones((64, 256))
    params = jax.jit(Wide("loop").init)(jax.random.key(0), inputs)["params"]
    return lambda layout: (Wide(layout), stack_layers(params) if layout == "scan" else params, inputs)
