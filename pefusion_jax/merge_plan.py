"""What a merge of files does: which tensors of which folders become which tensor, by which method."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pefusion_jax.fusion import named
from pefusion_jax.fusion.recipe import DTYPES, Recipe, Settings, Slice, Source, lookup
from pefusion_jax.fusion.streamed import Job
from pefusion_jax.interop import hub
from pefusion_jax.interop.headers import WeightFileError
from pefusion_jax.interop.pretrained import read_config
from pefusion_jax.interop.weights import Weights, open_weights
from pefusion_jax.trees import did_you_mean

_LAYER = re.compile(r"((?:^|.*?\.)(?:layers?|blocks?|h))\.(\d+)\.(.+)")
# NeoX calls its head embed_out, TransformerLens unembed; OPT and CLIP have more before their layers than tables.
_TABLE = re.compile(r"(?<!un)embed(?!_out)|\bw[tp]e\b|shared\.weight|attention_bias")
_ENTRANCE = re.compile(r"project_in\b|pre_layrnorm|ln_pre\b")
_SAME_CONFIG = ("model_type", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size")
_FLOATS = tuple(jnp.dtype(name) for name in DTYPES)


class Tensor(NamedTuple):
    """One tensor of the result.

    Attributes:
      name: in the result.
      inputs: ``(model, name)`` of the tensors it is made from, the base first if the job is based on it.
      shape: of all of them.
      dtype: of the result.
      job: how; ``None`` copies the first input, which the others have to equal: these are no floats.
    """

    name: str
    inputs: tuple[tuple[str, str], ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    job: Job | None

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


class Model(NamedTuple):
    """A model of the recipe: its folder, ``config.json`` and headers."""

    folder: Path
    config: dict[str, Any]
    weights: Weights


class Plan(NamedTuple):
    """Everything that is known before a byte of data is read.

    Attributes:
      models: by the names in the recipe; the one that configuration and tokenizer come from is first.
      tensors: of the result, layers in order.
      config: of the result.
    """

    models: dict[str, Model]
    tensors: tuple[Tensor, ...]
    config: dict[str, Any]


def make_plan(recipe: Recipe, seed: int) -> Plan:
    """Opens the folders (headers only) and decides on every tensor.

    Raises:
      ValueError: if models do not fit together, or the method does not take what it is given.
      FileNotFoundError: if a folder or its weights are not there.
    """
    recipe, models = _opened(recipe)
    first = recipe.models[0]
    _require_alike(models)
    tensors = []
    for name, part, rows, depth in _layout(recipe, models):
        tensors.append(_tensor(recipe, models, seed, name, part, rows, depth))
    config = dict(models[first].config)
    kinds = {tensor.dtype.name for tensor in tensors if tensor.dtype in _FLOATS}
    if recipe.dtype is not None or len(kinds) == 1:
        key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
        config[key] = recipe.dtype or kinds.pop()
    if recipe.slices[0].sources[0].layers is not None:
        _set_layers(config, recipe)
    return Plan(models, tuple(tensors), config)


def is_table(name: str) -> bool:
    """Whether a tensor outside of the layers, or a matrix anywhere, is by its name an embedding, or belongs to one."""
    return _TABLE.search(name) is not None


def _opened(recipe: Recipe) -> tuple[Recipe, dict[str, Model]]:
    """The models of a recipe, each opened once, and the recipe with one name for each: ``a``, ``a/`` and ``./a`` are one.

    Raises:
      ValueError: if models that are combined are one, or a parameter would have no effect, naming the line.
    """
    folders = {name: hub.locate(name).path for name in recipe.models}
    names: dict[Path, str] = {}
    first = {name: names.setdefault(folder.resolve(), name) for name, folder in folders.items()}
    for part in recipe.slices:
        seen: dict[str, Source] = {}
        for source in part.sources:
            other = seen.setdefault(first[source.model], source)
            if other is not source:
                again = "" if other.model == source.model else f" ({folders[source.model].resolve()}, as {other.model})"
                raise ValueError(f"{source.where}: {source.model} is named twice{again}; name each model once")
            if recipe.ours and first[source.model] == recipe.base and source.parameters:
                raise ValueError(
                    f"{source.where}: parameters of base_model ({', '.join(source.parameters)}) have no effect: "
                    f"{recipe.method} combines what the other models change of it; give parameters to those, or leave "
                    "base_model out"
                )
    slices = tuple(
        part._replace(sources=tuple(source._replace(model=first[source.model]) for source in part.sources))
        for part in recipe.slices
    )
    return recipe._replace(slices=slices), {name: _open(name, folders[name]) for name in names.values()}


def _open(name: str, folder: Path) -> Model:
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{name} is a PEFT adapter; a merge of files is of whole models: pefusion convert {name} --out FOLDER")
    config = read_config(folder)
    if config.get("quantization_config") is not None:
        raise ValueError(
            f"{folder / hub.CONFIG}: quantization_config is set: the weights are packed numbers, and nothing can be computed "
            "with those; dequantize the model first (transformers: model.dequantize()), save it, and merge that"
        )
    return Model(folder, config, open_weights(folder))


def _require_alike(models: Mapping[str, Model]) -> None:
    (first, known), *others = models.items()
    for name, model in others:
        for key in _SAME_CONFIG:
            ours, theirs = known.config.get(key), model.config.get(key)
            if ours is not None and theirs is not None and ours != theirs:
                raise ValueError(
                    f"{first} and {name} differ in {key} of config.json: {ours!r} and {theirs!r}; only models of one "
                    "architecture can be merged"
                )


def _layout(recipe: Recipe, models: Mapping[str, Model]) -> Iterator[tuple[str, Slice, list[tuple[Source, str]], float]]:
    """``(name in the result, slice, [(source, its name there)], depth)`` of every tensor, layers in order."""
    first = recipe.models[0]
    if recipe.slices[0].sources[0].layers is None:
        [part] = recipe.slices
        for name, model in models.items():
            extra = [tensor for tensor in model.weights if tensor not in models[first].weights]
            if extra:
                _missing(models, first, extra[0], name)
        counts = _layers(models[first].weights)
        for name in sorted(models[first].weights, key=_in_order):
            found = _LAYER.fullmatch(name)
            depth = 0.0
            if found:
                layers = counts[found[1]]
                depth = int(found[2]) / (layers - 1) if layers > 1 else 1.0
            yield name, part, [(source, name) for source in part.sources], depth
        return
    stacks: dict[str, str] = {}
    inside: dict[str, dict[int, list[str]]] = {}
    for owner, model in models.items():
        own = _layers(model.weights)
        if len(own) != 1:
            raise ValueError(f"slices need one stack of layers, but {model.folder} has {sorted(own) or 'none'}; use models")
        [stacks[owner]] = own
        inside[owner] = _by_layer(model.weights)
    outside = [name for name in models[first].weights if not _LAYER.fullmatch(name)]

    def part_of(name: str) -> Slice:
        # What comes before the layers is the first slice's, what comes after them the last one's.
        return recipe.slices[0 if is_table(name) or _ENTRANCE.search(name) else -1]

    for part in recipe.slices:
        for source in part.sources:
            for name in models[source.model].weights:
                if not _LAYER.fullmatch(name) and name not in models[first].weights and part_of(name) is part:
                    _missing(models, first, name, source.model)
    for name in sorted(outside, key=_in_order):
        part = part_of(name)
        yield name, part, [(source, name) for source in part.sources], 0.0
    place = 0
    for part in recipe.slices:
        start, end = part.sources[0].layers or (0, 0)
        rests = inside[part.sources[0].model]
        for j in range(end - start):
            if start + j not in rests:
                raise ValueError(f"{part.sources[0].model} has no layer {start + j}; its last one is {max(rests)}")
            depth = j / (end - start - 1) if end - start > 1 else 1.0
            row = [(source, (source.layers or (0, 0))[0] + j) for source in part.sources]
            for source, layer in row[1:]:
                for rest in inside[source.model].get(layer, ()):
                    if rest not in rests[start + j]:
                        lacking = part.sources[0].model
                        _missing(models, lacking, f"{stacks[lacking]}.{start + j}.{rest}", source.model)
            for rest in rests[start + j]:
                rows = [(source, f"{stacks[source.model]}.{layer}.{rest}") for source, layer in row]
                yield f"{stacks[first]}.{place}.{rest}", part, rows, depth
            place += 1


def _tensor(
    recipe: Recipe,
    models: Mapping[str, Model],
    seed: int,
    name: str,
    part: Slice,
    rows: Sequence[tuple[Source, str]],
    depth: float,
) -> Tensor:
    base = _base(recipe, part, name, rows)
    others = [row for row in rows if row is not base]
    if base is not None and not others:
        raise ValueError(f"there is nothing to merge into base_model {recipe.base}: list other models")
    ordered = [*([base] if base is not None else []), *others]
    infos = []
    for source, own in ordered:
        model = models[source.model]
        if own not in model.weights:
            _missing(models, source.model, own, ordered[0][0].model)
        infos.append(model.weights.infos[own])
    reference = infos[0]
    inputs = tuple((source.model, own) for source, own in ordered)
    copied = reference.dtype not in _FLOATS
    if copied:
        if jnp.issubdtype(reference.dtype, jnp.floating) or reference.dtype.kind == "c":
            raise WeightFileError(
                models[inputs[0][0]].weights.file_of(inputs[0][1]), "a merge is of float32, bfloat16 and float16 tensors",
                tensor=inputs[0][1], found=reference.dtype, remedy="convert the model first: pefusion convert --dtype float32",
            )  # fmt: skip
    for (owner, own), info in zip(inputs, infos, strict=True):
        path = models[owner].weights.file_of(own)
        if info.shape != reference.shape:
            vocabulary = info.shape[1:] == reference.shape[1:] and len(info.shape) == 2
            raise WeightFileError(
                path, f"a tensor has another shape than in {inputs[0][0]}", tensor=own, expected=list(reference.shape),
                found=list(info.shape),
                remedy="the models have different vocabularies: give both the same one first (transformers: "
                "resize_token_embeddings), or leave that model out" if vocabulary else "merge models of one architecture",
            )  # fmt: skip
        if info.dtype != reference.dtype if copied else info.dtype not in _FLOATS:
            raise WeightFileError(
                path, f"a tensor is not of a kind that goes with {reference.dtype} in {inputs[0][0]}", tensor=own,
                expected=reference.dtype.name if copied else ", ".join(DTYPES), found=info.dtype.name,
                remedy="merge models that were saved alike" if copied else
                "convert the model first: pefusion convert --dtype float32",
            )  # fmt: skip
    if copied:
        return Tensor(name, inputs, reference.shape, reference.dtype, None)
    dtype = jnp.dtype(recipe.dtype) if recipe.dtype is not None else reference.dtype
    try:
        job = _job(recipe, part, others, base is not None, name, depth, seed)
    except ValueError as error:
        raise ValueError(f"{recipe.method}, tensor {name}: {error}") from error
    return Tensor(name, inputs, reference.shape, dtype, job)


def _base(recipe: Recipe, part: Slice, name: str, rows: Sequence[tuple[Source, str]]) -> tuple[Source, str] | None:
    """The base, and the tensor's name there; none if there is none, or if it has no part in the method."""
    if recipe.base is None:
        return None
    listed = next((row for row in rows if row[0].model == recipe.base), None)
    of_layers = part.sources[0].layers is not None
    # As in mergekit: a base names the model whose configuration is copied; beside models it is one more of them.
    if not recipe.ours and recipe.method == "passthrough" and (of_layers or listed is not None):
        return None
    if listed is None and of_layers:
        raise ValueError(
            f"base_model {recipe.base} is not among the sources of the slice that {name} comes from; list it there"
        )
    return listed if listed is not None else (Source(recipe.base, {}), name)


