"""What the tests of the vision families share. Each takes a random transformers model saved in a folder."""

import dataclasses
import json
import re
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import transformers
from parity import assert_round_trip, furthest, randomize, theirs

from pefusion_jax import trees
from pefusion_jax.backbones import FAMILIES, stack_layers
from pefusion_jax.backbones.family import canonical, in_memory, params_from_hf, params_to_hf
from pefusion_jax.interop import load_pretrained, load_safetensors, save_safetensors


def pixels(height, width, batch=2, channels=3, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, channels, height, width)).astype(np.float32)


def raw_config(folder):
    return json.loads((folder / "config.json").read_text())


def family_of(folder):
    return next(family for family in FAMILIES if raw_config(folder)["model_type"] in family.model_types)


def compare(got, want, bound=1e-5):
    """Every output that transformers gives, by its name; returns their names."""
    for name, value in want.items():
        if name == "hidden_states":
            assert len(got.hidden_states) == len(value)
            for layer, (mine, other) in enumerate(zip(got.hidden_states, value, strict=True)):
                assert furthest(mine, other) <= bound, layer
        elif hasattr(value, "items"):
            # Transformers puts the projected embedding in the place of a tower's pooled output.
            rest = {key: item for key, item in value.items() if key != "pooler_output"}
            compare(getattr(got, name), rest, bound)
        else:
            assert furthest(getattr(got, name), value) <= bound, name
    return set(want.keys())


def check_export(folder, tmp_path, reference, inputs, options=None):
    """HF -> ours -> HF bit for bit in both layouts, and transformers builds the same model from what we write."""
    family = family_of(folder)
    assert_round_trip(family, folder, raw_config(folder))
    model, params = load_pretrained(folder)
    save_safetensors(tmp_path / "model.safetensors", params_to_hf(family, params, model.config))
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    again, report = type(reference).from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager", **options or {}
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    one, two = theirs(reference, **inputs), theirs(again.eval(), **inputs)
    assert one.keys() == two.keys()
    for name in one:
        if isinstance(one[name], (tuple, list)):
            assert all((a == b).all() for a, b in zip(one[name], two[name], strict=True)), name
        elif not hasattr(one[name], "items"):
            assert (one[name] == two[name]).all(), name
    # Without the tensors, the architecture says the same, unless an argument decided that no configuration records.
    assert options or type(model.config).from_dict(raw_config(folder)) == model.config
    assert options or type(model.config).from_dict(model.config.to_dict()) == model.config


def check_memory_names(folder, reference):
    """The modules' names by ``Family.modules`` are those in transformers' memory: all, and the same parameters."""
    family = family_of(folder)
    model, params = load_pretrained(folder)
    table = family.table(model.config)
    headed = any(entry.name.startswith(family.heads) for entry in table.values()) if family.heads else False
    memory = {name: parameter.detach().numpy() for name, parameter in reference.named_parameters()}
    seen = set()
    for path, leaf in trees.flat(params).items():
        module, _, kind = path.replace("/", ".").rpartition(".")
        in_head = bool(family.heads) and path.replace("/", ".").startswith(family.heads)
        if kind in ("kernel", "embedding", "scale", "bias"):
            name = in_memory(family, module) + (".bias" if kind == "bias" else ".weight")
        else:
            name = path.replace("/", ".")  # a parameter that is no layer's keeps its name, but its stack may not
            name = re.sub("^" + re.escape(module), in_memory(family, module), name) if module else name
        name = name if in_head or not headed else family.prefix + name
        leaf = np.asarray(leaf)
        back = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 and kind == "kernel" else leaf.T if kind == "kernel" else leaf
        np.testing.assert_array_equal(back, memory[name], err_msg=name)
        seen.add(name)
    assert seen == set(memory)


def check_layouts(folder, inputs, loss):
    """Loop, scan and remat are one model: values and gradients."""

    def run(gradient, **options):
        model, own = load_pretrained(folder, **options)
        value = lambda p: loss(model.apply({"params": p}, inputs, output_hidden_states=True))  # noqa: E731
        return own, jax.jit(jax.value_and_grad(value) if gradient else lambda p: (value(p), None))(own)

    params, (want, want_grad) = run(True)
    for scan_layers, remat in ((False, True), (True, False), (True, True)):
        own, (value, grad) = run(scan_layers and remat, scan_layers=scan_layers, remat=remat)
        assert jax.tree.structure(own) == jax.tree.structure(stack_layers(params) if scan_layers else params)
        np.testing.assert_allclose(value, want, rtol=1e-5)
        if grad is None:
            continue
        expected = trees.flat(stack_layers(want_grad))
        for path, leaf in trees.flat(grad).items():
            # Sums over all outputs: the bound is relative to the gradient's size.
            bound = 2e-5 * max(1.0, float(jnp.abs(expected[path]).max()))
            np.testing.assert_allclose(leaf, expected[path], atol=bound, rtol=0, err_msg=path)


