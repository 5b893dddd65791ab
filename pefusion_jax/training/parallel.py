"""Maps the per-device step over devices: ``jax.pmap`` or ``jax.shard_map``, with the same numbers.

Either way base parameters, state and head are replicated once and stay on the devices; only the batch is split. Several
processes each map the step over their own devices and feed it their own rows; the all-reduce spans all of them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax.training.step import make_step

AXIS = "data"
MAPPINGS = ("pmap", "shard_map")


def data_mesh(devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    """A mesh with the one axis ``data``; its type is given, because the default of ``jax.make_mesh`` has changed before."""
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=tuple(devices))


def held_devices(mapping: str, devices: Sequence[jax.Device]) -> tuple[jax.Device, ...]:
    """The devices that arrays are placed on from this process: its own under pmap, all of them on a global mesh.

    Raises:
      ValueError: if the mapping is unknown, or a process has no device among ``devices``.
    """
    if mapping not in MAPPINGS:
        raise ValueError(f"mapping={mapping!r} is unknown; choose one of {', '.join(map(repr, MAPPINGS))}")
    own = tuple(d for d in devices if d.process_index == jax.process_index())
    if not own or len(own) * jax.process_count() != len(devices):
        raise ValueError(
            f"devices must hold the same number of devices of each of the {jax.process_count()} processes, got {len(own)} of "
            f"{len(devices)} in process {jax.process_index()}; pass devices=None for all of them"
        )
    return own if mapping == "pmap" else tuple(devices)


def map_step(step: Callable[..., Any], mapping: str, devices: Sequence[jax.Device]) -> Callable[..., Any]:
    """Maps ``step(state, params, held, head_params, batch) -> (state, metrics)`` over devices.

    Args:
      step: a per-device function that reduces over the axis ``data``.
      mapping: ``"pmap"`` or ``"shard_map"``.
      devices: the devices of all processes.

    Returns:
      A compiled function of the same arguments, which gives the memory of ``state`` to its result. All arguments but the
      batch come from :func:`replicate`, the batch from :func:`place_batch`.
    """
    if mapping == "pmap":
        whole = (None, None, None, None, 0)
        return jax.pmap(step, axis_name=AXIS, in_axes=whole, out_axes=(None, None), devices=devices, donate_argnums=(0,))
    replicated, split = jax.P(), jax.P(AXIS)
    # check_vma=False: a replicated input is then differentiated on each device by itself, as under pmap, and the step's own
    # psum is the only reduction.
    mapped = jax.shard_map(
        step,
        mesh=data_mesh(devices),
        in_specs=(replicated, replicated, replicated, replicated, split),
        out_specs=(replicated, replicated),
        check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=(0,))


@functools.lru_cache(maxsize=64)
def compiled_step(
    adapted: Any,
    optimizer: Any,
    head_features: Callable[..., Any],
    head_logits: Callable[..., Any],
    loss: Any,
    accumulate: int,
    clip: float | None,
    stochastic: bool,
    rate: Callable[..., Any] | None,
    mapping: str,
    devices: tuple[jax.Device, ...],
    penalty: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """The mapped step for these settings: one object, so that equal shapes compile once in the life of the process."""
    step = make_step(
        adapted,
        optimizer,
        head_features,
        head_logits,
        loss,
        accumulate=accumulate,
        clip=clip,
        stochastic=stochastic,
        rate=rate,
        axis_name=AXIS,
        penalty=penalty,
    )
    return map_step(step, mapping, devices)


def replicate(tree: Any, devices: Sequence[jax.Device], *, copy: bool = False) -> Any:
    """Places a tree whole on every device. Leaves that already are there are not moved.

    Args:
      tree: any pytree of arrays; with several processes, the same in each.
      devices: see :func:`held_devices`.
      copy: whether the result must not share memory with ``tree``; needed for what is donated.
    """
    sharding = jax.sharding.NamedSharding(data_mesh(devices), jax.P())
    if copy:
        # device_put(may_alias=False) is no help: over several devices it shares the memory of the one that has the array.
        tree = jax.tree.map(jnp.copy, tree)
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def place(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            return leaf
        here = np.asarray(leaf)
        return jax.make_array_from_callback(here.shape, sharding, lambda index: here[index])

    return jax.tree.map(place, tree)


def unreplicate(tree: Any) -> Any:
    """Copies a replicated tree to the host: numpy leaves; random keys stay keys."""

    def fetch(leaf: Any) -> Any:
        here = leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf
        if jnp.issubdtype(here.dtype, jax.dtypes.prng_key):
            return here
        # A copy, because the memory behind a view may be donated to the next step.
        return np.array(here, copy=True)

    return jax.tree.map(fetch, tree)


def shard_batch(batch: Any, n: int) -> Any:
    """Splits the rows of a batch over devices: ``[rows, ...] -> [n, rows / n, ...]``.

    Raises:
      ValueError: if a leaf's rows are not divisible by ``n``.
    """

    def split(x: np.ndarray) -> np.ndarray:
        if x.shape[0] % n:
            raise ValueError(f"{x.shape[0]} rows cannot be split over {n} devices; {_nearest(x.shape[0], n)}")
        return x.reshape(n, -1, *x.shape[1:])

    return jax.tree.map(split, batch)


def process_rows(batch: Any) -> Any:
    """The rows of a global batch that this process works on; all of them where there is one process."""
    count, index = jax.process_count(), jax.process_index()
    return jax.tree.map(lambda x: x[index * len(x) // count : (index + 1) * len(x) // count], batch)


def split_rows(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Spreads rows over the devices of a single process; with several, each works on all rows itself."""
    if jax.process_count() > 1:
        return tree
    return jax.device_put(tree, jax.sharding.NamedSharding(data_mesh(devices), jax.P(AXIS)))


def place_batch(batch: Any, mapping: str, devices: Sequence[jax.Device]) -> Any:
    """Brings this process's rows of a global batch into the form that :func:`map_step`'s function takes."""
    own = process_rows(batch)
    if mapping == "pmap":
        return shard_batch(own, len(held_devices(mapping, devices)))
    if jax.process_count() == 1:
        return split_rows(own, devices)
    sharding = jax.sharding.NamedSharding(data_mesh(devices), jax.P(AXIS))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), own)


def check_batch_size(batch_size: int, devices: int, accumulate: int) -> None:
    """Checks that a global batch splits evenly over devices and micro-batches.

    Raises:
      ValueError: naming the nearest sizes that do.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate={accumulate} must be 1 or more")
    unit = devices * accumulate
    if batch_size < 1 or batch_size % unit:
        raise ValueError(
            f"batch_size={batch_size} does not split evenly over {devices} devices x accumulate={accumulate}; "
            f"{_nearest(batch_size, unit)}"
        )


def _nearest(size: int, unit: int) -> str:
    below = size // unit * unit
    return "the nearest sizes that do: " + ", ".join(str(s) for s in (below, below + unit) if s > 0)


_ALL_REDUCE = re.compile(r"=\s*(.+?)\s+all-reduce(?:-start)?\(")
_SHAPE = re.compile(r"\b(?:pred|bf16|[fsuc]\d+)\[([\d,]*)\]")


def allreduce_elements(compiled: Any) -> int:
    """Counts the array elements that a compiled program sums over devices, in one run of its body.

    Args:
      compiled: HLO text, or an object with ``as_text()`` such as ``jitted.lower(...).compile()``.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    total = 0
    for line in text.splitlines():
        found = _ALL_REDUCE.search(line)
        for dims in _SHAPE.findall(found.group(1)) if found else ():
            total += int(np.prod([int(d) for d in dims.split(",") if d], dtype=np.int64))
    return total
