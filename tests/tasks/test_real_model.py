"""Zero-shot heads on the real MiniLM and real text: far above chance where the descriptions can tell classes apart."""

import jax.numpy as jnp
import numpy as np
import pytest

from pefusion_jax.interop.pretrained import load_pretrained, load_tokenizer
from pefusion_jax.tasks import base_apply, embedded_tasks, features_of

NAME = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def minilm():
    model, params = load_pretrained(NAME)
    return model, params, load_tokenizer(NAME)


# Chance is 0.05, 0.04, 0.07 and 0.5; the whole test splits score 0.83, 0.46, 0.25 and 0.72.
@pytest.mark.parametrize("name, least", [("intents", 0.7), ("supersense", 0.35), ("genre", 0.15), ("spam", 0.58)])
def test_zero_shot_beats_chance(minilm, name, least):
    model, params, tokenizer = minilm
    (task,) = embedded_tasks(model, params, tokenizer, names=(name,), buckets=(32,))
    inputs, labels = task.arrays("test")
    some = {key: value[:128] for key, value in inputs.items()}
    features = features_of(base_apply(model), params, some, task.encode.trim)
    logits = np.asarray(task.head.logits(task.head.params, jnp.asarray(features)))
    assert least < task.metric(logits, labels[:128]) < 0.95
