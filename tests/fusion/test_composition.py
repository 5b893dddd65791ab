"""Arithmetic of trees against fusing again from scratch."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pefusion_jax import fusion
from pefusion_jax.deltas import Delta, LowRank, dense

METHODS = [fusion.average(), fusion.task_arithmetic(0.3)]


def trees():
    rng = np.random.default_rng(0)

    def leaf(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {name: {"enc": {"kernel": leaf(5, 4)}, "scale": leaf(3)} for name in "abcd"}


def changes():
    rng = np.random.default_rng(1)

    def pair(rank):
        a, b = rng.normal(size=(5, rank)), rng.normal(size=(rank, 4))
        return LowRank(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), (5, 4))

    out = {}
    for rank, name in enumerate("abcd", start=1):
        out[name] = Delta({"kernel": pair(rank), "bias": jnp.asarray(rng.normal(size=4), jnp.float32)})
    out["d"].leaves["other"] = pair(2)
    return out


def close(ours, theirs):
    def flat(tree):
        return {p: dense(c) for p, c in tree.leaves.items()} if isinstance(tree, Delta) else tree

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), flat(ours), flat(theirs))


@pytest.mark.parametrize("given", [trees(), changes()], ids=["trees", "deltas"])
@pytest.mark.parametrize("method", METHODS, ids=["average", "task_arithmetic"])
def test_adding_and_removing_equal_fusing_again(method, given):
    three, four = fusion.fuse(method, {n: given[n] for n in "abc"}), fusion.fuse(method, given)
    close(fusion.add_task(three, given["d"], method, 3), four)
    without = fusion.remove_task(four, given["b"], method, 4)
    close(without, fusion.fuse(method, {n: given[n] for n in "acd"}))
    close(fusion.add_task(without, given["b"], method, 3), four)
    if isinstance(four, Delta):
        assert without.leaves["kernel"].rank == four.leaves["kernel"].rank - 2  # its factors are gone
        # Factors that do not stand there are subtracted.
        turned = Delta(
            given["b"].leaves | {"kernel": LowRank(-given["b"].leaves["kernel"].a, -given["b"].leaves["kernel"].b, (5, 4))}
        )
        subtracted = fusion.remove_task(four, turned, method, 4)
        close(subtracted, without)
        assert subtracted.leaves["kernel"].rank == four.leaves["kernel"].rank + 2
        # Under jit, where factors cannot be compared.
        close(jax.jit(lambda f, t: fusion.remove_task(f, t, method, 4))(four, given["b"]), without)


def test_removal_of_low_rank_task_arithmetic_is_exact():
    given = changes()
    method = fusion.task_arithmetic(0.3)
    rest = fusion.remove_task(fusion.fuse(method, given), given["b"], method, 4).leaves["kernel"]
    expected = fusion.fuse(method, {n: given[n] for n in "acd"}).leaves["kernel"]
    np.testing.assert_array_equal(rest.a, expected.a)
    np.testing.assert_array_equal(rest.b, expected.b)


@pytest.mark.parametrize("given", [trees(), changes()], ids=["trees", "deltas"])
def test_negate_and_analogy(given):
    a, b, c = (given[n] for n in "abc")
    close(fusion.fuse(fusion.task_arithmetic(1.0), [a, fusion.negate(a)]), fusion.fuse(fusion.task_arithmetic(0.0), [a]))
    expected = fusion.fuse(fusion.task_arithmetic({"a": -1.0, "b": 1.0, "c": 1.0}), {"a": a, "b": b, "c": c})
    close(fusion.analogy(a, b, c), expected)
    close(fusion.analogy(a, a, c), c)


def test_products_of_factors_are_not_negated_leaf_by_leaf():
    rng = np.random.default_rng(0)
    tree = {"layer": {name: jnp.asarray(rng.normal(size=(3, 3)), jnp.float32) for name in ("lora_a", "lora_b")}}
    lora = SimpleNamespace(
        deltas=lambda params, tree: Delta({"layer/kernel": LowRank(tree["layer"]["lora_a"], tree["layer"]["lora_b"], (3, 3))})
    )
    for call in (
        lambda **options: fusion.negate(tree, **options),
        lambda **options: fusion.analogy(tree, tree, tree, **options),
        lambda fused=tree, **options: fusion.add_task(fused, tree, METHODS[0], 1, **options),
        lambda fused=tree, **options: fusion.remove_task(fused, tree, METHODS[0], 2, **options),
    ):
        with pytest.raises(ValueError, match=r"both factors 'layer/lora_a' and 'layer/lora_b'.*adapted and params"):
            call()
        if "fused" in call.__code__.co_varnames:
            with pytest.raises(ValueError, match="must be a Delta"):
                call(adapted=lora, params={})
            assert isinstance(call(lora.deltas({}, tree), adapted=lora, params={}), Delta)
        else:
            assert isinstance(call(adapted=lora, params={}), Delta)
        assert isinstance(call(displacement=True), dict)
    product = tree["layer"]["lora_a"] @ tree["layer"]["lora_b"]
    negative = fusion.negate(tree, adapted=lora, params={}).leaves["layer/kernel"]
    np.testing.assert_allclose(dense(negative), -product, rtol=1e-5)
    # A displacement that moves one factor alone is linear.
    half = {"layer": {"lora_a": jnp.zeros((3, 3)), "lora_b": tree["layer"]["lora_b"]}}
    np.testing.assert_array_equal(fusion.negate(half)["layer"]["lora_b"], -tree["layer"]["lora_b"])
    with pytest.raises(ValueError, match="both adapted and params"):
        fusion.negate(tree, adapted=lora)


def test_errors():
    given, low = trees(), changes()
    fused = fusion.fuse(METHODS[0], given)
    for call in (fusion.add_task, fusion.remove_task):
        with pytest.raises(ValueError, match="linear fusion alone"):
            call(fused, given["a"], fusion.ties(), 4)
        with pytest.raises(ValueError, match=r"by name \(a, b\)"):
            call(fused, given["a"], fusion.task_arithmetic({"a": 1.0, "b": 2.0}), 2)
        with pytest.raises(ValueError, match="by place"):
            call(fused, given["a"], fusion.task_arithmetic([1.0, 2.0]), 2)
        with pytest.raises(ValueError, match="'tree' lacks the leaf|'fused' has|'fused' lacks|'tree' has"):
            call(fused, {"scale": given["a"]["scale"]}, METHODS[0], 4)
        with pytest.raises(ValueError, match="Delta"):
            call(fused, low["a"], METHODS[0], 4)
    with pytest.raises(ValueError, match="no multiple"):
        fusion.add_task(fused, given["a"], fusion.linear(lambda count: jnp.arange(1.0, count + 1) ** -float(count)), 3)
    with pytest.raises(ValueError, match="count=1: taking out the only tree"):
        fusion.remove_task(fused, given["a"], METHODS[0], 1)
    with pytest.raises(ValueError, match="count=0"):
        fusion.add_task(fused, given["a"], METHODS[0], 0)
    three = fusion.fuse(METHODS[0], {n: low[n] for n in "abc"})
    with pytest.raises(ValueError, match="changes 'other', the fusion does not"):
        fusion.remove_task(three, low["d"], METHODS[0], 3)
