"""Training state on disk (Orbax), and adapters alone as one safetensors file.

A state is a folder ``DIR/STEP`` that Orbax writes under a temporary name and renames when it is complete: a process killed at
any moment leaves the previous state. With every state stands what it belongs to, and a state of something else is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax import trees
from pefusion_jax.interop import safetensors

# Recorded, but not a reason to refuse: another version may well go on with the state.
_INFORMATIVE = ("versions",)


def structure(tree: Any) -> dict[str, str]:
    """``{slash path: dtype[shape]}`` of a tree, to be compared and stored as JSON."""
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in trees.paths(tree).items()}


def save(directory: str | os.PathLike[str], step: int, state: Any, metadata: Mapping[str, Any], *, keep: int = 2) -> None:
    """Saves a training state under its step and removes all but the newest ``keep``.

    Args:
      directory: folder of this run's states; made if needed. With several processes, one that all of them see.
      step: number of updates made; a state of that step that exists is replaced.
      state: pytree of host arrays and random keys. Keys are stored as their data, with the name of their implementation.
      metadata: JSON-compatible mapping of what the state belongs to; :func:`restore_latest` compares it.
      keep: number of states to keep, at least 1.

    Raises:
      ValueError: if ``keep`` is below 1.
    """
    from orbax.checkpoint import v1 as ocp

    if keep < 1:
        raise ValueError(f"keep={keep} must be 1 or more")
    if jax.process_index() == 0:
        stored = {**metadata, "keys": _key_names(state)}
        newest = ocp.training.preservation_policies.LatestN(keep)
        with _open(directory, preservation_policy=newest, cleanup_tmp_directories=True) as checkpointer:
            checkpointer.save(step, _plain(state), force=True, overwrite=True, custom_metadata=stored)


def restore_latest(
    directory: str | os.PathLike[str], abstract_state: Any, metadata: Mapping[str, Any]
) -> tuple[int, Any] | None:
    """Loads the newest state of a folder.

    Args:
      directory: as given to :func:`save`.
      abstract_state: a state of the same structure; only shapes and dtypes matter.
      metadata: what the state has to belong to.

    Returns:
      ``(step, state)`` with host arrays, bit for bit what was saved, or ``None`` if there is no complete state.

    Raises:
      ValueError: if the newest state belongs to something else (naming what differs) or cannot be read.
    """
    if not Path(directory).is_dir():
        return None
    with _open(directory) as checkpointer:
        latest = checkpointer.latest
        if latest is None:
            return None
        where = f"the checkpoint {Path(directory) / str(latest.step)}"
        remedy = "remove the folder, pass resume=False to replace what it holds, or pass another checkpoint_dir"
        # Orbax's errors are of many kinds; whichever it is, the folder does not hold a state that could be used.
        try:
            stored = checkpointer.metadata(latest.step).custom_metadata
        except Exception as error:
            raise ValueError(f"{where} cannot be read: {error}; {remedy}") from error
        expected = json.loads(json.dumps({**metadata, "keys": _key_names(abstract_state)}))
        differing = _differences("", stored or {}, expected)
        if differing:
            raise ValueError(f"{where} belongs to another run: {'; '.join(differing)}. To start anew, {remedy}")
        try:
            plain = checkpointer.load(latest.step, _plain(abstract_state))
        except Exception as error:
            raise ValueError(f"{where} cannot be read: {error}; {remedy}") from error
    leaves = [
        jax.random.wrap_key_data(jnp.asarray(plain[path]), impl=expected["keys"][path])
        if path in expected["keys"]
        else np.asarray(plain[path])
        for path in trees.paths(abstract_state)
    ]
    return int(latest.step), jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)


def clear(directory: str | os.PathLike[str]) -> None:
    """Removes all states of a folder; files of other kinds stay."""
    if jax.process_index() == 0 and Path(directory).is_dir():
        with _open(directory) as checkpointer:
            for checkpoint in checkpointer.checkpoints:
                checkpointer.delete(checkpoint.step)


def _open(directory: str | os.PathLike[str], **options: Any) -> Any:
    from orbax.checkpoint import v1 as ocp

    # The state is the same in every process, so each works alone: the first one writes, all of them read.
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index}, barrier_sync_key_prefix=str(index))
    context = ocp.Context(multiprocessing_options=alone if jax.process_count() > 1 else None)
    return ocp.training.Checkpointer(Path(directory).absolute(), context=context, **options)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_names(state: Any) -> dict[str, str]:
    return {path: str(jax.random.key_impl(leaf)) for path, leaf in trees.paths(state).items() if _is_key(leaf)}


def _plain(state: Any) -> dict[str, np.ndarray]:
    """One level of slash paths: an optimizer's own node types need no place in the file."""
    return {path: np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf) for path, leaf in trees.paths(state).items()}


