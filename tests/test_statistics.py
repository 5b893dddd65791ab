"""Moments and Fisher diagonals against a plain evaluation, in every layout and linearization; their compression and files."""

from __future__ import annotations

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import statistics_models as models

import pefusion_jax as pf
from pefusion_jax.interop import safetensors
from pefusion_jax.moment_files import load_statistics, save_statistics
from pefusion_jax.moments import (
    Moments,
    Spectral,
    Statistics,
    compress_statistics,
    dense_moment,
)
from pefusion_jax.statistics import statistics
from pefusion_jax.tasks import Head

ALL = ("inputs", "outputs", "fisher")


def collect(adapted, params, tree, **options):
    return statistics(adapted, params, tree, [models.BATCH], head=models.HEAD, **options)


def require_close(found, expected):
    assert set(found.moments) == set(expected)
    for path, (inputs, outputs, fisher) in expected.items():
        for actual, wanted in (
            (dense_moment(found.moments[path].inputs), inputs),
            (found.moments[path].outputs, outputs),
            (found.fisher[path], fisher),
        ):
            np.testing.assert_allclose(actual, wanted, rtol=2e-5, atol=2e-6 * np.abs(wanted).max(), err_msg=path)


def test_moments_of_a_plain_model_without_padding():
    adapted, params, _, point = models.build()
    found = collect(adapted, params, point, kinds=ALL)
    require_close(found, models.reference(pf.fold(params, adapted.deltas(params, point))))
    assert found.examples == 2
    # Token 0 stands in padding only, token 6 in the row that fills up the batch.
    frequencies = np.asarray(found.moments["embed/embedding"].inputs.diagonal)
    np.testing.assert_allclose(frequencies, np.array([0, 1, 2, 1, 1, 0, 0]) / 5, rtol=1e-6)


