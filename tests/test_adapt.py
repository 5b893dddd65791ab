"""What the contract suite does not walk: foreign layers, several methods, shared modules, dropout, half precision, errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefusion_jax as pf
from pefusion_jax import trees


class Shared(nn.Module):
    """One layer that is called twice."""

    def setup(self):
        self.inner = nn.Dense(6)

    def __call__(self, x):
        return self.inner(jnp.tanh(self.inner(x)))


class Net(nn.Module):
    """Two dense layers, a normalisation with state, and an option."""

    @nn.compact
    def __call__(self, x, train: bool = False, *, gain: float = 1.0):
        x = nn.Dense(8, name="first")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return gain * nn.Dense(4, name="second")(jnp.tanh(x))


X = jax.random.normal(jax.random.key(1), (3, 6))


def shift(tree, seed=2):
    keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(tree)))
    keys = jax.tree.unflatten(jax.tree.structure(tree), list(keys))
    return jax.tree.map(lambda leaf, k: leaf + 0.1 * jax.random.normal(k, leaf.shape), tree, keys)


def test_a_shared_layer_has_one_adapter():
    model = Shared()
    params = model.init(jax.random.key(0), X)["params"]
    adapted = pf.adapt(model, pf.LoRA(rank=2, targets="inner"))
    adapters = shift(adapted.init(jax.random.key(0), params, X))
    assert trees.paths(adapters).keys() == {"inner/lora_a", "inner/lora_b"}
    folded = model.apply({"params": pf.fold(params, adapted.deltas(params, adapters))}, X)
    np.testing.assert_allclose(adapted.apply(params, adapters, X), folded, atol=1e-5)


def test_collections_options_and_keywords_pass_through():
    model = Net()
    variables = model.init(jax.random.key(0), X)
    adapted = pf.adapt(model, pf.LoRA(rank=2, targets="first"))
    adapters = shift(adapted.init(jax.random.key(0), variables, X, False, gain=2.0))
    assert set(trees.flat(adapters)) == {"first/lora_a", "first/lora_b"}
    doubled = adapted.apply(variables, adapters, X, False, gain=2.0)
    np.testing.assert_allclose(doubled, 2 * adapted.apply(variables, adapters, X), atol=1e-6)
    linear = pf.linearize(adapted, adapters)
    np.testing.assert_allclose(linear.apply(variables, linear.init(None, variables), X, gain=2.0), doubled, atol=1e-6)


def test_the_first_matching_method_wins_and_kinds_combine():
    model = Net()
    variables = model.init(jax.random.key(0), X)
    methods = [pf.LoRA(rank=1, targets="first"), pf.LoRA(rank=3, targets=".*"), pf.FullFineTuning(targets=".*/bias")]
    adapted = pf.adapt(model, methods)
    adapters = shift(adapted.init(jax.random.key(0), variables, X))
    shapes = {path: leaf.shape for path, leaf in trees.paths(adapters).items()}
    assert shapes == {
        "first/lora_a": (6, 1),
        "first/lora_b": (1, 8),
        "first/bias_delta": (8,),
        "second/lora_a": (8, 3),
        "second/lora_b": (3, 4),
        "second/bias_delta": (4,),
        "norm/bias_delta": (8,),
    }
    delta = adapted.deltas(variables, adapters)
    assert set(delta.leaves) == {"first/kernel", "first/bias", "second/kernel", "second/bias", "norm/bias"}
    np.testing.assert_allclose(adapted.apply(variables, adapters, X), model.apply(pf.fold(variables, delta), X), atol=1e-5)


@pytest.mark.parametrize(
    ("method", "leaf"), [(pf.LoRA(targets="first"), "lora_b"), (pf.FullFineTuning(targets="first/bias"), "bias_delta")]
)
def test_a_base_that_uses_an_adapters_name_is_refused(method, leaf):
    variables = trees.merge(Net().init(jax.random.key(0), X), {"params": {"first": {leaf: jnp.ones(8)}}})
    with pytest.raises(ValueError, match=f"the base model has a parameter 'first/{leaf}'.*fold"):
        pf.adapt(Net(), method).init(jax.random.key(0), variables, X)


def test_two_changes_of_one_parameter_are_refused():
    model = Net()
    variables = model.init(jax.random.key(0), X)
    adapted = pf.adapt(model, [pf.LoRA(rank=1, targets="first"), pf.FullFineTuning(targets="first/kernel")])
    adapters = adapted.init(jax.random.key(0), variables, X)
    with pytest.raises(ValueError, match="two methods change the parameter 'first/kernel'"):
        adapted.deltas(variables, adapters)


def test_dropout_acts_only_with_a_key_and_keeps_the_mean():
    model = nn.Dense(4, name="only")

    class One(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="only")(x)

    model = One()
    params = model.init(jax.random.key(0), X)["params"]
    adapted = pf.adapt(model, pf.LoRA(rank=2, targets="only", dropout=0.5))
    adapters = shift(adapted.init(jax.random.key(0), params, X))
    still = adapted.apply(params, adapters, X)
    np.testing.assert_array_equal(still, pf.adapt(model, pf.LoRA(rank=2, targets="only")).apply(params, adapters, X))
    draw = jax.jit(jax.vmap(lambda key: adapted.apply(params, adapters, X, rngs={"dropout": key})))
    samples = draw(jax.random.split(jax.random.key(7), 4000))
    assert float(jnp.std(samples, axis=0).max()) > 0.01
    error = jnp.std(samples, axis=0) / np.sqrt(4000)
    assert bool(jnp.all(jnp.abs(samples.mean(0) - still) < 5 * error + 1e-5))
    linear = pf.linearize(adapted, adapters)
    tau = shift(linear.init(None, params), 3)
    one, two = (linear.apply(params, tau, X, rngs={"dropout": jax.random.key(k)}) for k in (1, 2))
    assert not np.allclose(one, two)


def test_a_scan_that_hides_the_dropout_key_is_an_error():
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(6, name="inner")(x), None

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)(name="layers")(x, None)[0]

    params = Scanned().init(jax.random.key(0), X)["params"]
    adapted = pf.adapt(Scanned(), pf.LoRA(rank=2, targets=r".*inner", dropout=0.5))
    adapters = adapted.init(jax.random.key(0), params, X)
    with pytest.raises(ValueError, match="'layers/inner' got no 'dropout' key.*split_rngs"):
        adapted.apply(params, adapters, X, rngs={"dropout": jax.random.key(0)})


def test_a_bfloat16_base_with_float32_adapters():
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="only", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)(x)

    params = Half().init(jax.random.key(0), X)["params"]
    adapted = pf.adapt(Half(), pf.LoRA(rank=2, targets="only"))
    adapters = shift(adapted.init(jax.random.key(0), params, X.astype(jnp.bfloat16)))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(adapters))
    for model in (adapted, *(pf.linearize(adapted, adapters, mode) for mode in ("network", "layer", "weight"))):
        out, gradient = jax.value_and_grad(
            lambda tree, m=model: m.apply(params, tree, X.astype(jnp.bfloat16)).astype(jnp.float32).sum()
        )(adapters)
        assert np.isfinite(out) and all(leaf.dtype == jnp.float32 and np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    "layer",
    [
        nn.DenseGeneral(4, batch_dims=(0,), axis=-1),
        nn.Conv(6, (1,), feature_group_count=3),
        nn.Conv(6, (1,), mask=np.tri(6, dtype=np.float32)[None]),
    ],
)
def test_layers_without_a_factor_pair_are_not_adapted_silently(layer):
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layer.clone(name="odd", parent=self)(x)

    x = jnp.ones((3, 5, 6))
    params = Odd().init(jax.random.key(0), x)["params"]
    with pytest.raises(ValueError, match="matches no layer that LoRA can adapt"):
        pf.adapt(Odd(), pf.LoRA(rank=2, targets="odd")).init(jax.random.key(0), params, x)


@pytest.mark.parametrize(
    "wrapper, message",
    [
        (nn.WeightNorm, "'WeightNorm_0' has a parameter named 'odd/kernel/scale', with a slash"),
        (nn.SpectralNorm, "matches 'odd', whose weight 'SpectralNorm_0', a SpectralNorm, normalises.*LoRA"),
    ],
)
def test_layers_whose_weight_a_wrapper_normalises_are_refused(wrapper, message):
    class Wrapped(nn.Module):
        @nn.compact
        def __call__(self, x):
            how = {"update_stats": False} if wrapper is nn.SpectralNorm else {}
            return nn.Dense(2, name="even")(wrapper(nn.Dense(5, name="odd"))(x, **how))

    x = jnp.ones((3, 4))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        variables = Wrapped().init(jax.random.key(0), x)
        with pytest.raises(ValueError, match=message):
            pf.adapt(Wrapped(), pf.LoRA(rank=2, targets=".*")).init(jax.random.key(0), variables, x)
        if wrapper is nn.SpectralNorm:
            adapted = pf.adapt(Wrapped(), pf.LoRA(rank=2, targets="even"))
            adapters = adapted.init(jax.random.key(0), variables, x)
            np.testing.assert_array_equal(adapted.apply(variables, adapters, x), adapted.base(variables, x))


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="got no method"):
        pf.adapt(Net(), [])
    with pytest.raises(ValueError, match="not a regular expression"):
        pf.adapt(Net(), pf.LoRA(targets="("))
    with pytest.raises(ValueError, match="nested dictionary"):
        pf.adapt(Net(), pf.LoRA(targets="first")).init(jax.random.key(0), X, X)
    with pytest.raises(ValueError, match="rank must be a positive integer"):
        pf.LoRA(targets="x", rank=0)
    with pytest.raises(ValueError, match=r"targets=\['first'\] must be one string; join several with |"):
        pf.adapt(Net(), pf.LoRA(targets=["first"]))
    variables = Net().init(jax.random.key(0), X)
    adapted = pf.adapt(Net(), pf.LoRA(targets="first"))
    with pytest.raises(ValueError, match="'first', for which the adapters hold no leaves"):
        adapted.apply(variables, {}, X)


def test_leaves_that_nothing_uses_and_half_pairs_are_refused():
    variables = Net().init(jax.random.key(0), X)
    both, one = (pf.adapt(Net(), pf.LoRA(rank=2, targets=targets)) for targets in ("first|second", "first"))
    adapters = both.init(jax.random.key(0), variables, X)
    misspelt = {**adapters, "first": {**adapters["first"], "lora_C": jnp.ones(3)}}
    for adapted, tree, leaf in ((one, adapters, "second/lora_a"), (both, misspelt, "first/lora_C")):
        for use in (lambda a, t: a.apply(variables, t, X), lambda a, t: a.deltas(variables, t)):
            with pytest.raises(ValueError, match=f"have a leaf '{leaf}' that is of no method here: LoRA.targets='first"):
                use(adapted, tree)
    half = {**adapters, "first": {"lora_a": adapters["first"]["lora_a"]}}
    for use in (
        lambda t: both.apply(variables, t, X),
        lambda t: both.deltas(variables, t),
        lambda t: both.trainable(t),
        lambda t: pf.linearize(both, t),
    ):
        with pytest.raises(ValueError, match="lack the leaf 'first/lora_b', which LoRA needs beside 'lora_a'"):
            use(half)


def test_shapes_that_do_not_go_together_are_refused_by_the_name_of_the_layer():
    variables = Net().init(jax.random.key(0), X)
    adapted = pf.adapt(Net(), pf.LoRA(rank=2, targets="first|second"))
    tree = adapted.init(jax.random.key(0), variables, X)
    own = tree["second"]
    ranks = {**tree, "second": {**own, "lora_b": jnp.tile(own["lora_b"], (2, 1))}}
    widths = {**tree, "second": {**own, "lora_b": own["lora_b"][:, 1:]}}
    uses = (lambda t: adapted.apply(variables, t, X), lambda t: adapted.deltas(variables, t))
    for wrong, use in ((ranks, uses[0]), (ranks, uses[1]), (widths, uses[0])):
        with pytest.raises(ValueError, match=r"adapters of 'second' do not fit .*lora_a \(.*lora_b \(.*Take adapters"):
            use(wrong)


def test_integer_parameters_are_not_fine_tuned():
    class Quantised(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("w", lambda key: jnp.ones((6, 4), jnp.int8)).astype(x.dtype)

    params = Quantised().init(jax.random.key(0), X)["params"]
    with pytest.raises(ValueError, match=r"targets='\.\*' matches 'w', which is int8; narrow it"):
        pf.adapt(Quantised(), pf.FullFineTuning(targets=".*")).init(jax.random.key(0), params, X)
