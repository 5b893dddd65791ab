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
from pefusion_jax import backbones
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


def first_of_decoder(outputs, inputs):
    return outputs.last_hidden_state[:, 0]


def itself(params, features):
    return features


LAST = Head({}, first_of_decoder, itself)


@pytest.mark.parametrize("scan", [False, True])
def test_an_encoder_decoder_counts_the_tokens_that_a_layer_reads(scan):
    """With as many decoder tokens as encoder tokens, rows and buckets: by hand, and as where all of these differ."""
    config = dict(vocab_size=13, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, tied=False)
    model = backbones.T5(backbones.T5Config(**config, relative_attention_num_buckets=6), scan_layers=scan)
    rng = np.random.default_rng(0)
    source, target = (rng.integers(1, 13, size=(6, 6)).astype(np.int32) for _ in range(2))
    read, told = (np.broadcast_to(np.arange(6) < n, (6, 6)).astype(np.int32) for n in (5, 2))
    weights = np.array([1, 1, 1, 1, 1, 0], np.float32)
    params = jax.jit(model.init)(jax.random.key(0), source, decoder_input_ids=target)["params"]
    adapted = pf.adapt(model, pf.LoRA(rank=2, targets=r"shared|lm_head|.*/(q|v|wi|relative_attention_bias)"))
    start = adapted.init(jax.random.key(1), params, source, decoder_input_ids=target)
    tree = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(2), leaf.shape), start)

    def run(more, masked=True):
        longer = {name: np.pad(a, ((0, 0), (0, more))) for name, a in (("ids", target), ("mask", told))}
        inputs = {"input_ids": source, "attention_mask": read, "decoder_input_ids": longer["ids"]}
        inputs |= {"decoder_attention_mask": longer["mask"]} if masked else {}
        return statistics(adapted, params, tree, [{"inputs": inputs, "weights": weights}], head=LAST, likelihood="gaussian")

    found = run(0)
    assert not [path for path in found.moments if "relative_attention_bias" in path]
    for path, moments in run(1).moments.items():
        for side in ("inputs", "outputs"):
            same = (np.asarray(dense_moment(getattr(each, side))) for each in (found.moments[path], moments))
            np.testing.assert_allclose(*same, rtol=1e-4, atol=1e-6, err_msg=path)
    words = np.concatenate([ids[mask * weights[:, None] > 0] for ids, mask in ((source, read), (target, told))])
    frequencies = np.bincount(words, minlength=13) / len(words)
    np.testing.assert_allclose(found.moments["shared/embedding"].inputs.diagonal, frequencies, rtol=1e-5)
    seen = adapted.apply(params, tree, source, attention_mask=read, decoder_input_ids=target).encoder_last_hidden_state
    rows = np.asarray(seen, np.float64)[read * weights[:, None] > 0]
    for each in (found, run(0, masked=False)):  # the encoder's mask is never the decoder's
        path = "decoder/block/0/layer/1/EncDecAttention/v/kernel"
        np.testing.assert_allclose(each.moments[path].inputs, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    whole = np.concatenate([source[read * weights[:, None] > 0], target[weights > 0].reshape(-1)])
    counted = run(0, masked=False).moments["shared/embedding"].inputs.diagonal
    np.testing.assert_allclose(counted, np.bincount(whole, minlength=13) / len(whole), rtol=1e-5)


@pytest.mark.parametrize("kind", ["Bert", "MPNet"])
def test_tables_that_are_read_once_for_all_rows_have_no_moments(kind):
    """As many tokens as rows, so that the queries of MPNet's distances look like rows."""
    shape = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, max_position_embeddings=8)
    model = getattr(backbones, kind)(getattr(backbones, f"{kind}Config")(vocab_size=11, **shape))
    ids = np.arange(9, dtype=np.int32).reshape(3, 3) % 5 + 3
    params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
    adapted = pf.adapt(model, pf.LoRA(rank=2, targets=r".*(word|position)_embeddings|.*relative_attention_bias"))
    tree = jax.tree.map(lambda leaf: leaf + 0.1, adapted.init(jax.random.key(1), params, ids))

    def run(inputs):
        batches = [{"inputs": {"input_ids": rows}, "weights": np.ones(len(rows), np.float32)} for rows in inputs]
        return statistics(adapted, params, tree, batches, head=LAST).moments

    together, apart = run([ids]), run([row[None] for row in ids])
    # MPNet counts positions row by row from the padding.
    tables = ["position", "word"] if kind == "MPNet" else ["word"]
    assert sorted(together) == sorted(apart) == [f"embeddings/{table}_embeddings/embedding" for table in tables]
    for path, moments in together.items():
        np.testing.assert_allclose(moments.outputs, apart[path].outputs, rtol=1e-4, atol=1e-7)


