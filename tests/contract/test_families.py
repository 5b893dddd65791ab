"""Every family of models, every capability, and the guarantees of the contract with LoRA and network linearization."""

from __future__ import annotations

import functools
from pathlib import Path

import capabilities
import families
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pefusion_jax as pf
from pefusion_jax import backbones, tasks, trees
from pefusion_jax.backbones import stack_layers
from pefusion_jax.training import parallel
from pefusion_jax.training.step import init_state

SGD = optax.sgd(0.1)


@pytest.fixture(params=families.NAMES, ids=lambda name: name.replace(" ", "-"))
def name(request):
    return request.param


@pytest.mark.parametrize("capability", capabilities.CAPABILITIES, ids=lambda text: text.replace(" ", "-"))
def test_capability(name, capability):
    can = capabilities.CAPABILITIES[capability](name)
    row = readme_table()[name]
    assert (row[capability] == "yes") == can, f"README says {row[capability]!r} about {name}: {capability}"


def readme_table():
    lines = (Path(__file__).parents[2] / "README.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    header = next(row for row in rows if row[0] == "family")
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows if row[0] in families.NAMES}


def test_the_table_has_every_family_and_every_capability():
    assert set(families.NAMES) == {family.name for family in backbones.FAMILIES} == set(readme_table())
    assert list(next(iter(readme_table().values())))[1:] == list(capabilities.CAPABILITIES)


@functools.cache
def losses(name):
    """Value and gradient of a scalar of the outputs in the loop, remat and scan layouts, each compiled when first called."""
    made, (_, adapters) = families.family(name), capabilities.lora(name)
    found = {}
    for layout, options in (("loop", {}), ("remat", {"remat": True}), ("scan", {"scan_layers": True})):
        model = made.model.clone(**options)
        params, tree = (stack_layers(t) if layout == "scan" else t for t in (made.params, adapters))
        adapted = pf.adapt(model, pf.LoRA(rank=3, alpha=6, targets=made.row.targets))

        def loss(tree, params, adapted=adapted):
            return jnp.mean(jnp.square(made.picked(adapted.apply(params, tree, made.row.inputs)) - 1.0))

        found[layout] = (jax.jit(jax.value_and_grad(loss)), tree, params)
    return found


@pytest.mark.parametrize("name", families.DISTINCT)
def test_loop_equals_remat_equals_scan(name):
    results = {layout: fn(tree, params) for layout, (fn, tree, params) in losses(name).items()}
    value, gradient = results["loop"]
    expected = trees.paths(stack_layers(gradient))
    scale = max(float(jnp.abs(leaf).max()) for leaf in expected.values())
    assert scale > 1e-4
    for layout in ("remat", "scan"):
        np.testing.assert_allclose(results[layout][0], value, rtol=1e-5)
        for path, leaf in trees.paths(stack_layers(results[layout][1])).items():
            np.testing.assert_allclose(leaf, expected[path], atol=2e-5 * scale, rtol=0, err_msg=f"{layout} {path}")


def test_gradients_are_finite_and_zero_exactly_where_documented(name):
    made, (adapted, adapters) = families.family(name), capabilities.lora(name)
    fn, _, params = losses(name)["loop"]
    start = adapted.init(jax.random.key(1), params, made.row.inputs)
    for path, leaf in trees.paths(fn(start, params)[1]).items():
        assert np.isfinite(leaf).all() and (not np.any(leaf)) == path.endswith("lora_a"), path
    # two factors, two projections, two layers; two towers, or three kinds of attention
    assert len(trees.paths(adapters)) == 8 * {"CLIP": 2, "T5": 3}.get(name, 1)
    np.testing.assert_array_equal(capabilities.compiled(name)(params, start), capabilities.base(name)(params))


def test_jvp_equals_finite_difference(name):
    made, (adapted, adapters) = families.family(name), capabilities.lora(name)
    direction = jax.tree.map(lambda leaf: 0.5 * leaf, adapters)

    @jax.jit
    def both(params, step):
        def f(step):
            moved = jax.tree.map(lambda a, d: a + step * d, adapters, direction)
            return made.picked(adapted.apply(params, moved, made.row.inputs))

        return jax.jvp(f, (step,), (jnp.float32(1),))

    tangent = both(made.params, jnp.float32(0))[1]
    h = 1e-2
    values = {k: np.asarray(both(made.params, jnp.float32(k * h))[0], np.float64) for k in (-2, -1, 1, 2)}
    difference = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * h)
    # Float32 rounding limits a fourth-order difference to about 1e-4 of the outputs' size.
    size = max(np.abs(tangent).max(), np.abs(values[1]).max())
    np.testing.assert_allclose(tangent, difference, atol=1e-3 * size, rtol=0)


