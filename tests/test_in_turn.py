"""Decompositions one after the other: the same bits, an order in the compiled program, and programs that end."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax.in_turn import after, in_turn

MANY = """
import jax, jax.numpy as jnp, numpy as np
import pefusion_jax as pf
from pefusion_jax.deltas import Delta, LowRank
rng = np.random.default_rng(0)
def pair():
    a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((128, 16), (16, 128)))
    return LowRank(a, b, (128, 128))
trees = {f"t{t}": Delta({f"layers/{n}/kernel": pair() for n in range(24)}) for t in range(8)}
fused = jax.jit(lambda trees: pf.fuse(pf.fusion.svd(16), trees))(trees)
assert all(bool(jnp.all(jnp.isfinite(pair.a))) for pair in fused.leaves.values())
print("done")
"""


def test_a_program_with_many_decompositions_ends():
    """On two threads this one hung: two decompositions at a time, each waiting for a thread."""
    flags = " ".join(flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag)
    environment = {**os.environ, "XLA_FLAGS": flags, "OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run([sys.executable, "-c", MANY], env=environment, capture_output=True, text=True, timeout=240)
    assert ran.stdout == "done\n", ran.stderr[-2000:]


def test_nothing_changes_and_one_waits_for_the_other():
    x = np.random.default_rng(0).normal(size=(3, 8, 8)).astype(np.float32)
    x[0, 0, 0] = np.nan  # what is broken stays where it is

    def values(matrices):
        return in_turn(lambda m: jnp.linalg.svd(m, compute_uv=False), list(matrices))

    program = jax.jit(values).lower(x).compile()
    for found, matrix in zip(program(x), x, strict=True):
        np.testing.assert_array_equal(found, jax.jit(lambda m: jnp.linalg.svd(m, compute_uv=False))(matrix))
    text = program.as_text()
    calls = re.findall(r"(%?[\w.\-]+) = .*custom-call\(([^)]*)\).*lapack_sgesdd", text)
    assert len(calls) == 3
    plain = jax.jit(lambda xs: [jnp.linalg.svd(m, compute_uv=False) for m in xs]).lower(list(x)).compile().as_text()
    # The comparison with infinity is still in the program: XLA has not removed what makes one wait for the other.
    assert text.count("compare(") > plain.count("compare(")


def test_outside_of_a_program_there_is_nothing_to_do():
    x = jnp.ones(3)
    assert after(x, jnp.ones(2)) is x
    assert after({"a": x, "name": "w"}, None) == {"a": x, "name": "w"}
