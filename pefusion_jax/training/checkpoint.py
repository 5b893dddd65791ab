"""Training state on disk (Orbax), and adapters alone as one safetensors file.

A state is a folder ``DIR/STEP`` that Orbax writes under a temporary name and renames when it is complete: a process killed at
any moment leaves the previous state. With every state stands what it belongs to, and a state of something else is refused.
"""

from __future__ import annotations

import json
import os
import re
import shutil
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
_REMOVED = ".removed"


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
    root = Path(directory).absolute()
    root.mkdir(parents=True, exist_ok=True)
    # Orbax wants every process here, and lets the first one write.
    ocp.save(root / str(step), _plain(state), overwrite=True, custom_metadata={**metadata, "keys": _key_names(state)})
    if jax.process_index() == 0:
        _remove(root, _steps(root)[:-keep])


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
    from orbax.checkpoint import v1 as ocp

    root = Path(directory).absolute()
    steps = _steps(root)
    if not steps:
        return None
    path = root / str(steps[-1])
    remedy = f"remove {root}, pass resume=False to replace what it holds, or pass another checkpoint_dir"
    expected = json.loads(json.dumps({**metadata, "keys": _key_names(abstract_state)}))
    # Orbax's errors are of many kinds; whichever it is, the folder does not hold a state that could be used.
    try:
        stored = ocp.metadata(path).custom_metadata
    except Exception as error:
        raise ValueError(f"the checkpoint {path} cannot be read: {error}; {remedy}") from error
    differing = _differences("", stored or {}, expected)
    if differing:
        raise ValueError(f"the checkpoint {path} belongs to another run: {'; '.join(differing)}. To start anew, {remedy}")
    try:
        plain = ocp.load(path, _plain(abstract_state))
    except Exception as error:
        raise ValueError(f"the checkpoint {path} cannot be read: {error}; {remedy}") from error
    leaves = [
        jax.random.wrap_key_data(jnp.asarray(plain[path]), impl=expected["keys"][path])
        if path in expected["keys"]
        else np.asarray(plain[path])
        for path in trees.paths(abstract_state)
    ]
    return steps[-1], jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)


def clear(directory: str | os.PathLike[str]) -> None:
    """Removes all states of a folder; files of other kinds stay."""
    root = Path(directory).absolute()
    if jax.process_index() == 0:
        _remove(root, _steps(root))


def _steps(root: Path) -> list[int]:
    """The complete states of a folder, oldest first. Orbax renames a folder to its number when it is complete."""
    return sorted(int(path.name) for path in root.glob("*") if path.name.isdecimal() and path.is_dir())


def _remove(root: Path, steps: list[int]) -> None:
    """Removes states, and what a killed process left half written or half removed. A state disappears at once."""
    for step in steps:
        (root / str(step)).rename(root / f"{step}{_REMOVED}")
    for path in root.glob("*"):
        if path.is_dir() and re.fullmatch(rf"\d+({re.escape(_REMOVED)}|\.orbax-checkpoint-tmp.*)", path.name):
            shutil.rmtree(path, ignore_errors=True)


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
      ValueError: if the tree is empty, a key holds a slash, a leaf is not an array, is not finite or has a dtype that JAX would
        make narrower (naming the path).
    """
    path = Path(path)
    leaves = trees.flat(tree)
    if not leaves:
        raise ValueError(f"{path}: the tree holds no adapters; pass what init or finetune returned")
    if not _plain_keys(tree):
        raise ValueError(f"{path}: adapters are nested dictionaries with string keys without slashes")
    for name, leaf in leaves.items():
        if not hasattr(leaf, "dtype"):
            raise ValueError(f"{path}: {name!r} is a {type(leaf).__name__}, not an array; a file of adapters holds arrays only")
    _require_kept(path, leaves)
    trees.require_finite(tree, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    strings = {key: json.dumps(value, sort_keys=True) for key, value in (metadata or {}).items()}
    safetensors.save_safetensors(path, jax.device_get(leaves), strings)


def _plain_keys(tree: Any) -> bool:
    """Whether the slash paths of a nested dictionary lead back to it."""
    return not isinstance(tree, Mapping) or all(
        isinstance(key, str) and key and "/" not in key and _plain_keys(value) for key, value in tree.items()
    )


def _require_kept(path: str | os.PathLike[str], leaves: Mapping[str, Any]) -> None:
    for name, leaf in leaves.items():
        if (kept := jax.dtypes.canonicalize_dtype(leaf.dtype)) != leaf.dtype:
            raise ValueError(
                f"{path}: {name!r} is {leaf.dtype}, which JAX would make {kept}; cast it to that, or set jax_enable_x64"
            )


def load_adapters(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a file that :func:`save_adapters` wrote.

    Args:
      path: the file. It is validated before it is used, and never run.

    Returns:
      ``(tree, metadata)``: nested dictionary of arrays, and the metadata as it was given.

    Raises:
      ValueError: if the file is not valid, a leaf is not finite, or its dtype is one that JAX would make narrower.
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
        except RecursionError as error:
            raise ValueError(f"{path}: the metadata {key!r} is nested too deeply to be ours") from error
    _require_kept(path, leaves)
    try:
        tree = trees.nest({name: jnp.asarray(leaf) for name, leaf in leaves.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}; it was not written by save_adapters") from error
    trees.require_finite(tree, str(path))
    return tree, metadata
