"""Every method, every guarantee."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import LAYOUTS, METHODS, MODES, build, expansion, jit, noise
from models import Encoder, stack_layers

import pefusion_jax as pf
from pefusion_jax import tasks, training, trees
from pefusion_jax.training import parallel
from pefusion_jax.training.step import init_state


def assert_close(actual, expected, bound=1e-5):
    """Largest difference relative to the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= bound * max(np.abs(expected).max(), 1e-30)


def squares(apply):
    return lambda params, tree, ids: jnp.mean(jnp.square(apply(params, tree, ids) - 1.0))


NO_WEIGHTS = "no change of the weights"


@pytest.fixture(params=[(row.name, layout) for row in METHODS for layout in row.layouts], ids="-".join)
def case(request):
    return build(*request.param)


def refused(case, mode=None):
    """Whether the method has no such linearization, or without ``mode`` no weight-space change; then that it says so."""
    if case.row.folds or mode in ("network", "layer"):
        return False
    with pytest.raises(ValueError, match=NO_WEIGHTS):
        case.adapted.deltas(case.params, case.point) if mode is None else pf.linearize(case.adapted, case.start, mode)
    return True


def test_identity_at_initialisation(case):
    created = case.adapted.init(jax.random.key(0), case.params, case.ids)
    assert {k: v.shape for k, v in trees.paths(created).items()} == {k: v.shape for k, v in trees.paths(case.start).items()}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(created))
    base = jit(case.adapted.base)(case.params, case.ids)
    adapted = jit(case.adapted.apply)(case.params, created, case.ids)
    assert adapted.shape == base.shape
    gap = np.abs(adapted - base).max()
    assert gap <= case.row.start and (gap > 0) == (case.row.start > 0)


def test_activation_path_equals_folded_path(case):
    assert case.adapted.folds == case.row.folds
    if refused(case):
        return
    adapted = jit(case.adapted.apply)(case.params, case.point, case.ids)
    delta = case.adapted.deltas(case.params, case.point)
    folded = jit(case.adapted.base)(pf.fold(case.params, delta), case.ids)
    assert_close(adapted, folded)
    assert_close(jit(case.adapted.apply_deltas)(case.params, delta, case.ids), folded)
    base = jit(case.adapted.base)(case.params, case.ids)
    assert np.abs(adapted - base).max() > 1e-3, "the adapters changed nothing, so nothing was compared"


def test_jit_equals_eager(loop):
    assert_close(
        loop.adapted.apply(loop.params, loop.point, loop.ids), jit(loop.adapted.apply)(loop.params, loop.point, loop.ids)
    )


def test_second_call_does_not_recompile(loop):
    traces = []

    @jax.jit
    def gradient(params, tree, ids):
        traces.append(1)
        return jax.grad(squares(loop.adapted.apply), argnums=1)(params, tree, ids)

    first = gradient(loop.params, loop.point, loop.ids)
    gradient(loop.params, jax.tree.map(lambda p, g: p - 0.1 * g, loop.point, first), loop.ids)
    assert len(traces) == 1


def test_gradients_are_finite_and_zero_exactly_where_documented(case):
    gradient = jax.jit(jax.grad(squares(case.adapted.apply), argnums=1))(case.params, case.start, case.ids)
    for path, leaf in trees.paths(gradient).items():
        assert np.isfinite(leaf).all(), path
        assert (not np.any(leaf)) == bool(re.fullmatch(case.row.zero_gradient, path)), path
    moving = trees.paths(case.adapted.moving(case.start))
    assert moving.keys() == {p for p in trees.paths(case.start) if not re.fullmatch(case.row.zero_gradient, p)}


def test_jvp_equals_finite_difference(loop):
    # Flax's own LayerNorm mixes float64 with float32, hence the standard promotion here.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        params, point, direction = (
            jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), tree)
            for tree in (loop.params, loop.point, loop.direction)
        )

        @jax.jit
        def moved(step):
            return loop.adapted.apply(params, jax.tree.map(lambda p, d: p + step * d, point, direction), loop.ids)

        _, tangent = jax.jit(lambda: jax.jvp(moved, (jnp.float64(0.0),), (jnp.float64(1.0),)))()
        step = 1e-5
        difference = (moved(jnp.float64(step)) - moved(jnp.float64(-step))) / (2 * step)
        assert_close(tangent, difference, 1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_linearized_at_zero_is_the_model_at_the_point_of_expansion(case, mode):
    if refused(case, mode):
        return
    for at, phi0 in (("start", case.start), ("point", case.point)):
        linear = expansion(case, at, mode)
        tau = linear.init(jax.random.key(5), case.params, case.ids)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(tau))
        assert_close(jit(linear.apply)(case.params, tau, case.ids), jit(case.adapted.apply)(case.params, phi0, case.ids), 2e-6)


