"""Text to ``input_ids``, ``attention_mask`` and ``token_type_ids`` with a Hugging Face tokenizer, in a few fixed lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """Tokenizes one text or a pair per example and pads each batch to the smallest bucket that holds its longest row.

    Each bucket is one compiled shape: ``buckets=(32,)`` gives one for everything. Longer texts are cut; of a pair, the
    longer side loses tokens first. Padding stands on the right, whatever the tokenizer prefers.

    Attributes:
      tokenizer: a Hugging Face tokenizer, or anything with its call and ``pad_token_id``.
      fields: name of the text's field; two names for a pair. With three or more, all but the last are joined with ``": "``
        to the first side: ``("word", "sentence1", "sentence2")`` gives ``word: sentence1`` and ``sentence2``.
      buckets: allowed lengths, increasing.
      max_length: longest length used, special tokens included; the last bucket by default.

    Raises:
      ValueError: if buckets are not increasing, ``max_length`` is not within them, or there is no field.
    """

    tokenizer: Any
    fields: tuple[str, ...] = ("text",)
    buckets: tuple[int, ...] = (16, 32, 64, 128)
    max_length: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.fields, str) or not self.fields:
            raise ValueError(f"fields={self.fields!r} must be a tuple of field names such as ('text',)")
        buckets = tuple(self.buckets)
        if not buckets or buckets[0] < 1 or any(a >= b for a, b in zip(buckets, buckets[1:], strict=False)):
            raise ValueError(f"buckets={self.buckets!r} must be increasing lengths such as (16, 32, 64)")
        longest = buckets[-1] if self.max_length is None else self.max_length
        if not 1 <= longest <= buckets[-1]:
            raise ValueError(f"max_length={longest} must be from 1 to the last bucket, {buckets[-1]}: add a longer bucket")
        # No row is longer than max_length, so the first bucket that holds it is the last one needed.
        needed = tuple(b for b in buckets if b < longest) + (next(b for b in buckets if b >= longest),)
        object.__setattr__(self, "fields", tuple(self.fields))
        object.__setattr__(self, "buckets", needed)
        object.__setattr__(self, "max_length", longest)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """Encodes a batch: int32 arrays ``[batch, bucket]``."""
        return self.trim(self.padded(examples))

    def problem(self, example: Mapping[str, Any]) -> str | None:
        """What is wrong with an example, or ``None``."""
        for name in self.fields:
            if name not in example:
                return f"no field {name!r}, there are {sorted(example)}; name the text's fields in TextEncoder(fields=...)"
            if not isinstance(example[name], str):
                return f"field {name!r} is {type(example[name]).__name__}, not text: {example[name]!r:.60}"
        return None

    def padded(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """Encodes examples at the width of the smallest bucket that holds all of them, or of the last one."""
        for row, example in enumerate(examples):
            if (message := self.problem(example)) is not None:
                raise ValueError(f"example {row}: {message}")
        if len(self.fields) == 1:
            return self._encode([example[self.fields[0]] for example in examples], None)
        *first, second = self.fields
        return self._encode(
            [": ".join(example[name] for name in first) for example in examples], [example[second] for example in examples]
        )

    def texts(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Encodes plain texts, whatever ``fields`` says: class descriptions, for instance."""
        return self._encode(list(texts), None)

    def trim(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Cuts padding away: the arrays at the smallest bucket that holds the longest row."""
        longest = int(np.max(np.sum(inputs["attention_mask"], axis=1), initial=1))
        width = self._bucket(longest)
        return {name: value[:, :width] for name, value in inputs.items()}

    def _bucket(self, length: int) -> int:
        return next(bucket for bucket in self.buckets if bucket >= length)

    def _encode(self, first: list[str], second: list[str] | None) -> dict[str, np.ndarray]:
        if not first:
            raise ValueError("there is no text to encode: the list of examples is empty")
        coded = self.tokenizer(
            first,
            second,
            truncation="longest_first",
            max_length=self.max_length,
            padding=False,
            add_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=True,
        )
        width = self._bucket(max(1, max(len(row) for row in coded["input_ids"])))
        pad = getattr(self.tokenizer, "pad_token_id", None)
        ids = np.full((len(first), width), 0 if pad is None else pad, np.int32)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for row, tokens in enumerate(coded["input_ids"]):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
            types[row, : len(tokens)] = coded["token_type_ids"][row]
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
