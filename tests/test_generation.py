"""Generation against transformers, token for token: tiny random decoders and encoder-decoders."""

import dataclasses
import functools
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import pefusion_jax as pf
from pefusion_jax import generation
from pefusion_jax.interop import load_pretrained

sys.path.insert(0, str(Path(__file__).parent / "backbones"))
import parity

SHAPE = dict(vocab_size=61, attn_implementation="eager", pad_token_id=3, eos_token_id=2)
NEW = 64
RNG = np.random.default_rng(1)
IDS = RNG.integers(4, 61, (4, 6)).astype(np.int32)
MASK = np.array([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1] * 6, [1] * 6], np.int32)
IDS[MASK == 0] = 3
BATCH = {"input_ids": IDS, "attention_mask": MASK}
LABELS = [[5, 6, 7], [8], [9, 10], [5, 6, 8]]


@functools.cache
def tiny(kind):
    if kind == "t5":
        config = transformers.T5Config(
            **SHAPE,
            d_model=24,
            d_kv=6,
            d_ff=40,
            num_layers=1,
            num_heads=4,
            decoder_start_token_id=1,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
        model = parity.randomize(transformers.T5ForConditionalGeneration(config), 8)
        with torch.no_grad():  # larger weights: this one repeated itself from the first token on
            for name, parameter in model.named_parameters():
                parameter.mul_(2.0 if "decoder" in name and parameter.ndim == 2 else 1.0)
    else:
        family = "Llama" if kind == "llama" else "Qwen2"
        config = getattr(transformers, f"{family}Config")(
            **SHAPE,
            hidden_size=24,
            num_hidden_layers=1 if kind == "llama" else 2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=40,
            max_position_embeddings=128,
            tie_word_embeddings=kind == "qwen2",
        )
        model = parity.randomize(getattr(transformers, f"{family}ForCausalLM")(config), 1)
    model.generation_config.eos_token_id = None  # what a test does not ask for must not come from here
    return model


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    @functools.cache
    def folder(kind):
        path = tmp_path_factory.mktemp("tiny")
        tiny(kind).save_pretrained(path)
        return path

    return functools.cache(lambda kind, **options: load_pretrained(folder(kind), **options))


@functools.cache
def theirs(kind, new=NEW, eos=None, **options):
    config = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=eos if eos is None else list(eos),
        pad_token_id=3,
        decoder_start_token_id=1,
        **options,
    )
    tensors = {name: torch.tensor(array) for name, array in BATCH.items()}
    found = tiny(kind).generate(**tensors, generation_config=config).numpy()
    found = found[:, 1 if kind == "t5" else IDS.shape[1] :]
    return np.pad(found, ((0, 0), (0, new - found.shape[1])), constant_values=3)


def generate(model, params, kind, batch=BATCH, new=NEW, eos=None, **options):
    return np.asarray(pf.generate_tokens(model, params, batch, max_new_tokens=new, eos_token_id=eos, pad_token_id=3, **options))


@functools.cache
def ends_of(kind):
    """Tokens that greedy search meets early in some rows and never in others."""
    free = theirs(kind)
    return int(free[0, 2]), int(free[1, 20])


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_greedy_search_is_that_of_transformers_for_64_tokens(kind, load):
    model, params = load(kind)
    np.testing.assert_array_equal(generate(model, params, kind), theirs(kind))
    want = theirs(kind, eos=ends_of(kind))
    lengths = (want != 3).sum(axis=1)
    assert lengths.min() <= 3 and len(set(lengths)) > 1  # the first row ends early, others later
    np.testing.assert_array_equal(generate(model, params, kind, eos=ends_of(kind)), want)


@pytest.mark.parametrize(
    ("beams", "length_penalty", "early_stopping", "ends"),
    [(4, 1.0, False, 1), (3, 0.0, True, 2), (2, -1.0, "never", 1), (5, 2.0, "never", 2)],
)
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_beam_search_is_that_of_transformers(kind, beams, length_penalty, early_stopping, ends, load):
    model, params = load(kind)
    options = dict(num_beams=beams, length_penalty=length_penalty, early_stopping=early_stopping)
    options |= dict(new=24, eos=ends_of(kind)[:ends])
    np.testing.assert_array_equal(generate(model, params, kind, **options), theirs(kind, **options))


def test_beam_search_without_an_end_and_one_token(load):
    model, params = load("llama")
    for options in (dict(num_beams=3, new=12), dict(num_beams=3, new=1)):
        np.testing.assert_array_equal(generate(model, params, "llama", **options), theirs("llama", **options))