def check_jvp(folder, inputs, read, key):
    """The derivative along a direction in all parameters is the finite difference, for a scanned, rematerialised model."""
    model, params = load_pretrained(folder, scan_layers=True, remat=True)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    tangent = structure.unflatten([0.1 * jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)])

    @jax.jit
    def f(scale):
        moved = jax.tree.map(lambda p, t: p + scale * t, params, tangent)
        return read(model.apply({"params": moved}, inputs))

    got = jax.jit(lambda: jax.jvp(f, (jnp.float32(0),), (jnp.float32(1),))[1])()
    step = 1e-2
    # Fourth-order central difference: float32 rounding limits it to about 1e-4.
    fd = (8 * (f(step) - f(-step)) - (f(2 * step) - f(-2 * step))) / (12 * step)
    assert float(jnp.abs(got).max()) > 1e-2
    np.testing.assert_allclose(got, fd, atol=2e-3 * float(jnp.abs(got).max()), rtol=0)


def check_bfloat16(folder, inputs, read, want, bound=0.15):
    """Parameters in bfloat16, or in float32 under a bfloat16 computation, give bfloat16 near the float32 model."""
    for scan_layers in (False, True):
        model, params = load_pretrained(folder, dtype=jnp.bfloat16, scan_layers=scan_layers)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
        if scan_layers:
            params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        got = read(jax.jit(model.apply)({"params": params}, inputs))
        assert got.dtype == jnp.bfloat16
        assert furthest(got, want) < bound


def check_init(folder, inputs, key):
    """A new model has the tree of the table, scanned or not."""
    model, params = load_pretrained(folder)
    made = jax.eval_shape(model.init, key, inputs)["params"]
    assert {k: v.shape for k, v in trees.paths(made).items()} == {k: v.shape for k, v in trees.paths(params).items()}
    scanned = model.clone(scan_layers=True)
    assert jax.eval_shape(scanned.init, key, inputs)["params"] == jax.eval_shape(stack_layers, made)


def taps_of(model, params, inputs):
    """What passes through every tap, by path, and the outputs."""
    seen = {}

    def record(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        if type(context.module).__name__ == "Tap":
            seen["/".join(context.module.path)] = out
        return out

    with nn.intercept_methods(record):
        got = model.apply({"params": params}, inputs, output_hidden_states=True)
    return seen, got


def check_dropout(folder, inputs, read, key, **fields):
    """Off by default; with rates above zero it needs a key, depends on it, and zero rates switch it off."""
    model, params = load_pretrained(folder)
    config = model.config
    still = read(jax.jit(model.apply)({"params": params}, inputs))
    noisy_model = model.clone(config=dataclasses.replace(config, **fields))

    @jax.jit
    def noisy(key):
        return read(noisy_model.apply({"params": params}, inputs, deterministic=False, rngs={"dropout": key}))

    one, again, two = (noisy(jax.random.fold_in(key, i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert jnp.abs(one - two).max() > 0.01 and jnp.abs(one - still).max() > 0.01
    np.testing.assert_array_equal(read(jax.jit(noisy_model.apply)({"params": params}, inputs)), still)


def garbage(config_class, good):
    """Hostile dictionaries: whatever a field is, from_dict takes it or raises a ValueError."""
    values = [
        None,
        True,
        -1,
        0,
        1.5,
        2**70,
        1e300,
        float("nan"),
        "x",
        [],
        {},
        [1, 2, 3],
        {"a": [1]},
        [[2]],
        "\ud800",
        [4, True],
    ]
    for field in [*good, "unknown"]:
        for value in values:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                try:
                    config_class.from_dict({**good, field: value})
                except ValueError as error:
                    assert len(str(error)) < 4000


def make(kind, config_kind, seed, config_options, **options):
    """A random transformers model with eager attention."""
    config = getattr(transformers, config_kind)(**config_options, attn_implementation="eager")
    return randomize(getattr(transformers, kind)(config, **options), seed)


def assert_canonical(folder, renamed):
    """A file with other names is read as the same parameters."""
    family = family_of(folder)
    tensors = load_safetensors(folder / "model.safetensors")
    config = family.read_config(raw_config(folder), canonical(family, tensors))
    want = params_from_hf(family, tensors, config)
    got = params_from_hf(family, renamed(tensors), config)
    jax.tree.map(np.testing.assert_array_equal, got, want)
