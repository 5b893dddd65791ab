"""Files as a whole: what a folder is, what is in it, whether it is intact, and turning one kind into another."""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_SENTENCES = (
    "A film about a young boxer from Philadelphia.",
    "How do I reset my password, and why does it expire every ninety days?",
)
KINDS = ("huggingface", "peft", "run")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Source(NamedTuple):
    """A path or Hub id and what it is: ``huggingface``, ``peft``, ``run`` or ``safetensors`` (one file)."""

    kind: str
    path: Path
    given: str


def identify(given: str | os.PathLike[str]) -> Source:
    """Says what a path or Hub id is, from the names of its files.

    Raises:
      FileNotFoundError: if there is nothing, or nothing that is known.
    """
    from pefusion_jax import runs
    from pefusion_jax.interop import hub

    text = os.fspath(given)
    path = Path(text).expanduser()
    if path.is_file():
        return Source("safetensors", path, text)
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            return Source("peft", path, text)
        if (path / runs.FILE).is_file():
            return Source("run", path, text)
        if not (path / hub.CONFIG).is_file():
            raise FileNotFoundError(
                f"{text} holds no model (config.json), no PEFT adapter (adapter_config.json) and no run ({runs.FILE}); it has: "
                + (", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing")
            )
    return Source("huggingface", hub.locate(text).path, text)


def inspect(given: str | os.PathLike[str]) -> dict[str, Any]:
    """Describes a model, adapter, run or safetensors file from headers and configurations alone; reads no weights.

    Args:
      given: a path, or a Hub id.

    Returns:
      A JSON-compatible dictionary: ``kind``, ``path``, ``tensors``, ``parameters``, ``bytes``, ``dtypes``, ``files``; for
      models also ``family``, ``config`` and ``names`` (how many matched, which are missing or unexpected), for adapters and
      runs their configuration and ``shapes``, for a file its ``shapes``.

    Raises:
      FileNotFoundError, ValueError: if it is not there or damaged.
    """
    from pefusion_jax import runs
    from pefusion_jax.interop import manifest, pretrained, safetensors

    source = identify(given)
    out: dict[str, Any] = {"kind": source.kind, "path": os.fspath(source.path)}
    if source.kind == "huggingface":
        found = pretrained.open_checkpoint(source.path)
        out |= {
            "family": found.family.name,
            "config": found.family.write_config(found.config),
            "names": {kind: names if kind != "matched" else len(names) for kind, names in found.report._asdict().items()},
        }
        infos, files = found.weights.infos, found.weights.files
    else:
        if source.kind == "safetensors":
            file = source.path
        elif source.kind == "run":
            file = source.path / runs.FILE
            out["config"] = safetensors.read_metadata(file)
        else:
            from pefusion_jax.interop import peft, peft_config

            file = peft.weights_file(source.path)
            out["config"] = peft_config.read_config(source.path)
        infos, files = safetensors.read_header(file), (file,)
        out["shapes"] = {name: list(info.shape) for name, info in infos.items()}
    elements = {name: int(np.prod(info.shape, dtype=np.int64)) for name, info in infos.items()}
    out |= {
        "tensors": len(infos),
        "parameters": sum(elements.values()),
        "bytes": sum(info.nbytes for info in infos.values()),
        "dtypes": dict(Counter(str(info.dtype) for info in infos.values())),
        "files": [file.name for file in files],
    }
    folder = source.path if source.path.is_dir() else source.path.parent
    out["manifest"] = (folder / manifest.NAME).is_file()
    return out


class Plan(NamedTuple):
    """What :func:`convert` writes, or would write.

    ``base``: the base model of an adapter or a run. ``difference``: with ``as_layer``, the largest absolute difference of
    outputs between the linearized model and what is written, on a few sentences or on noise images; ``None`` where nothing is
    approximated.
    """

    source: str
    kind: str
    to: str
    out: str
    base: str | None
    dtype: str | None
    files: tuple[str, ...]
    difference: float | None = None


