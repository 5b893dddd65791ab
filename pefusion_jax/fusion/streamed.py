"""Fusion of tensors too large to hold: chunk by chunk, with the thresholds of TIES found in passes over the chunks.

A chunk is a flat piece of the same tensor in every model; chunks come in a few sizes, so that a few programs are compiled.
Arithmetic is in float32. What is computed is what ``fuse`` computes of the tensor by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax.fusion.parts import Fusion

CHUNK = 2**20
_SMALLEST = 2**10
_SAMPLE_BLOCKS, _SAMPLE_BLOCK = 64, 4096
_ALL = np.uint32(0xFFFFFFFF)

# (first entry, number of entries) -> that piece of the tensor in each model, the base first where there is one; padded with
# zeros to chunk_size(number). The arrays may be overwritten by the next call.
Read = Callable[[int, int], tuple[np.ndarray, ...]]


class Ties(NamedTuple):
    """TIES of one tensor, trimmed by itself.

    Attributes:
      densities: of each task.
      weights: of each task.
      scale: of the result.
      by_count: elect signs by the number of tasks, not by the sum.
      mean: divide by what agrees: by the number of tasks, or with ``weighted`` by the sum of their weights.
      weighted: mergekit's: entries are weighted before the election, and undecided coordinates take plus. Else the paper's:
        they take the sign that most coordinates elected.
    """

    densities: tuple[float, ...]
    weights: tuple[float, ...]
    scale: float = 1.0
    by_count: bool = False
    mean: bool = True
    weighted: bool = False


class Job(NamedTuple):
    """What to do with one tensor; one of the last four says how.

    Attributes:
      based: the base comes first, and the method is for differences from it.
      coefficients: of a linear combination.
      ties: TIES.
      elementwise: a method that treats each coordinate by itself.
      whole: a method that has to see the tensor as a whole.
    """

    based: bool
    coefficients: tuple[float, ...] | None = None
    ties: Ties | None = None
    elementwise: Fusion | None = None
    whole: Fusion | None = None


class Kept(NamedTuple):
    """Which entries of each task stay: those above ``threshold``, and of those equal to it the ones before ``first[t]``."""

    threshold: np.ndarray
    first: tuple[int, ...]


def chunk_size(count: int) -> int:
    """The size to which a piece of a tensor is padded."""
    size = _SMALLEST
    while size < count:
        size *= 2
    return size


def chunks(size: int) -> Iterator[tuple[int, int]]:
    """``(first entry, number of entries)`` of the chunks of a tensor."""
    for start in range(0, size, CHUNK):
        yield start, min(CHUNK, size - start)


@functools.partial(jax.jit, static_argnames=("based", "dtype"))
def linear(pieces: tuple[jax.Array, ...], coefficients: jax.Array, *, based: bool, dtype: Any) -> tuple[jax.Array, jax.Array]:
    r"""``sum_t c_t x_t``, or with ``based`` ``x_0 + sum_t c_t (x_t - x_0)``; and whether all of it is finite.

    Raises:
      ValueError: if there are not as many coefficients as ``x_t``.
    """
    base, vectors = _vectors(pieces, based)
    # An index out of an array is not an error under jit: the last coefficient would stand for those that are missing.
    if coefficients.shape != (len(vectors),):
        raise ValueError(f"{len(vectors)} tensors are combined, but the coefficients have shape {list(coefficients.shape)}")
    total = vectors[0] * coefficients[0]
    for t, vector in enumerate(vectors[1:], 1):
        total = total + vector * coefficients[t]
    return _finish(total, base, dtype)


@functools.partial(jax.jit, static_argnames=("method", "based", "dtype"))
def elementwise(pieces: tuple[jax.Array, ...], *, method: Fusion, based: bool, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Any method that treats each coordinate by itself; and whether all of it is finite, inputs included."""
    base, vectors = _vectors(pieces, based)
    out, finite = _finish(method.apply({"": jnp.stack(vectors)})[""], base, dtype)
    return out, finite & _all_finite(vectors)


