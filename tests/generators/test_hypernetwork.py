"""Hyper-networks against their equations in NumPy float64, their counts, and what averaging codes means."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefusion_jax as pf
from pefusion_jax import generators, trees
from pefusion_jax.backbones import T5, Bert, BertConfig, T5Config
from pefusion_jax.generators.layout import layout_of

TASKS = ("rte", "mrpc", "cola")
IDS = jnp.arange(24).reshape(4, 6) % 20
CONFIG = BertConfig(
    vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, max_position_embeddings=8
)
PARALLEL = pf.parallel(bottleneck=3)


@pytest.fixture(scope="module")
def bert():
    model = Bert(CONFIG)
    return model, jax.jit(model.init)(jax.random.key(1), IDS)["params"]


@pytest.fixture(scope="module")
def trained(bert):
    """PHA with entries as large as after training."""
    model, params = bert
    adapted = pf.adapt(model, PARALLEL)
    made = pf.generate(adapted, generators.pha(TASKS, features=8, instances="base"))
    tree = jax.jit(lambda key: made.init(key, params, IDS))(jax.random.key(0))
    generator = np.random.default_rng(5)
    moved = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(0.2) * generator.normal(size=leaf.shape), tree)
    return adapted, made, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), moved)


# Compiled once each: eager calls compile every operation anew.
jit = functools.cache(jax.jit)


def float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def test_pha_makes_what_its_equations_say(bert, trained):
    adapted, made, tree = trained
    exact = float64(tree)
    kind = exact["kinds"]["0"]
    code, heads = kind["code"], kind["heads"]
    layers = kind["sites"]["encoder"]["layer"]["*"]["output"]["tap_output"]["layer"]
    for number in range(len(TASKS)):
        adapters = jit(made.materialise)(bert[1], tree, number)
        for layer in range(2):
            u = np.concatenate([exact["tasks"][number], layers[layer]])
            hidden = np.maximum(u @ code["in"]["kernel"] + code["in"]["bias"], 0)
            raw = hidden @ code["out"]["kernel"] + code["out"]["bias"]
            g = (raw - raw.mean()) / np.sqrt(raw.var() + 1e-6) * code["norm"]["scale"] + code["norm"]["bias"]
            leaves = adapters["encoder"]["layer"][str(layer)]["output"]["tap_output"]
            assert set(leaves) == {"adapter_down", "adapter_down_bias", "adapter_up", "adapter_up_bias"}
            for leaf, got in leaves.items():
                expected = np.tensordot(g, heads[leaf]["kernel"], 1) + heads[leaf]["bias"]
                np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_retriever_is_two_layers_on_the_mean_of_the_hidden_states(trained):
    _, made, tree = trained
    generator = np.random.default_rng(0)
    hidden, mask = generator.normal(size=(4, 6, 8)), np.array([[1] * n + [0] * (6 - n) for n in (6, 3, 1, 5)])
    outputs = type("Outputs", (), {"last_hidden_state": jnp.asarray(hidden, jnp.float32)})
    mean = generators.instance_features(outputs, {"attention_mask": jnp.asarray(mask)})
    expected = (hidden * mask[:, :, None]).sum(1) / mask.sum(1)[:, None]
    np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-6)
    exact = float64(tree)["retriever"]
    middle = np.maximum(expected @ exact["in"]["kernel"] + exact["in"]["bias"], 0)
    z = made.origin.generator.retrieve(tree, mean)
    np.testing.assert_allclose(z, middle @ exact["out"]["kernel"] + exact["out"]["bias"], rtol=1e-5, atol=1e-5)


def test_auxiliary_loss_is_a_tenth_of_both_and_teaches_what_the_tasks_loss_does_not(bert, trained):
    _, params = bert
    _, made, tree = trained
    ids = jnp.array([0, 2])
    inputs = {"input_ids": IDS, "task": ids}
    outputs = jit(made.apply)(params, tree, **inputs)
    seen = jit(made.base)(params, IDS).last_hidden_state  # the adapters of the task would tell it
    z = made.origin.generator.retrieve(tree, jnp.mean(seen, axis=1))
    rows = jnp.array([0, 0, 2, 2])
    expected = 0.1 * (generators.instance_loss(z, rows) + generators.prototype_loss(z, tree["tasks"], rows))
    np.testing.assert_allclose(jit(made.auxiliary)(params, tree, outputs, inputs), expected, rtol=1e-5)

    def task_loss(tree):
        return jnp.mean(jnp.square(made.apply(params, tree, **inputs).last_hidden_state))

    gradient = trees.paths(jax.jit(jax.grad(task_loss))(tree))
    assert all((not np.any(leaf)) == path.startswith("retriever/") for path, leaf in gradient.items() if path != "tasks")
    assert set(trees.paths(tree)) - set(trees.paths(made.moving(tree))) == {p for p in gradient if p.startswith("retriever/")}
    quiet = pf.generate(pf.adapt(bert[0], PARALLEL), dataclasses.replace(made.origin.generator, weight=0.0))
    assert quiet.auxiliary is None and "retriever" not in quiet.trainable(tree)
    with pytest.raises(ValueError, match="this one has a single task: train with finetune_together"):
        made.auxiliary(params, tree, outputs, {"input_ids": IDS, "task": jnp.array([1])})


def test_averaging_codes_is_averaging_adapters_and_averaging_prototypes_is_not(bert, trained):
    _, made, tree = trained
    generator = made.origin.generator
    shares = np.float32([0.5, 0.2, 0.3])
    adapters = [jit(made.materialise)(bert[1], tree, number) for number in range(3)]
    average = pf.fuse(pf.fusion.weighted_average(shares), adapters)
    codes = [generator.codes(tree, jnp.int32(t)) for t in range(3)]
    (site,) = codes[0]
    mean_code = {site: sum(s * code[site] for s, code in zip(shares, codes, strict=True))}
    of_codes = generator.leaves(tree, mean_code)
    for path, leaf in trees.paths(average).items():
        layer = int(path.split("/")[2])
        np.testing.assert_allclose(of_codes[f"{site}/{path.rpartition('/')[2]}"][layer], leaf, atol=2e-6)
    mixed = {**tree, "tasks": tree["tasks"].at[0].set(shares @ tree["tasks"])}
    of_prototypes = trees.paths(jit(made.materialise)(bert[1], mixed, 0))
    gap = max(float(jnp.abs(of_prototypes[p] - leaf).max()) for p, leaf in trees.paths(average).items())
    assert gap > 0.05, "the network between prototype and code is not linear"


def test_linearized_around_the_adapters_of_the_mean_prototype(bert, trained):
    """An ordinary linearized bottleneck model: the tasks' adapters are displacements."""
    _, params = bert
    adapted, made, tree = trained
    center = jit(made.materialise)(params, {**tree, "tasks": tree["tasks"].at[0].set(jnp.mean(tree["tasks"], 0))}, 0)
    linear = pf.linearize(adapted, center)
    own = {name: jit(made.materialise)(params, tree, number) for number, name in enumerate(TASKS)}
    taus = {name: jax.tree.map(lambda a, b: 0.1 * (a - b), adapters, center) for name, adapters in own.items()}
    total = pf.fuse(pf.fusion.task_arithmetic(1.0), taus)
    features = {n: jit(linear.apply)(params, tau, IDS).last_hidden_state for n, tau in (*taus.items(), ("sum", total))}
    base = jit(adapted.apply)(params, center, IDS).last_hidden_state
    np.testing.assert_allclose(features["sum"] - base, sum(features[n] - base for n in TASKS), atol=2e-5)