def convert(
    given: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: str = "huggingface",
    base: str | None = None,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    as_layer: bool = False,
    target: str = "transformers>=5",
    overwrite: bool = False,
    dry_run: bool = False,
    command: Sequence[str] | None = None,
) -> Plan:
    """Turns a model, a PEFT adapter or a run into a Hugging Face model, a PEFT adapter or a run.

    A model can be cast and cut into shards. An adapter or run becomes a merged model, or the other kind of adapter.

    Args:
      given: a path, or the Hub id of a model.
      out: the folder to write; whole or not at all.
      to: ``huggingface``, ``peft`` or ``run``.
      base: the base model of a PEFT adapter; what the adapter names if not given.
      dtype: of a model's tensors in the file; that of the source's or its base's file if not given. Merging is in float32.
      max_shard_bytes: largest file of weights.
      as_layer: export a network- or weight-linearized run as its layer counterpart, which is another function.
      target: names of modules in a PEFT adapter, ``transformers>=5`` or ``transformers<5``.
      overwrite: replace a folder that is not empty.
      dry_run: read and check everything, and write nothing in ``out``.
      command: the command line, for the card.

    Returns:
      What was written, or would be.

    Raises:
      ValueError: if the source cannot become that kind, with the way out; if an argument has no meaning for it; or if the
        source or its base lies in ``out``.
      FileExistsError: if ``out`` is not empty.
    """
    from pefusion_jax import files, runs
    from pefusion_jax.interop import hub, saving
    from pefusion_jax.interop.peft_names import TARGETS

    if to not in KINDS:
        raise ValueError(f"to={to!r} is not one of {', '.join(KINDS)}")
    source = identify(given)
    if source.kind == "safetensors":
        raise ValueError(f"{given} is a single file; pass the folder that also holds its config.json")
    if source.kind == to != "huggingface":
        raise ValueError(f"{given} is a {to} already; choose another --to: {', '.join(kind for kind in KINDS if kind != to)}")
    if source.kind == "huggingface" and to != "huggingface":
        raise ValueError(f"{given} is a whole model; only an adapter or a run becomes {to}: train one with pefusion finetune")
    if dtype is not None and to != "huggingface":
        raise ValueError(f"dtype={dtype!r} goes with --to huggingface; adapters keep their own precision")
    if base is not None and source.kind != "peft":
        raise ValueError(f"base={base!r} is for a PEFT adapter, and {given} is a {source.kind}; leave --base out")
    if to != "peft" and (as_layer or target != TARGETS[0]):
        raise ValueError(
            f"as_layer and target say how a PEFT adapter is written; leave them out, or convert --to peft, not {to}"
        )
    target_folder = Path(out)
    files.require_free(target_folder, overwrite)
    files.require_apart(out, source.path)
    run = runs.load_run(source.path) if source.kind == "run" else None
    if source.kind != "huggingface":
        base = str(run.spec["model"]) if run is not None else base or _base_of(source.path)
        files.require_apart(out, hub.locate(base).path)
    limit = saving.MAX_SHARD_BYTES if max_shard_bytes is None else max_shard_bytes
    names: tuple[str, ...]
    difference = None
    if to == "huggingface":
        names = _to_huggingface(source, run, target_folder, base, dtype, limit, overwrite, dry_run, command)
    else:  # small, so that a dry run is a run that throws away what it made
        with tempfile.TemporaryDirectory() if dry_run else nullcontext() as scratch:
            place = target_folder if scratch is None else Path(scratch) / "out"
            if run is not None:
                difference = _to_peft(run, place, as_layer, target, overwrite)
            else:
                _to_run(source, place, str(base), overwrite)
            names = tuple(sorted(file.name for file in place.iterdir()))
    return Plan(os.fspath(given), source.kind, to, os.fspath(out), base, dtype, names, difference)


def _to_huggingface(
    source: Source,
    run: Any,
    out: Path,
    base: str | None,
    dtype: str | None,
    limit: int,
    overwrite: bool,
    dry_run: bool,
    command: Sequence[str] | None,
) -> tuple[str, ...]:
    import jax
    import jax.numpy as jnp

    from pefusion_jax import PromptTuning, fold, load_pretrained
    from pefusion_jax.interop import hub, load_peft, manifest, pretrained, saving
    from pefusion_jax.interop.card import model_card

    inputs = {Path(source.given).name or source.given: source.path}
    models: tuple[str, ...] = ()
    results: Mapping[str, Any] | None = None
    method = None
    if base is None:
        like, base_name, relation = source.path, source.given, "finetune"
        model, params = load_pretrained(source.path, dtype="auto" if dtype is None else None)
    else:
        base_name, like = base, hub.locate(base).path
        if run is not None:
            model, params, adapted, tree = run.model, run.params, run.adapted, run.tree
            results = _scores(run.spec)
        else:
            model, params = load_pretrained(base_name)
            adapted, tree = load_peft(source.path, model, params)
        inputs["base"] = like
        relation, models = "merge", (source.given,)
        from pefusion_jax.deltas import Delta

        if not adapted.folds:
            if adapted.origin is not None and any(isinstance(rule, PromptTuning) for rule in adapted.origin.methods):
                raise ValueError(
                    f"{source.given} has a prompt: positions in front of the tokens, which no weights put there. Keep it "
                    "beside its base, as it is or with --to run or --to peft, or train LoRA to merge it"
                )
            if adapted.pushforward is None:
                raise ValueError(
                    f"{source.given} has adapters with a nonlinearity, or others for each task, which no single set of weights "
                    "computes; keep the run, or train LoRA to merge it"
                )
            raise ValueError(
                f"{source.given} is linearized over the network, which no single set of weights computes; train it with "
                "--mode layer to merge it, or export its layer counterpart: --to peft --as-layer"
            )
        delta = tree if isinstance(tree, Delta) else adapted.deltas(params, tree)
        params = fold(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), delta)
        stored = pretrained.stored_dtypes(pretrained.open_checkpoint(like))
        dtype = dtype or (str(*stored) if len(stored) == 1 else None)
        method = f"The adapter of `{source.given}` written into the weights of `{base_name}`."
    described = {
        name: manifest.describe_input(source.given if name != "base" else base_name, path) for name, path in inputs.items()
    }
    settings = {"source": source.given, "kind": source.kind, "base": base_name, "dtype": dtype, "max_shard_bytes": limit}
    title = Path(source.given).name or source.given
    card = model_card(
        title,
        base_model=base_name,
        relation=relation,
        models=models,
        method=method,
        settings=settings,
        command=command,
        results=results,
        inputs=described,
    )
    if dry_run:
        return saving.planned_files(model, params, dtype=dtype, max_shard_bytes=limit, like=like)
    saving.save_pretrained(
        out,
        model,
        params,
        dtype=dtype,
        max_shard_bytes=limit,
        like=like,
        card=card,
        inputs=described,
        settings=settings,
        overwrite=overwrite,
    )
    return tuple(sorted(file.name for file in out.iterdir()))