@pytest.mark.parametrize("mode", ["network", "weight"])
def test_linearized_is_affine_and_pushforwards_superpose(case, mode):
    if refused(case, mode):
        return
    linear = expansion(case, "start", mode)
    taus = [case.direction, noise(case.start, 7, 0.05)]
    if mode == "weight":  # affine in the weight-space change; with A at its start that is affine in B
        taus = [_only_moving(case, tau) for tau in taus]
    apply = jit(linear.apply)
    zero = jax.tree.map(jnp.zeros_like, taus[0])
    f0, f1, f2 = (apply(case.params, tau, case.ids) for tau in (zero, *taus))
    both = jax.tree.map(lambda a, b: 0.7 * a - 1.3 * b, *taus)
    expected = f0 + 0.7 * (f1 - f0) - 1.3 * (f2 - f0)
    assert_close(apply(case.params, both, case.ids), expected)
    base, pushed = jit(linear.pushforward)(case.params, trees.stack(taus), case.ids)
    assert_close(base, f0)
    assert_close(base + 0.7 * pushed[0] - 1.3 * pushed[1], expected)


def _only_moving(case, tau):
    moving = trees.paths(case.adapted.moving(case.start))
    return trees.map_paths(lambda path, leaf: leaf if path in moving else jnp.zeros_like(leaf), tau)


@pytest.mark.parametrize("mode", ["network", "weight"])
def test_linearized_is_the_first_order_term(loop, mode):
    """The gap to the model itself shrinks with the square of the displacement."""
    if refused(loop, mode):
        return
    linear = expansion(loop, "point", mode)
    gaps = []
    for size in (4e-3, 2e-3):
        tau = jax.tree.map(lambda leaf, s=size: s * leaf, noise(loop.start, 9, 1.0))
        moved = jax.tree.map(jnp.add, loop.point, tau)
        if mode == "weight":
            exact = jit(loop.adapted.base)(pf.fold(loop.params, loop.adapted.deltas(loop.params, moved)), loop.ids)
        else:
            exact = jit(loop.adapted.apply)(loop.params, moved, loop.ids)
        gaps.append(np.abs(exact - jit(linear.apply)(loop.params, tau, loop.ids)).max())
    assert 2.5 < gaps[0] / gaps[1] < 6.5, gaps


@pytest.mark.parametrize("mode", MODES)
def test_linearized_deltas_stand_for_the_displacement(case, mode):
    if refused(case, mode):
        return
    for at in ("start", "point"):
        linear = expansion(case, at, mode)
        if not case.row.folds:
            with pytest.raises(ValueError, match=NO_WEIGHTS):
                linear.deltas(case.params, case.direction)
            continue
        applied = jit(linear.apply)(case.params, case.direction, case.ids)
        delta = linear.deltas(case.params, case.direction)
        assert_close(jit(linear.apply_deltas)(case.params, delta, case.ids), applied, 2e-5)


def test_layer_mode_folds(case):
    linear = expansion(case, "start", "layer")
    assert linear.folds == case.row.folds
    if refused(case):
        return
    applied = jit(linear.apply)(case.params, case.direction, case.ids)
    folded = pf.fold(case.params, linear.deltas(case.params, case.direction))
    assert_close(applied, jit(case.adapted.base)(folded, case.ids))


@pytest.mark.parametrize("mode", MODES)
def test_linearized_trains_only_what_moves(loop, mode):
    if refused(loop, mode):
        return
    linear = expansion(loop, "start", mode)
    zero = linear.init(jax.random.key(0), loop.params, loop.ids)
    gradient = jax.jit(jax.grad(squares(linear.apply), argnums=1))(loop.params, zero, loop.ids)
    trained = trees.paths(linear.trainable(zero))
    for path, leaf in trees.paths(gradient).items():
        dead = bool(re.fullmatch(loop.row.zero_gradient, path))
        assert (not np.any(leaf)) == dead, path
        if mode != "weight":  # there A learns as soon as B has left zero
            assert (path in trained) == (not dead), path
    point = jax.tree.map(jnp.add, zero, loop.direction)
    kept = linear.trainable(point)
    if mode == "network":
        only = jit(linear.apply)(loop.params, kept, loop.ids)
        assert_close(only, jit(linear.apply)(loop.params, point, loop.ids))


def test_loop_equals_remat_equals_scan(name):
    outputs, gradients = [], []
    for layout in LAYOUTS:
        case = build(name, layout)
        value, gradient = jax.jit(jax.value_and_grad(squares(case.adapted.apply), argnums=1))(case.params, case.point, case.ids)
        outputs.append(value)
        gradients.append(gradient if layout == "scan" else stack_layers(gradient))
    for value, gradient in zip(outputs[1:], gradients[1:], strict=True):
        assert_close(value, outputs[0])
        for path, leaf in trees.paths(gradient).items():
            assert_close(leaf, trees.paths(gradients[0])[path], 2e-5)


def test_a_rule_that_matches_nothing_names_the_nearest_paths(name):
    row = next(row for row in METHODS if row.name == name)
    case = build(name, "loop")
    adapted = pf.adapt(case.model, row.make(r".*/qurey"))
    with pytest.raises(ValueError, match=r"qurey.*matches no (layer|parameter).*nearest: .*query"):
        adapted.init(jax.random.key(0), case.params, case.ids)