def _job(
    recipe: Recipe, part: Slice, rows: Sequence[tuple[Source, str]], based: bool, tensor: str, depth: float, seed: int
) -> Job:
    """What the method does with the tensor of that name in the result, from those in ``rows``.

    Filters of what each model has of its own are for the tensor's name there, which in slices is another layer's.
    """
    sources = [source for source, _ in rows]
    whole: list[Settings] = [part.parameters, recipe.parameters]
    if recipe.ours:
        known = named.our_parameters(recipe.method)
        per_model = {key for source in sources for key in source.parameters}
        shared = {}
        for key in known:
            value = lookup(whole, key, tensor, depth) if key not in per_model else None
            if value is not None:
                shared[key] = value
        each: dict[str, list[Any]] = {}
        for key in sorted(per_model):
            values = [lookup([source.parameters, *whole], key, own, depth) for source, own in rows]
            for source, value in zip(sources, values, strict=True):
                if value is None:
                    raise ValueError(f"{source.model} has no {key}, but other models have one")
            each[key if key in known else f"{key}s"] = values
        if "key" in known and "key" not in shared:
            shared["key"] = seed
        return named.our_job(recipe.method, shared, each, models=[source.model for source in sources], based=based)
    given: dict[str, Any] = {}
    lists: dict[str, list[Any]] = {}
    for key, parameter in named.MERGEKIT[recipe.method].items():
        scopes = [([source.parameters, *whole], own) for source, own in rows] if parameter.per_model else [(whole, tensor)]
        settled: list[Any] = []
        for place, (scope, own) in enumerate(scopes):
            value = lookup(scope, key, own, depth)
            where = f"{key} of {sources[place].model}" if parameter.per_model else key
            if value is None and parameter.default is named.REQUIRED:
                raise ValueError(f"{where} is missing: write it under parameters")
            settled.append(parameter.default if value is None else named.check(value, parameter, where))
        if parameter.per_model:
            lists[key] = settled
        else:
            given[key] = settled[0]
    return named.mergekit_job(recipe.method, given, lists, count=len(sources), based=based, key=seed)