def test_beams_find_what_is_likelier_than_greedy(load):
    """The definition, not another implementation: the sum of log-probabilities of the whole sequence."""
    model, params = load("qwen2")

    def likelihood(tokens):  # each row its own continuation
        return pf.score_labels(model, params, BATCH, tokens[:, None])[:, 0]

    greedy, beams = (likelihood(generate(model, params, "qwen2", new=6, num_beams=n)) for n in (1, 5))
    assert (beams >= greedy - 1e-4).all() and (beams > greedy + 1e-3).any()


@pytest.mark.parametrize("kind", ["qwen2", "t5"])
def test_scanned_and_rematerialised_layers_write_the_same(kind, load):
    model, params = load(kind, scan_layers=True, remat=True)
    np.testing.assert_array_equal(generate(model, params, kind), theirs(kind))
    beams = dict(num_beams=3, new=10, eos=ends_of(kind))
    np.testing.assert_array_equal(generate(model, params, kind, **beams), theirs(kind, **beams))


def adapted(kind, load, targets):
    model, params = load(kind)
    lora = pf.adapt(model, pf.LoRA(rank=2, alpha=4, targets=targets))
    example = dict(input_ids=IDS, decoder_input_ids=IDS) if kind == "t5" else dict(input_ids=IDS)
    phi = lora.init(jax.random.key(1), params, **example)
    moved = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(2), leaf.shape), phi)
    return model, params, lora, phi, moved


TARGETS = {"llama": r".*/(q_proj|v_proj|down_proj)|embed_tokens", "t5": r".*/(q|v|wo)|shared"}


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_adapted_models_write_what_folded_ones_do(kind, load):
    model, params, lora, phi, moved = adapted(kind, load, TARGETS[kind])
    plain = generate(model, params, kind)
    delta = lora.deltas(params, moved)
    folded = generate(model, pf.fold(params, delta), kind)
    assert (folded != plain).any(axis=1).all()
    np.testing.assert_array_equal(generate(lora, params, kind), plain)
    np.testing.assert_array_equal(generate(lora, params, kind, adapters=phi), plain)  # B is zero
    np.testing.assert_array_equal(generate(lora, params, kind, adapters=moved), folded)
    np.testing.assert_array_equal(generate(lora, params, kind, adapters=delta), folded)


@pytest.mark.parametrize(("kind", "mode"), [("llama", "network"), ("llama", "layer"), ("llama", "weight"), ("t5", "network")])
def test_linearized_models_write_what_their_forward_pass_says(kind, mode, load):
    model, params, lora, phi, moved = adapted(kind, load, TARGETS[kind])
    linear = pf.linearize(lora, phi, mode=mode)
    assert (linear.pushforward is None) == (mode == "layer")
    zero = jax.tree.map(jnp.zeros_like, phi)
    plain = theirs(kind, new=8)
    np.testing.assert_array_equal(generate(linear, params, kind, adapters=zero, new=8), plain)
    tau = jax.tree.map(jnp.subtract, moved, phi)
    for tree in (tau, linear.deltas(params, tau)) if (kind, mode) == ("llama", "network") else (tau,):
        got = generate(linear, params, kind, adapters=tree, new=8)
        assert (got != plain).any(axis=1).all()
        forward = linear.apply_deltas if isinstance(tree, pf.Delta) else linear.apply
        np.testing.assert_array_equal(got[2:], stepwise(functools.partial(forward, params, tree), kind, 8))


def test_linearized_beams_start_from_those_of_the_model(load):
    _, params, lora, phi, _ = adapted("llama", load, TARGETS["llama"])
    options = dict(num_beams=3, new=5, eos=ends_of("llama"))
    got = generate(pf.linearize(lora, phi), params, "llama", adapters=jax.tree.map(jnp.zeros_like, phi), **options)
    np.testing.assert_array_equal(got, theirs("llama", **options))


def stepwise(forward, kind, new):
    """Greedy search over the last two rows, which have no padding, by whole forward passes without any cache."""
    run = jax.jit(lambda **inputs: forward(**inputs).logits)
    ids, written = IDS[2:], np.zeros((2, new), np.int32)
    for step in range(new):  # tokens to come are there already, as zeros; nothing sees them
        if kind == "t5":
            target = np.concatenate([np.ones((2, 1), np.int32), written[:, :-1]], axis=1)
            logits = run(input_ids=ids, decoder_input_ids=target)[:, step]
        else:
            logits = run(input_ids=np.concatenate([ids, written], axis=1))[:, ids.shape[1] + step - 1]
        written[:, step] = jnp.argmax(logits, axis=-1)
    return written


