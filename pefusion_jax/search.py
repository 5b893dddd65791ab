"""Greedy and beam search over the logits of a model, as loops of one compiled program."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Following", "Plan", "beam_search", "greedy"]

_LOW = np.float32(-1e9)

# (state, last tokens [rows], how many tokens there are, all tokens [rows, new]) -> (logits [rows, vocab] of the next, state).
# The leaves of a state have the rows on their second axis; scalars belong to all rows.
Following = Callable[[Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Plan(NamedTuple):
    """What a search depends on, besides the model and the shapes.

    ``start`` is the first token of a decoder that has an encoder; None for others.
    """

    new: int
    beams: int
    eos: tuple[int, ...]
    pad: int
    length_penalty: float
    early_stopping: bool | str
    start: int | None


def _is_end(plan: Plan, tokens: jax.Array) -> jax.Array:
    return functools.reduce(jnp.logical_or, (tokens == token for token in plan.eos), jnp.zeros(tokens.shape, bool))


def greedy(plan: Plan, logits: jax.Array, state: Any, following: Following) -> jax.Array:
    """The most likely token at each step, ``[batch, plan.new]``, from the logits ``[batch, vocab]`` of the first one on."""

    def choose(logits: jax.Array, step: Any, written: jax.Array, done: jax.Array) -> Any:
        tokens = jnp.where(done, plan.pad, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        written = jax.lax.dynamic_update_slice_in_dim(written, tokens[:, None], step, axis=1)
        return step + 1, tokens, written, done | _is_end(plan, tokens)

    def body(carry: Any) -> Any:
        step, tokens, written, done, state = carry
        logits, state = following(state, tokens, step, written)
        return *choose(logits, step, written, done), state

    batch = logits.shape[0]
    empty = jnp.full((batch, plan.new), plan.pad, jnp.int32)
    begin = *choose(logits, jnp.int32(0), empty, jnp.zeros(batch, bool)), state
    return jax.lax.while_loop(lambda carry: (carry[0] < plan.new) & ~jnp.all(carry[3]), body, begin)[2]


class _Beams(NamedTuple):
    """The state of a beam search: running sequences, the best finished ones, and who is done."""

    step: jax.Array  # tokens that the running sequences have
    running: jax.Array  # [batch, beams, new]
    running_scores: jax.Array  # [batch, beams], best first
    finished: jax.Array  # [batch, beams, new]
    scores: jax.Array  # [batch, beams], best first, length penalty included
    is_finished: jax.Array  # [batch, beams]: whether the place in ``finished`` is taken
    improvable: jax.Array  # [batch, 1]: whether a running sequence may still overtake; once not, never again
    ended: jax.Array  # [batch, candidates]: which of the last step's candidates are over
    state: Any


def beam_search(plan: Plan, logits: jax.Array, state: Any, following: Following) -> jax.Array:
    """Beam search as transformers does it, step by step, so that ties of rounding fall the same way."""
    beams, new, vocab = plan.beams, plan.new, logits.shape[-1]
    # Candidates of a step: so many that, if all the best ones end, enough others go on.
    candidates = max(2, 1 + len(plan.eos)) * beams
    if candidates > beams * vocab:
        raise ValueError(f"num_beams={beams} is too many for a vocabulary of {vocab} tokens")
    lengths = jnp.asarray([1.0, *(float(n) ** plan.length_penalty for n in range(1, new + 1))], jnp.float32)
    early = plan.early_stopping is True

    def gather(array: jax.Array, at: jax.Array) -> jax.Array:
        return jnp.take_along_axis(array, at.reshape(*at.shape, *(1,) * (array.ndim - 2)), axis=1)

    def low(where: jax.Array) -> jax.Array:
        return where.astype(jnp.float32) * _LOW

    def advance(logits: jax.Array, at: _Beams) -> _Beams:
        """One step, from the logits ``[batch, beams, vocab]`` of the running sequences."""
        batch = logits.shape[0]
        total = (jax.nn.log_softmax(logits, axis=-1) + at.running_scores[:, :, None]).reshape(batch, beams * vocab)
        best, index = jax.lax.top_k(total, candidates)
        tokens = (index % vocab).astype(jnp.int32)
        found = gather(at.running, index // vocab)
        found = jax.lax.dynamic_update_slice_in_dim(found, tokens[:, :, None], at.step, axis=2)
        step = at.step + 1
        ended = _is_end(plan, tokens) | (step >= new)
        # Those that go on.
        running_scores, go_on = jax.lax.top_k(best + low(ended), beams)
        # Those that are over, against those that were before. Only the best ``beams`` candidates count.
        over = ended & (jnp.arange(candidates) < beams)[None, :]
        full = jnp.all(at.is_finished, axis=1, keepdims=True) & early
        value = best / lengths[step] + low(full) + low(~at.improvable) + low(~over)
        scores, stay = jax.lax.top_k(jnp.concatenate([at.scores, value], axis=1), beams)
        finished = gather(jnp.concatenate([at.finished, found], axis=1), stay)
        is_finished = gather(jnp.concatenate([at.is_finished, over], axis=1), stay)
        hypothetical = lengths[new] if plan.early_stopping == "never" and plan.length_penalty > 0 else lengths[step]
        worst = jnp.where(is_finished, jnp.min(scores, axis=1, keepdims=True), _LOW)
        improvable = at.improvable & jnp.any(running_scores[:, :1] / hypothetical > worst, axis=1, keepdims=True)
        parent = gather(index // vocab, go_on) + jnp.arange(batch, dtype=index.dtype)[:, None] * beams
        state = jax.tree.map(lambda leaf: leaf[:, parent.reshape(-1)] if leaf.ndim > 1 else leaf, at.state)
        running = gather(found, go_on)
        return _Beams(step, running, running_scores, finished, scores, is_finished, improvable, ended, state)

    def goes_on(at: _Beams) -> jax.Array:
        return jnp.any(at.improvable) & ~(jnp.all(at.is_finished) & early) & ~jnp.all(at.ended)

    def body(at: _Beams) -> _Beams:
        written = at.running.reshape(-1, new)
        last = jax.lax.dynamic_index_in_dim(written, at.step - 1, axis=1, keepdims=False)
        logits, state = following(at.state, last, at.step, written)
        return advance(logits.reshape(-1, beams, vocab), at._replace(state=state))

    batch = logits.shape[0]
    empty = jnp.full((batch, beams, new), plan.pad, jnp.int32)
    unused = jnp.full((batch, beams), _LOW)
    begin = _Beams(
        step=jnp.int32(0),
        running=empty,
        running_scores=unused.at[:, 0].set(0.0),  # the beams are all alike in the beginning: only the first one counts
        finished=empty,
        scores=unused,
        is_finished=jnp.zeros((batch, beams), bool),
        improvable=jnp.ones((batch, 1), bool),
        ended=jnp.zeros((batch, candidates), bool),
        state=jax.tree.map(lambda leaf: jnp.repeat(leaf, beams, axis=1) if leaf.ndim > 1 else leaf, state),
    )
    begin = advance(jnp.repeat(logits[:, None], beams, axis=1), begin)
    return jax.lax.while_loop(goes_on, body, begin).finished[:, 0]
