"""The commands on files: ``pefusion convert | inspect | merge | verify``."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Convert:
    """Turns a model, a PEFT adapter or a run into a Hugging Face model, a PEFT adapter or a run.

    A model is cast or cut into shards; an adapter or a run is merged into its base, or becomes the other kind of adapter.

    Merge:   pefusion convert runs/spam --out merged --dtype bfloat16

    Export:  pefusion convert runs/spam --to peft --out spam-lora

    Import:  pefusion convert some-peft-adapter --to run --base sentence-transformers/all-MiniLM-L6-v2 --out runs/theirs
    """

    source: tyro.conf.Positional[str]
    """A folder (model, PEFT adapter, or what 'pefusion finetune' or 'fuse' wrote), or a model's Hub id."""
    out: Annotated[str, tyro.conf.arg(help="Folder to write. It must be empty or not exist.", metavar="DIR")]
    to: Literal["huggingface", "peft", "run"] = "huggingface"
    """What to write: a whole model, a PEFT adapter, or a run."""
    base: str | None = None
    """Base model of a PEFT adapter; the one that the adapter names if not given."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of a model's file; that of the source if not given."""
    max_shard_size: str = "5GB"
    """Largest file of weights, for example 300MB."""
    as_layer: bool = False
    """Export a network-linearized run as its layer counterpart, which is another function; the difference is printed."""
    target: Literal["transformers>=5", "transformers<5"] = "transformers>=5"
    """Names of modules in a PEFT adapter: they changed for vision models."""
    dry_run: bool = False
    """Read and check everything, write nothing, and say what would be written."""
    overwrite: bool = False
    """Replace a folder that is not empty."""
    json: bool = False
    """Print what was written as JSON."""


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Says what a model, adapter, run or safetensors file is and holds, from its headers alone.

    Example:  pefusion inspect sentence-transformers/all-MiniLM-L6-v2
    """

    source: tyro.conf.Positional[str]
    """A folder, a safetensors file, or a model's Hub id."""
    dry_run: bool = False
    """Only say what the source is, without opening its weights."""
    json: bool = False
    """Print everything, with the shape of every tensor of an adapter, as JSON."""


@dataclasses.dataclass(frozen=True)
class Merge:
    """Merges whole models by a recipe, file to file, in bounded memory.

    The recipe is mergekit's YAML (merge_method, models or slices, base_model, parameters), or the same with 'method: NAME', a
    method of pefusion_jax.fusion that needs neither data nor an inner method and sees one tensor at a time.

    Example:  pefusion merge ties.yml merged --dry-run
    """

    config: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CONFIG")]
    """The recipe, a YAML file."""
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """Folder to write. It must be empty or not exist."""
    threads: int = 2
    """Threads that read."""
    max_shard_size: str = "5GB"
    """Largest file of weights, for example 300MB."""
    seed: int = 0
    """Seed of methods that drop entries at random."""
    digest_inputs: bool = False
    """Record the SHA-256 of the inputs' weights too, for which they are read once more."""
    dry_run: bool = False
    """Read and check everything but the weights, write nothing, and print the plan."""
    overwrite: bool = False
    """Replace a folder that is not empty."""
    json: bool = False
    """Print what was written as JSON."""


@dataclasses.dataclass(frozen=True)
class Verify:
    """Recomputes the digests of a folder and compares them with its manifest.json; exit status 1 if they differ.

    Example:  pefusion verify merged
    """

    folder: tyro.conf.Positional[str]
    """A folder that 'pefusion convert' or 'pefusion merge' wrote."""
    dry_run: bool = False
    """Only list the files that the manifest names."""
    json: bool = False
    """Print the lists as JSON."""


