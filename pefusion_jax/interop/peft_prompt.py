"""Prompts in PEFT's folders: one tensor without the name of a module, and whole modules beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax import trees
from pefusion_jax.adapt import Adapted, Origin
from pefusion_jax.backbones import Family
from pefusion_jax.deltas import Delta
from pefusion_jax.interop import peft_config
from pefusion_jax.interop.peft_names import Module, Parameters, columns_of, modules_of
from pefusion_jax.interop.peft_rows import Content, whole_parameters
from pefusion_jax.interop.peft_tensors import Reader
from pefusion_jax.interop.peft_tree import displaced, nested
from pefusion_jax.methods import FullFineTuning, PromptTuning
from pefusion_jax.methods.prompt import LEAF, WORD_EMBEDDINGS
from pefusion_jax.rules import join, owner

KIND, TENSOR = "PROMPT_TUNING", "prompt_embeddings"
# PEFT does not wrap the model that it puts a prompt in front of, so that the names have one level less than LoRA's.
PREFIX = "base_model."
# Ends of architectures -> the type of PEFT's model that fits; those without a head for it have features.
_TASK_TYPES = {"ForCausalLM": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
# Types whose model needs a head in the file -> its names.
_HEADS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("SEQ_CLS", "TOKEN_CLS"), ("classifier", "score")),
    "QUESTION_ANS": ("qa_outputs",),
}


class Found(NamedTuple):
    """A prompt that was read; the fields are those of ``PeftAdapter`` and its report."""

    methods: tuple[Any, ...]
    adapters: dict[str, Any]
    heads: dict[str, np.ndarray]
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    column: str


def word_embeddings(family: Family, shape: Any) -> Module:
    """The module that a prompt stands beside.

    Raises:
      ValueError: if the model has none, or several.
    """
    tables = [module for module in modules_of(family, shape) if module.kind == "embedding"]
    found = [module for module in tables if re.fullmatch(WORD_EMBEDDINGS, module.path)]
    if len(found) != 1:
        which = f"several: {', '.join(module.path for module in found)}" if found else "none"
        raise ValueError(
            f"a prompt stands in front of the word embeddings, of which this {family.name} model has {which}; it is for text "
            "models with one table of them, such as BERT, T5 and Llama"
        )
    return found[0]


def read_prompt(
    config: Mapping[str, Any], family: Family, shape: Any, base: Parameters, tensors: Mapping[str, np.ndarray]
) -> Found:
    """The prompt of a file, and what stands beside it.

    Raises:
      ValueError: if it is not a prompt for this model.
    """
    module = word_embeddings(family, shape)
    prompt = _checked(config, family.name, module.shape[-1], tensors)
    plain = {name.removeprefix(PREFIX): array for name, array in tensors.items() if name.startswith(PREFIX)}
    unexpected = [name for name in tensors if name != TENSOR and not name.startswith(PREFIX)]
    names = {name.rpartition(".")[0] for name in plain}
    column = max(columns_of(family, shape), key=lambda column: len(names & column.modules.keys()))

    # What stands beside a prompt is what stands beside a LoRA without targets.
    beside = {name: field.default for name, field in peft_config.FIELDS["LORA"].items()}
    beside |= {"target_modules": [], "modules_to_save": config["modules_to_save"]}
    selection = peft_config.Selection(beside, family.model_types)
    reader = Reader(beside, family, shape, base, selection, column, False)
    where = {name: reader.plain(name, array) for name, array in plain.items()}
    unexpected += [PREFIX + name for name, use in where.items() if use == "unexpected"]
    _require_still(reader.changes, module)
    moved, leaves = displaced(family.table(shape), reader.changes, base.stacked)
    return Found(
        methods=(PromptTuning(length=prompt.shape[0]), *moved),
        adapters=nested({join(module.path, LEAF): prompt, **leaves}),
        heads={name: plain[name] for name, use in where.items() if use == "head"},
        matched=_names(column.modules, module),
        missing=tuple(reader.missing(set())),
        unexpected=tuple(unexpected),
        column=column.label,
    )


def _checked(config: Mapping[str, Any], family: str, width: int, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """The prompt in float32; of two submodules that of the encoder, which is all that PEFT's model looks at."""
    n, both = config["num_virtual_tokens"], config["task_type"] == "SEQ_2_SEQ_LM"
    parts = config["num_transformer_submodules"] or (2 if both else 1)
    if parts == 2 and not both:
        raise ValueError(
            f"num_transformer_submodules=2 goes with task_type='SEQ_2_SEQ_LM' and not {config['task_type']!r}: the rows of a "
            "decoder have no meaning here. Train it with num_transformer_submodules=1"
        )
    if config["token_dim"] not in (None, width):
        raise ValueError(
            f"token_dim={config['token_dim']} in {peft_config.CONFIG}, but the word embeddings of this {family} model are "
            f"{width} wide; load the model that the prompt was trained on: {config['base_model_name_or_path']!r:.200}"
        )
    if TENSOR not in tensors:
        names = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise ValueError(f"the file has no tensor {TENSOR}, it has {names}; save the prompt again with peft's save_pretrained")
    prompt = tensors[TENSOR]
    if prompt.shape != (n * parts, width):
        raise ValueError(
            f"{TENSOR} has the shape {list(prompt.shape)}, but num_virtual_tokens={n} and num_transformer_submodules={parts} "
            f"in {peft_config.CONFIG} and this {family} model need {[n * parts, width]}; the files are not of the same prompt, "
            "or it is for another model"
        )
    return np.ascontiguousarray(prompt[:n].astype(np.float32))


