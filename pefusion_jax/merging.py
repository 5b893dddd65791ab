"""Merges of whole models, from safetensors to safetensors: every tensor is read, fused and written in bounded memory."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import queue
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax import files
from pefusion_jax.fusion import streamed
from pefusion_jax.fusion.combine import fuse
from pefusion_jax.fusion.parts import Fusion
from pefusion_jax.fusion.recipe import Recipe, read_recipe
from pefusion_jax.fusion.streamed import CHUNK, Job
from pefusion_jax.interop import manifest, saving
from pefusion_jax.interop.card import model_card
from pefusion_jax.interop.headers import WeightFileError
from pefusion_jax.interop.hub import CONFIG, INDEX
from pefusion_jax.interop.pieces import Pieces, Writer, writing
from pefusion_jax.interop.safetensors import aligned
from pefusion_jax.interop.weights import write_index
from pefusion_jax.merge_plan import Plan, Tensor, is_table, make_plan

Progress = Callable[[int, int, str], None]


class Merged(NamedTuple):
    """What :func:`merge_files` wrote, or would write.

    Attributes:
      out: the folder.
      method: of the recipe.
      models: the base, if there is one, first.
      base: the model that task vectors are relative to.
      tensors: number of them.
      copied: how many are no floats, and are the same in every model.
      bytes_read, bytes_written: of tensors, each read once (TIES with a density below 1 reads two or three times).
      peak_bytes: estimate of the memory taken beside the interpreter and its libraries.
      files: names in the folder.
    """

    out: str
    method: str
    models: tuple[str, ...]
    base: str | None
    tensors: int
    copied: int
    bytes_read: int
    bytes_written: int
    peak_bytes: int
    files: tuple[str, ...]


def merge_files(
    recipe: Recipe | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    threads: int = 2,
    shard_size: int = saving.MAX_SHARD_BYTES,
    seed: int = 0,
    dry_run: bool = False,
    progress: Progress | None = None,
    overwrite: bool = False,
    digest_inputs: bool = False,
    command: Sequence[str] | None = None,
) -> Merged:
    """Merges models, file to file, by a recipe (see ``pefusion_jax.fusion.recipe``).

    Methods that treat coordinates by themselves, and TIES trimmed by tensor, go in chunks of a million entries, so that no
    tensor is ever held. All others hold one tensor of every model in float32, and the next one as it is stored. Reading,
    computing and writing overlap. Arithmetic is in float32. Tensors that are no floats, such as tables of positions, have to be
    the same in every model, and are copied; they are compared before anything is written.

    The result depends on the tensors, the recipe and the seed alone: not on how the inputs are cut into files, nor on threads.
    Methods see each tensor by itself, under its Hugging Face name, and matrices as ``[inputs, outputs]``, as everywhere in
    this library: a coordinate of TIES whose vote is drawn takes the sign that most coordinates of its tensor elected.

    Args:
      recipe: a parsed recipe, or the path of its YAML file.
      out: the folder to write, whole or not at all.
      threads: that read.
      shard_size: largest file of weights, in bytes.
      seed: of methods that draw.
      dry_run: check everything and write nothing.
      progress: called with the number of tensors done, that of all, and the tensor's name.
      overwrite: replace a folder that is not empty.
      digest_inputs: put the SHA-256 of the inputs' weights into manifest and card. They are read once more for it, which can
        take longer than the merge. Those of what is written are always there.
      command: the command line, for the card.

    Returns:
      What was written, or would be.

    Raises:
      ValueError: naming file and tensor, if models do not fit together, are quantized or have integers that differ, or weights
        or the result are not finite; if a method compares tensors with each other, with the remedy; or if a model lies in
        ``out``.
      FileExistsError: if ``out`` is not empty.
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    given = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    target = Path(out)
    files.require_free(target, overwrite)
    plan = make_plan(given, seed)
    files.require_apart(target, *(model.folder for model in plan.models.values()))
    _require_same_integers(plan)
    kinds = {tensor.name: (tensor.dtype, tensor.shape) for tensor in plan.tensors}
    shards = saving.plan_shards(kinds, shard_size)
    first = next(iter(plan.models))
    if dry_run:
        like = plan.models[first].folder
        names = [*shards, *([INDEX] if len(shards) > 1 else []), CONFIG, "README.md", manifest.NAME]
        return _summary(given, plan, out, threads, [*names, *saving.companions(like)])

    by_name = {tensor.name: tensor for tensor in plan.tensors}
    with files.new_folder(target, overwrite) as folder, concurrent.futures.ThreadPoolExecutor(1) as beside:
        described = {
            name: beside.submit(manifest.describe_input, name, model.folder, weights=digest_inputs)
            for name, model in plan.models.items()
        }
        try:
            digests = {}
            done = 0
            with _Reading(plan, threads) as reading:
                for file, tensors in shards.items():
                    with writing(folder / file, {name: kinds[name] for name in tensors}) as (order, writer):
                        for name in reading.merge([by_name[name] for name in order], writer):
                            done += 1
                            if progress is not None:
                                progress(done, len(by_name), name)
                        digests[file] = writer.finish()
            inputs = {name: future.result() for name, future in described.items()}
        except BaseException:
            beside.shutdown(wait=False, cancel_futures=True)
            raise
        if len(shards) > 1:
            write_index(folder / INDEX, shards)
        files.write_json(folder / CONFIG, plan.config)
        saving.copy_companions(plan.models[first].folder, folder)
        card = model_card(
            target.name,
            base_model=given.base or first,
            models=[name for name in plan.models if name != given.base],
            method=f"{given.method} ({'a method of pefusion_jax.fusion' if given.ours else 'as in mergekit'})",
            settings=given.content,
            command=command,
            inputs=inputs,
        )
        files.write_atomically(folder / "README.md", card.encode())
        settings = {"recipe": given.content, "seed": seed, "shard_size": shard_size}
        manifest.write_manifest(folder, inputs=inputs, settings=settings, known=digests)
    return _summary(given, plan, out, threads, [file.name for file in target.iterdir()])


