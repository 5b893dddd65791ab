"""A tokenizer and a base model that tests can compute by hand."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class FakeTokenizer:
    """One token per word, its number the word's length; [CLS]=101, [SEP]=102, padding 7. Truncates like Hugging Face."""

    pad_token_id = 7

    def __init__(self):
        self.calls = 0

    def __call__(self, first, second, *, truncation, max_length, **options):
        assert truncation == "longest_first" and options["padding"] is False
        self.calls += 1
        ids, types = [], []
        for row, text in enumerate(first):
            sides = [[len(w) for w in text.split()]]
            if second is not None:
                sides.append([len(w) for w in second[row].split()])
            while sum(map(len, sides)) + 1 + len(sides) > max_length:
                max(reversed(sides), key=len).pop()
            ids.append([101] + [t for side in sides for t in (*side, 102)])
            types.append([0] * (len(sides[0]) + 2) + ([1] * (len(sides[1]) + 1) if second is not None else []))
        return {"input_ids": ids, "token_type_ids": types}


class Outputs(NamedTuple):
    last_hidden_state: jax.Array


def fake_params(width=6):
    return {"table": jax.random.normal(jax.random.key(3), (128, width))}


def fake_apply(params, *, input_ids, attention_mask, token_type_ids):
    del attention_mask
    hidden = params["table"][input_ids] + token_type_ids[..., None].astype(jnp.float32)
    return Outputs(hidden)


class FakeModel:
    def apply(self, variables, **inputs):
        return fake_apply(variables["params"], **inputs)


def texts(n, classes=3, seed=0):
    """Texts whose word lengths tell their class."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        words = ["x" * int(rng.integers(1, 4) + 4 * (i % classes)) for _ in range(rng.integers(2, 9))]
        rows.append({"text": " ".join(words), "label": i % classes})
    return rows