def prompt_content(
    adapted: Adapted,
    origin: Origin,
    params: Mapping[str, Any],
    tree: Any,
    named: Mapping[str, tuple[Module, ...]],
    base: Parameters,
    tied: set[str],
    family: Family,
    task_type: str | None,
) -> Content:
    """What a prompt's folder holds.

    Raises:
      ValueError: if PEFT has no such adapter, naming the remedy.
    """
    others = [type(rule).__name__ for rule in origin.methods if not isinstance(rule, (PromptTuning, FullFineTuning))]
    if others:
        raise ValueError(
            f"PEFT keeps one type of adapter in a folder, and this model has PromptTuning beside {', '.join(others)}. Write "
            "what changes weights into the base, save_pretrained(BASE, model, pf.fold(params, delta)), and save the prompt "
            "alone with base=BASE; or keep both in a run (pf.save_run)"
        )
    if origin.mode is not None:
        raise ValueError(
            f"a prompt linearized in mode={origin.mode!r} is no adapter that PEFT has. In mode='layer' it is a prompt of the "
            "model that was linearized: save jax.tree.map(jnp.add, adapters0, tree) with that model. Else keep the run "
            "(pf.save_run), or train without linearize"
        )
    if isinstance(tree, Delta):
        raise ValueError(
            "a prompt is no change of weights, so a Delta holds none: fuse prompts as trees, "
            "pf.fuse(method, trees, space='adapter'), and save the tree"
        )
    if adapted.tasks:
        raise ValueError(
            "this model makes a prompt for each task, and a PEFT folder holds one: save_peft(FOLDER, adapted, "
            f"generated.materialise(params, tree, {adapted.tasks[0]!r}), ...) with the model given to generate()"
        )
    if adapted.materialise is not None:
        tree = adapted.materialise(params, tree)
    config = origin.model.config
    module = word_embeddings(family, config)
    prompt, changes = _parts(origin, tree, module, family.name)
    _require_still(changes, module)
    tensors, beside = whole_parameters(named, {}, changes, base, tied, remedy="keep the run (pf.save_run)")
    tensors = {TENSOR: prompt, **{PREFIX + name: array for name, array in tensors.items()}}
    written = family.write_config(config)
    if task_type is None:
        (built,) = written["architectures"]
        task_type = next((kind for end, kind in _TASK_TYPES.items() if built.endswith(end)), "FEATURE_EXTRACTION")
    _require_head(task_type, tensors)
    return Content(
        kind=KIND,
        tensors=tensors,
        fields={
            "task_type": task_type,
            "num_virtual_tokens": prompt.shape[0],
            "token_dim": prompt.shape[1],
            "num_transformer_submodules": 1,
            # PEFT asks for these two, and does nothing with them where it has a prompt.
            "num_attention_heads": written.get("num_attention_heads", written.get("num_heads")),
            "num_layers": written.get("num_hidden_layers", written.get("num_layers")),
            "modules_to_save": beside["modules_to_save"],
        },
        modules=_names(named, module),
    )


