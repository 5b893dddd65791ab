"""CondLoRA against its formulas in NumPy float64, its counts, and what it shares and does not share with LoRA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefusion_jax as pf
from pefusion_jax import trees
from pefusion_jax.backbones import Bert, BertConfig
from pefusion_jax.generators import CondLoRA
from pefusion_jax.generators.layout import layout_of

TARGETS = r".*/(query|value)"
IDS = jnp.arange(12).reshape(2, 6) % 20
CONFIG = BertConfig(
    vocab_size=20, hidden_size=12, num_hidden_layers=3, num_attention_heads=2, intermediate_size=20, max_position_embeddings=8
)


@pytest.fixture(scope="module")
def bert():
    model = Bert(CONFIG)
    return model, jax.jit(model.init)(jax.random.key(1), IDS)["params"]


def generated(model, orientation="paper", targets=TARGETS, rank=4, alpha=8.0):
    return pf.generate(pf.adapt(model, pf.LoRA(rank=rank, alpha=alpha, targets=targets)), CondLoRA(orientation=orientation))


def drawn(tree, seed=3):
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), jnp.float32), tree)


@pytest.mark.parametrize("orientation", ["paper", "official"])
def test_changes_are_the_formulas(bert, orientation):
    model, params = bert
    made = generated(model, orientation)
    theta = drawn(made.init(jax.random.key(0), params, IDS))
    changes = made.deltas(params, theta).leaves
    assert len(changes) == 6
    for path, change in changes.items():
        kernel = np.asarray(trees.flat(params)[path], np.float64)
        own = theta["encoder"]["layer"]["*"]["attention"]["self"][path.split("/")[-2]]
        a, b = (np.asarray(own[name], np.float64) for name in ("theta_a", "theta_b"))
        first = kernel @ a if orientation == "paper" else kernel.T @ a
        expected = 2.0 * first @ (b.T @ kernel)
        np.testing.assert_allclose(change.dense(), expected, atol=1e-6 * np.abs(expected).max())


def test_counts_are_those_of_the_paper():
    """RoBERTa-base, query and value, rank 8: 24,576 against LoRA's 294,912."""
    from pefusion_jax.backbones import Roberta, RobertaConfig

    model = Roberta(
        RobertaConfig(
            vocab_size=50265,
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            intermediate_size=3072,
            max_position_embeddings=514,
        )
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    lora = pf.adapt(model, pf.LoRA(rank=8, targets=TARGETS))
    made = pf.generate(lora, CondLoRA())
    assert trees.size(jax.eval_shape(lora.init, jax.random.key(0), shapes, IDS)) == 294_912
    assert trees.size(jax.eval_shape(made.init, jax.random.key(0), shapes, IDS)) == 24_576


def test_start_is_the_base_model_and_draws_within_the_bound(bert):
    model, params = bert
    for orientation in ("paper", "official"):
        made = generated(model, orientation)
        theta = made.init(jax.random.key(0), params, IDS)
        apply, base = jax.jit(made.apply), jax.jit(made.base)
        np.testing.assert_array_equal(apply(params, theta, IDS).last_hidden_state, base(params, IDS).last_hidden_state)
        flat = trees.paths(theta)
        assert not any(np.any(leaf) for path, leaf in flat.items() if path.endswith("theta_b"))
        first = np.concatenate([np.ravel(leaf) for path, leaf in flat.items() if path.endswith("theta_a")])
        assert np.abs(first).max() <= 12**-0.5 and np.abs(first).max() > 0.9 * 12**-0.5
        assert set(trees.paths(made.moving(theta))) == {path for path in flat if path.endswith("theta_b")}
        assert set(trees.paths(made.moving(drawn(theta)))) == set(flat)


def test_kernels_that_are_not_square(bert):
    model, params = bert
    targets = r".*/(intermediate|output)/dense"
    made = generated(model, targets=targets)
    theta = made.init(jax.random.key(0), params, IDS)
    shapes = {path: leaf.shape for path, leaf in trees.paths(theta).items()}
    assert shapes["encoder/layer/*/intermediate/dense/theta_a"] == (20, 4)
    assert shapes["encoder/layer/*/intermediate/dense/theta_b"] == (12, 4)
    folded = pf.fold(params, made.deltas(params, drawn(theta)))
    expected = jax.jit(made.apply)(params, drawn(theta), IDS).last_hidden_state
    np.testing.assert_allclose(jax.jit(made.base)(folded, IDS).last_hidden_state, expected, atol=2e-5)
    with pytest.raises(ValueError, match="12 x 20; orientation='official' needs square"):
        generated(model, "official", targets).init(jax.random.key(0), params, IDS)


def test_fold_and_take_back_restores_the_weights_and_factors_of_folded_weights_are_others(bert):
    model, params = bert
    made = generated(model)
    theta = jax.tree.map(lambda leaf: 0.3 * leaf, drawn(made.init(jax.random.key(0), params, IDS)))
    delta = made.deltas(params, theta)
    folded = pf.fold(params, delta)
    back = pf.fold(folded, delta * -1.0)
    path = "encoder/layer/1/attention/self/query/kernel"
    kernel, again = trees.flat(params)[path], trees.flat(back)[path]
    np.testing.assert_allclose(again, kernel, atol=1e-6)
    # The released code makes the change anew from the folded weight when it takes it back.
    wrong = trees.flat(pf.fold(folded, made.deltas(folded, theta) * -1.0))[path]
    assert np.abs(wrong - kernel).max() > 1e-3


def test_adding_thetas_is_adding_factors_and_not_adding_changes(bert):
    model, params = bert
    made = generated(model)
    start = made.init(jax.random.key(0), params, IDS)
    one, two = drawn(start, 3), drawn(start, 4)
    mean = pf.fuse(pf.fusion.average(), {"one": one, "two": two})
    factors = [made.materialise(params, theta) for theta in (one, two)]
    of_mean = trees.paths(made.materialise(params, mean))
    for path, leaf in trees.paths(pf.fuse(pf.fusion.average(), {"one": factors[0], "two": factors[1]})).items():
        np.testing.assert_allclose(of_mean[path], leaf, atol=1e-5)
    in_weights = pf.fuse(pf.fusion.average(), {n: made.deltas(params, t) for n, t in (("one", one), ("two", two))})
    path = "encoder/layer/0/attention/self/value/kernel"
    change = made.deltas(params, mean).leaves[path].dense()
    assert np.abs(change - pf.deltas.dense(in_weights.leaves[path])).max() > 0.1 * np.abs(change).max()


def test_errors_say_what_does_not_fit(bert):
    model, params = bert
    with pytest.raises(ValueError, match="orientation='sideways' must be"):
        CondLoRA(orientation="sideways")
    other = pf.generate(pf.adapt(model, pf.FullFineTuning(targets=r".*/query/kernel")), CondLoRA())
    with pytest.raises(ValueError, match=r"makes the factors of pf\.LoRA; the adapters have a leaf"):
        other.init(jax.random.key(0), params, IDS)
    made = generated(model)
    theta = made.init(jax.random.key(0), params, IDS)
    with pytest.raises(ValueError, match="makes one set of adapters for all inputs; leave out task="):
        made.apply(params, theta, IDS, task=0)
    narrower = generated(model, targets=r".*/query")
    with pytest.raises(
        ValueError, match=r"matrices for 'encoder/layer/\*/attention/self/value', which LoRA does not adapt here"
    ):
        narrower.materialise(params, theta)
    wider = generated(model, targets=r".*/(query|value|key)")
    with pytest.raises(ValueError, match="for which the adapters hold no leaves"):
        wider.apply(params, theta, IDS)
    with pytest.raises(ValueError, match="linearize the result"):
        pf.generate(pf.linearize(made, theta), CondLoRA())
    with pytest.raises(ValueError, match="generated already"):
        pf.generate(made, CondLoRA())


def test_kernels_that_are_not_adapted_do_not_count(two_shapes):
    """Of two numbered layers of different shapes one is adapted."""
    model, params, x = two_shapes
    made = pf.generate(pf.adapt(model, pf.LoRA(rank=2, targets="Dense_0")), CondLoRA())
    shapes = {path: leaf.shape for path, leaf in trees.paths(made.init(jax.random.key(1), params, x)).items()}
    assert shapes == {"Dense_0/theta_a": (6, 2), "Dense_0/theta_b": (3, 2)}


def test_a_scan_of_another_name_is_told_which_names_there_are():
    params = {"h/query/kernel": jnp.zeros((3, 4, 4))}
    layout = layout_of(trees.nest(params), lambda path: True)
    with pytest.raises(ValueError, match=r"shapes \[\(3, 4, 4\)\]; .*told by the name of the scan, 'block', 'layer', 'layers'"):
        CondLoRA().init(jax.random.key(0), {"h/query/lora_a": jnp.zeros((3, 4, 2))}, params, layout)