def _require_same_integers(plan: Plan) -> None:
    """Refuses tensors that are no floats and differ: they count, point or are packed, and have no mean."""
    with contextlib.ExitStack() as stack:
        opened = {name: stack.enter_context(contextlib.closing(Pieces(model.weights))) for name, model in plan.models.items()}
        for tensor in plan.tensors:
            if tensor.job is not None or len(tensor.inputs) < 2:
                continue
            buffers = [aligned(min(tensor.size, CHUNK) * tensor.dtype.itemsize) for _ in tensor.inputs]
            for start, count in streamed.chunks(tensor.size):
                first, *others = (
                    opened[model].read(name, start, count, buffer)
                    for (model, name), buffer in zip(tensor.inputs, buffers, strict=True)
                )
                for (model, name), other in zip(tensor.inputs[1:], others, strict=True):
                    if not np.array_equal(first, other):
                        raise WeightFileError(
                            opened[model].file_of(name), f"a tensor of {tensor.dtype} is not that of {tensor.inputs[0][0]}",
                            tensor=name, expected="equal numbers, which are copied: only floats are merged",
                            remedy="packed weights have to be dequantized first; of anything else give all models the same",
                        )  # fmt: skip


def _summary(recipe: Recipe, plan: Plan, out: Any, threads: int, names: Sequence[str]) -> Merged:
    infos = {name: model.weights.infos for name, model in plan.models.items()}
    inputs = [tensor.inputs if tensor.job is not None else tensor.inputs[:1] for tensor in plan.tensors]
    widest = max((len(of_tensor) for of_tensor in inputs), default=1)
    width = max((infos[model][name].dtype.itemsize for of_tensor in inputs for model, name in of_tensor), default=1)
    # Sets of buffers, pieces that wait to be written, and what the program of a chunk takes in float32.
    peak = CHUNK * (width * widest * (threads + 4) + 4 * 6 + 4 * 3 * widest)
    for tensor, of_tensor in zip(plan.tensors, inputs, strict=True):
        if tensor.job is not None and tensor.job.whole is not None:
            stored = sum(infos[model][name].nbytes for model, name in of_tensor)
            peak = max(peak, 2 * stored + 12 * tensor.size * len(of_tensor))
    return Merged(
        os.fspath(out),
        recipe.method,
        tuple(plan.models),
        recipe.base,
        len(plan.tensors),
        sum(tensor.job is None for tensor in plan.tensors),
        sum(infos[model][name].nbytes for of_tensor in inputs for model, name in of_tensor),
        sum(tensor.size * tensor.dtype.itemsize for tensor in plan.tensors),
        peak,
        tuple(sorted(names)),
    )


