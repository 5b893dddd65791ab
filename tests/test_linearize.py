"""The three linearizations on a real model, and their relations to what others do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefusion_jax as pf
from pefusion_jax import trees

SENTENCES = [
    "A young boxer fights his way out of poverty.",
    "Shares fell sharply after the bank warned of losses.",
    "Turn on the light in the kitchen.",
]


@pytest.fixture(scope="module")
def minilm():
    """MiniLM with LoRA on query and value, a start, and one batch of real sentences."""
    model, params = pf.load_pretrained("sentence-transformers/all-MiniLM-L6-v2")
    tokenizer = pf.load_tokenizer("sentence-transformers/all-MiniLM-L6-v2")
    inputs = {k: np.asarray(v) for k, v in tokenizer(SENTENCES, padding=True, return_tensors="np").items()}
    lora = pf.adapt(model, pf.LoRA(rank=16, alpha=32, targets=r".*/(query|value)"))
    return lora, params, lora.init(jax.random.key(0), params, **inputs), inputs


def hidden(adapted):
    def apply(params, tree, inputs):
        return adapted.apply(params, tree, **inputs).last_hidden_state

    return jax.jit(apply)


def noise(tree, seed, size=0.02):
    keys = jax.tree.unflatten(
        jax.tree.structure(tree), list(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(tree))))
    )
    return jax.tree.map(lambda leaf, k: size * jax.random.normal(k, leaf.shape), tree, keys)


def test_network_mode_superposes_on_minilm(minilm):
    lora, params, phi0, inputs = minilm
    apply = hidden(pf.linearize(lora, phi0))
    taus = [noise(phi0, seed) for seed in (1, 2, 3)]
    f0 = np.asarray(apply(params, jax.tree.map(jnp.zeros_like, phi0), inputs), np.float64)
    parts = [np.asarray(apply(params, tau, inputs), np.float64) - f0 for tau in taus]
    together = apply(params, jax.tree.map(lambda a, b, c: a + 0.5 * b - c, *taus), inputs)
    expected = f0 + parts[0] + 0.5 * parts[1] - parts[2]
    error = np.abs(together - expected).max() / np.abs(expected).max()
    assert error <= 1e-5
    plain = hidden(lora)
    moved = [np.asarray(plain(params, jax.tree.map(jnp.add, phi0, tau), inputs), np.float64) - f0 for tau in taus[:2]]
    both = plain(params, jax.tree.map(lambda a, b, c: a + b + c, phi0, *taus[:2]), inputs)
    assert np.abs(both - f0 - sum(moved)).max() / np.abs(both).max() > 1e-2, "the model itself is not additive"


def test_layer_mode_is_lora_with_frozen_a_and_folds_on_minilm(minilm):
    lora, params, phi0, inputs = minilm
    layer = pf.linearize(lora, phi0, "layer")
    tau = noise(phi0, 1)
    out = hidden(layer)(params, tau, inputs)
    frozen = trees.map_paths(lambda p, leaf: trees.paths(tau)[p] if p.endswith("lora_b") else leaf, phi0)
    scale = np.abs(out).max()
    assert np.abs(out - hidden(lora)(params, frozen, inputs)).max() <= 1e-5 * scale
    folded = pf.fold(params, layer.deltas(params, tau))
    base = jax.jit(lambda p, i: lora.base(p, **i).last_hidden_state)
    assert np.abs(out - base(folded, inputs)).max() <= 1e-5 * scale
    assert np.abs(out - base(params, inputs)).max() > 1e-2 * scale
    assert all(change.rank == 16 for change in layer.deltas(params, tau).leaves.values())


def test_the_gradient_of_a_is_exactly_zero_from_the_standard_start(minilm):
    lora, params, phi0, inputs = minilm
    for mode in ("network", "layer"):
        apply = pf.linearize(lora, phi0, mode).apply

        @jax.jit
        def gradient(tau, apply=apply):
            return jax.grad(lambda t: jnp.sum(apply(params, t, **inputs).last_hidden_state[:, 0, 0]))(tau)

        for path, leaf in trees.paths(gradient(noise(phi0, 1))).items():
            assert bool(np.any(leaf)) == path.endswith("lora_b"), (mode, path)


def test_flops_on_minilm(minilm):
    """XLA's counts relative to one forward of the base, at 16 texts of 32 tokens."""
    lora, params, phi0, _ = minilm
    inputs = {"input_ids": jnp.ones((16, 32), jnp.int32), "attention_mask": jnp.ones((16, 32), jnp.int32)}
    network = pf.linearize(lora, phi0)

    def flops(fn, *args):
        return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]

    def gradient(adapted):
        return jax.grad(lambda t, p, i: jnp.mean(jnp.square(adapted.apply(p, t, **i).last_hidden_state - 1.0)))

    base = flops(lambda p, i: lora.base(p, **i).last_hidden_state, params, inputs)
    tau = network.trainable(network.init(None, params))
    assert flops(gradient(lora), phi0, params, inputs) <= 2.15 * base
    assert flops(lambda t, p, i: network.apply(p, t, **i).last_hidden_state, tau, params, inputs) <= 2.15 * base
    assert flops(gradient(network), tau, params, inputs) <= 3.2 * base