def test_misspelled_adapters_are_an_error(loop):
    first = "layer_0" if "layer_0" in loop.point else "embed"
    wrong = {("layer_9" if k == first else k): v for k, v in loop.point.items()}
    with pytest.raises(ValueError, match=r"'layer_9/.*no such module.*layer_"):
        loop.adapted.apply(loop.params, wrong, loop.ids)


def test_base_parameters_are_not_copied(loop):
    if refused(loop):
        return
    delta = loop.adapted.deltas(loop.params, loop.point)
    folded = trees.paths(pf.fold(loop.params, delta))
    for path, leaf in trees.paths(loop.params).items():
        assert (folded[path] is leaf) == (path not in delta.leaves), path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flops_of_the_linearization(name, layout, wide_model):
    """XLA's own count on a model whose width is large against the rank, relative to one forward of the base."""
    row = next(row for row in METHODS if row.name == name)
    model, params, inputs = (row.counted or wide_model)(layout)
    adapted = pf.adapt(model, row.make("" if row.counted else r".*(up|down)"))
    phi0 = adapted.init(jax.random.key(0), params, inputs)
    linear = pf.linearize(adapted, phi0)
    tau = linear.trainable(linear.init(jax.random.key(0), params, inputs))

    def flops(fn, *args):
        return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]

    base = flops(adapted.base, params, inputs)
    assert flops(linear.apply, params, tau, inputs) <= row.linear_forward * base
    if layout == "loop":  # remat computes the forward twice by design, and XLA counts a scanned body once
        assert flops(jax.grad(squares(linear.apply), argnums=1), params, tau, inputs) <= row.linear_gradient * base


def test_full_encoder_is_what_the_table_is_checked_on():
    """Guards the suite itself: every layer type the methods support is in the model and is matched."""
    case = build("lora", "loop")
    matched = {path.rsplit("/", 2)[-2] for path in trees.paths(case.start)}
    assert matched == {"query", "key", "value", "out", "up", "down", "conv", "embed"}
    assert isinstance(case.model, Encoder)


@pytest.mark.parametrize("mode", [None, *MODES])
def test_adapters_survive_a_save_bit_for_bit(loop, mode, tmp_path):
    if mode and refused(loop, mode):
        return
    adapted = loop.adapted if mode is None else expansion(loop, "start", mode)
    training.save_adapters(tmp_path / "adapters.safetensors", loop.point, {"mode": mode})
    loaded, metadata = training.load_adapters(tmp_path / "adapters.safetensors")
    assert metadata["mode"] == mode
    for path, leaf in trees.paths(loop.point).items():
        assert np.asarray(leaf).tobytes() == np.asarray(trees.paths(loaded)[path]).tobytes(), path
    applied = jit(adapted.apply)(loop.params, loop.point, loop.ids)
    np.testing.assert_array_equal(jit(adapted.apply)(loop.params, loaded, loop.ids), applied)


@pytest.mark.parametrize("name", [row.name for row in METHODS if not row.variant])
@pytest.mark.parametrize("mode", [None, "network"])
def test_eight_devices_equal_one_and_only_adapters_cross_the_wire(loop, mode):
    adapted = loop.adapted if mode is None else expansion(loop, "start", mode)
    tree = loop.point if mode is None else adapted.init(None, loop.params)
    trained, held = trees.split(tree, adapted.trainable(tree))
    ids = jax.random.randint(jax.random.key(4), (8, 6), 0, 11)
    # Of other weight on every device, and of none on some: the mean of the devices' means is another number.
    weights = jnp.array([1.0, 2.0, 0.5, 1.0, 1.0, 0.0, 0.0, 0.0])
    batch = {"inputs": {"ids": ids}, "labels": ids[:, 0] % 2, "weights": weights}
    states = []
    for devices in (tuple(jax.devices()), tuple(jax.devices()[:1])):
        step = parallel.compiled_step(
            adapted, SGD, last_token, two_logits, tasks.cross_entropy, 1, 1.0, False, None, "pmap", devices
        )
        # copied, because the step takes its state over
        state = parallel.replicate(init_state(trained, SGD, 0), devices, copy=True)
        arguments = (state, *parallel.replicate((loop.params, held, {}), devices))
        placed = parallel.place_batch(batch, "pmap", devices)
        compiled = step.lower(*arguments, placed).compile()
        if len(devices) == 8:
            assert parallel.allreduce_elements(compiled) == trees.size(trained) + 3  # loss, weights, number of examples
        states.append(jax.device_get(compiled(*arguments, placed)[0].adapters))
    for path, leaf in trees.paths(states[0]).items():
        assert_close(leaf, trees.paths(states[1])[path], 1e-5)
        assert np.any(leaf != trees.paths(trained)[path]), path


SGD = optax.sgd(0.1)


def last_token(outputs, inputs):
    return outputs[:, -1]


def two_logits(params, features):
    return features[:, :2]