def test_pushforwards_superpose(name):
    made, (adapted, adapters) = families.family(name), capabilities.lora(name)
    linear = pf.linearize(adapted, adapters)
    rng = np.random.default_rng(5)
    taus = [jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32), adapters) for _ in range(2)]
    both = jax.tree.map(lambda a, b: 0.7 * a - 1.3 * b, *taus)

    @jax.jit
    def run(params, stacked, both):
        f0, pushed = linear.pushforward(params, stacked, made.row.inputs)
        return made.picked(f0), made.picked(pushed), made.picked(linear.apply(params, both, made.row.inputs))

    f0, pushed, combined = run(made.params, trees.stack(taus), both)
    capabilities.close(combined, f0 + 0.7 * pushed[0] - 1.3 * pushed[1], 1e-5)


def test_adapters_survive_a_save_bit_for_bit(name, tmp_path):
    _, adapters = capabilities.lora(name)
    pf.training.save_adapters(tmp_path / "adapters.safetensors", adapters, {})
    loaded, _ = pf.training.load_adapters(tmp_path / "adapters.safetensors")
    for path, leaf in trees.paths(adapters).items():
        assert np.asarray(leaf).tobytes() == np.asarray(trees.paths(loaded)[path]).tobytes(), path


def test_flops_of_the_linearization(name):
    """Counted on the program before optimisation, with a rank that is small against nothing here: bounds include it."""
    made, (adapted, adapters) = families.family(name), capabilities.lora(name)
    linear = pf.linearize(adapted, adapters)

    def flops(fn, *args):
        return jax.jit(fn).lower(*args).cost_analysis()["flops"]

    inputs = made.row.inputs
    plain = flops(lambda p, a: made.picked(adapted.apply(p, a, inputs)), made.params, adapters)
    pushed = flops(lambda p, a: made.picked(linear.apply(p, a, inputs)), made.params, adapters)
    # Tiny models spend much on softmax and norms, whose derivatives cost more than they do.
    assert pushed <= 3.2 * plain, pushed / plain


def inputs_size(inputs):
    return jax.tree.leaves(inputs)[0].shape[0]


def two_logits(params, features):
    return features[:, :2]


@pytest.mark.parametrize("name", families.DISTINCT)
def test_eight_devices_equal_one_and_only_adapters_cross_the_wire(name):
    """A step of the network linearization; plain LoRA takes the same path in ``test_contract.py``."""
    made, (_, adapters) = families.family(name), capabilities.lora(name)
    plain = pf.adapt(made.model.clone(scan_layers=True), pf.LoRA(rank=3, alpha=6, targets=made.row.targets))
    params = stack_layers(made.params)
    adapted = pf.linearize(plain, stack_layers(adapters))
    tree = adapted.init(None, params)
    trained, held = trees.split(tree, adapted.trainable(tree))
    inputs = {key: np.concatenate([value] * 4) for key, value in made.row.inputs.items()}
    batch = {"inputs": inputs, "labels": np.arange(8) % 2, "weights": np.ones(8, np.float32)}

    def picked(outputs, inputs):
        return made.picked(outputs).reshape(inputs_size(inputs), -1)

    states = []
    for devices in (tuple(jax.devices()), tuple(jax.devices()[:1])):
        step = parallel.compiled_step(
            adapted, SGD, picked, two_logits, tasks.cross_entropy, 1, 1.0, False, None, "pmap", devices
        )
        state = parallel.replicate(init_state(trained, SGD, 0), devices, copy=True)
        arguments = (state, *parallel.replicate((params, held, {}), devices))
        placed = parallel.place_batch(batch, "pmap", devices)
        compiled = step.lower(*arguments, placed).compile()
        if len(devices) == 8:
            assert parallel.allreduce_elements(compiled) == trees.size(trained) + 3
        states.append(jax.device_get(compiled(*arguments, placed)[0].adapters))
    before = trees.paths(trained)
    for path, leaf in trees.paths(states[0]).items():
        other = trees.paths(states[1])[path]
        np.testing.assert_allclose(leaf, other, atol=1e-5 * max(1.0, np.abs(other).max()), rtol=0, err_msg=path)
    assert any(np.any(leaf != before[path]) for path, leaf in trees.paths(states[0]).items())