T5_BASE = T5Config(vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_decoder_layers=12, num_heads=12)


@pytest.fixture(scope="module")
def t5():
    model = T5(T5_BASE)
    ids = jnp.zeros((1, 4), jnp.int32)
    inputs = {"input_ids": ids, "decoder_input_ids": ids}
    return model, jax.eval_shape(lambda key: model.init(key, **inputs), jax.random.key(0))["params"], inputs


def counts(made, params, inputs):
    tree = jax.eval_shape(lambda key: made.init(key, params, **inputs), jax.random.key(0))
    sizes = {path: leaf.size for path, leaf in trees.paths(tree).items()}
    return sizes, lambda start: sum(size for path, size in sizes.items() if path.startswith(start))


def test_pha_counts_on_t5_base(t5):
    """The released configuration: bottleneck 64, eight tasks, learned adapters in the encoder, made ones in the decoder."""
    model, params, inputs = t5
    tasks = ("rte", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "cola")
    method = pf.parallel(bottleneck=64, init="xavier")
    made = pf.generate(pf.adapt(model, method), generators.pha(tasks, features=768, learned=r"encoder/.*"))
    sizes, below = counts(made, params, inputs)
    assert below("learned/") == 1_189_632
    assert below("kinds/") == 6_469_504
    assert below("kinds/0/code/") == 24_896
    assert below("kinds/0/heads/adapter_down/") + below("kinds/0/heads/adapter_up/") == 6_389_760
    assert below("kinds/0/heads/adapter_up_bias/") == 49_920 and below("kinds/0/heads/adapter_down_bias/") == 4_160
    assert below("kinds/0/sites/") == 768 and below("retriever/") == 106_688 and sizes["tasks"] == 512
    assert sum(sizes.values()) == 7_766_336