def _differences(prefix: str, stored: Any, expected: Any, most: int = 4) -> list[str]:
    """Readable differences between two JSON values, the first few."""
    if isinstance(stored, dict) and isinstance(expected, dict):
        found = []
        for key in sorted(stored.keys() | expected.keys()):
            if not prefix and key in _INFORMATIVE:
                continue
            name = f"{prefix}{key}"
            if key not in expected:
                found.append(f"{name} is {stored[key]!r} there and absent now")
            elif key not in stored:
                found.append(f"{name} is absent there and {expected[key]!r} now")
            else:
                found += _differences(f"{name}: ", stored[key], expected[key], most)
        return found if len(found) <= most else [*found[:most], f"and {len(found) - most} more"]
    return [] if stored == expected else [f"{prefix.removesuffix(': ')} is {stored!r} there and {expected!r} now"]


def save_adapters(path: str | os.PathLike[str], tree: Any, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes adapters as one safetensors file, atomically; :func:`load_adapters` gives back the same bits.

    Args:
      path: the file; its folder is made if needed.
      tree: nested dictionary of arrays; the slash paths become the tensors' names.
      metadata: JSON-compatible values, for instance the method, the base model and the task.

    Raises:
      ValueError: if the tree is empty, a key holds a slash, a leaf is not an array, or one is not finite (naming the path).
    """
    path = Path(path)
    leaves = trees.flat(tree)
    if not leaves:
        raise ValueError(f"{path}: the tree holds no adapters; pass what init or finetune returned")
    if structure(trees.nest(leaves)).keys() != structure(tree).keys() or trees.flat(trees.nest(leaves)).keys() != leaves.keys():
        raise ValueError(f"{path}: adapters are nested dictionaries with string keys without slashes")
    for name, leaf in leaves.items():
        if not hasattr(leaf, "dtype"):
            raise ValueError(f"{path}: {name!r} is a {type(leaf).__name__}, not an array; a file of adapters holds arrays only")
    trees.require_finite(tree, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    strings = {key: json.dumps(value, sort_keys=True) for key, value in (metadata or {}).items()}
    safetensors.save_safetensors(path, jax.device_get(leaves), strings)


def load_adapters(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a file that :func:`save_adapters` wrote.

    Args:
      path: the file. It is validated before it is used, and never run.

    Returns:
      ``(tree, metadata)``: nested dictionary of arrays, and the metadata as it was given.

    Raises:
      ValueError: if the file is not valid, or a leaf is not finite.
      OSError: if it cannot be opened.
    """
    leaves = safetensors.load_safetensors(path)
    metadata: dict[str, Any] = {}
    for key, text in safetensors.read_metadata(path).items():
        if key == "format":  # says how other readers should take the file; not ours
            continue
        try:
            metadata[key] = json.loads(text)
        except ValueError:
            metadata[key] = text  # written by another tool
    tree = trees.nest({name: jnp.asarray(leaf) for name, leaf in leaves.items()})
    trees.require_finite(tree, str(path))
    return tree, metadata
