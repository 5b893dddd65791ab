"""Text from language models: greedy and beam search, and the likelihood of given continuations.

One pair of functions for decoders (``input_ids`` are continued) and for encoder-decoders (``input_ids`` are read, the
decoder starts from its start token), for plain, adapted and linearized models. Keys and values are cached, except for models
that are affine in a displacement: what such a model would cache is itself linearized, and attention is not linear in it, so
these models read the whole sequence again for every token.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax.adapt import Adapted
from pefusion_jax.deltas import Delta
from pefusion_jax.search import Plan, beam_search, greedy

__all__ = ["generate_tokens", "score_labels"]

IGNORED = -100  # fills up the token ids of shorter labels


def generate_tokens(
    model: Adapted | nn.Module,
    params: Any,
    inputs: Any,
    *,
    adapters: Any = None,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    decoder_start_token_id: int | None = None,
) -> jax.Array:
    r"""Continues each row with its most likely tokens: greedily, or by beam search.

    Greedy: :math:`y_t = \arg\max_v p(v \mid x, y_{<t})`. Beams: the finished sequence with the largest
    :math:`\log p(y \mid x) / |y|^{\alpha}` among those that the search meets, :math:`\alpha` being ``length_penalty``. The
    tokens are those of ``generate(do_sample=False)`` of transformers. One program is compiled for a model, a shape of
    ``inputs`` and a setting of the options; other parameters, adapters and prompts of the same shapes run it again.

    Args:
      model: an adapted model, also a linearized one, or a Linen module, whose outputs have ``logits``.
      params: its base parameters.
      inputs: token ids ``[batch, seq]``, or a mapping with ``input_ids`` and, for padded rows, ``attention_mask``. Decoders
        need the padding on the left; their positions count from the first kept token.
      adapters: adapters, a displacement or a ``Delta`` of an adapted model; None: the model without them.
      max_new_tokens: length of the result.
      eos_token_id: a row that has chosen it, or one of several, is finished; None: none ever is.
      pad_token_id: fills up finished rows; the first ``eos_token_id`` if not given.
      num_beams: sequences kept for each row; 1 is greedy.
      length_penalty: above 0 for longer sequences, below 0 for shorter ones. For beams only.
      early_stopping: when a row with ``num_beams`` finished sequences is done: ``True`` at once, ``False`` when the best
        running one could not overtake them at its present length, ``"never"`` when it could not at any length.
      decoder_start_token_id: first token of the decoder of an encoder-decoder; by default the one of its configuration.

    Returns:
      New tokens ``[batch, max_new_tokens]``, int32.

    Raises:
      ValueError: naming what is wrong with the inputs or options.

    Departs from transformers: a mask is never guessed from the ids, and the result has always the full length.
    """
    _refuse_unmade(model, adapters)
    ids, mask = _inputs(inputs)
    eos = () if eos_token_id is None else (eos_token_id,) if isinstance(eos_token_id, int) else tuple(map(int, eos_token_id))
    for name, value in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, not {value!r}")
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"early_stopping must be True, False or 'never', not {early_stopping!r}")
    start = _start_token(model, params, decoder_start_token_id)
    if start is None:
        _require_left_padding(mask)
    pad = pad_token_id if pad_token_id is not None else eos[0] if eos else 0
    plan = Plan(max_new_tokens, num_beams, eos, int(pad), float(length_penalty), early_stopping, start)
    return _generate(model, plan, params, adapters, ids, mask)


def score_labels(
    model: Adapted | nn.Module,
    params: Any,
    inputs: Any,
    label_ids: Any,
    *,
    adapters: Any = None,
    length_normalize: bool = False,
    labels_at_once: int | None = None,
    decoder_start_token_id: int | None = None,
) -> jax.Array:
    r"""The log-likelihood of each candidate continuation: :math:`\sum_t \log p(y_t \mid x, y_{<t})`.

    The largest one classifies ("rank classification"). The prompt is read once, for all candidates.

    Args:
      model, params, inputs, adapters, decoder_start_token_id: see :func:`generate_tokens`.
      label_ids: token ids of the candidates: a sequence of sequences, or an array ``[labels, length]`` or (each row its own)
        ``[batch, labels, length]`` whose shorter labels are filled up with -100.
      length_normalize: divide by the number of tokens, so that long candidates are not at a disadvantage.
      labels_at_once: how many candidates are read at a time, which bounds the memory; all by default.

    Returns:
      ``[batch, labels]``, float32.

    Raises:
      ValueError: naming what is wrong with the inputs or labels.

    Reference: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", 2022,
    which divides by the length.
    """
    _refuse_unmade(model, adapters)
    ids, mask = _inputs(inputs)
    labels = _labels(label_ids, ids.shape[0])
    start = _start_token(model, params, decoder_start_token_id)
    if start is None:
        _require_left_padding(mask)
    if labels_at_once is not None and labels_at_once < 1:
        raise ValueError(f"labels_at_once must be a positive integer, not {labels_at_once!r}")
    scores = _score(model, start, labels_at_once, params, adapters, ids, mask, labels)
    return scores / jnp.sum(labels >= 0, axis=-1).astype(scores.dtype) if length_normalize else scores


def _refuse_unmade(model: Any, adapters: Any) -> None:
    """What a generator makes for one task, or for each input, has to be made before the first token."""
    if adapters is None or isinstance(adapters, Delta) or not isinstance(model, Adapted):
        return
    origin: Any = model.origin
    by_row = getattr(getattr(origin, "generator", None), "observe", None) is not None
    if by_row and origin.mode is None:
        made = "generators.mean_adapters(model, params, tree, task_data)"
        raise ValueError(
            "the model's generator makes other adapters for each input; write with one set of them and the model given to "
            f"generate(): pass model.origin.inner, with adapters={made}"
        )
    if model.tasks:
        made = f"model.materialise(params, tree, {model.tasks[0]!r}{', inputs' if by_row else ''})"
        raise ValueError(
            "the model's generator makes other adapters for each task; write with those of one task and the model given to "
            f"generate(): pass model.origin.inner, with adapters={made}{', row by row' if by_row else ''}"
        )


class _Reader(NamedTuple):
    """A model that reads ``inputs`` and then tokens, in one of two ways; rows may be repeated in between (beams).

    Attributes:
      first: ``length -> (logits [batch, vocab] of the first new token, state)`` with room for ``length`` new tokens.
      following: ``(state, tokens [rows, seq], step) -> (logits [rows, seq, vocab] after each, state)``; ``tokens`` are the new
        tokens from number ``step`` on. None where a cache is not exact.
      whole: ``new tokens [rows, length] -> logits [rows, length, vocab]`` that predict each of them.
    """

    first: Callable[[int], tuple[jax.Array, Any]]
    following: Callable[..., tuple[jax.Array, Any]] | None
    whole: Callable[[jax.Array], jax.Array]


def _reader(model: Any, params: Any, adapters: Any, ids: jax.Array, mask: jax.Array, start: int | None) -> _Reader:
    if isinstance(model, nn.Module):
        if adapters is not None:
            raise ValueError("a Linen module has no adapters: pass adapt(model, methods), or fold them into the parameters")
        run: Callable[..., Any] = functools.partial(model.apply, params if _is_collections(params) else {"params": params})
    elif adapters is None:
        run = functools.partial(model.base, params)
    else:
        run = functools.partial(model.apply_deltas if isinstance(adapters, Delta) else model.apply, params, adapters)
    exact = isinstance(model, nn.Module) or adapters is None or model.pushforward is None
    module = _module(model, params)
    batch, seq = ids.shape

    def rows(array: jax.Array, like: jax.Array) -> jax.Array:
        return jnp.repeat(array, like.shape[0] // batch, axis=0)

    def logits(out: Any) -> jax.Array:
        if getattr(out, "logits", None) is None or out.logits.ndim != 3:
            raise ValueError(f"{type(module).__name__} has no language-model head: load a checkpoint that has one")
        return out.logits.astype(jnp.float32)

    if start is None:
        kept = jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.int32)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)

        def longer(mask: jax.Array, length: int) -> jax.Array:
            return jnp.pad(mask, ((0, 0), (0, length)), constant_values=1)

        def first(length: int) -> tuple[jax.Array, Any]:
            cache = module.init_cache(batch, seq + length) if exact else None
            attended = longer(mask, length) if exact else mask
            out = run(input_ids=ids, attention_mask=attended, position_ids=positions, **({"cache": cache} if exact else {}))
            return logits(out)[:, -1], getattr(out, "cache", None)

        def following(cache: Any, tokens: jax.Array, step: Any) -> tuple[jax.Array, Any]:
            at = rows(kept, tokens) + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :] + step
            attended = longer(rows(mask, tokens), cache["key"].shape[-2] - seq)
            out = run(input_ids=tokens, attention_mask=attended, position_ids=at, cache=cache)
            return logits(out), out.cache

        def whole(tokens: jax.Array) -> jax.Array:
            length = tokens.shape[1] - 1
            new = rows(kept, tokens) + jnp.arange(length, dtype=jnp.int32)[None, :]
            out = run(
                input_ids=jnp.concatenate([rows(ids, tokens), tokens[:, :-1]], axis=1),
                attention_mask=longer(rows(mask, tokens), length),
                position_ids=jnp.concatenate([rows(positions, tokens), new], axis=1),
            )
            return logits(out)[:, seq - 1 :]

    else:
        begin = jnp.full((batch, 1), start, jnp.int32)

        def first(length: int) -> tuple[jax.Array, Any]:
            given = {"cache": module.init_cache(batch, length, seq)} if exact else {}
            out = run(input_ids=ids, attention_mask=mask, decoder_input_ids=begin, **given)
            return logits(out)[:, -1], getattr(out, "cache", None)

        def following(cache: Any, tokens: jax.Array, step: Any) -> tuple[jax.Array, Any]:
            # What the encoder said is in the cache.
            out = run(input_ids=None, attention_mask=rows(mask, tokens), decoder_input_ids=tokens, cache=cache)
            return logits(out), out.cache

        def whole(tokens: jax.Array) -> jax.Array:
            target = jnp.concatenate([rows(begin, tokens), tokens[:, :-1]], axis=1)
            out = run(input_ids=rows(ids, tokens), attention_mask=rows(mask, tokens), decoder_input_ids=target)
            return logits(out)

    return _Reader(first, following if exact else None, whole)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(model: Any, plan: Plan, params: Any, adapters: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
    reader = _reader(model, params, adapters, ids, mask, plan.start)

    def following(state: Any, tokens: jax.Array, step: jax.Array, written: jax.Array) -> tuple[jax.Array, Any]:
        """Logits of token number ``step``; ``tokens`` are those before it, ``written`` all so far."""
        if reader.following is not None:
            logits, state = reader.following(state, tokens[:, None], step - 1)
            return logits[:, 0], state
        return jax.lax.dynamic_index_in_dim(reader.whole(written), step, axis=1, keepdims=False), state

    search = greedy if plan.beams == 1 else beam_search
    return search(plan, *reader.first(plan.new), following)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _score(
    model: Any,
    start: int | None,
    at_once: int | None,
    params: Any,
    adapters: Any,
    ids: jax.Array,
    mask: jax.Array,
    labels: jax.Array,
) -> jax.Array:
    reader = _reader(model, params, adapters, ids, mask, start)
    following = reader.following
    if following is None:
        predict = reader.whole
    else:
        first, state = reader.first(labels.shape[-1])

        def predict(tokens: jax.Array) -> jax.Array:
            if tokens.shape[1] == 1:
                return first[:, None]
            return jnp.concatenate([first[:, None], following(state, tokens[:, :-1], 0)[0]], axis=1)

    def one(label: jax.Array) -> jax.Array:
        """Scores of one candidate for each row, ``[batch, length] -> [batch]``."""
        tokens, real = jnp.maximum(label, 0), label >= 0
        logits = predict(tokens)
        each = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), tokens[:, :, None], axis=2)[:, :, 0]
        return jnp.sum(jnp.where(real, each, 0.0), axis=1)

    return jax.lax.map(one, labels.swapaxes(0, 1), batch_size=at_once or labels.shape[1]).T


def _inputs(inputs: Any) -> tuple[jax.Array, jax.Array]:
    """Token ids and mask, ``[batch, seq]`` int32 each."""
    given = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
    if "input_ids" not in given or set(given) - {"input_ids", "attention_mask"}:
        raise ValueError(f"inputs must have input_ids and may have attention_mask, not {sorted(given)}: leave out the others")
    ids = jnp.asarray(given["input_ids"])
    if ids.ndim != 2 or 0 in ids.shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"input_ids must be integers [batch, seq], not {ids.dtype} of shape {ids.shape}")
    mask = given.get("attention_mask")
    mask = jnp.ones(ids.shape, jnp.int32) if mask is None else jnp.asarray(mask).astype(bool).astype(jnp.int32)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask has shape {mask.shape}, input_ids has {ids.shape}")
    return ids.astype(jnp.int32), mask


def _labels(label_ids: Any, batch: int) -> jax.Array:
    """Labels as ``[batch, labels, length]`` int32."""
    if not hasattr(label_ids, "ndim"):
        rows = [list(row) for row in label_ids]
        if not rows or not all(rows):
            raise ValueError("each label needs at least one token: label_ids has none, or an empty one")
        length = max(map(len, rows))
        label_ids = np.asarray([[*row, *[IGNORED] * (length - len(row))] for row in rows])
    if label_ids.ndim not in (2, 3) or 0 in label_ids.shape or (label_ids.ndim == 3 and label_ids.shape[0] != batch):
        raise ValueError(
            f"label_ids must be [labels, length] or [batch, labels, length] with a batch of {batch}, not of shape "
            f"{tuple(label_ids.shape)}"
        )
    if not isinstance(label_ids, jax.core.Tracer):
        real = np.asarray(label_ids) >= 0
        if not real[..., 0].all() or (real[..., 1:] & ~real[..., :-1]).any():
            raise ValueError("each label needs at least one token, and -100 only after its last one")
    labels = jnp.asarray(label_ids).astype(jnp.int32)
    return jnp.broadcast_to(labels if labels.ndim == 3 else labels[None], (batch, *labels.shape[-2:]))


def _require_left_padding(mask: jax.Array) -> None:
    if isinstance(mask, jax.core.Tracer) or bool(jnp.all(mask[:, -1])):
        return
    row = int(jnp.argmin(mask[:, -1]))
    raise ValueError(
        f"row {row} of attention_mask ends with 0: a decoder continues after the last position, so rows must be padded on the "
        "left; set tokenizer.padding_side = 'left'"
    )


def _is_collections(params: Any) -> bool:
    return isinstance(params, Mapping) and isinstance(params.get("params"), Mapping)


def _unbound(module: nn.Module) -> nn.Module:
    return module.clone(parent=None)


def _module(model: Any, params: Any) -> nn.Module:
    """The Linen module of an adapted model, which Linen hands to whatever is called as one of its methods."""
    return model if isinstance(model, nn.Module) else model.base(params, method=_unbound)


def _start_token(model: Any, params: Any, given: int | None) -> int | None:
    """The first token of the decoder of an encoder-decoder; None for a decoder.

    Raises:
      ValueError: if the model cannot generate, or if the token is missing or superfluous.
    """
    if not isinstance(model, (Adapted, nn.Module)):
        raise ValueError(f"model must be an Adapted or a Linen module, not {type(model).__name__}")
    module = _module(model, params)
    name = type(module).__name__
    if not hasattr(module, "init_cache"):
        raise ValueError(f"{name} cannot generate: it has no cache (init_cache), as decoders and encoder-decoders have")
    if "decoder_input_ids" not in inspect.signature(type(module).__call__).parameters:
        if given is not None:
            raise ValueError(f"decoder_start_token_id={given} is for encoder-decoders, {name} is a decoder: leave it out")
        return None
    start = given if given is not None else getattr(getattr(module, "config", None), "decoder_start_token_id", None)
    if start is None:
        raise ValueError(f"{name} is an encoder-decoder: give decoder_start_token_id, which is 0 for T5")
    return int(start)