def test_hyperformer_plus_plus_counts_on_t5_base(t5):
    """Reduction factor 32: two networks and eight task vectors."""
    model, params, inputs = t5
    method = pf.houlsby(bottleneck=24, norm=True, init="normal", activation="gelu_new")
    made = pf.generate(pf.adapt(model, method), generators.hyperformer_plus_plus([f"task{n}" for n in range(8)]))
    sizes, below = counts(made, params, inputs)
    assert sum(sizes.values()) == 5_163_440
    assert below("kinds/0/") == below("kinds/1/") == 2_581_464


def test_errors_say_what_does_not_fit(bert, trained):
    model, params = bert
    adapted, made, tree = trained
    with pytest.raises(ValueError, match="one or more different names"):
        generators.task_embeddings(("a", "a"))
    with pytest.raises(ValueError, match="prototypes need two or more tasks"):
        generators.pha(("alone",), features=8)
    with pytest.raises(ValueError, match="needs features="):
        generators.pha(TASKS, features=0)
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"weight={weight} must be a finite number, 0"):
            generators.pha(TASKS, features=8, weight=weight)
    for make in (generators.task_embeddings, generators.hyperformer, generators.hyperformer_plus_plus):
        with pytest.raises(ValueError, match=r"tasks='rte' is one name, whose letters .*pass tasks=\('rte',\)"):
            make("rte")
    with pytest.raises(ValueError, match="there is no task 'mrcp'.*the generator has 0 rte, 1 mrpc, 2 cola"):
        made.materialise(params, tree, "mrcp")
    with pytest.raises(ValueError, match=r"must be numbers from 0 to 2: 0 rte, 1 mrpc, 2 cola"):
        made.apply(params, tree, IDS, task=np.array([3]))
    traced = jax.jit(lambda task: made.apply(params, tree, IDS, task=task).last_hidden_state)
    assert np.isfinite(traced(jnp.int32(2))).all()
    for number in (3, -1):
        assert np.isnan(traced(jnp.int32(number))).all(), "a traced number cannot be refused, but it shows"
        rows = np.isnan(traced(jnp.array([0, number, 1, 2]))).all(axis=(1, 2))
        np.testing.assert_array_equal(rows, [False, True, False, False])
    with pytest.raises(ValueError, match="say which task"):
        made.apply(params, tree, IDS)
    with pytest.raises(ValueError, match="3 groups do not divide a batch of 4 rows"):
        made.apply(params, tree, IDS, task=np.array([0, 1, 2]))
    with pytest.raises(ValueError, match="no one weight-space change; take one task's"):
        made.deltas(params, tree)
    fewer = pf.generate(adapted, generators.pha(TASKS[:2], features=8, instances="base"))
    with pytest.raises(ValueError, match="the tree has 3 tasks, the generator 2"):
        fewer.apply(params, tree, IDS, task=0)
    other = pf.generate(pf.adapt(model, pf.LoRA(rank=2, targets=r".*/query")), made.origin.generator)
    with pytest.raises(ValueError, match="makes a leaf 'encoder/layer/0/output/tap_output/adapter_.*others than the adapters'"):
        other.apply(params, tree, IDS, task=0)
    told = pf.generate(adapted, generators.pha(TASKS, features=8))
    with pytest.raises(ValueError, match="would tell the retriever the task.*instances='base'"):
        told.init(jax.random.key(0), params, IDS)
    wider = pf.generate(adapted, generators.pha(TASKS, features=9, instances="base"))
    with pytest.raises(ValueError, match="are 8 wide, the retriever's features=9; make the generator with features=8"):
        wider.init(jax.random.key(0), params, IDS)
    with pytest.raises(ValueError, match="matches no adapter leaf"):
        pf.generate(adapted, generators.pha(TASKS, features=8, learned=r"decoder/.*")).init(jax.random.key(0), params, IDS)
    with pytest.raises(ValueError, match="matches every adapter leaf"):
        pf.generate(adapted, generators.pha(TASKS, features=8, learned=r".*")).init(jax.random.key(0), params, IDS)