@functools.partial(jax.jit, static_argnames=("settings", "dtype"))
def _ties(
    pieces: tuple[jax.Array, ...],
    threshold: jax.Array,
    first: jax.Array,
    weights: jax.Array,
    scale: jax.Array,
    minus: jax.Array,
    *,
    settings: Ties,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    base, vectors = _vectors(pieces, True)
    kept = _trimmed(vectors, threshold, first)
    count = len(kept)
    if settings.weighted:
        kept = [vector * weights[t] for t, vector in enumerate(kept)]
        plus = _vote(kept, settings) >= 0
        agree = [jnp.where(plus, vector > 0, vector < 0) for vector in kept]
        shares = [weights[t] for t in range(count)]
    else:
        vote = jnp.sign(_vote(kept, settings))
        sign = jnp.where(vote == 0, jnp.where(minus, -1.0, 1.0).astype(jnp.float32), vote)
        agree = [(jnp.sign(vector) == sign) & (vector != 0) for vector in kept]
        shares = [jnp.ones((), jnp.float32)] * count
    zero = jnp.zeros((), jnp.float32)
    total = _sum([jnp.where(a, vector, zero) for a, vector in zip(agree, kept, strict=True)])
    if settings.mean:
        divisor = _sum([jnp.where(a, share, zero) for a, share in zip(agree, shares, strict=True)])
        total = total / jnp.where(divisor == 0, jnp.ones((), jnp.float32), divisor)
    out, finite = _finish(total * scale, base, dtype)
    return out, finite & _all_finite(vectors)


@functools.partial(jax.jit, static_argnames=("settings",))
def _balance(pieces: tuple[jax.Array, ...], threshold: jax.Array, first: jax.Array, *, settings: Ties) -> jax.Array:
    """Coordinates that elected plus less those that elected minus."""
    kept = _trimmed(_vectors(pieces, True)[1], threshold, first)
    return jnp.sum(jnp.sign(_vote(kept, settings)).astype(jnp.int32))


def ties(
    settings: Ties, read: Read, size: int
) -> Callable[[int, int, tuple[np.ndarray, ...], Any], tuple[jax.Array, jax.Array]]:
    """Finds the thresholds of a tensor, in passes over it.

    Args:
      settings: what to do.
      read: the tensor, the base first.
      size: number of entries.

    Returns:
      ``(first entry, number of entries, pieces, dtype) -> (fused piece, whether all of it is finite)``.
    """
    kept = largest(read, size, settings.densities)
    weights = np.asarray(settings.weights, np.float32)
    scale = np.float32(settings.scale)
    # Numbers are arguments of the program, so that a gradient of them over the layers does not compile it again.
    plain = settings._replace(densities=(), weights=(), scale=0.0)

    def limits(start: int, count: int) -> np.ndarray:
        return np.asarray([min(max(first - start, 0), count) for first in kept.first], np.int32)

    minus = False
    if not settings.weighted:
        votes = (
            _balance(read(start, count), kept.threshold, limits(start, count), settings=plain) for start, count in chunks(size)
        )
        minus = sum(int(vote) for vote in votes) < 0

    def fused(start: int, count: int, pieces: tuple[np.ndarray, ...], dtype: Any) -> tuple[jax.Array, jax.Array]:
        return _ties(pieces, kept.threshold, limits(start, count), weights, scale, np.bool_(minus), settings=plain, dtype=dtype)

    return fused


def largest(read: Read, size: int, densities: tuple[float, ...]) -> Kept:
    """Finds each task's ``max(1, floor(density * size))`` entries of largest magnitude; of equal ones the first.

    A sample gives brackets of the thresholds. One pass counts what lies above them and collects what lies inside. Where a
    bracket has missed, the pass is repeated with a wider one.

    Args:
      read: the tensor, the base first; magnitudes are of the differences from it.
      size: number of entries.
      densities: fraction kept of each task; 1 or more keeps all, 0 or less none.
    """
    wanted = [0 if density <= 0 else size if density >= 1 else max(1, int(density * size)) for density in densities]
    threshold = np.asarray([0 if count else _ALL for count in wanted], np.uint32)
    first = [size] * len(wanted)
    open_tasks = [t for t, count in enumerate(wanted) if 0 < count < size]
    if not open_tasks:
        return Kept(threshold, tuple(first))
    sample = _sample(read, size)
    low, high = np.zeros(len(wanted), np.uint32), np.full(len(wanted), _ALL)
    for t in open_tasks:
        place = len(sample[t]) - min(max(1, round(wanted[t] * len(sample[t]) / size)), len(sample[t]))
        margin = max(8, len(sample[t]) // 100) if len(sample[t]) < size else 0
        low[t], high[t] = sample[t][max(0, place - margin)], sample[t][min(len(sample[t]) - 1, place + margin)]
    while open_tasks:
        found = _census(read, size, low, high)
        for t in list(open_tasks):
            rank = wanted[t] - found.above[t]
            if rank <= 0:
                low[t], high[t] = high[t], _ALL
                continue
            inside = np.concatenate(found.inside[t]) if found.inside[t] else np.zeros(0, np.uint32)
            at_high, at_low = sum(found.at_high[t]), sum(found.at_low[t])
            if rank > at_high + inside.size + at_low:
                low[t], high[t] = 0, low[t]
                continue
            if rank <= at_high:
                threshold[t], equal = high[t], found.at_high[t]
            elif rank <= at_high + inside.size:
                rank -= at_high
                threshold[t] = np.partition(inside, inside.size - rank)[inside.size - rank]
                rank -= int(np.count_nonzero(inside > threshold[t]))
                equal = [int(np.count_nonzero(values == threshold[t])) for values in found.inside[t]]
            else:
                rank -= at_high + inside.size
                threshold[t], equal = low[t], found.at_low[t]
            first[t] = _first(read, size, t, threshold[t], equal, rank)
            open_tasks.remove(t)
    return Kept(threshold, tuple(first))


class _Census(NamedTuple):
    above: list[int]
    at_high: list[list[int]]  # task -> chunk -> count
    at_low: list[list[int]]
    inside: list[list[np.ndarray]]


def _census(read: Read, size: int, low: np.ndarray, high: np.ndarray) -> _Census:
    """Counts what is above, at and inside of brackets of magnitudes; collects what is strictly inside."""
    tasks = len(low)
    found = _Census([0] * tasks, [[] for _ in range(tasks)], [[] for _ in range(tasks)], [[] for _ in range(tasks)])
    for start, count in chunks(size):
        patterns, inside, above, at_high, at_low = jax.device_get(_compare(read(start, count), low, high, np.int32(count)))
        for t in range(tasks):
            found.above[t] += int(above[t])
            found.at_high[t].append(int(at_high[t]))
            found.at_low[t].append(int(at_low[t]))
            found.inside[t].append(patterns[t][inside[t]])
    return found


@jax.jit
def _compare(pieces: tuple[jax.Array, ...], low: jax.Array, high: jax.Array, count: jax.Array) -> Any:
    patterns = [_pattern(vector) for vector in _vectors(pieces, True)[1]]
    real = jnp.arange(patterns[0].size, dtype=jnp.int32) < count  # not the padding
    inside = [(p > low[t]) & (p < high[t]) & real for t, p in enumerate(patterns)]

    def number(where: Callable[[int, jax.Array], jax.Array]) -> list[jax.Array]:
        return [jnp.sum(where(t, p) & real, dtype=jnp.int32) for t, p in enumerate(patterns)]

    at_low = number(lambda t, p: (p == low[t]) & (low[t] != high[t]))
    return patterns, inside, number(lambda t, p: p > high[t]), number(lambda t, p: p == high[t]), at_low


def _first(read: Read, size: int, task: int, threshold: np.uint32, equal: list[int], room: int) -> int:
    """The entry before which ``room`` entries equal the threshold; ``equal`` counts them by chunk."""
    for (start, count), here in zip(chunks(size), equal, strict=True):
        if room == 0:
            return start
        if room < here:
            patterns = np.asarray(_patterns(read(start, count))[task])[:count]
            return start + int(np.flatnonzero(patterns == threshold)[room])
        room -= here
    return size


def _sample(read: Read, size: int) -> list[np.ndarray]:
    """Sorted magnitudes of blocks spread evenly over the tensor, or of all of it if it is small."""
    if size <= _SAMPLE_BLOCKS * _SAMPLE_BLOCK:
        return [np.sort(np.asarray(p)[:size]) for p in _patterns(read(0, size))]
    starts = np.linspace(0, size - _SAMPLE_BLOCK, _SAMPLE_BLOCKS).astype(np.int64)
    blocks = [[np.array(p) for p in _patterns(read(int(start), _SAMPLE_BLOCK))] for start in starts]
    return [np.sort(np.concatenate(of_task)) for of_task in zip(*blocks, strict=True)]


@jax.jit
def _patterns(pieces: tuple[jax.Array, ...]) -> list[jax.Array]:
    return [_pattern(vector) for vector in _vectors(pieces, True)[1]]


def _pattern(vector: jax.Array) -> jax.Array:
    """The bit patterns of magnitudes order as the magnitudes do."""
    return jax.lax.bitcast_convert_type(jnp.abs(vector), jnp.uint32)


def _vectors(pieces: tuple[jax.Array, ...], based: bool) -> tuple[jax.Array | None, list[jax.Array]]:
    wide = [piece.astype(jnp.float32) for piece in pieces]
    return (wide[0], [piece - wide[0] for piece in wide[1:]]) if based else (None, wide)


def _trimmed(vectors: list[jax.Array], threshold: jax.Array, first: jax.Array) -> list[jax.Array]:
    place = jnp.arange(vectors[0].size, dtype=jnp.int32)
    out = []
    for t, vector in enumerate(vectors):
        pattern = _pattern(vector)
        stays = (pattern > threshold[t]) | ((pattern == threshold[t]) & (place < first[t]))
        out.append(jnp.where(stays, vector, jnp.zeros((), vector.dtype)))
    return out


def _vote(kept: list[jax.Array], settings: Ties) -> jax.Array:
    return _sum([jnp.sign(vector) for vector in kept] if settings.by_count else kept)


def _sum(values: list[jax.Array]) -> jax.Array:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def _all_finite(vectors: list[jax.Array]) -> jax.Array:
    """An election passes over a NaN, which agrees with no sign: it has to be looked for where it comes in."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(vector)) for vector in vectors]))


def _finish(total: jax.Array, base: jax.Array | None, dtype: Any) -> tuple[jax.Array, jax.Array]:
    out = (total if base is None else base + total).astype(dtype)
    return out, jnp.all(jnp.isfinite(out))