def _to_peft(run: Any, out: Path, as_layer: bool, target: str, overwrite: bool) -> float | None:
    from pefusion_jax.interop import save_peft

    approximate = as_layer and run.spec["mode"] in ("network", "weight")
    return save_peft(
        out,
        run.adapted,
        run.tree,
        params=run.params,
        base=str(run.spec["model"]),
        as_layer=as_layer,
        inputs=_sample_inputs(str(run.spec["model"]), run.model) if approximate else None,
        target=target,
        overwrite=overwrite,
    ).difference


def _sample_inputs(name: str, model: Any) -> dict[str, Any] | None:
    """Something to compare two versions of a model on: a few sentences where it has a tokenizer, noise where it sees images."""
    from pefusion_jax.interop import load_tokenizer

    size = getattr(model.config, "image_size", None)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        shape = (2, getattr(model.config, "num_channels", 3), height, width)
        return {"pixel_values": np.random.default_rng(0).normal(size=shape).astype(np.float32)}
    try:
        tokenizer = load_tokenizer(name)
    except FileNotFoundError:
        return None
    encoded = tokenizer(
        list(_SENTENCES), padding=bool(tokenizer.pad_token), truncation=True, max_length=12, return_tensors="np"
    )
    return {key: np.asarray(value, np.int32) for key, value in encoded.items() if key in ("input_ids", "attention_mask")}


def _to_run(source: Source, out: Path, base: str, overwrite: bool) -> None:
    from pefusion_jax import files, load_pretrained, runs
    from pefusion_jax.interop import manifest
    from pefusion_jax.interop.peft import read_peft

    model, params = load_pretrained(base)
    adapter = read_peft(source.path, model, params)
    if adapter.heads:
        raise ValueError(
            f"{source.given} also holds a head that {base} does not have: {', '.join(adapter.heads)}. A run cannot keep it: "
            "use --base with a model that has this head, or interop.read_peft, which gives it as .heads"
        )
    with files.new_folder(out, overwrite) as folder:
        runs.save_run(folder, adapter.adapters, model=base, params=params, methods=adapter.methods, source=source.given)
        inputs = {"adapter": manifest.describe_input(source.given, source.path)}
        manifest.write_manifest(folder, inputs=inputs, settings={"base": base})


def _base_of(folder: Path) -> str:
    from pefusion_jax.interop import peft_config

    name = peft_config.read_config(folder).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{folder}/adapter_config.json does not say which model it is for; name it: --base MODEL")
    return name


def _scores(spec: Mapping[str, Any]) -> dict[str, dict[str, float]] | None:
    """The result tables that a run recorded, as ``{row: {task: score}}``."""
    rows = {}
    for name, entry in (spec.get("scores") or {}).items():
        scores = entry.get("scores") if isinstance(entry, Mapping) else None
        if isinstance(scores, Mapping):
            rows[name] = {task: value for task, value in scores.items() if isinstance(value, (int, float))}
    return rows or None


def parse_size(text: str) -> int:
    """Bytes from ``5GB``, ``300MB``, ``64MiB`` or a plain number.

    Raises:
      ValueError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]{0,3})", text.strip())
    if not match or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write for example 5GB, 300MB or 64MiB")
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size < 1:
        raise ValueError(f"{text!r} is not a positive size")
    return size
