"""Writes adapters as PEFT folders: LoRA with biases and whole modules beside it, from adapters, displacements or deltas; and
prompts, see :mod:`peft_prompt`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax import files, trees
from pefusion_jax.adapt import Adapted, Origin
from pefusion_jax.deltas import Delta, LowRank, dense, fold, weighted_sum
from pefusion_jax.interop import manifest, peft_config
from pefusion_jax.interop.card import model_card
from pefusion_jax.interop.peft import PREFIX, WEIGHTS
from pefusion_jax.interop.peft_names import Module, Parameters, column, default_prefix, modules_of
from pefusion_jax.interop.peft_prompt import prompt_content
from pefusion_jax.interop.peft_rows import MERGED, Content, Site, described, fits, rows_of, whole_parameters
from pefusion_jax.interop.safetensors import save_safetensors
from pefusion_jax.interop.saving import family_of_model
from pefusion_jax.linearize import linearize
from pefusion_jax.methods import FullFineTuning, LoRA, PromptTuning

# Fields of the configuration that the card repeats, of whatever type.
_SHOWN = ("r", "lora_alpha", "use_rslora", "bias", "target_modules", "modules_to_save", "num_virtual_tokens")


class PeftExport(NamedTuple):
    """What was written.

    Attributes:
      config: the content of ``adapter_config.json``.
      modules: names of the modules with a LoRA; for a prompt, of the word embeddings.
      difference: with ``as_layer`` and ``inputs``, the largest absolute difference between the outputs of the linearized
        model and of what was written, else ``None``.
    """

    config: dict[str, Any]
    modules: tuple[str, ...]
    difference: float | None


def save_peft(
    folder: str | os.PathLike[str],
    adapted: Adapted,
    tree: Any,
    *,
    params: Mapping[str, Any],
    base: str | os.PathLike[str],
    target: str = "transformers>=5",
    prefix: str | None = None,
    as_layer: bool = False,
    inputs: Mapping[str, Any] | None = None,
    task_type: str | None = None,
    revision: str | None = None,
    dtype: Any = jnp.float32,
    overwrite: bool = False,
) -> PeftExport:
    """Writes adapters as a folder that ``PeftModel.from_pretrained`` loads, with a manifest, all of it or nothing.

    LoRA is written exactly, with biases and other parameters that :class:`FullFineTuning` moved as ``bias`` or
    ``modules_to_save``. A model linearized in ``layer`` mode is an ordinary LoRA, of rank r where it was expanded at B = 0 and
    of rank 2r elsewhere. The other two linearizations are not weight changes of a plain model; ``as_layer`` writes the plain
    LoRA next to them, which computes something else, and measures how much else.

    The prompt of :class:`PromptTuning` is written as PEFT's ``PROMPT_TUNING``, with ``modules_to_save`` beside it; of a
    generated one, what the generator makes. Prompts of several tasks, linearized ones, and prompts beside other methods have no
    such folder.

    Args:
      folder: to make; it must be empty or not exist.
      adapted: ``adapt``'s or ``linearize``'s result for one of our backbones.
      tree: adapters, a displacement, or a :class:`Delta` (such as ``fuse`` returns) whose matrices are low-rank pairs.
      params: the base parameters.
      base: Hub id or folder of the base model, for ``base_model_name_or_path``.
      target: ``"transformers>=5"`` or ``"transformers<5"``, which name the layers of ViT, DeiT and DINOv2 differently.
      prefix: in front of the modules' names: ``"bert."`` for a ``BertForSequenceClassification``, ``""`` for a ``BertModel``.
        By default what fits the backbone's own head, or that it has none.
      as_layer: for ``network`` and ``weight`` linearizations: write their layer counterpart.
      inputs: of the model, to measure what ``as_layer`` changes.
      task_type: PEFT's, such as ``"SEQ_CLS"``. A prompt needs one: by default ``"CAUSAL_LM"`` or ``"SEQ_2_SEQ_LM"`` where the
        backbone is such a model, else ``"FEATURE_EXTRACTION"``.
      revision: of the base model.
      dtype: of the tensors.
      overwrite: replace a folder that is not empty.

    Raises:
      ValueError: if there is no such PEFT adapter, naming the remedy, a leaf is not finite, or ``base`` lies in the folder.
      FileExistsError: if the folder is not empty.
    """
    if (local := Path(base).expanduser()).is_dir():
        files.require_apart(folder, local)
    origin = adapted.origin
    if origin is None:
        raise ValueError(f"this model does not know its methods, so that no PEFT adapter describes it; {MERGED}")
    family = family_of_model(origin.model)
    config = origin.model.config
    where = Parameters(params, family, config)
    for path, leaf in trees.paths(tree.leaves if isinstance(tree, Delta) else tree).items():
        if not np.isfinite(np.asarray(leaf)).all():
            raise ValueError(f"adapters to be saved: {path!r} holds NaN or infinite elements; train it again, or leave it out")
    modules = modules_of(family, config)
    named = column(family, modules, target, default_prefix(family, config) if prefix is None else prefix).modules
    tied = {name.rpartition(".")[0] for name in family.copies(config).values() if name.endswith(".weight")}
    if any(isinstance(rule, PromptTuning) for rule in origin.methods):
        content = prompt_content(adapted, origin, params, tree, named, where, tied, family, task_type)
    else:
        content = _lora_content(adapted, origin, params, tree, named, where, tied, as_layer)
    stored = {}
    for name, array in content.tensors.items():
        with np.errstate(over="ignore"):
            stored[name] = np.ascontiguousarray(np.asarray(array, np.float32).astype(jnp.dtype(dtype)))
        if not np.isfinite(stored[name].astype(np.float32)).all():
            raise ValueError(f"{name} is not finite in {jnp.dtype(dtype)}; write it as bfloat16 or float32")
    written = peft_config.complete(
        content.kind,
        {"task_type": task_type, "revision": revision, "base_model_name_or_path": os.fspath(base)} | content.fields,
    )
    difference = _difference(adapted, params, tree, inputs) if as_layer and inputs is not None else None
    settings = (
        {name: written[name] for name in _SHOWN if name in written}
        | ({} if origin.mode is None else {"linearization": origin.mode})
        | ({} if difference is None else {"largest difference of outputs from the linearized model": difference})
    )
    card = model_card(
        "LoRA adapter" if content.kind == "LORA" else "Prompt",
        base_model=os.fspath(base),
        relation="adapter",
        library="peft",
        settings=settings,
    )
    with files.new_folder(folder, overwrite) as made:
        files.write_json(Path(made) / peft_config.CONFIG, written)
        save_safetensors(Path(made) / WEIGHTS, stored)
        files.write_atomically(Path(made) / "README.md", card.encode())
        manifest.write_manifest(made, settings={"base": os.fspath(base), **settings})
    return PeftExport(written, content.modules, difference)


def _lora_content(
    adapted: Adapted,
    origin: Origin,
    params: Mapping[str, Any],
    tree: Any,
    named: Mapping[str, tuple[Module, ...]],
    where: Parameters,
    tied: set[str],
    as_layer: bool,
) -> Content:
    """What the folder of a LoRA holds."""
    if origin.mode in ("network", "weight") and not as_layer:
        raise ValueError(
            f"a model linearized in mode={origin.mode!r} is not a change of the weights of a plain model, which is what PEFT "
            "stores. as_layer=True writes the plain LoRA next to it and, given inputs, measures the difference; mode='layer' "
            "is written exactly"
        )
    sites, changes = (_from_delta if isinstance(tree, Delta) else _from_tree)(adapted, origin, params, tree)
    rows = rows_of(named, sites, where.stacked)
    for name in rows:
        if any(module.name in tied for module in named[name]):
            raise ValueError(f"{name} shares its weight with another layer, which peft would leave unadapted; {MERGED}")
    if not rows:
        raise ValueError(f"there is no LoRA to be written, and PEFT has no adapter without one; {MERGED}")
    tensors, extra = whole_parameters(named, rows, changes, where, tied)
    fields = described(rows, named)
    stabilized = fields["use_rslora"]
    for name, row in rows.items():
        b = row.b if fits(row.alpha(stabilized)) else row.b * np.float32(row.scale)
        kind = named[name][0].kind
        suffix = ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{name}.{suffix[0]}": row.a, f"{name}.{suffix[1]}": b}
    dropout = Counter(site.dropout for site in sites.values()).most_common(1)[0][0]
    return Content(
        "LORA",
        {PREFIX + name: array for name, array in tensors.items()},
        fields | extra | {"lora_dropout": dropout},
        tuple(rows),
    )


def _from_tree(
    adapted: Adapted, origin: Origin, params: Mapping[str, Any], tree: Any
) -> tuple[dict[str, Site], dict[str, jax.Array]]:
    """LoRA sites and dense changes, by stored path, from adapters or a displacement."""
    if origin.mode is None:
        parts: tuple[Any, ...] = (tree,)
    else:
        start = trees.flat(origin.adapters0)
        given = trees.flat(tree)
        for path in given:
            if path not in start:
                raise ValueError(f"the displacement has a leaf {path!r}, adapters0 has none{trees.did_you_mean(path, start)}")
        parts = (origin.adapters0, trees.nest({path: given.get(path, jnp.zeros_like(leaf)) for path, leaf in start.items()}))
    found: list[tuple[Any, str, Any]] = []

    def visit(rule: Any, site: str, leaves: Any, weights: Any) -> dict[str, Any]:
        found.append((rule, site, leaves))
        return {}

    expand = adapted.expand if origin.plain is None else origin.plain.expand
    if expand is None:
        raise ValueError(f"this model cannot be visited site by site; {MERGED}")
    expand.changes(params, parts, visit)
    sites: dict[str, Site] = {}
    changes: dict[str, jax.Array] = {}
    for rule, site, leaves in found:
        if isinstance(rule, LoRA):
            sites[site] = _lora(rule, site, leaves, origin.mode)
        elif isinstance(rule, FullFineTuning):
            total = leaves[0] if len(leaves) == 1 else jax.tree.map(jnp.add, *leaves)
            changes |= {f"{site}/{rule.owns(name)}" if site else rule.owns(name): leaf for name, leaf in total.items()}
        else:
            raise ValueError(f"{type(rule).__name__} (at {site}) is not written as a PEFT adapter yet; {MERGED}")
    return sites, changes


def _lora(rule: LoRA, site: str, leaves: Any, mode: str | None) -> Site:
    """The plain LoRA that a site amounts to."""
    a, b = leaves[0]["lora_a"], leaves[0]["lora_b"]
    scale = rule.scale(site, a.shape[-1])
    if mode == "weight":
        a, b = a + leaves[1]["lora_a"], b + leaves[1]["lora_b"]
    elif mode is not None:
        a_step, b_step = leaves[1]["lora_a"], leaves[1]["lora_b"]
        if bool(jnp.any(b)):  # s (A0 (B0 + dB) + dA B0)
            a, b = jnp.concatenate([a, a_step], -1), jnp.concatenate([b + b_step, b], -2)
        else:
            b = b_step
    return Site(a, b, scale, rule.rank_stabilized, rule.dropout)


def _from_delta(
    adapted: Adapted, origin: Origin, params: Mapping[str, Any], delta: Delta
) -> tuple[dict[str, Site], dict[str, jax.Array]]:
    """LoRA sites and dense vectors from a weight-space change, relative to the base parameters."""
    if origin.plain is not None:
        delta = _total(origin.plain, params, origin.adapters0, delta)
    sites: dict[str, Site] = {}
    changes: dict[str, jax.Array] = {}
    for path, leaf in delta.leaves.items():
        if isinstance(leaf, LowRank) and leaf.axes is None:
            sites[path.rpartition("/")[0]] = Site(leaf.a, leaf.b, 1.0, False, 0.0)
        elif path.rpartition("/")[2] in ("bias", "scale"):
            changes[path] = dense(leaf)
        else:
            raise ValueError(
                f"the change of {path} is a dense matrix, and a LoRA stores pairs of low rank: "
                "write the merged model instead: save_pretrained(FOLDER, model, pf.fold(params, delta)). Linear fusion methods "
                "(simple_average, task_arithmetic) keep pairs"
            )
    return sites, changes


def _total(plain: Adapted, params: Mapping[str, Any], adapters0: Any, delta: Delta) -> Delta:
    """A change relative to the point of expansion as one relative to the base: both together."""
    start = plain.deltas(params, adapters0).leaves
    moved = {path: leaf for path, leaf in start.items() if bool(jnp.any(leaf.b if isinstance(leaf, LowRank) else leaf))}
    both = {path: weighted_sum([leaf, delta.leaves[path]], (1.0, 1.0)) for path, leaf in moved.items() if path in delta.leaves}
    return Delta({**moved, **delta.leaves, **both})


def _difference(adapted: Adapted, params: Mapping[str, Any], tree: Any, inputs: Mapping[str, Any]) -> float:
    """The largest absolute difference between a linearized model's outputs and those of its layer counterpart."""
    origin = adapted.origin
    if origin is None or origin.plain is None:
        return 0.0
    plain, start = origin.plain, origin.adapters0

    def outputs(of: Any, *args: Any) -> Any:
        return jax.jit(lambda args, inputs: of(*args, **inputs))(args, dict(inputs))

    if isinstance(tree, Delta):
        theirs = outputs(adapted.apply_deltas, params, tree)
        ours = outputs(plain.base, fold(params, _total(plain, params, start, tree)))
    elif origin.mode == "weight":
        flat = trees.flat(tree)
        moved = trees.map_paths(lambda path, leaf: leaf + flat[path] if path in flat else leaf, start)
        theirs, ours = outputs(adapted.apply, params, tree), outputs(plain.apply, params, moved)
    else:
        theirs = outputs(adapted.apply, params, tree)
        ours = outputs(linearize(plain, start, "layer").apply, params, tree)
    pairs = zip(jax.tree.leaves(theirs), jax.tree.leaves(ours), strict=True)
    return max(float(jnp.max(jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)))) for x, y in pairs if x.size)
