"""Prompts beside PEFT's, in front of every backbone's inputs, with caches, and where they are refused."""

import functools
import sys
import warnings
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

import pefusion_jax as pf
from pefusion_jax import backbones, trees

sys.path.insert(0, str(Path(__file__).parents[1] / "backbones"))
import parity

N = 3
IDS = np.array([[5, 7, 9, 11, 13, 2], [3, 8, 21, 6, 4, 7]], np.int32)
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], np.int32)
LEFT = np.ascontiguousarray(MASK[:, ::-1])
SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24, vocab_size=29)
T5 = dict(vocab_size=29, d_model=16, d_kv=6, d_ff=24, num_layers=1, num_decoder_layers=1, num_heads=3)
BOTH = {"input_ids": IDS, "attention_mask": MASK}


def close(ours, theirs, bound=1e-5):
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= bound


def of_peft(kind):
    """A random model of transformers, and the class and inputs of PEFT's model around it."""
    if kind == "bert":
        base = transformers.BertModel(transformers.BertConfig(**SIZES, max_position_embeddings=12))
        return base, "FEATURE_EXTRACTION", BOTH
    if kind == "roberta":
        base = transformers.RobertaModel(transformers.RobertaConfig(**SIZES, max_position_embeddings=16, pad_token_id=1))
        return base, "FEATURE_EXTRACTION", {"input_ids": np.where(MASK > 0, IDS, 1).astype(np.int32), "attention_mask": MASK}
    if kind == "llama":
        config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, attn_implementation="eager")
        return transformers.LlamaForCausalLM(config), "CAUSAL_LM", {"input_ids": IDS, "attention_mask": LEFT}
    config = transformers.T5Config(**T5, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config), "SEQ_2_SEQ_LM", BOTH | {"decoder_input_ids": IDS[:, ::-1].copy()}


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama", "t5"])
def test_outputs_equal_pefts(kind, tmp_path):
    base, task, inputs = of_peft(kind)
    parity.randomize(base, 3).save_pretrained(tmp_path)
    model, params = pf.load_pretrained(tmp_path)
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=N, num_transformer_submodules=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(base, config).eval()
        with torch.no_grad():
            wrapped.prompt_encoder.default.embedding.weight.copy_(torch.randn(N, 16) * 0.5)
            theirs = wrapped(**{name: torch.tensor(array).long() for name, array in inputs.items()})
    tensor = peft.get_peft_model_state_dict(wrapped)["prompt_embeddings"]

    adapted = pf.adapt(model, pf.PromptTuning(length=N))
    created = adapted.init(jax.random.key(0), params, **inputs)
    (path,) = trees.paths(created)
    assert trees.paths(created)[path].shape == tensor.shape
    ours = jax.jit(adapted.apply)(params, trees.nest({path: jnp.asarray(tensor.numpy())}), **inputs)
    name = "logits" if kind in ("llama", "t5") else "last_hidden_state"
    ours_, theirs_ = getattr(ours, name), getattr(theirs, name).numpy()[:, 0 if kind == "t5" else N :]  # T5's: the decoder's
    # Padding stands elsewhere in PEFT's RoBERTa, which does not see ids, and nothing sees padding.
    close(*((np.where(MASK[:, :, None], x, 0) for x in (ours_, theirs_)) if kind == "roberta" else (ours_, theirs_)))
    if kind == "bert":
        close(ours.pooler_output, theirs.pooler_output.numpy())
    if kind == "t5":
        close(ours.encoder_last_hidden_state, theirs.encoder_last_hidden_state.numpy()[:, N:])


@functools.cache
def built(kind, **options):
    """A model, its parameters, and what it is like with a prompt: ``(adapted, params, prompt)``."""
    if kind == "t5":
        model = backbones.T5(backbones.T5Config(**T5), **options)
        inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    elif kind == "llama":
        config = backbones.LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True)
        model, inputs = backbones.Llama(config, **options), {"input_ids": IDS}
    else:
        model = backbones.Bert(backbones.BertConfig(**SIZES, max_position_embeddings=12, masked_lm=True), **options)
        inputs = {"input_ids": IDS}
    drawn = jax.jit(model.init)(jax.random.key(1), **inputs)["params"]
    params = jax.tree.map(lambda leaf: 5 * leaf if leaf.ndim > 1 and kind != "t5" else leaf, drawn)
    adapted = pf.adapt(model, pf.PromptTuning(length=N, init="unit"))
    return adapted, params, adapted.init(jax.random.key(2), params, **inputs)