def _names(named: Mapping[str, tuple[Module, ...]], module: Module) -> tuple[str, ...]:
    """What a column calls the module."""
    return tuple(name for name, modules in named.items() if module.path in [known.path for known in modules])


def _parts(origin: Origin, tree: Any, module: Module, family: str) -> tuple[np.ndarray, dict[str, jax.Array]]:
    """The prompt, and displacements by the path of their parameter."""
    prompts: dict[str, Any] = {}
    changes: dict[str, jax.Array] = {}
    lengths = []
    for path, leaf in trees.flat(tree).items():
        site, _, name = path.rpartition("/")
        rule = owner(origin.methods, path)
        if rule is None:
            raise ValueError(f"the adapters have a leaf {path!r}, which is of no method of this model")
        if isinstance(rule, PromptTuning):
            prompts[site] = np.asarray(jnp.asarray(leaf, jnp.float32))
            lengths.append(rule.length)
        else:
            changes[join(site, rule.owns(name))] = leaf
    if list(prompts) != [module.path]:
        raise ValueError(
            f"PEFT has one prompt, in front of the word embeddings, which for this {family} model are {module.path!r}; these "
            f"adapters have prompts at {', '.join(map(repr, prompts)) or 'no place'}. Train one with "
            "PromptTuning's own targets"
        )
    prompt = prompts[module.path]
    if prompt.shape != (lengths[0], module.shape[-1]):
        raise ValueError(
            f"the prompt has the shape {list(prompt.shape)}, where PromptTuning(length={lengths[0]}) of this model has "
            f"{[lengths[0], module.shape[-1]]}: it is another model's"
        )
    return prompt, changes


def _require_still(changes: Mapping[str, Any], module: Module) -> None:
    """PEFT looks tokens up in the table that the base model had before it put another one in its place."""
    change = changes.get(next(iter(module.weights.values())))
    if change is not None and np.any(np.asarray(change)):
        raise ValueError(
            f"the table of word embeddings ({module.name}) was moved beside the prompt, which PEFT stores but does not use: "
            "write it into the base model, pf.fold and save_pretrained, and leave it out of the adapter"
        )


def _require_head(task_type: str, tensors: Mapping[str, Any]) -> None:
    """PEFT chooses its model by the type: without a known one the prompt has no effect, and some need a head in the file."""
    known = ("FEATURE_EXTRACTION", *_TASK_TYPES.values(), *_HEADS)
    if task_type not in known:
        raise ValueError(f"task_type={task_type!r} is not one of {', '.join(known)}, which PEFT has models with prompts for")
    heads = _HEADS.get(task_type, ())
    if heads and not any(name.startswith(f"{PREFIX}{head}.") for name in tensors for head in heads):
        raise ValueError(
            f"task_type={task_type!r} makes PEFT look for a trained head ({' or '.join(heads)}) in the file, and it has none: "
            f"train it too, FullFineTuning(targets='{heads[0]}/.*'), or write task_type='FEATURE_EXTRACTION'"
        )