def test_a_scan_under_remat_has_the_moments_of_the_loop():
    adapted, params, _, point = models.build()
    one = collect(adapted, params, point, kinds=ALL)
    adapted, params, _, point = models.build(scan=True)
    two = collect(adapted, params, point, kinds=ALL)
    pf.trees.require_same_structure({"loop": one, "scan": two})
    for path, leaf in pf.trees.paths(one).items():
        np.testing.assert_allclose(leaf, pf.trees.paths(two)[path], rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("mode", ["network", "layer"])
def test_moments_of_linearized_models(mode):
    adapted, params, start, point = models.build()
    linear = pf.linearize(adapted, start, mode)
    tau = jax.tree.map(jnp.subtract, point, start)
    found = collect(linear, params, tau, kinds=ALL)
    expansion = pf.fold(params, adapted.deltas(params, start))
    if mode == "layer":
        require_close(found, models.reference(pf.fold(expansion, linear.deltas(params, tau))))
    else:
        moved = linear.apply(params, tau, models.IDS) - linear.apply(params, jax.tree.map(jnp.zeros_like, tau), models.IDS)
        require_close(found, models.reference(expansion, moved))
        assert float(jnp.abs(moved).max()) > 0.1


class Mixed(nn.Module):
    """Every kind of layer once, on one position."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.DenseGeneral((2, 3), name="heads")(x))
        x = jnp.tanh(nn.DenseGeneral(4, axis=(-2, -1), name="join")(x))
        x = jnp.tanh(nn.Conv(3, kernel_size=(3,), name="conv")(x))
        x = jnp.tanh(nn.Einsum((2, 3, 2), "btd,ndh->btnh", name="mixed", use_bias=False)(x))
        x = jnp.tanh(nn.Einsum((2, 2, 3), "btnh,nhd->btnd", name="experts", use_bias=False)(x))
        return x.reshape(*x.shape[:2], -1)


def first(outputs, inputs):
    return outputs[:, 0]


def test_kinds_of_layers_by_their_fisher_information():
    """One example with one position: the squared gradient of each weight is the product of the two diagonals."""
    model = Mixed()
    x = np.random.default_rng(1).normal(size=(1, 1, 5)).astype(np.float32)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    adapted = pf.adapt(model, pf.LoRA(rank=1, targets=".*"))
    tree = jax.tree.map(lambda leaf: leaf + 0.1, adapted.init(jax.random.key(1), params, x))
    head = Head({"kernel": jax.random.normal(jax.random.key(2), (6, 3))}, first, models.logits)
    batch = {"inputs": {"x": x}, "weights": np.ones(1, np.float32)}
    found = statistics(adapted, params, tree, [batch], head=head, kinds=ALL)
    assert sorted(found.moments) == [f"{name}/kernel" for name in ("conv", "experts", "heads", "join", "mixed")]
    for path, moments in found.moments.items():
        g, s = (np.diagonal(side, axis1=-2, axis2=-1) for side in (moments.inputs, moments.outputs))
        product = g[..., :, None] * s[..., None, :]
        fisher = np.asarray(found.fisher[path])
        fisher = fisher if moments.axes is None else fisher.transpose(moments.axes)
        np.testing.assert_allclose(product, fisher.reshape(product.shape), rtol=1e-4, atol=1e-7, err_msg=path)
        assert product.max() > 1e-6
    assert found.moments["experts/kernel"].inputs.shape == (2, 2, 2)


def test_a_task_gives_its_own_examples_and_a_bias_is_the_weight_of_a_constant():
    _, params, _, _ = models.build()
    adapted = pf.adapt(models.Model(), pf.FullFineTuning(targets=r"layer/0/up/.*"))
    task = models.make_task("t", 0)
    tree = adapted.init(jax.random.key(0), params, models.IDS)
    found = statistics(adapted, params, tree, task, examples=13, batch_size=8)
    assert found.examples == 13 and sorted(found.moments) == ["layer/0/up/bias", "layer/0/up/kernel"]
    # Exactly the first 13 of the permutation.
    ids = np.concatenate([pf.tasks.train_batch(task, step, 8, 0)["inputs"]["ids"] for step in range(2)])[:13]
    rows = np.asarray(params["embed"]["embedding"])[ids.reshape(-1)]
    np.testing.assert_allclose(found.moments["layer/0/up/kernel"].inputs, rows.T @ rows / 39, rtol=1e-5, atol=1e-6)
    assert found.moments["layer/0/up/bias"].inputs.tolist() == [[1.0]]
    assert np.array_equal(found.moments["layer/0/up/bias"].outputs, found.moments["layer/0/up/kernel"].outputs)


def test_refusals():
    adapted, params, _, point = models.build()
    with pytest.raises(ValueError, match="pass head="):
        statistics(adapted, params, point, [models.BATCH])
    with pytest.raises(ValueError, match="kinds="):
        collect(adapted, params, point, kinds=("outputs",))
    with pytest.raises(ValueError, match="no parameter 'layer/0/upp/kernel'.*layer/0/up/kernel"):
        collect(adapted, params, point, paths=("layer/0/upp/kernel",))
    with pytest.raises(ValueError, match="no batches"):
        statistics(adapted, params, point, [], head=models.HEAD)


def random_statistics(seed=0):
    rng = np.random.default_rng(seed)

    def moment(n):
        x = rng.normal(size=(2 * n, n)) * np.linspace(0.1, 2, n)
        return jnp.asarray(x.T @ x / n, jnp.float32)

    moments = {
        "a/kernel": Moments(moment(6), moment(9)),
        "b/kernel": Moments(moment(9), moment(4), (1, 0, 2)),
        "e/embedding": Moments(Spectral(jnp.zeros((5, 0)), jnp.zeros(0), jnp.arange(5.0)), moment(4)),
    }
    return Statistics(moments, {"a/kernel": jnp.asarray(rng.random((6, 9)), jnp.float32)}, 32)


def sides(stats):
    """Every moment multiplied out, in float64."""

    def whole(value):
        if not isinstance(value, Spectral):
            return np.asarray(value, np.float64)
        vectors, values, diagonal = (np.asarray(part, np.float64) for part in (value.vectors, value.values, value.diagonal))
        return vectors * values @ vectors.T + np.diag(diagonal)

    return {
        (path, side): whole(getattr(moments, side)) for path, moments in stats.moments.items() for side in ("inputs", "outputs")
    }


def test_compression_keeps_traces_and_gets_better_with_room():
    whole = random_statistics()
    before = sides(whole)

    def errors(stats):
        out = {}
        for name, value in sides(stats).items():
            np.testing.assert_allclose(np.trace(value), np.trace(before[name]), rtol=1e-6)
            np.testing.assert_allclose(np.diagonal(value), np.diagonal(before[name]), rtol=1e-5, atol=1e-6)
            out[name] = np.linalg.norm(value - before[name])
        return out

    smallest = compress_statistics(whole, rank=0).size()
    last = errors(compress_statistics(whole, rank=0))
    assert last["a/kernel", "outputs"] > 0.1
    for budget in np.linspace(smallest, whole.size(), 6).astype(int):
        small = compress_statistics(whole, budget=int(budget))
        assert small.size() <= budget
        now = errors(small)
        assert all(now[name] <= last[name] + 1e-5 for name in now), budget
        last = now
    assert max(last.values()) < 1e-4
    ranked = [errors(compress_statistics(whole, rank=rank)) for rank in (0, 2, 5)]
    for low, high in zip(ranked[:-1], ranked[1:], strict=True):
        assert all(high[name] <= low[name] + 1e-5 for name in low)
    with pytest.raises(ValueError, match=f"budget={smallest - 1} bytes is too small: the diagonals alone take {smallest}"):
        compress_statistics(whole, budget=smallest - 1)
    with pytest.raises(ValueError, match="either rank"):
        compress_statistics(whole)


def test_files_hold_the_same_bits(tmp_path):
    for stats in (random_statistics(), compress_statistics(random_statistics(), rank=1)):
        save_statistics(tmp_path / "run" / "statistics.safetensors", stats)
        again = load_statistics(tmp_path / "run" / "statistics.safetensors")
        assert jax.tree.structure(again) == jax.tree.structure(stats) and again.examples == 32
        for one, two in zip(jax.tree.leaves(stats), jax.tree.leaves(again), strict=True):
            assert np.asarray(one).tobytes() == np.asarray(two).tobytes()
    broken = dataclasses.replace(stats, fisher={"a/kernel": jnp.full((2,), jnp.nan)})
    with pytest.raises(ValueError, match="fisher:a/kernel"):
        save_statistics(tmp_path / "nan.safetensors", broken)
    assert not (tmp_path / "nan.safetensors").exists()


EYE = np.eye(3, dtype=np.float32)
META = {"kind": "second moments 1", "examples": "4", "axes": "{}"}


@pytest.mark.parametrize(
    "tensors, metadata, message",
    [
        ({"inputs:k": EYE}, {"kind": "adapters"}, "does not hold statistics"),
        ({"inputs:k": EYE}, META | {"axes": "[1"}, "__metadata__"),
        ({"inputs:k": EYE}, META | {"axes": json.dumps({"k": [0, 2]})}, "__metadata__"),
        ({"inputs:k": EYE}, META | {"axes": json.dumps({"k": {"0": 1}})}, "__metadata__"),
        ({"inputs:k": EYE}, META | {"axes": '{"k": [Infinity]}'}, "__metadata__"),
        ({"inputs:k": EYE}, META | {"axes": json.dumps({"q": [1, 0]})}, "__metadata__"),
        ({"inputs:k": EYE}, META | {"examples": "-1"}, "__metadata__"),
        ({"inputs:k": EYE}, META | {"examples": "[" * 5000}, "__metadata__"),
        ({"inputs:k": EYE[:2]}, META, "inputs:k"),
        ({"inputs:k": -EYE}, META, "inputs:k"),
        ({"inputs:k": EYE * np.nan}, META, "inputs:k"),
        ({"inputs:k": EYE.astype(np.int32)}, META, "inputs:k"),
        ({"outputs:k": EYE}, META, "outputs:k"),
        ({"fisher:k": -EYE}, META, "fisher:k"),
        ({"other:k": EYE}, META, "other:k"),
        ({"inputs.more:k": EYE}, META, "inputs.more:k"),
        ({"inputs.vectors:k": EYE, "inputs.values:k": EYE[0]}, META, "inputs:k"),
        ({"inputs.vectors:k": EYE, "inputs.values:k": EYE[0], "inputs.diagonal:k": EYE[0, :2]}, META, "inputs:k"),
        ({"inputs:k": EYE, "inputs.values:k": EYE[0]}, META, "inputs:k"),
    ],
)
def test_hostile_files_are_refused_by_name(tmp_path, tensors, metadata, message):
    path = tmp_path / "hostile.safetensors"
    safetensors.save_safetensors(path, tensors, metadata)
    with pytest.raises(ValueError) as caught:
        load_statistics(path)
    assert str(path) in str(caught.value) and message in str(caught.value)