def test_prompt_is_what_is_embedded_and_outputs_lose_it():
    """Word for word: the prompt of the embeddings of tokens is these tokens in front."""
    adapted, params, created = built("bert")
    before = np.array([17, 4, 17], np.int32)
    prompt = pf.prompt_from_tokens(created, params, before)
    long = {
        "input_ids": np.concatenate([np.tile(before, (2, 1)), IDS], 1),
        "attention_mask": np.pad(MASK, ((0, 0), (N, 0)), constant_values=1),
        "token_type_ids": np.pad(MASK, ((0, 0), (N, 0))),
        "position_ids": np.arange(2, 2 + N + 6)[None],
    }
    expected = jax.jit(functools.partial(adapted.base, output_hidden_states=True))(params, long)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": MASK, "position_ids": np.arange(2, 8)[None]}
    given = jax.jit(functools.partial(adapted.apply, output_hidden_states=True))(params, prompt, **inputs)
    close(given.logits, expected.logits[:, N:])
    close(given.pooler_output, expected.pooler_output)
    assert len(given.hidden_states) == 2
    for ours, theirs in zip(given.hidden_states, expected.hidden_states, strict=True):
        close(ours, theirs[:, N:])


class Table(nn.Module):
    """What a model reads, [batch, seq * d], in the dtype that it computes in; of two axes, so that it keeps the prompt."""

    @nn.compact
    def __call__(self, input_ids):
        words = nn.Embed(7, 8, dtype=jnp.bfloat16, embedding_init=nn.initializers.normal(100.0), name="shared")
        return words(input_ids).reshape(len(input_ids), -1)


@pytest.mark.parametrize("mode", [None, "layer", "network"])
def test_a_bfloat16_model_reads_the_prompt_whatever_the_size_of_its_table(mode):
    ids = IDS[:, :2] % 7
    params = Table().init(jax.random.key(0), ids)["params"]
    adapted = pf.adapt(Table(), pf.PromptTuning(length=N))
    start, step = (adapted.init(jax.random.key(seed), params, ids) for seed in (1, 2))
    model = adapted if mode is None else pf.linearize(adapted, start, mode)
    given = jax.jit(model.apply)(params, step, ids)
    prompt, moved = (np.asarray(tree["shared"]["prompt"]) for tree in (start, step))
    expected = jnp.asarray(moved if mode is None else prompt + moved, jnp.bfloat16)
    assert given.dtype == jnp.bfloat16
    for row, words in zip(given.reshape(2, N + 2, 8), adapted.base(params, ids).reshape(2, 2, 8), strict=True):
        # Over the network the value and the derivative are rounded apart, each at its own size.
        close(row[:N], expected, 2**-8 * (np.abs(prompt) + np.abs(moved)).max() if mode == "network" else 0)
        np.testing.assert_array_equal(row[N:], words)


def test_other_methods_work_beside_it_and_scans_agree():
    adapted, params, prompt = built("bert")
    model = adapted.origin.model
    methods = [pf.LoRA(rank=2, targets=r".*/(query|word_embeddings_)"), pf.PromptTuning(length=N)]
    both = pf.adapt(model, methods)
    tree = jax.tree.map(lambda leaf: leaf + 0.1, both.init(jax.random.key(0), params, IDS))
    assert {path.rpartition("/")[2] for path in trees.paths(tree)} == {"lora_a", "lora_b", "prompt"}
    scanned = pf.adapt(model.clone(scan_layers=True), methods)
    ours = jax.jit(scanned.apply)(backbones.stack_layers(params), backbones.stack_layers(tree), IDS)
    close(ours.last_hidden_state, jax.jit(both.apply)(params, tree, IDS).last_hidden_state)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_generation_with_a_cache_is_generation_without(kind):
    """Every token is the likeliest one when the whole text is read anew."""
    adapted, params, prompt = built(kind)
    start = {"decoder_start_token_id": 0} if kind == "t5" else {}
    inputs = {"input_ids": IDS, "attention_mask": LEFT}
    tokens = np.asarray(pf.generate_tokens(adapted, params, inputs, adapters=prompt, max_new_tokens=5, **start))
    if kind == "t5":
        text = inputs | {"decoder_input_ids": np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]}
    else:
        mask = np.pad(LEFT, ((0, 0), (0, 5)), constant_values=1)
        positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
        text = {"input_ids": np.concatenate([IDS, tokens], 1), "attention_mask": mask, "position_ids": positions}
    run = jax.jit(adapted.apply)
    logits = run(params, prompt, text).logits
    np.testing.assert_array_equal(tokens, np.argmax(logits[:, -6:-1] if kind == "llama" else logits, -1))
    other = run(params, jax.tree.map(jnp.flip, prompt), text).logits
    assert np.abs(other - logits).max() > 1e-2, "no prompt in the model"


