"""What the tests of the text encoders share: checks of one model against its transformers counterpart."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from parity import assert_hidden_states, furthest, run, theirs

from pefusion_jax import trees
from pefusion_jax.backbones import stack_layers
from pefusion_jax.backbones.family import params_to_hf
from pefusion_jax.interop import load_pretrained, save_safetensors

BASE = dict(
    vocab_size=61,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=16,
    attn_implementation="eager",
)
# Padding on the right, on the left, and none.
MASK = np.array([[1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1], [1] * 7], np.int32)


def ids(pad):
    """Token ids ``[3, 7]`` with the padding of ``MASK``."""
    tokens = np.random.default_rng(0).integers(6, 61, (3, 7)).astype(np.int32)
    return np.where(MASK == 1, tokens, np.int32(pad))


def assert_same_outputs(model, params, reference, inputs, bound=1e-5):
    """Every hidden state, the pooler's output and the logits, each where the reference has it."""
    want, got = theirs(reference, **inputs), run(model, params, inputs)
    assert_hidden_states(got.hidden_states, want.hidden_states, bound)
    np.testing.assert_array_equal(got.last_hidden_state, got.hidden_states[-1])
    for field in ("logits", "pooler_output"):
        mine, other = getattr(got, field), getattr(want, field, None)
        assert (mine is None) == (other is None), field
        if other is not None:
            assert furthest(mine, other) <= bound, field
    return got


def assert_layouts_agree(family, folder, reference, inputs, pad):
    """Loop, scan and remat compute the same, and their gradients are torch's."""

    def loss(model, params):
        out = model.apply({"params": params}, inputs, output_hidden_states=True)
        return sum(jnp.sum(jnp.sin(hidden)) for hidden in out.hidden_states) + jnp.sum(jnp.sin(out.logits)), out

    reference.zero_grad()
    out = reference(**{name: torch.tensor(array) for name, array in inputs.items()}, output_hidden_states=True)
    (sum(hidden.sin().sum() for hidden in out.hidden_states) + out.logits.sin().sum()).backward()
    torch_grad = {name: p.grad.numpy().copy() for name, p in reference.named_parameters() if p.grad is not None}
    reference.zero_grad()

    plain, params = load_pretrained(folder)
    _, want = jax.jit(lambda p: loss(plain, p))(params)
    for scan_layers, remat in ((False, True), (True, False), (True, True)):
        model, own = load_pretrained(folder, scan_layers=scan_layers, remat=remat)
        assert jax.tree.structure(own) == jax.tree.structure(stack_layers(params) if scan_layers else params)
        if remat:
            (_, got), grad = jax.jit(jax.value_and_grad(lambda p, model=model: loss(model, p), has_aux=True))(own)
            ours = {name: array.copy() for name, array in params_to_hf(family, grad, model.config).items()}
            compared = torch_grad.keys() & ours.keys()
            # The only ones that are not ours are the decoder's second names of tied tensors.
            assert compared == ours.keys() and all("decoder" in name for name in torch_grad.keys() - ours.keys())
            for name in compared:
                if name.endswith(("word_embeddings.weight", "position_embeddings.weight")):
                    ours[name][pad] = torch_grad[name][pad]  # torch holds the rows of padding fixed
                # Sums over all outputs: the bound is relative to the gradient's size.
                bound = 2e-5 * max(1.0, float(np.abs(torch_grad[name]).max()))
                np.testing.assert_allclose(ours[name], torch_grad[name], atol=bound, rtol=0, err_msg=name)
        else:
            _, got = jax.jit(lambda p, model=model: loss(model, p))(own)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5, rtol=0)