@pytest.mark.parametrize("beams", [1, 3])
def test_one_program_serves_all_parameters_adapters_and_prompts_of_a_shape(beams, load):
    model, params, lora, phi, moved = adapted("llama", load, TARGETS["llama"])
    run = functools.partial(generate, kind="llama", num_beams=beams, new=7, eos=5)
    before = generation._generate._cache_size()
    first = run(lora, params, adapters=phi)
    other = jax.tree.map(lambda leaf: leaf * 1.5, params)
    again = {"input_ids": IDS[::-1].copy(), "attention_mask": MASK[::-1].copy()}
    results = [run(lora, params, adapters=moved), run(lora, other, adapters=phi), run(lora, params, adapters=phi, batch=again)]
    assert generation._generate._cache_size() == before + 1
    assert all((result != first).any() for result in results)
    np.testing.assert_array_equal(results[2][::-1], first)
    if beams == 1:  # another module of the same configuration is the same program too
        run(model, params)
        run(model.clone(), other)
        assert generation._generate._cache_size() == before + 2


def test_generation_works_inside_jit_and_with_collections(load):
    model, params = load("llama")
    want = theirs("llama", new=5)
    inside = jax.jit(lambda p, batch: pf.generate_tokens(model, p, batch, max_new_tokens=5, pad_token_id=3))
    np.testing.assert_array_equal(inside({"params": params}, BATCH), want)
    # Rows without padding need no mask.
    np.testing.assert_array_equal(pf.generate_tokens(model, params, IDS[2:], max_new_tokens=5), want[2:])


def test_bfloat16_generates(load):
    model, params = load("llama", dtype=jnp.bfloat16)
    tokens = generate(model, params, "llama", new=4)
    assert tokens.dtype == np.int32 and tokens.shape == (4, 4) and (tokens >= 0).all() and (tokens < 61).all()


