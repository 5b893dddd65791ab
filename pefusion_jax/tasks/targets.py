"""Scoring of text-to-text tasks: features of the target's tokens, ranking of candidates, writing by greedy search."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax.generation import generate_tokens


def target_features(outputs: Any, inputs: Mapping[str, Any]) -> jax.Array:
    r"""Logits relative to those of the target's tokens: :math:`f_{tv} = z_{tv} - z_{t y_t}`, 0 where there is no token.

    Linear in the outputs, and all that a loss needs: :math:`-\log p(y_t) = \log \sum_v e^{f_{tv}}`.

    Args:
      outputs: has ``logits``, ``[batch, seq + 1, vocab]``; the last position predicts nothing.
      inputs: have ``decoder_input_ids`` and ``decoder_attention_mask``, ``[batch, seq + 1]``: the start token and the target.

    Returns:
      ``[batch, seq, vocab]``, float32.

    Raises:
      ValueError: if the model has no language-model head, or the inputs are not those of a text-to-text task.
    """
    if getattr(outputs, "logits", None) is None:
        raise ValueError("a text-to-text task needs a model with a language-model head; load a checkpoint that has one")
    if "decoder_attention_mask" not in inputs:
        raise ValueError(f"the inputs are {', '.join(sorted(inputs))}, without a target; make the task with text_to_text")
    logits = outputs.logits[:, :-1].astype(jnp.float32)
    target = jnp.asarray(inputs["decoder_input_ids"])[:, 1:]
    real = jnp.asarray(inputs["decoder_attention_mask"])[:, 1:] > 0
    picked = jnp.take_along_axis(logits, target[:, :, None], axis=-1)
    return jnp.where(real[:, :, None], logits - picked, jnp.float32(0))


@dataclass(frozen=True, eq=False)
class Targets:
    """Texts as decoder inputs: the start token, the text's tokens and the end token.

    Attributes:
      tokenizer: a Hugging Face tokenizer.
      end: ends every target; also where the tokenizer does not add it.
      start: first token of the decoder.
      longest: number of tokens that is allowed, the end token included.
    """

    tokenizer: Any
    end: int
    start: int
    longest: int
    _known: dict[str, tuple[int, ...]] = field(default_factory=dict, init=False, repr=False)

    def tokens(self, text: Any) -> tuple[int, ...]:
        """The tokens of a text, the end token included.

        Raises:
          ValueError: if it is not a text, has no tokens, or too many.
        """
        if not isinstance(text, str):
            raise ValueError(f"the target is {type(text).__name__}, not text: {text!r:.60}")
        if text not in self._known:
            found = [int(token) for token in self.tokenizer(text, add_special_tokens=True)["input_ids"]]
            self._known[text] = (*found, *(() if found[-1:] == [self.end] else (self.end,)))
        tokens = self._known[text]
        if len(tokens) < 2:
            raise ValueError(f"the target {text!r} has no tokens; give each class a text that can be written")
        if len(tokens) > self.longest:
            raise ValueError(
                f"the target {text!r:.60} has {len(tokens)} tokens with the end token, more than "
                f"max_target_length={self.longest}; raise it, or shorten the text"
            )
        return tokens

    def padded(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """``decoder_input_ids`` and ``decoder_attention_mask``, int32 ``[texts, longest text + 1]``."""
        rows = [(self.start, *self.tokens(text)) for text in texts]
        width = max(map(len, rows))
        pad = getattr(self.tokenizer, "pad_token_id", None)
        ids = np.full((len(rows), width), 0 if pad is None else pad, np.int32)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return {"decoder_input_ids": ids, "decoder_attention_mask": mask}


@dataclass(frozen=True, eq=False)
class Ranking:
    """Predicts the log-likelihood of each class's text, ``[batch, classes]``.

    Attributes:
      candidates: ``decoder_input_ids`` and ``decoder_attention_mask``, ``[classes, seq + 1]``.
      length_normalize: divide by the number of tokens.
      at_once: classes read at a time.
    """

    candidates: dict[str, np.ndarray]
    length_normalize: bool
    at_once: int

    def __call__(self, kind: str, adapted: Any, params: Any, tree: Any, inputs: Mapping[str, Any]) -> jax.Array:
        scores = _ranking(adapted, kind, self.at_once)(params, tree, dict(inputs), self.candidates)
        lengths = jnp.asarray(self.candidates["decoder_attention_mask"][:, 1:].sum(axis=1), jnp.float32)
        return scores / lengths[None, :] if self.length_normalize else scores


@functools.lru_cache(maxsize=64)
def _ranking(adapted: Any, kind: str, at_once: int) -> Callable[..., jax.Array]:
    call = {"adapters": adapted.apply, "delta": adapted.apply_deltas, "base": lambda p, _, **given: adapted.base(p, **given)}[
        kind
    ]

    def run(params: Any, tree: Any, inputs: dict[str, Any], candidates: dict[str, Any]) -> jax.Array:
        rows = inputs["input_ids"].shape[0]

        def one(candidate: dict[str, jax.Array]) -> jax.Array:
            """``[batch]``. Only the decoder depends on what is mapped over, so the encoder runs once for all."""
            given = {**inputs, **{name: jnp.broadcast_to(row[None], (rows, *row.shape)) for name, row in candidate.items()}}
            features = target_features(call(params, tree, **given), given)
            real = (candidate["decoder_attention_mask"][1:] > 0).astype(jnp.float32)
            return -jnp.sum(jax.nn.logsumexp(features, axis=-1) * real[None, :], axis=1)

        return jax.lax.map(one, candidates, batch_size=min(at_once, len(candidates["decoder_input_ids"]))).T

    return jax.jit(run)


@dataclass(frozen=True, eq=False)
class Writing:
    """Predicts what greedy search writes: texts ``[batch]``, or numbers.

    Attributes:
      targets: encoder of the targets.
      otherwise: the number for a text that is none; ``None`` to keep texts.
    """

    targets: Targets
    otherwise: float | None

    def __call__(self, kind: str, adapted: Any, params: Any, tree: Any, inputs: Mapping[str, Any]) -> np.ndarray:
        write = functools.partial(
            generate_tokens,
            max_new_tokens=self.targets.longest,
            eos_token_id=self.targets.end,
            pad_token_id=getattr(self.targets.tokenizer, "pad_token_id", None),
            decoder_start_token_id=self.targets.start,
        )
        read = {name: np.asarray(inputs[name]) for name in ("input_ids", "attention_mask")}
        # A change of the weights is the same for all rows, whatever could have made it.
        origin = adapted.origin if kind == "adapters" else None
        by_row = getattr(getattr(origin, "generator", None), "observe", None) is not None
        if "task" not in inputs and not by_row:
            written = np.asarray(write(adapted, params, read, adapters=None if kind == "base" else tree))
        elif origin is None or origin.mode is not None:
            raise ValueError(
                "a linearized model that was generated for several tasks, or for each input, cannot write texts; write with "
                "materialise() and the model underneath, or score classes"
            )
        elif not by_row:
            adapters = _materialised(adapted)(params, tree, inputs["task"])
            written = np.asarray(write(origin.inner, params, read, adapters=adapters))
        else:  # each row has adapters of its own, and is written by itself: one program for all
            named = {name: value for name, value in inputs.items() if name != "task"}
            made = _materialised(adapted)(params, tree, inputs.get("task"), named)
            rows = [
                (jax.tree.map(lambda x, n=n: x[n], made), {k: v[n : n + 1] for k, v in read.items()})
                for n in range(len(read["input_ids"]))
            ]
            written = np.concatenate([np.asarray(write(origin.inner, params, row, adapters=own)) for own, row in rows])
        texts = [text.strip() for text in self.targets.tokenizer.batch_decode(written, skip_special_tokens=True)]
        if self.otherwise is None:
            return np.asarray(texts, object)
        return np.asarray([_number(text, self.otherwise) for text in texts], np.float32)


@functools.lru_cache(maxsize=16)
def _materialised(adapted: Any) -> Callable[..., Any]:
    return jax.jit(adapted.materialise)


def _number(text: str, otherwise: float) -> float:
    try:
        value = float(text)
    except ValueError:
        return otherwise
    return value if math.isfinite(value) else otherwise