def test_network_mode_is_jax_linearize_of_the_whole_model(minilm):
    lora, params, phi0, inputs = minilm
    tau = noise(phi0, 1)
    value, push = jax.linearize(lambda phi: lora.apply(params, phi, **inputs).last_hidden_state, phi0)
    expected = value + push(tau)
    out = hidden(pf.linearize(lora, phi0))(params, tau, inputs)
    assert np.abs(out - expected).max() <= 1e-5 * np.abs(expected).max()


def test_errors_say_what_to_do(minilm):
    lora, params, phi0, inputs = minilm
    with pytest.raises(ValueError, match="mode='networks' is not one of 'network', 'layer', 'weight'"):
        pf.linearize(lora, phi0, "networks")
    linear = pf.linearize(lora, phi0)
    with pytest.raises(ValueError, match="linearized already"):
        pf.linearize(linear, phi0)
    broken = trees.map_paths(lambda p, leaf: leaf * np.float32("nan") if "layer/0" in p else leaf, phi0)
    with pytest.raises(ValueError, match="adapters0: 'encoder/layer/0/.*lora_a' holds .* NaN"):
        pf.linearize(lora, broken)
    with pytest.raises(ValueError, match="the displacement has a leaf 'encoder/lora_c', adapters0 has none; nearest"):
        linear.apply(params, {"encoder": {"lora_c": jnp.ones(2)}}, **inputs)


def test_an_operation_without_a_forward_rule_is_named():
    import flax.linen as nn

    @jax.custom_vjp
    def fused(x):
        return jnp.sin(x)

    fused.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="last")(fused(nn.Dense(3, name="first")(x)))

    x = jnp.ones((2, 3))
    params = Net().init(jax.random.key(0), x)["params"]
    lora = pf.adapt(Net(), pf.LoRA(rank=1, targets="first"))
    phi0 = lora.init(jax.random.key(0), params, x)
    with pytest.raises(TypeError, match="custom_vjp.*no forward rule.*dot_product_attention"):
        pf.linearize(lora, phi0).apply(params, phi0, x)
    np.testing.assert_allclose(
        pf.linearize(lora, phi0, "layer").apply(params, jax.tree.map(jnp.zeros_like, phi0), x), lora.base(params, x)
    )


@pytest.fixture(scope="module")
def small():
    """A model of two layers, adapters away from their start, and a batch."""
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="last")(jnp.tanh(nn.Dense(4, name="first")(x)))

    x = jax.random.normal(jax.random.key(1), (2, 3))
    params = Net().init(jax.random.key(0), x)["params"]
    lora = pf.adapt(Net(), pf.LoRA(rank=2, targets="first|last"))
    return lora, params, jax.tree.map(lambda leaf: leaf + 0.3, lora.init(jax.random.key(0), params, x)), x


@pytest.mark.parametrize("mode", ["network", "layer", "weight"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_adapters_in_half_precision_are_expanded_in_float32(small, mode, dtype):
    lora, params, phi, x = small
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), phi)
    same = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    tau = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.125), half)  # in half precision as well
    found, expected = (pf.linearize(lora, start, mode).apply(params, tau, x) for start in (half, same))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("mode", ["network", "layer", "weight"])
def test_frozen_dictionaries_are_dictionaries(small, mode):
    from flax.core import freeze

    lora, params, phi, x = small
    linear = pf.linearize(lora, phi, mode)
    tau = jax.tree.map(lambda leaf: leaf * 0.1, phi)
    expected = linear.apply(params, tau, x)
    for made, given in ((linear, freeze(tau)), (pf.linearize(lora, freeze(phi), mode), tau)):
        np.testing.assert_array_equal(made.apply(params, given, x), expected)
    delta = linear.deltas(params, freeze(tau))
    for collections in ({"params": params}, freeze({"params": params})):
        np.testing.assert_array_equal(linear.apply_deltas(collections, delta, x), linear.apply_deltas(params, delta, x))


@pytest.mark.parametrize("mode", ["network", "layer", "weight"])
def test_changes_of_no_parameter_or_of_another_shape_are_named(small, mode):
    lora, params, phi, x = small
    linear = pf.linearize(lora, phi, mode)
    with pytest.raises(ValueError, match="no parameter 'frist/kernel' to fold into; nearest: 'first/kernel'"):
        linear.apply_deltas(params, pf.Delta({"frist/kernel": jnp.ones((3, 4))}), x)
    with pytest.raises(ValueError, match=r"'first/kernel' has shape \(3, 4\), its change has \(1, 4\)"):
        linear.apply_deltas(params, pf.Delta({"first/kernel": jnp.ones((1, 4))}), x)


@pytest.mark.parametrize("mode", ["network", "layer", "weight"])
def test_displacements_of_another_shape_are_named(small, mode):
    lora, params, phi, x = small
    linear = pf.linearize(lora, phi, mode)
    wider = {"first": {name: jnp.concatenate([leaf, leaf]) for name, leaf in phi["first"].items()}}
    for use in (lambda t: linear.apply(params, t, x), lambda t: linear.deltas(params, t)):
        with pytest.raises(ValueError, match=r"leaf 'first/lora_[ab]' has the shape \(.*, and \(.* in adapters0"):
            use(wider)
