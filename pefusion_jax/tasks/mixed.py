"""Batches of several tasks: blocks of rows, each of one task, by a schedule that can be asked about any step.

    step 0                 step 1                 ...      a window: every task has its share, to within one block
    [ task 2 | task 0 ]    [ task 0 | task 1 ]             in a random order

The schedule holds shares instead of drawing tasks one by one: small tasks come as regularly as large ones, and a few additions
tell how many blocks a task has had before a step. So a batch is a pure function of its step, and each task walks through its
own examples epoch by epoch, wherever a run is resumed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from pefusion_jax.tasks.task import Batch, Task, stream

_BITS = 32
_ONE = 1 << _BITS
# Second words of Philox keys; epochs, which task.py uses, are far below.
_WINDOWS, _SHIFT = 2**63, 2**64 - 1


def mixed_batch(
    tasks: Iterable[Task] | Mapping[str, Task],
    step: int,
    batch_size: int,
    seed: int,
    *,
    groups: int,
    temperature: float = 1.0,
    sizes: Sequence[float] | None = None,
    parts: int = 1,
) -> Batch:
    r"""The training batch of a step over several tasks: a pure function of its arguments.

    It has ``groups`` blocks of ``batch_size / groups`` consecutive rows, each of one task, and one more input, ``task``: int32
    ``[groups]``, the place of each block's task among ``tasks``. The share of a task in the blocks is

    .. math:: p_t \propto n_t^{1/T}

    with its number of examples :math:`n_t` and the temperature :math:`T`: 1 is proportional to size, infinity the same for all.
    Blocks are not drawn one by one: every window of batches, of twice as many blocks as there are tasks or a few more, holds
    each task's share to within one block, in a random order. Rare tasks come in turn, so over many windows, too, their numbers
    stay within a few blocks of their share. The blocks of a task together walk through permutations of its examples: in every
    epoch of a task each example comes once.

    Where there are two tasks or more and ``groups`` is 2 or more, every batch holds at least two tasks, which losses that
    contrast tasks need. A share is therefore at most ``1 - 1 / groups``: the others share what a larger one has too much.

    Args:
      tasks: the tasks; their inputs have the same names. Regressions and classifications may be mixed.
      step: number of the update, from 0.
      batch_size: number of rows over all devices.
      seed: of the order of tasks and of examples.
      groups: number of blocks; divides ``batch_size``.
      temperature: :math:`T`, above 0.
      sizes: :math:`n_t`, in the order of the tasks, in place of their numbers of training examples.
      parts: number of parts, of consecutive blocks, that are worked on apart (devices times micro-batches): what is said of
        batches and ``groups`` above then holds for each part, so that a loss within one has something to contrast.

    Returns:
      The batch. Inputs are padded to one length: token ids with the encoder's padding, all others with 0. Labels are int32, or
      float32 in all batches if any of the tasks is a regression.

    Raises:
      ValueError: for a bad argument, two tasks of one name, inputs of different names, types or shapes (naming both tasks),
        an empty training split or a bad row.
    """
    of = listed_tasks(tasks)
    if step < 0 or batch_size < 1 or seed < 0 or groups < 1 or parts < 1:
        raise ValueError(
            f"step={step} and seed={seed} must be 0 or more; batch_size={batch_size}, groups={groups} and parts={parts} must "
            "be 1 or more"
        )
    if batch_size % groups or groups % parts:
        raise ValueError(
            f"groups={groups} must divide batch_size={batch_size} and be a multiple of parts={parts}: all blocks have as many "
            f"rows; such numbers are {', '.join(map(str, _between(batch_size, parts))) or 'none'}"
        )
    counts = tuple(len(task.split("train")) for task in of)
    given = tuple(float(n) for n in (counts if sizes is None else sizes))
    if len(given) != len(of) or not all(0 < n < math.inf for n in given):
        raise ValueError(f"sizes={sizes!r:.100} must be one finite number above 0 for each of the {len(of)} tasks")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0; infinity gives all tasks the same share")
    schedule = (given, float(temperature), int(groups), groups // parts, int(seed))
    numbers, places = blocks(*schedule, step)

    rows = batch_size // groups
    order, pieces = [], {}
    for number in dict.fromkeys(numbers.tolist()):
        here = np.flatnonzero(numbers == number)
        # A task's blocks follow each other in its own stream.
        index = stream(counts[number], int(places[here[0]]) * rows, len(here) * rows, seed)
        pieces[number] = of[number].rows("train", index, np.ones(len(index), np.float32))
        order.append((here[:, None] * rows + np.arange(rows)[None, :]).ravel())
    back = np.argsort(np.concatenate(order))
    inputs = _joined({of[n]: piece["inputs"] for n, piece in pieces.items()})
    labels = np.concatenate([piece["labels"].astype(_label_dtype(of)) for piece in pieces.values()])
    weights = np.concatenate([piece["weights"] for piece in pieces.values()])
    arranged = {name: value[back] for name, value in inputs.items()}
    return {"inputs": {**arranged, "task": numbers}, "labels": labels[back], "weights": weights[back]}


def listed_tasks(tasks: Iterable[Task] | Mapping[str, Task]) -> tuple[Task, ...]:
    """Tasks in the order given.

    Raises:
      ValueError: if there are none, or two have the same name.
    """
    of = tuple(tasks.values() if isinstance(tasks, Mapping) else tasks)
    if not of:
        raise ValueError("no tasks were given; pass at least one")
    names = [task.name for task in of]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two tasks are named {twice!r}; give each task a name of its own")
    return of


def require_alike(tasks: Sequence[Task]) -> None:
    """Raises ValueError if the inputs of two tasks cannot stand in one batch: now, and not when they first meet."""
    one = np.zeros(1, np.int64)
    _joined({task: task.rows("train", one, np.ones(1, np.float32))["inputs"] for task in tasks})


def blocks(
    sizes: tuple[float, ...], temperature: float, groups: int, part: int, seed: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """The tasks of a step's blocks, int32 ``[groups]``, and the place of each block among all of its task, ``[groups]``.

    Args:
      sizes: of the tasks.
      temperature: see :func:`mixed_batch`, also for ``seed``.
      groups: blocks of a step.
      part: blocks of which two or more are to hold two tasks or more; divides ``groups``.
      step: number of the update.
    """
    batches = max(2, -(-2 * len(sizes) // groups))
    window, within = divmod(step, batches)
    bounds = _bounds(sizes, temperature, batches * groups, part)
    order = _window(bounds, part, seed, window)
    before = np.bincount(order[: within * groups], minlength=len(sizes))
    first = np.asarray(_counts(bounds, _shift(seed), window)) + before
    numbers = order[within * groups : (within + 1) * groups]
    # Earlier blocks of the same task in this batch.
    earlier = np.sum(np.tril(numbers[:, None] == numbers[None, :], -1), axis=1)
    return numbers.astype(np.int32), first[numbers] + earlier


@functools.lru_cache(maxsize=64)
def _bounds(sizes: tuple[float, ...], temperature: float, window: int, part: int) -> tuple[int, ...]:
    """Cumulative shares of a window's blocks, from 0 to ``window``, in units of ``2**-32`` blocks."""
    logs = np.log(np.asarray(sizes, np.float64))
    # Tasks without any share would make the shares of the rest undefined where the largest is cut.
    powers = [Fraction(max(p, 1e-12)) for p in np.exp((logs - logs.max()) / temperature).tolist()]
    top, total = powers.index(max(powers)), sum(powers)
    most = Fraction(window - window // part) if part > 1 and len(sizes) > 1 else Fraction(window)
    shares = [power * window / total for power in powers]
    if shares[top] > most:
        rest = total - powers[top]
        shares = [power * (window - most) / rest for power in powers]
        shares[top] = most
    units = [int(share * _ONE) for share in shares]
    units[powers.index(min(powers))] += window * _ONE - sum(units)  # less than one unit for each task
    return tuple(sum(units[:t]) for t in range(len(units) + 1))


# Each task has an interval of a line, as long as its share of a window. A window takes the tasks at the points v, 1 + v, 2 + v,
# ..., so each gets its share rounded down or up. The offsets v are van der Corput's: of 2^k windows in a row one lies in each
# 2^-k of [0, 1). The shift, which the seed decides, flips bits of all of them and changes nothing of that.


@functools.lru_cache(maxsize=64)
def _shift(seed: int) -> int:
    return int(np.random.Philox(key=np.asarray([seed % 2**64, _SHIFT], np.uint64)).random_raw(1)[0]) >> (64 - _BITS)


def _offset(window: int, shift: int) -> int:
    return int(f"{window:0{_BITS}b}"[::-1], 2) ^ shift


def _counts(bounds: tuple[int, ...], shift: int, windows: int) -> list[int]:
    """Blocks of each task in the first ``windows`` windows."""
    below = [windows * (bound >> _BITS) + _smaller(bound & (_ONE - 1), shift, windows) for bound in bounds]
    return [high - low for low, high in zip(below, below[1:], strict=False)]


def _smaller(limit: int, shift: int, windows: int) -> int:
    """How many of the first ``windows`` offsets are below ``limit``."""
    total = start = 0
    for k in reversed(range(windows.bit_length())):
        if windows >> k & 1:
            # The offsets of windows start to start + 2^k have all the leading k bits there are, and the same bits after them.
            spacing = 1 << (_BITS - k)
            total += (limit - _offset(start, shift) % spacing + spacing - 1) // spacing
            start += 1 << k
    return total


@functools.lru_cache(maxsize=64)
def _window(bounds: tuple[int, ...], part: int, seed: int, window: int) -> np.ndarray:
    """The tasks of a window's blocks, in order."""
    if window >= _ONE:
        raise ValueError(f"step is beyond the {_ONE} windows that the schedule tells apart")
    before, after = (_counts(bounds, _shift(seed), number) for number in (window, window + 1))
    order = np.repeat(np.arange(len(before)), np.subtract(after, before))
    words = np.asarray([seed % 2**64, _WINDOWS + window], np.uint64)
    order = order[np.argsort(np.random.Philox(key=words).random_raw(len(order)), kind="stable")]
    if part > 1 and len(before) > 1:
        _mix(order.reshape(-1, part))
    order.flags.writeable = False
    return order


def _mix(parts: np.ndarray) -> None:
    """Swaps blocks until no part is of one task alone: shares are such that there is a block of another task for each part."""
    for one in parts:
        task = one[0]
        if np.all(one == task):
            others = np.sum(parts != task, axis=1)
            other = parts[np.argmax(others)]  # has two or more
            place = np.argmax(other != task)
            one[-1], other[place] = other[place], task


def _between(batch_size: int, parts: int) -> list[int]:
    return [groups for groups in range(parts, batch_size + 1, parts) if batch_size % groups == 0]


def _label_dtype(tasks: Sequence[Task]) -> Any:
    return np.int32 if all(task.classes for task in tasks) else np.float32


def _joined(inputs: Mapping[Task, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    (first, ours), *rest = inputs.items()
    for task, theirs in rest:
        if ours.keys() != theirs.keys():
            raise ValueError(
                f"the inputs of {first.name!r} are {', '.join(sorted(ours))}, but those of {task.name!r} "
                f"{', '.join(sorted(theirs))}; encode the tasks alike"
            )
        for name in ours:
            one, two = ours[name], theirs[name]
            if one.dtype != two.dtype or (one.shape[1:] != two.shape[1:] and not (_padded(name, one) and _padded(name, two))):
                raise ValueError(
                    f"a row of the input {name!r} is {one.dtype}{list(one.shape[1:])} in {first.name!r} and "
                    f"{two.dtype}{list(two.shape[1:])} in {task.name!r}; encode the tasks alike (only token ids and masks are "
                    "padded to one length)"
                )
    joined = {}
    for name in ours:
        width = max(of[name].shape[1:] for of in inputs.values())
        values = [
            value if value.shape[1:] == width else np.pad(value, [(0, 0), (0, width[0] - value.shape[1])], constant_values=fill)
            for value, fill in ((of[name], _fill(task, name)) for task, of in inputs.items())
        ]
        joined[name] = np.concatenate(values)
    return joined


def _padded(name: str, value: np.ndarray) -> bool:
    """Whether an input may be filled up: ``[rows, length]`` of numbers of tokens, or a mask."""
    return value.ndim == 2 and (value.dtype.kind in "iub" or "mask" in name)


def _fill(task: Task, name: str) -> int:
    """RoBERTa, for one, counts its positions by which ids are padding."""
    pad = getattr(getattr(task.encode, "tokenizer", None), "pad_token_id", None) if name.endswith("input_ids") else None
    return 0 if pad is None else pad
