import numpy as np
import pytest
from fake import FakeTokenizer

from pefusion_jax.tasks import TextEncoder


def rows(*lengths):
    return [{"text": " ".join(["ab"] * n)} for n in lengths]


@pytest.mark.parametrize("words, width", [(1, 4), (2, 4), (3, 8), (6, 8), (7, 12), (100, 12)])
def test_pads_to_the_smallest_bucket_and_truncates(words, width):
    encoder = TextEncoder(FakeTokenizer(), buckets=(4, 8, 12))
    out = encoder(rows(1, words))
    kept = min(words, 10) + 2
    assert {name: value.shape for name, value in out.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids"), (2, width)
    )
    assert all(value.dtype == np.int32 for value in out.values())
    np.testing.assert_array_equal(out["attention_mask"].sum(axis=1), [3, kept])
    np.testing.assert_array_equal(out["input_ids"][0], [101, 2, 102] + [7] * (width - 3))
    assert out["input_ids"][1, kept - 1] == 102


def test_padded_then_trimmed_is_encoded():
    encoder = TextEncoder(FakeTokenizer(), buckets=(4, 8, 16))
    examples = rows(1, 2, 13, 5)
    whole = encoder.padded(examples)
    assert whole["input_ids"].shape == (4, 16)
    for index in ([0, 1], [3], [0, 2]):
        part = encoder.trim({name: value[index] for name, value in whole.items()})
        direct = encoder([examples[i] for i in index])
        for name in part:
            np.testing.assert_array_equal(part[name], direct[name])


def test_one_bucket_is_one_shape():
    encoder = TextEncoder(FakeTokenizer(), buckets=(32,))
    assert {encoder(rows(n))["input_ids"].shape for n in (1, 9, 40)} == {(1, 32)}
    assert TextEncoder(FakeTokenizer(), buckets=(8, 16, 32, 64), max_length=20).buckets == (8, 16, 32)


def test_pairs_lose_tokens_of_the_longer_side_first():
    encoder = TextEncoder(FakeTokenizer(), fields=("one", "two"), buckets=(8,))
    out = encoder([{"one": "a a", "two": "bb bb bb bb bb bb"}])
    np.testing.assert_array_equal(out["input_ids"], [[101, 1, 1, 102, 2, 2, 2, 102]])
    np.testing.assert_array_equal(out["token_type_ids"], [[0, 0, 0, 0, 1, 1, 1, 1]])


def test_more_than_two_fields_are_joined():
    encoder = TextEncoder(FakeTokenizer(), fields=("word", "one", "two"), buckets=(16,))
    out = encoder([{"word": "bank", "one": "a", "two": "ccc ccc"}])
    # "bank: a" and "ccc ccc"
    np.testing.assert_array_equal(out["input_ids"][0, :7], [101, 5, 1, 102, 3, 3, 102])
    np.testing.assert_array_equal(encoder.texts(["aa"])["input_ids"][0, :4], [101, 2, 102, 7])


def test_a_real_tokenizer_gives_the_same_as_its_own_padding(tmp_path):
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "same", "word", "##s", "other", "here"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = BertTokenizerFast.from_pretrained(str(tmp_path))
    examples = [{"a": "same words here", "b": "other"}, {"a": "word", "b": "here words same other here words"}]
    out = TextEncoder(tokenizer, fields=("a", "b"), buckets=(8, 12), max_length=10)(examples)
    direct = tokenizer(
        [e["a"] for e in examples],
        [e["b"] for e in examples],
        truncation="longest_first",
        max_length=10,
        padding="max_length",
        return_tensors="np",
    )
    for name in out:
        assert out[name].shape == (2, 12)
        np.testing.assert_array_equal(out[name][:, :10], direct[name])
        np.testing.assert_array_equal(out[name][:, 10:], 0)


def test_settings_that_cannot_work_are_errors():
    for buckets in ((), (8, 8), (16, 8), (0, 4)):
        with pytest.raises(ValueError, match="increasing"):
            TextEncoder(FakeTokenizer(), buckets=buckets)
    with pytest.raises(ValueError, match="max_length=65 must be from 1 to the last bucket, 64"):
        TextEncoder(FakeTokenizer(), buckets=(64,), max_length=65)
    with pytest.raises(ValueError, match="tuple of field names"):
        TextEncoder(FakeTokenizer(), fields="text")
    encoder = TextEncoder(FakeTokenizer())
    with pytest.raises(ValueError, match="example 1: field 'text' is bytes"):
        encoder([{"text": "a"}, {"text": b"a"}])
    with pytest.raises(ValueError, match="no text to encode"):
        encoder([])