def convert(given: Convert) -> None:
    """Runs :class:`Convert`."""
    from pefusion_jax import checkpoints

    plan = checkpoints.convert(
        given.source,
        given.out,
        to=given.to,
        base=given.base,
        dtype=given.dtype,
        max_shard_bytes=checkpoints.parse_size(given.max_shard_size),
        as_layer=given.as_layer,
        target=given.target,
        overwrite=given.overwrite,
        dry_run=given.dry_run,
        command=("pefusion", *sys.argv[1:]),
    )
    if given.json:
        print(json.dumps({**plan._asdict(), "dry_run": given.dry_run}, indent=2))
    else:
        did = "would write" if given.dry_run else "wrote"
        print(f"{plan.source} is a {plan.kind}; {did} {plan.out} as {plan.to}: {', '.join(plan.files)}")
        if plan.difference is not None:
            print(f"its outputs differ from the linearized model's by up to {plan.difference:.3g} on sample inputs")


def inspect(given: Inspect) -> None:
    """Runs :class:`Inspect`."""
    from pefusion_jax import checkpoints
    from pefusion_jax.interop.headers import shown

    if given.dry_run:
        source = checkpoints.identify(given.source)
        found: dict[str, Any] = {"kind": source.kind, "path": str(source.path)}
    else:
        found = checkpoints.inspect(given.source)
    if given.json:
        print(json.dumps(found, indent=2, default=str))
        return
    found.pop("shapes", None)
    config = found.pop("config", None)
    names = found.pop("names", None)
    for key, value in found.items():
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else shown(value, 100_000)
        print(f"{key + ':':12} {text}")
    if names:
        print("names:       " + ", ".join(f"{n if isinstance(n, int) else len(n)} {kind}" for kind, n in names.items()))
        for kind in ("missing", "unexpected", "misfits"):
            for name in names[kind][:10]:
                print(f"  {kind}: {shown(name)}")
    for key, value in (config or {}).items():
        print(f"  {shown(key)}: {shown(value, 100)}")


def merge(given: Merge) -> None:
    """Runs :class:`Merge`."""
    from pefusion_jax import checkpoints, merging
    from pefusion_jax.interop.headers import shown

    def progress(done: int, total: int, name: str) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{total} {shown(name)[-60:]:60}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    merged = merging.merge_files(
        given.config,
        given.out,
        threads=given.threads,
        shard_size=checkpoints.parse_size(given.max_shard_size),
        seed=given.seed,
        dry_run=given.dry_run,
        progress=progress,
        overwrite=given.overwrite,
        digest_inputs=given.digest_inputs,
        command=("pefusion", *sys.argv[1:]),
    )
    if given.json:
        print(json.dumps({**merged._asdict(), "dry_run": given.dry_run}, indent=2))
        return
    print(f"{'would write' if given.dry_run else 'wrote'} {merged.out}: {', '.join(merged.files)}")
    print(f"method:      {merged.method}")
    print("models:      " + ", ".join(f"{name} (base)" if name == merged.base else name for name in merged.models))
    print(f"tensors:     {merged.tensors:,}" + (f", of which {merged.copied:,} are copied" if merged.copied else ""))
    print(f"bytes:       {merged.bytes_read:,} to read, {merged.bytes_written:,} to write")
    print(f"memory:      about {merged.peak_bytes:,} bytes beside the interpreter")


def verify(given: Verify) -> None:
    """Runs :class:`Verify`."""
    from pefusion_jax.interop import manifest
    from pefusion_jax.interop.headers import shown

    if given.dry_run:
        listed = list(manifest.read_manifest(Path(given.folder))["files"])
        print(json.dumps({"files": listed}, indent=2) if given.json else "\n".join(listed))
        return
    verdict = manifest.verify(given.folder)
    if given.json:
        print(json.dumps({"ok": verdict.ok, **verdict._asdict()}, indent=2))
    else:
        for kind, names in verdict._asdict().items():
            if names and kind != "intact":
                print(f"{kind}: {', '.join(map(shown, names))}")
        print(f"{len(verdict.intact)} files intact" + ("" if verdict.ok else "; the folder is not what its manifest says"))
    if not verdict.ok:
        raise SystemExit(1)
