"""``conform="peft"`` and ``peft_weighted_adapter`` against PEFT's ``add_weighted_adapter`` on the same tensors."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pefusion_jax import fusion, trees
from pefusion_jax.fusion import parts
from pefusion_jax.fusion.conformance import peft_weighted_adapter

SITES = {"q": (5, 4), "v": (6, 3)}  # inputs, outputs
ALPHAS = {"a": 4.0, "b": 1.0, "c": 3.0}
WEIGHTS = {"a": 0.7, "b": 1.5, "c": -0.4}


@functools.cache
def torch_and_peft():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        import torch
    return torch, peft


def adapters(ranks: tuple[int, ...] = (2, 2, 2), missing: bool = False) -> dict[str, dict]:
    """Three trees; at one entry of A, and of B, two tasks are at odds and the third has no opinion."""
    rng = np.random.default_rng(5)
    made = {}
    for sign, name, rank in zip((1, -1, 0), ALPHAS, ranks, strict=True):
        made[name] = {}
        for site, (inputs, outputs) in SITES.items():
            a, b = rng.normal(size=(inputs, rank)), rng.normal(size=(rank, outputs))
            a[0, 0], b[0, 0] = 3 * sign, 3 * sign
            made[name][site] = {"lora_a": jnp.asarray(a, jnp.float32), "lora_b": jnp.asarray(b, jnp.float32)}
    if missing:
        del made["c"]["v"]
    return made


def theirs(given: dict[str, dict], kind: str, masks: list | None = None, **options) -> dict[str, dict]:
    """What PEFT makes of the trees; random masks are drawn here and left in ``masks``, in the order of the draws."""
    torch, peft = torch_and_peft()
    rng = np.random.default_rng(0)

    def bernoulli(chance):
        masks.append((rng.uniform(size=chance.shape) < chance.numpy()).astype(np.float32))
        return torch.tensor(masks[-1])

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")  # about attributes that a model of ours lacks, and densities of 1
        if masks is not None:
            patch.setattr(torch, "bernoulli", bernoulli)
        model = torch.nn.ModuleDict({site: torch.nn.Linear(*shape, bias=False) for site, shape in SITES.items()})
        for place, (name, tree) in enumerate(given.items()):
            rank = tree["q"]["lora_a"].shape[1]
            config = peft.LoraConfig(r=rank, lora_alpha=ALPHAS[name] * rank, target_modules=list(tree))
            if place == 0:
                model = peft.PeftModel(model, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
        layers = {site: model.base_model.model[site] for site in SITES}
        for name, tree in given.items():
            for site, pair in tree.items():
                layers[site].lora_A[name].weight.data = torch.tensor(np.asarray(pair["lora_a"]).T)
                layers[site].lora_B[name].weight.data = torch.tensor(np.asarray(pair["lora_b"]).T)
        weights = [WEIGHTS[name] for name in given]
        model.add_weighted_adapter(list(given), weights, "merged", combination_type=kind, **options)
    assert all(layer.scaling["merged"] == 1 for layer in layers.values())
    return {
        site: {
            "lora_a": layer.lora_A["merged"].weight.detach().numpy().T,
            "lora_b": layer.lora_B["merged"].weight.detach().numpy().T,
        }
        for site, layer in layers.items()
    }


def ours(given: dict[str, dict], kind: str, **options) -> dict:
    names = list(given)
    call = functools.partial(
        peft_weighted_adapter,
        weights={name: WEIGHTS[name] for name in names},
        combination_type=kind,
        scaling={name: ALPHAS[name] for name in names},
        **options,
    )
    return jax.jit(call)(given)


def products(tree: dict) -> dict[str, np.ndarray]:
    return {site: np.asarray(pair["lora_a"]) @ np.asarray(pair["lora_b"]) for site, pair in tree.items()}


def same(got, want) -> None:
    def close(ours, theirs):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * max(np.abs(theirs).max(), 1))

    jax.tree.map(close, got, want)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("linear", {}),
        ("cat", {}),
        ("ties", {"density": 0.5}),
        ("ties", {"density": 0.6, "majority_sign_method": "frequency"}),
        ("ties", {"density": 0.15}),  # less than one entry of some factors
        ("ties", {"density": 1.0}),
        ("magnitude_prune", {"density": 0.5}),
    ],
)
def test_on_the_factors(kind, options):
    given = adapters()
    same(ours(given, kind, **options), theirs(given, kind, **options))


@pytest.mark.parametrize(
    ("kind", "options"),
    [("svd", {}), ("svd", {"svd_rank": 3}), ("ties_svd", {"density": 0.4}), ("magnitude_prune_svd", {"density": 0.3})],
)
def test_on_the_changes(kind, options):
    """Singular vectors have arbitrary signs, so products are compared, and the ranks."""
    given = adapters((2, 1, 2), missing=True)
    got, want = ours(given, kind, **options), theirs(given, kind, **options)
    same(products(got), products(want))
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(np.shape, want)
    for site in SITES:  # the singular values stand in B
        np.testing.assert_allclose(got[site]["lora_a"].T @ got[site]["lora_a"], np.eye(got[site]["lora_a"].shape[1]), atol=1e-5)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_random_types_with_the_same_masks(kind, monkeypatch):
    given, masks = adapters(), []
    want = theirs(given, kind, masks, density=0.6)
    order = list(SITES) if kind.endswith("_svd") else [f"{site}/{last}" for site in SITES for last in ("lora_a", "lora_b")]
    by_path = {path: np.stack([mask.T for mask in masks[3 * place : 3 * place + 3]]) for place, path in enumerate(order)}
    assert len(masks) == 3 * len(order)

    def drop(density, key):
        return lambda stacked: trees.map_paths(lambda path, leaf: leaf * by_path[path] / jnp.float32(density), stacked)

    monkeypatch.setattr(parts, "drop", drop)
    got = ours(given, kind, density=0.6)
    same(*((products(got), products(want)) if kind.endswith("_svd") else (got, want)))


def test_other_ranks_and_missing_layers():
    given = adapters((1, 3, 2), missing=True)
    got, want = ours(given, "cat"), theirs(given, "cat")
    same(products(got), products(want))
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(np.shape, want)
    exact = {
        site: sum(WEIGHTS[n] * ALPHAS[n] * p[site]["lora_a"] @ p[site]["lora_b"] for n, p in given.items() if site in p)
        for site in SITES
    }
    same(products(got), exact)
    with pytest.raises(ValueError, match="ranks at 'q' differ.*use 'cat'"):
        ours(given, "linear")


def test_one_tree_is_linear_and_linear_has_cross_terms():
    one = {"a": adapters()["a"]}
    same(ours(one, "ties_svd", density=0.2), theirs(one, "ties_svd", density=0.2))
    given = adapters()
    exact = sum(WEIGHTS[name] * ALPHAS[name] * products(tree)["q"] for name, tree in given.items())
    assert np.abs(products(ours(given, "linear"))["q"] - exact).max() > 1


def test_stacked_layers_are_one_tensor_each():
    given = adapters()
    layers = {
        name: {"layers": {str(i): {"q": {k: (i + 1) * v for k, v in tree["q"].items()}} for i in range(2)}}
        for name, tree in given.items()
    }
    stacked = {
        name: {"layers": {"q": {k: jnp.stack([tree["layers"][i]["q"][k] for i in "01"]) for k in ("lora_a", "lora_b")}}}
        for name, tree in layers.items()
    }
    for kind in ("ties", "svd"):
        flat, got = (ours(trees_, kind, density=0.5) for trees_ in (layers, stacked))
        for last in ("lora_a", "lora_b"):
            want = jnp.stack([flat["layers"][i]["q"][last] for i in "01"])
            np.testing.assert_allclose(got["layers"]["q"][last], want, atol=1e-6)


def test_what_cannot_be_combined():
    given = adapters()
    for message, call in {
        "must be one of": lambda: peft_weighted_adapter(given, WEIGHTS, "slerp"),
        "needs a density": lambda: peft_weighted_adapter(given, WEIGHTS, "ties"),
        "only lora_a and lora_b": lambda: peft_weighted_adapter({"a": {"q": {"magnitude": jnp.ones(3)}}}, {"a": 1.0}),
        "only lora_a at 'q'": lambda: peft_weighted_adapter([{"q": {"lora_a": jnp.ones((3, 1))}}], [1.0]),
        "weights are given for a, b": lambda: peft_weighted_adapter(given, {"a": 1.0, "b": 2.0}),
        "given like the trees": lambda: peft_weighted_adapter(given, [1.0, 2.0, 3.0]),
        "no trees": lambda: peft_weighted_adapter([], []),
        "'total' or 'frequency'": lambda: peft_weighted_adapter(given, WEIGHTS, "ties", density=1.0, majority_sign_method="x"),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=r"takes weights only with conform='peft' or 'mergekit', not with 'paper'"):
        fusion.ties(weights=[1.0])
    with pytest.raises(ValueError, match="ties conforms to .* not 'mergkit'"):
        fusion.ties(conform="mergkit")