def by_hand(kind, labels):
    """Log-likelihoods from single forward passes of transformers, without padding and without batches."""
    model, out = tiny(kind), np.zeros((len(IDS), len(labels)))
    for row in range(len(IDS)):
        ids = torch.tensor(IDS[row][MASK[row] == 1][None])
        for column, label in enumerate(labels):
            new = torch.tensor([label])
            with torch.no_grad():
                if kind == "t5":
                    start = torch.ones((1, 1), dtype=torch.long)
                    logits = model(input_ids=ids, decoder_input_ids=torch.cat([start, new[:, :-1]], 1)).logits
                else:
                    logits = model(input_ids=torch.cat([ids, new], 1)).logits[:, ids.shape[1] - 1 : -1]
            out[row, column] = logits.log_softmax(-1).gather(2, new[..., None]).sum()
    return out


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_score_labels_is_the_log_likelihood(kind, load):
    model, params = load(kind)
    score = functools.partial(pf.score_labels, model, params, BATCH)
    want = by_hand(kind, LABELS)
    got = score(LABELS)
    assert got.shape == (4, 4) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=1e-5)
    lengths = np.array([len(label) for label in LABELS])
    np.testing.assert_allclose(score(LABELS, length_normalize=True), want / lengths, atol=2e-5, rtol=1e-5)
    each = np.full((4, 4, 3), -100)
    for column, label in enumerate(LABELS):
        each[:, column, : len(label)] = label
    each[0] = each[0, ::-1]  # the first row has its own order
    np.testing.assert_allclose(score(each), np.concatenate([want[:1, ::-1], want[1:]]), atol=2e-5, rtol=1e-5)
    if kind == "llama":
        np.testing.assert_allclose(score(LABELS, labels_at_once=3), got, atol=1e-5)
        np.testing.assert_allclose(score([[label[0]] for label in LABELS])[:, 1], want[:, 1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_score_labels_of_adapted_and_linearized_models(kind, load):
    model, params, lora, phi, moved = adapted(kind, load, TARGETS[kind])
    score = functools.partial(pf.score_labels, inputs=BATCH, label_ids=LABELS)
    if kind == "llama":
        folded = score(model, pf.fold(params, lora.deltas(params, moved)))
        np.testing.assert_allclose(score(lora, params, adapters=moved), folded, atol=1e-4, rtol=1e-4)
    linear = pf.linearize(lora, phi)
    zero = jax.tree.map(jnp.zeros_like, phi)
    np.testing.assert_allclose(score(linear, params, adapters=zero), by_hand(kind, LABELS), atol=2e-5, rtol=1e-5)
    # The logits are affine in tau; the likelihood of a label of one token is a log-softmax of them.
    tau = jax.tree.map(jnp.subtract, moved, phi)
    example = dict(decoder_input_ids=np.ones((2, 1), np.int32)) if kind == "t5" else {}
    logits = linear.apply(params, tau, input_ids=IDS[2:], **example).logits[:, -1]  # these rows have no padding
    got = score(linear, params, adapters=tau)[2:, 1]
    np.testing.assert_allclose(got, jax.nn.log_softmax(logits)[:, 8], atol=1e-4, rtol=1e-4)


def test_score_labels_has_gradients(load):
    """Rank classification is trained through the same scores."""
    _, params, lora, _, moved = adapted("llama", load, TARGETS["llama"])
    direction = jax.tree.map(jnp.ones_like, moved)

    @jax.jit
    def total(scale):
        tree = jax.tree.map(lambda a, d: a + scale * d, moved, direction)
        return jnp.sum(pf.score_labels(lora, params, BATCH, np.array([[5, 6], [8, -100]]), adapters=tree))

    step = 3e-3
    fd = (8 * (total(step) - total(-step)) - (total(2 * step) - total(-2 * step))) / (12 * step)
    assert math.isclose(float(jax.jit(jax.grad(total))(0.0)), float(fd), rel_tol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(inputs={"ids": IDS}), "inputs must have input_ids"),
        (dict(inputs=BATCH | {"token_type_ids": IDS}), "leave out the others"),
        (dict(inputs=IDS[0]), r"integers \[batch, seq\]"),
        (dict(inputs=IDS.astype(np.float32)), "integers"),
        (dict(inputs=BATCH | {"attention_mask": MASK[:2]}), "attention_mask has shape"),
        (dict(inputs=BATCH | {"attention_mask": MASK[:, ::-1].copy()}), "row 0 of attention_mask ends with 0.*padding_side"),
        (dict(max_new_tokens=0), "max_new_tokens must be a positive integer"),
        (dict(num_beams=1.5), "num_beams must be a positive integer"),
        (dict(num_beams=31, eos_token_id=list(range(70))), "too many for a vocabulary"),
        (dict(early_stopping="soon"), "early_stopping must be"),
        (dict(decoder_start_token_id=0), "Llama is a decoder"),
        (dict(adapters={}), "a Linen module has no adapters"),
        (dict(model=lambda x: x), "must be an Adapted or a Linen module"),
    ],
)
def test_what_is_wrong_with_a_call_is_said(changes, message, load):
    model, params = load("llama")
    given = dict(model=model, params=params, inputs=BATCH, max_new_tokens=2) | changes
    with pytest.raises(ValueError, match=message):
        pf.generate_tokens(**given)


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        (pf.generators.PerTask(tasks=("a", "b")), r"each task; .*model.origin.inner, with adapters=model.materialise\(.*'a'\)"),
        (pf.generators.hyperdecoder(24), r"each input; .*model.origin.inner, with adapters=generators.mean_adapters\(model,"),
    ],
    ids=["table", "hyperdecoder"],
)
def test_adapters_of_a_generator_are_to_be_made_first(generator, message, load):
    model, params = load("t5")
    made = pf.generate(pf.adapt(model, pf.LoRA(rank=2, targets=r".*/(q|v)")), generator)
    for write in (
        functools.partial(pf.generate_tokens, max_new_tokens=2),
        functools.partial(pf.score_labels, label_ids=LABELS),
    ):
        with pytest.raises(ValueError, match=message):
            write(made, params, BATCH, adapters={})


def test_models_that_cannot_generate_say_so(load, tmp_path):
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, max_position_embeddings=9
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="Bert cannot generate"):
        pf.generate_tokens(*load_pretrained(tmp_path / "bert"), IDS, max_new_tokens=2)
    tiny("llama").model.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match="no language-model head"):
        pf.generate_tokens(*load_pretrained(tmp_path / "headless"), IDS, max_new_tokens=2)
    model, params = load("t5")
    none = model.clone(config=dataclasses.replace(model.config, decoder_start_token_id=None))
    with pytest.raises(ValueError, match="T5 is an encoder-decoder: give decoder_start_token_id"):
        pf.score_labels(none, params, IDS, LABELS)
    given = pf.score_labels(none, params, IDS, LABELS, decoder_start_token_id=1)
    np.testing.assert_array_equal(given, pf.score_labels(model, params, IDS, LABELS))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "at least one token"),
        ([[5], []], "at least one token"),
        (np.array([[5, -100], [-100, 5]]), "only after its last one"),
        (np.array([5, 6]), r"must be \[labels, length\]"),
        (np.ones((3, 2, 2), np.int32), "with a batch of 4"),
    ],
)
def test_wrong_labels_are_named(labels, message, load):
    with pytest.raises(ValueError, match=message):
        pf.score_labels(*load("llama"), BATCH, labels)
    with pytest.raises(ValueError, match="labels_at_once"):
        pf.score_labels(*load("llama"), BATCH, LABELS, labels_at_once=0)