def test_a_cache_filled_by_hand_continues():
    adapted, params, prompt = built("llama")
    run, cache = jax.jit(adapted.apply), adapted.origin.model.init_cache(2, 6)
    whole = run(params, prompt, IDS)
    first = run(params, prompt, IDS[:, :4], cache=cache)
    close(first.logits, whole.logits[:, :4])
    second = run(params, prompt, IDS[:, 4:], cache=first.cache, attention_mask=np.ones((2, 6), np.int32))
    close(second.logits, whole.logits[:, 4:])
    with pytest.raises(ValueError, match="do not fit into a cache"):
        adapted.apply(params, prompt, IDS, cache=second.cache)


def test_what_cannot_be_is_said():
    adapted, params, prompt = built("bert")
    with pytest.raises(ValueError, match=r"13 tokens, the model at most 12.*puts 3 positions in front of the 10"):
        adapted.apply(params, prompt, np.ones((1, 10), np.int32))
    with pytest.raises(ValueError, match="give all but the token ids by name"):
        adapted.apply(params, prompt, IDS, MASK)
    with pytest.raises(ValueError, match=r"there are none.*ids='name'"):
        adapted.apply(params, prompt, ids=IDS)
    with pytest.raises(ValueError, match=r"integers, and they are float32 of shape \(2, 6\)"):
        adapted.apply(params, prompt, IDS.astype(np.float32))
    with pytest.raises(ValueError, match=r"has 3 positions, PromptTuning\(length=2\)"):
        pf.adapt(adapted.origin.model, pf.PromptTuning(length=2)).apply(params, prompt, IDS)
    with pytest.raises(ValueError, match=r"matches 'encoder/layer/0/.*no embedding"):
        pf.adapt(adapted.origin.model, pf.PromptTuning(targets=r".*/query", length=N)).init(jax.random.key(0), params, IDS)
    with pytest.raises(ValueError, match="no change of the weights.*nonlinearly"):
        adapted.deltas(params, prompt)
    t5, params, prompt = built("t5")
    with pytest.raises(ValueError, match="encoder_outputs have no place"):
        t5.apply(params, prompt, encoder_outputs=np.ones((2, 6, 16), np.float32), decoder_input_ids=IDS)
    with pytest.raises(ValueError, match="cache of this kind"):
        t5.apply(params, prompt, IDS, decoder_input_ids=IDS, cache=(1, 2))
    for wrong in ({"length": 0}, {"init": "zeros"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            pf.PromptTuning(**wrong)


def test_prompts_start_from_tokens():
    adapted, params, created = built("llama")
    table = np.asarray(params["embed_tokens"]["embedding"])
    leaf = lambda tree: np.asarray(tree["embed_tokens"]["prompt"])  # noqa: E731
    np.testing.assert_array_equal(leaf(pf.prompt_from_tokens(created, params, [4, 9])), table[[4, 9, 4]])
    np.testing.assert_array_equal(leaf(pf.prompt_from_tokens(created, {"params": params}, np.arange(9))), table[:N])
    drawn = leaf(pf.prompt_from_tokens(created, params, key=jax.random.key(0), most_frequent=N))
    assert sorted(map(tuple, drawn.tolist())) == sorted(map(tuple, table[:N].tolist()))
    for wrong, said in (({}, "either ids="), ({"ids": [29]}, "29 to 29, the vocabulary has 29"), ({"ids": [0.5]}, "integers")):
        with pytest.raises(ValueError, match=said):
            pf.prompt_from_tokens(created, params, **wrong)
    with pytest.raises(ValueError, match="one leaf 'prompt'.*there are 0"):
        pf.prompt_from_tokens({}, params, [1])
    with pytest.raises(ValueError, match="no 'embed_tokens/embedding'.*another model"):
        pf.prompt_from_tokens(created, {"norm": {"scale": table}}, [1])


def test_similarity_of_prompts_is_spots():
    rng = np.random.default_rng(0)
    prompts = {name: rng.normal(size=(n, 4)) for name, n in (("new", 3), ("rte", 3), ("cola", 5))}
    found = {name: {"embed_tokens": {"prompt": jnp.asarray(rows, jnp.float32)}} for name, rows in prompts.items()}
    new = found.pop("new")
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    for name, got in pf.prompt_similarity(new, found).items():
        assert got == pytest.approx(cosine(prompts["new"].mean(0), prompts[name].mean(0)), abs=1e-6)
    for name, got in pf.prompt_similarity(new, found, per_token=True).items():
        pairs = [cosine(a, b) for a in prompts["new"] for b in prompts[name]]
        assert got == pytest.approx(np.mean(pairs), abs=1e-6)
    with pytest.raises(ValueError, match="'rte' is 4 wide, this one 2"):
        pf.prompt_similarity({"prompt": jnp.ones((3, 2))}, found)