def _missing(models: Mapping[str, Model], lacking: str, tensor: str, having: str) -> None:
    weights = models[lacking].weights
    raise WeightFileError(
        weights.files[0] if len(weights.files) == 1 else weights.folder,
        f"a tensor is missing that {having} has",
        tensor=tensor,
        expected=f"every tensor of {models[having].folder}",
        found=f"{len(weights)} tensors{did_you_mean(tensor, weights)}",
        remedy="merge models of one architecture, with or without a head alike; pefusion inspect lists what a folder holds",
    )


def _layers(names: Any) -> dict[str, int]:
    """Stack of layers -> number of layers."""
    counts: dict[str, int] = {}
    for name in names:
        found = _LAYER.fullmatch(name)
        if found:
            counts[found[1]] = max(counts.get(found[1], 0), int(found[2]) + 1)
    return counts


def _by_layer(names: Iterable[str]) -> dict[int, list[str]]:
    """Number of a layer -> what follows it in the names of its tensors, in order."""
    layers: dict[int, list[str]] = {}
    for name in names:
        found = _LAYER.fullmatch(name)
        if found:
            layers.setdefault(int(found[2]), []).append(found[3])
    return {layer: sorted(rests) for layer, rests in layers.items()}


def _set_layers(config: dict[str, Any], recipe: Recipe) -> None:
    counts = [(source.layers or (0, 0)) for source in (part.sources[0] for part in recipe.slices)]
    key = next((key for key in ("num_hidden_layers", "n_layer", "num_layers") if key in config), None)
    if key is None:
        raise ValueError("config.json does not say how many layers there are, so slices cannot be written; use models")
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == config[key]:
        config["layer_types"] = [kinds[layer] for start, end in counts for layer in range(start, min(end, len(kinds)))]
    config[key] = sum(end - start for start, end in counts)


def _in_order(name: str) -> list[tuple[int, int, str]]:
    """Sorts numbers in names as numbers."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]
