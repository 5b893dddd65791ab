"""The weights of a model's folder: in one file or in shards, read one tensor at a time and placed leaf by leaf.

A shard index is untrusted input::

    {"metadata": {"total_size": BYTES}, "weight_map": {TENSOR: "model-00001-of-00003.safetensors", ...}}

Names of shards are single path components that end in ``.safetensors`` and lie in the folder (or, for a folder of the
Hugging Face cache, in that cache's ``blobs``); map and shards must name the same tensors, each once.

Memory: on the host at most the size of the largest tensor beside the parameters themselves. Where an accelerator holds the
parameters, that is all; on a CPU, whose arrays are host memory, the peak is the model plus its largest tensor.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax import trees
from pefusion_jax.backbones import names
from pefusion_jax.backbones.layers import STACKS
from pefusion_jax.interop.headers import TensorInfo, WeightFileError, decode_json
from pefusion_jax.interop.hub import INDEX, WEIGHTS
from pefusion_jax.interop.safetensors import aligned, check_finite, iter_safetensors, read_header
from pefusion_jax.interop.streaming import read_concurrently

MAX_INDEX_BYTES = 64 * 2**20
MAX_SHARDS = 10_000
_BLOCK = 16
_PARTIAL = "the folder is incomplete or was edited: fetch or save the model again"

Place = Callable[[str, np.ndarray], jax.Array]


class Weights(Mapping[str, np.ndarray]):
    """The tensors of a folder by name. Headers are read and checked at once, data when it is asked for.

    Attributes:
      folder: where they lie.
      infos: ``{name: TensorInfo}``.
      files: the safetensors files, in order.
    """

    def __init__(self, folder: Path, shards: Mapping[Path, Mapping[str, TensorInfo]]):
        self.folder = folder
        self.files = tuple(shards)
        self.infos = {name: info for infos in shards.values() for name, info in infos.items()}
        self._file = {name: path for path, infos in shards.items() for name in infos}

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def __contains__(self, name: object) -> bool:
        return name in self.infos  # a Mapping's own would read the tensor to see whether it is there

    def __getitem__(self, name: str) -> np.ndarray:
        return next(iter_safetensors(self._file[name], [name]))[1]

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._file[name]


def open_weights(folder: Path) -> Weights:
    """Finds and checks the weights of a folder; reads headers only.

    Raises:
      FileNotFoundError: if there are none, saying what is there instead.
      WeightFileError: if a file or the index is not what it says it is.
    """
    single, index = folder / WEIGHTS, folder / INDEX
    if single.is_file():
        contained(single, folder)
        return Weights(folder, {single: read_header(single)})
    if index.is_file():
        return _open_shards(folder, index)
    pickles = sorted(file.name for file in folder.glob("*.bin"))
    hint = f"; {', '.join(pickles[:3])} is a pickle, which is never read: convert it to safetensors" if pickles else ""
    raise FileNotFoundError(f"{folder} has no {WEIGHTS} and no {INDEX}{hint}")


def _open_shards(folder: Path, index: Path) -> Weights:
    contained(index, folder)
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise WeightFileError(
            index, "the index is too large", expected=f"at most {MAX_INDEX_BYTES} bytes", found=index.stat().st_size
        )
    content = decode_json(index.read_bytes(), index, "the index")
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
        raise WeightFileError(index, "weight_map must map tensor names to file names", found=weight_map, remedy=_PARTIAL)
    shards = list(dict.fromkeys(weight_map.values()))
    if len(shards) > MAX_SHARDS:
        raise WeightFileError(index, "too many shards", expected=f"at most {MAX_SHARDS}", found=len(shards))
    headers: dict[Path, Mapping[str, TensorInfo]] = {}
    owner: dict[str, str] = {}
    for shard in shards:
        if Path(shard).name != shard or "\\" in shard or "\0" in shard or not shard.endswith(".safetensors"):
            raise WeightFileError(
                index,
                "a shard's name is not a plain file name that ends in .safetensors",
                found=shard,
                remedy="do not use this folder: its index points outside of it",
            )
        path = folder / shard
        if not path.is_file():
            raise WeightFileError(index, "a shard is missing", expected=shard, found="no such file", remedy=_PARTIAL)
        contained(path, folder)
        headers[path] = read_header(path)
        for name in headers[path]:
            if name in owner:
                raise WeightFileError(
                    path, "a tensor stands in two shards", tensor=name, found=f"also in {owner[name]}", remedy=_PARTIAL
                )
            owner[name] = shard
    for name, shard in weight_map.items():
        if owner.get(name) != shard:
            raise WeightFileError(
                index, "the index names a tensor that its shard does not hold", tensor=name, expected=shard,
                found=owner.get(name, "in no shard"), remedy=_PARTIAL,
            )  # fmt: skip
    extra = [name for name in owner if name not in weight_map]
    if extra:
        raise WeightFileError(
            folder / owner[extra[0]], "a shard holds a tensor that the index does not name", tensor=extra[0], remedy=_PARTIAL
        )
    metadata = content.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    found = sum(info.nbytes for infos in headers.values() for info in infos.values())
    if total is not None and total != found:
        raise WeightFileError(index, "total_size is not the size of the tensors", expected=total, found=found, remedy=_PARTIAL)
    return Weights(folder, headers)


def contained(path: Path, folder: Path) -> None:
    """Raises a WeightFileError if a file of a folder is a link that leads out of it.

    Links into ``blobs`` are followed for a snapshot of the Hugging Face cache, which is made of them.
    """
    home, target = folder.resolve(), path.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(root) for root in allowed):
        raise WeightFileError(
            path,
            "this is a link that leads out of its folder",
            found=os.fspath(target),
            remedy="put the file itself there, or pass the folder in which it really lies",
        )


def place_parameters(
    weights: Weights,
    table: names.Table,
    origin: Mapping[str, str],
    place: Place,
    dtype: Any,
    *,
    stacked: bool = False,
) -> dict[str, Any]:
    """Reads every tensor of a table once, in the order of the files, and places its parameters.

    A few threads read, check, cast and transpose different tensors at a time, as many as fit into the size of the largest.

    Args:
      weights: the files.
      table: ``{path: Entry}`` in the loop layout.
      origin: ``{canonical name: name in the file}``; rows of the table that it lacks are left out.
      place: ``(path, array) -> array on devices``; the array is given away.
      dtype: of the parameters.
      stacked: make the scan layout: a leaf is placed when its last layer has been read.

    Returns:
      A nested dictionary of parameters.

    Raises:
      WeightFileError: naming the tensors that hold NaN or infinity, as stored or in ``dtype``.
    """
    wanted: dict[str, list[tuple[str, names.Entry]]] = {}
    layers: dict[str, int] = {}
    for path, entry in table.items():
        if entry.name in origin:
            wanted.setdefault(origin[entry.name], []).append((path, entry))
            leaf, layer = _stacked(path)
            layers[leaf] = max(layers.get(leaf, 0), (layer or 0) + 1)
    leaves: dict[str, Any] = {}
    pending: dict[str, tuple[np.ndarray, set[int]]] = {}
    lock = threading.Lock()

    def keep(name: str) -> bool:
        """Whether the tensor is the parameter, as it stands in the file."""
        (path, entry), *others = wanted[name]
        alone = not others and entry.axes is None and entry.part is None and weights.infos[name].dtype == dtype
        return alone and not (stacked and _stacked(path)[1] is not None)

    def use(name: str, array: np.ndarray, file: Path) -> None:
        check_finite({name: array}, file)
        for path, entry in wanted[name]:
            view = names.convert(entry, array)
            leaf, layer = _stacked(path)
            if not stacked or layer is None:
                own = view
                if not keep(name):
                    own = _empty(view.shape, dtype)
                    copy(own, view, path, file)
                leaves[path] = jax.block_until_ready(place(path, own))
                continue
            with lock:
                if leaf not in pending:
                    pending[leaf] = _empty((layers[leaf], *view.shape), dtype), set(range(layers[leaf]))
                whole, missing = pending[leaf]
            copy(whole[layer], view, path, file)
            with lock:
                missing.discard(layer)
                last = not missing and pending.pop(leaf, None) is not None
            if last:
                leaves[leaf] = jax.block_until_ready(place(leaf, whole))

    for file in weights.files:
        here = [name for name in weights if weights.file_of(name) == file and name in wanted]
        read_concurrently(file, here, use, keep)
    if pending:
        raise ValueError(f"some layers of {next(iter(pending))} are missing, so that the layers cannot be stacked")
    order = {(_stacked(path)[0] if stacked else path): None for path in table}
    return trees.nest({path: leaves[path] for path in order if path in leaves})


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory that a CPU device takes over as it is."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    return aligned(size).view(dtype).reshape(shape)


def copy(target: np.ndarray, source: np.ndarray, path: str, file: Path) -> None:
    """Copies, casts and transposes in one go.

    Raises:
      WeightFileError: if values overflow in the target's dtype.
    """
    with np.errstate(over="ignore"):
        if source.ndim == 2 and not source.flags.c_contiguous:
            for start in range(0, source.shape[1], _BLOCK):  # rows of the file, few enough to stay in the cache
                target[:, start : start + _BLOCK] = source[:, start : start + _BLOCK]
        else:
            np.copyto(target, source, casting="unsafe")
    if target.dtype != source.dtype and source.size:
        largest = float(jnp.finfo(target.dtype).max)
        # No value above the largest: nothing can have overflowed. Else look, for rounding may have saved it.
        if not -largest <= float(source.min()) <= float(source.max()) <= largest and not np.isfinite(target).all():
            raise WeightFileError(
                file,
                f"weights are not finite in {target.dtype}, but are as stored",
                tensor=path,
                expected=f"at most {jnp.finfo(target.dtype).max}",
                remedy="load with dtype=bfloat16 or float32",
            )


def _stacked(path: str) -> tuple[str, int | None]:
    """The path of a parameter in the scan layout and its layer, or the path itself and None."""
    parts = path.split("/")
    for i, part in enumerate(parts[:-1]):
        if part in STACKS:
            return "/".join(parts[: i + 1] + parts[i + 2 :]), int(parts[i + 1])
    return path, None


def placing(sharding: Any) -> Place:
    """How a leaf gets onto devices.

    Args:
      sharding: ``None`` for the default device, a ``jax.Device``, a ``jax.sharding.Sharding``, or a function
        ``(path, shape) -> `` one of these.

    Raises:
      ValueError: (by the function returned) if the sharding does not fit a leaf's shape.
    """

    def place(path: str, array: np.ndarray) -> jax.Array:
        where = sharding(path, array.shape) if callable(sharding) else sharding
        try:
            if isinstance(where, jax.sharding.Sharding) and not where.is_fully_addressable:
                return jax.make_array_from_callback(array.shape, where, lambda index: array[index])
            return jax.device_put(array, where)
        except ValueError as error:
            raise ValueError(f"{path} {list(array.shape)} does not go with the sharding that was given: {error}") from error

    return place


def write_index(path: Path, shards: Mapping[str, Mapping[str, int]]) -> None:
    """Writes the index of shards ``{file: {tensor: bytes}}``."""
    from pefusion_jax.files import write_atomically

    content = {
        "metadata": {"total_size": sum(size for tensors in shards.values() for size in tensors.values())},
        "weight_map": {name: file for file, tensors in shards.items() for name in tensors},
    }
    write_atomically(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