class _Piece(NamedTuple):
    tensor: Tensor
    start: int
    entries: int
    arrays: tuple[np.ndarray, ...]
    buffers: list[np.ndarray] | None


class _Reading:
    """The open files of a plan, the threads that read ahead, and the buffers that they use again and again."""

    def __init__(self, plan: Plan, threads: int):
        self._models = {name: Pieces(model.weights) for name, model in plan.models.items()}
        self._threads = threads
        self._pool = concurrent.futures.ThreadPoolExecutor(threads)
        self._inputs = max((len(tensor.inputs) for tensor in plan.tensors), default=1)
        # Whole tensors are read one ahead, chunks a few ahead.
        self._ahead = (
            1 if any(tensor.job is not None and tensor.job.whole is not None for tensor in plan.tensors) else threads + 1
        )
        self._free: queue.SimpleQueue[list[np.ndarray]] = queue.SimpleQueue()
        self._own: list[np.ndarray] = []
        infos = {name: model.weights.infos for name, model in plan.models.items()}
        sizes = {infos[model][name].dtype.itemsize for tensor in plan.tensors for model, name in tensor.inputs}
        self._width = max(sizes, default=1)

    def __enter__(self) -> _Reading:
        return self

    def __exit__(self, *error: Any) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for pieces in self._models.values():
            pieces.close()

    def merge(self, tensors: Sequence[Tensor], writer: Writer) -> Iterator[str]:
        """Fuses tensors in order and hands them to the writer; yields the name of each when it is done."""
        pieces = self._read_ahead(tensors)
        for tensor in tensors:
            fused = None
            if tensor.job is not None and tensor.job.ties is not None:
                fused = streamed.ties(tensor.job.ties, self._reader(tensor), tensor.size)
            for _, count in _requests(tensor):
                piece = next(pieces)
                result = self._fuse(piece, fused)
                writer.append(result[:count].view(np.uint8))
                if piece.buffers is not None:
                    self._free.put(piece.buffers)
            yield tensor.name

    def _fuse(self, piece: _Piece, ties: Any) -> np.ndarray:
        tensor, job = piece.tensor, piece.tensor.job
        if job is None:
            return np.array(piece.arrays[0])
        if job.whole is not None:
            return self._whole(piece, job, job.whole)
        if ties is not None:
            out, finite = ties(piece.start, piece.entries, piece.arrays, tensor.dtype)
        elif job.elementwise is not None:
            out, finite = streamed.elementwise(piece.arrays, method=job.elementwise, based=job.based, dtype=tensor.dtype)
        else:
            coefficients = np.asarray(job.coefficients, np.float32)
            out, finite = streamed.linear(piece.arrays, coefficients, based=job.based, dtype=tensor.dtype)
        if not finite:
            self._refuse(piece)
        return np.asarray(out)

    def _whole(self, piece: _Piece, job: Job, method: Fusion) -> np.ndarray:
        tensor = piece.tensor
        path, to_ours, back = _orientation(tensor)
        wide = [jnp.asarray(array.reshape(tensor.shape)).astype(jnp.float32) for array in piece.arrays]
        base = wide.pop(0) if job.based else None
        vectors = [to_ours(array if base is None else array - base) for array in wide]
        if not all(bool(jnp.all(jnp.isfinite(vector))) for vector in vectors):
            self._refuse(piece)
        change = back(fuse(method, [{path: vector} for vector in vectors], stacks=())[path])
        out = (change if base is None else base + change).astype(tensor.dtype)
        if not bool(jnp.all(jnp.isfinite(out))):
            self._refuse(piece)
        return np.asarray(out).reshape(-1)

    def _refuse(self, piece: _Piece) -> None:
        for (model, name), array in zip(piece.tensor.inputs, piece.arrays, strict=True):
            if not np.isfinite(array[: piece.entries].astype(np.float32)).all():
                raise WeightFileError(
                    self._models[model].file_of(name),
                    "weights are NaN or infinite",
                    tensor=name,
                    expected="finite values",
                    remedy="the training run that wrote them diverged, or the file is damaged: use an earlier checkpoint",
                )
        raise ValueError(
            f"{piece.tensor.name} is not finite in {piece.tensor.dtype} after merging; set out_dtype: bfloat16 or float32, or "
            "smaller weights"
        )

    def _reader(self, tensor: Tensor) -> streamed.Read:
        """Reads chunks for the passes that come before the last, into one set of buffers."""
        self._own = self._own or self._buffers()
        return lambda start, count: self._read(tensor, start, count, self._own)

    def _read_ahead(self, tensors: Sequence[Tensor]) -> Iterator[_Piece]:
        requests = ((tensor, start, count) for tensor in tensors for start, count in _requests(tensor))
        ahead: deque[concurrent.futures.Future[_Piece]] = deque()
        for request in requests:
            ahead.append(self._pool.submit(self._piece, *request))
            if len(ahead) > self._ahead:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _piece(self, tensor: Tensor, start: int, count: int) -> _Piece:
        if tensor.job is not None and tensor.job.whole is not None:
            sizes = [self._models[model].infos[name].nbytes for model, name in tensor.inputs]
            arrays = tuple(
                self._models[model].read(name, 0, count, aligned(size))
                for (model, name), size in zip(tensor.inputs, sizes, strict=True)
            )
            return _Piece(tensor, 0, count, arrays, None)
        buffers = self._buffers()
        return _Piece(tensor, start, count, self._read(tensor, start, count, buffers), buffers)

    def _buffers(self) -> list[np.ndarray]:
        try:
            return self._free.get_nowait()
        except queue.Empty:
            return [aligned(CHUNK * self._width) for _ in range(self._inputs)]

    def _read(self, tensor: Tensor, start: int, count: int, buffers: list[np.ndarray]) -> tuple[np.ndarray, ...]:
        size = streamed.chunk_size(count)
        out = []
        for (model, name), buffer in zip(tensor.inputs if tensor.job else tensor.inputs[:1], buffers, strict=False):
            array = self._models[model].read(name, start, count, buffer)
            whole = buffer[: size * array.itemsize].view(array.dtype)
            whole[count:] = 0
            out.append(whole)
        return tuple(out)


def _requests(tensor: Tensor) -> Iterator[tuple[int, int]]:
    if tensor.size and tensor.job is not None and tensor.job.whole is not None:
        yield 0, tensor.size
    else:
        yield from streamed.chunks(tensor.size)


def _orientation(tensor: Tensor) -> tuple[str, Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]]:
    """The path of a tensor, and how it gets from the files' ``[outputs, inputs]`` to our ``[inputs, outputs]`` and back."""

    def same(array: jax.Array) -> jax.Array:
        return array

    dims = len(tensor.shape)
    if dims < 2:
        return tensor.name, same, same
    if dims == 2 and is_table(tensor.name):
        return f"{tensor.name}/embedding", same, same
    return tensor.name, lambda array: jnp.moveaxis(array, 0, -1), lambda array: jnp.moveaxis(array, -1, 0)