def assert_jvp_is_the_finite_difference(folder, options, inputs, key):
    """In a direction through all parameters."""
    model, params = load_pretrained(folder, **options)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    tangent = structure.unflatten([0.1 * jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)])

    @jax.jit
    def f(scale):
        moved = jax.tree.map(lambda p, t: p + scale * t, params, tangent)
        out = model.apply({"params": moved}, inputs)
        return jnp.concatenate([out.last_hidden_state.reshape(-1), out.logits.reshape(-1)])

    got = jax.jit(lambda: jax.jvp(f, (jnp.float32(0),), (jnp.float32(1),))[1])()
    step = 1e-2
    # Fourth-order central difference: float32 rounding limits it to about 1e-4.
    fd = (8 * (f(step) - f(-step)) - (f(2 * step) - f(-2 * step))) / (12 * step)
    np.testing.assert_allclose(got, fd, atol=1e-3 * float(jnp.abs(got).max()), rtol=0)


def assert_computes_in_bfloat16(folder, reference, inputs, scan_layers):
    """With bfloat16 parameters and with float32 ones."""
    want = theirs(reference, **inputs)
    model, params = load_pretrained(folder, dtype=jnp.bfloat16, scan_layers=scan_layers)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    for tree in (params, wide):
        got = jax.jit(model.apply)({"params": tree}, inputs)
        assert got.last_hidden_state.dtype == got.logits.dtype == jnp.bfloat16
        assert furthest(got.last_hidden_state, want.hidden_states[-1]) < 0.15


def assert_transformers_reads_what_we_write(family, kind, folder, target, inputs, **options):
    """Our config.json and our tensors make the same model in transformers, without a missing or unexpected name."""
    model, params = load_pretrained(folder)
    save_safetensors(target / "model.safetensors", params_to_hf(family, params, model.config))
    raw = family.write_config(model.config)
    (target / "config.json").write_text(json.dumps(raw))
    assert kind.__name__ in raw["architectures"]
    theirs_again, report = kind.from_pretrained(target, output_loading_info=True, **options)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_outputs(model, params, theirs_again.eval(), inputs)
    assert load_pretrained(target)[0].config == model.config


def assert_init_makes_the_tree_of_the_table(build, config, table, inputs, key):
    """In both layouts, with every path the tensor's name."""
    made = jax.eval_shape(build(config).init, key, inputs)["params"]
    table = dict(table)
    for path, leaf in trees.paths(made).items():
        row = table.pop(path)
        assert leaf.shape == (row.shape if row.axes is None else row.shape[::-1]), path
        renamed = path.replace("/kernel", "/weight").replace("/scale", "/weight").replace("/embedding", "/weight")
        assert renamed.replace("/", ".") == row.name
    assert not table
    stacked = jax.eval_shape(build(config, scan_layers=True).init, key, inputs)["params"]
    assert stacked == jax.eval_shape(stack_layers, made)


def taps(model, params, inputs):
    """``{path: activation}`` of every tap, and the outputs."""
    seen = {}

    def record(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        if type(context.module).__name__ == "Tap":
            seen["/".join(context.module.path)] = out
        return out

    with nn.intercept_methods(record):
        out = model.apply({"params": params}, inputs, output_hidden_states=True)
    return seen, out


def prepended(model, params, inputs, prefix):
    """The last hidden state with ``prefix {key, value: [batch, n, d]}`` put in front of keys and values in every layer."""

    def prepend(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        name = context.module.name or ""
        return jnp.concatenate([prefix[name[4:]], out], axis=1) if name in ("tap_key", "tap_value") else out

    with nn.intercept_methods(prepend):
        return model.apply({"params": params}, inputs).last_hidden_state


HOSTILE = [None, True, -1, 0, 2**80, 1e400, float("nan"), "x", "", [], [[[]]], {}, {"a": {"b": None}}, ["RobertaModel", 3]]


def assert_hostile_configurations_give_value_errors(family, raw):
    """Whatever stands in a field: a configuration, or a ValueError."""
    fields = {*raw, "architectures", "id2label", "num_labels", "pad_token_id", "classifier_dropout", "hidden_act"}
    for field in fields:
        for value in HOSTILE:
            for tensors in (None, {"classifier.dense.weight": None, "classifier.weight": None}):
                try:
                    hash(family.read_config(raw | {field: value}, tensors))
                except ValueError as error:
                    assert len(str(error)) < 4000