def test_numbered_modules_of_different_shapes_are_no_layers(two_shapes):
    """Linen numbers the layers of a module of one's own, whose shapes differ: each is a site of its own."""
    model, params, x = two_shapes
    both = pf.adapt(model, pf.LoRA(rank=2, targets=r"Dense_\d"))
    made = pf.generate(both, generators.task_embeddings(TASKS))
    adapters = made.materialise(params, made.init(jax.random.key(1), params, x), "mrpc")
    assert {path: leaf.shape for path, leaf in trees.paths(adapters).items()} == {
        "Dense_0/lora_a": (3, 2),
        "Dense_0/lora_b": (2, 6),
        "Dense_1/lora_a": (6, 2),
        "Dense_1/lora_b": (2, 4),
    }


@pytest.mark.parametrize(
    ("generator", "kinds"),
    [
        (generators.task_embeddings(TASKS), 1),
        (generators.task_embeddings(TASKS, places=True), 3),
        (generators.hyperformer(TASKS), 4),
        (generators.hyperdecoder(4), 1),
    ],
    ids=["embeddings", "places", "by_layer", "hyperdecoder"],
)
def test_kinds_go_by_depth_only_where_layers_are_shared_and_a_module_may_be_called_heads(generator, kinds):
    sites = ("short/layer/0/q", "long/layer/0/q", "long/layer/1/q", "decoder/heads/q", "heads/lora_a/q")
    layout = layout_of(trees.nest({f"{site}/kernel": np.zeros((4, 4)) for site in sites}), lambda path: True)
    shapes = {f"{site}/{leaf}": shape for site in sites for leaf, shape in (("lora_a", (4, 1)), ("lora_b", (1, 4)))}
    adapters = {path: jnp.zeros(shape) for path, shape in shapes.items()}

    def both(key):
        tree = generator.init(key, adapters, {}, layout)
        return tree, generator.make(tree, {}, layout, jnp.int32(0) if generator.tasks else (None, jnp.ones(4)))

    tree, made = jax.eval_shape(both, jax.random.key(0))
    assert len(tree["kinds"]) == kinds
    assert {path: leaf.shape for path, leaf in made.items()} == shapes