class Flat(nn.Module):
    """A layer on rows and tokens in one axis, or on one row at a time."""

    mapped: bool = False

    @nn.compact
    def __call__(self, x, attention_mask):
        if self.mapped:
            h = nn.vmap(nn.Dense, variable_axes={"params": None}, split_rngs={"params": False})(3, name="d")(x)
        else:
            h = nn.Dense(3, name="d")(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:2], 3)
        return jnp.sum(jnp.tanh(h) * attention_mask.astype(x.dtype)[..., None], axis=1)


def test_rows_in_one_axis_with_their_tokens_are_told_apart_and_others_refused():
    x = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
    mask = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], np.int32)
    batch = {"inputs": {"x": x, "attention_mask": mask}, "weights": np.array([1, 1, 1, 0], np.float32)}
    params = Flat().init(jax.random.key(0), **batch["inputs"])["params"]
    adapted = pf.adapt(Flat(), pf.LoRA(rank=2, targets="d"))
    tree = adapted.init(jax.random.key(1), params, **batch["inputs"])
    head = Head({}, lambda outputs, inputs: outputs, itself)
    found = statistics(adapted, params, tree, [batch], head=head).moments["d/kernel"]
    rows = x[mask * batch["weights"][:, None] > 0].astype(np.float64)
    np.testing.assert_allclose(found.inputs, rows.T @ rows / 6, rtol=1e-5, atol=1e-6)
    adapted = pf.adapt(Flat(mapped=True), pf.LoRA(rank=2, targets="d"))
    with pytest.raises(ValueError, match=r"'d' is called at positions of shape \(3,\), .* 4 rows.*nn.vmap"):
        statistics(adapted, params, tree, [batch], head=head)


class Both(nn.Module):
    """One layer for the tokens of both sides."""

    @nn.compact
    def __call__(self, input_ids, decoder_input_ids, attention_mask=None):
        layer = nn.Dense(2, name="both")
        source, target = (jnp.tanh(layer(jax.nn.one_hot(ids, 5))) for ids in (input_ids, decoder_input_ids))
        return jnp.sum(source, axis=1) + target[:, 0]


def test_a_layer_of_both_sides_wants_different_lengths():
    ids, mask = np.array([[0, 1, 2], [3, 4, 0]], np.int32), np.array([[1, 1, 0], [1, 1, 1]], np.int32)
    params = Both().init(jax.random.key(0), ids, ids)["params"]
    adapted = pf.adapt(Both(), pf.LoRA(rank=2, targets="both"))
    tree = adapted.init(jax.random.key(1), params, ids, ids)

    def run(target):
        inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": target}
        head = Head({}, lambda outputs, inputs: outputs, itself)
        return statistics(adapted, params, tree, [{"inputs": inputs, "weights": np.ones(2, np.float32)}], head=head)

    with pytest.raises(ValueError, match="'both' reads the encoder's tokens and the decoder's.*different lengths"):
        run(ids)
    counted = np.concatenate([ids[mask > 0], ids[:, :2].reshape(-1)])
    frequencies = np.bincount(counted, minlength=5) / len(counted)
    np.testing.assert_allclose(np.diagonal(run(ids[:, :2]).moments["both/kernel"].inputs), frequencies, rtol=1e-6)


def test_a_task_gives_its_own_examples_and_a_bias_is_the_weight_of_a_constant():
    _, params, _, _ = models.build()
    adapted = pf.adapt(models.Model(), pf.FullFineTuning(targets=r"layer/0/up/.*"))
    task = models.make_task("t", 0)
    tree = adapted.init(jax.random.key(0), params, models.IDS)
    unlabelled = dataclasses.replace(task, label="missing")
    found = statistics(adapted, params, tree, unlabelled, examples=13, batch_size=8)
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
