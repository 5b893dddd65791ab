"""``adapter_config.json``: its fields, what of it is implemented, and which modules it selects.

The file is untrusted: every field is checked by type, patterns go through :mod:`patterns`, nothing in it is imported or
opened. What would change the mathematics and is not implemented is refused by name, never approximated.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pefusion_jax.interop.headers import decode_json
from pefusion_jax.interop.patterns import Budget, Pattern
from pefusion_jax.interop.peft_names import Column, containers

CONFIG = "adapter_config.json"
PEFT_VERSION = "0.21.2"
MAX_BYTES, MAX_RANK = 2**20, 2**20
_HEADS = ("score", "classifier")  # of sequence classifiers, which "all-linear" leaves out
_OUTPUTS = ("lm_head", "cls.predictions.decoder")  # output embeddings, which it leaves out as well


class Field(NamedTuple):
    """A field: its default, what it may be (in words, and as a test), and where other values lead.

    Attributes:
      default: what an absent field means, and what we write.
      expected: for messages.
      valid: whether a value has the right type.
      refuse: why a value other than the default is not implemented and what to do instead; empty if it is.
    """

    default: Any
    expected: str
    valid: Callable[[Any], bool]
    refuse: str = ""


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and abs(value) < 1e30


def _is_rank(value: Any) -> bool:
    return _is_int(value) and 1 <= value <= MAX_RANK


def _is_size(value: Any) -> bool:
    return value is None or _is_rank(value)


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_names(value: Any) -> bool:
    return value is None or isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _is_pattern(value: Any) -> bool:
    return isinstance(value, str) or _is_names(value)


def _is_layers(value: Any) -> bool:
    return value is None or _is_int(value) or isinstance(value, list) and all(_is_int(entry) for entry in value)


def _is_mapping(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or isinstance(value, dict) and all(test(entry) for entry in value.values())


def _anything(value: Any) -> bool:
    return True


_MERGE = "merge it into its base model with peft (merge_and_unload) and load the model"
_COMMON: dict[str, Field] = {
    "peft_type": Field(None, "a string", lambda value: isinstance(value, str)),
    "task_type": Field(None, "a string or null", _is_text),
    "auto_mapping": Field(None, "an object or null", _is_mapping(_anything)),
    "base_model_name_or_path": Field(None, "a string or null", _is_text),
    "revision": Field(None, "a string or null", _is_text),
    "peft_version": Field(None, "a string or null", _is_text),
    "inference_mode": Field(False, "true or false", lambda value: isinstance(value, bool)),
    "modules_to_save": Field(None, "a list of names or null", _is_names),
}
# Of the types that are put on modules.
_MODULES: dict[str, Field] = {
    "target_modules": Field(None, "a list of names, a pattern or null", _is_pattern),
    "exclude_modules": Field(None, "a list of names, a pattern or null", _is_pattern),
    "layers_to_transform": Field(None, "an integer, a list of integers or null", _is_layers),
    "layers_pattern": Field(None, "a name, a list of names or null", _is_pattern),
}


def _refused(default: Any, why: str) -> Field:
    return Field(default, f"{default!r}", _anything, why)


_LORA: dict[str, Field] = {
    "r": Field(8, f"an integer from 1 to {MAX_RANK}", _is_rank),
    "lora_alpha": Field(8, "a number", _is_number),
    "lora_dropout": Field(0.0, "a number from 0 to below 1", lambda value: _is_number(value) and 0 <= value < 1),
    "bias": Field("none", "'none', 'all' or 'lora_only'", lambda value: value in ("none", "all", "lora_only")),
    "use_rslora": Field(False, "true or false", lambda value: isinstance(value, bool)),
    "lora_bias": Field(False, "true or false", lambda value: isinstance(value, bool)),
    "rank_pattern": Field({}, "an object of ranks", _is_mapping(_is_rank)),
    "alpha_pattern": Field({}, "an object of numbers", _is_mapping(_is_number)),
    "init_lora_weights": Field(True, "true, false or a string", lambda value: isinstance(value, (bool, str))),
    "fan_in_fan_out": _refused(False, "our layers are all linear layers, for which peft itself ignores it: set it to false"),
    "use_dora": _refused(False, f"weight-decomposed adapters (DoRA) are not implemented: {_MERGE}"),
    "target_parameters": _refused(None, f"adapters on bare parameters are not implemented: {_MERGE}"),
    "trainable_token_indices": _refused(None, f"single rows of embeddings are not implemented: {_MERGE}"),
    "layer_replication": _refused(None, f"repeated layers are another model: {_MERGE}"),
    "megatron_config": _refused(None, "it was made for Megatron's layers: convert it there to plain LoRA"),
    "megatron_core": Field("megatron.core", "a string or null", _is_text),
    "arrow_config": _refused(None, "routing between adapters depends on the input: use its adapters one by one"),
    "alora_invocation_tokens": _refused(None, "activated LoRA depends on the tokens: it is not a change of weights"),
    "use_qalora": _refused(False, f"QALoRA pools its inputs: {_MERGE}"),
    "qalora_group_size": Field(16, "an integer", _is_int),
    "use_bdlora": _refused(None, f"block-diagonal LoRA is not implemented: {_MERGE}"),
    "kasa_config": _refused(None, f"KaSA changes the base weights: {_MERGE}"),
    "monteclora_config": _refused(None, f"Monte-Carlo LoRA is random at inference: {_MERGE}"),
    "velora_config": _refused(None, "its effect at inference is not known to us: convert it with peft to plain LoRA"),
    "ensure_weight_tying": _refused(False, f"adapters on tied weights are not implemented: {_MERGE}"),
    # How training began; the adapter in the file is a plain one.
    "eva_config": Field(None, "an object or null", _is_mapping(_anything)),
    "corda_config": Field(None, "an object or null", _is_mapping(_anything)),
    "lora_ga_config": Field(None, "an object or null", _is_mapping(_anything)),
    "loftq_config": Field({}, "an object or null", _is_mapping(_anything)),
}
_PROMPT: dict[str, Field] = {
    "num_virtual_tokens": Field(None, f"an integer from 1 to {MAX_RANK}", _is_rank),
    "token_dim": Field(None, f"an integer from 1 to {MAX_RANK}, or null", _is_size),
    "num_transformer_submodules": Field(None, "1, 2 or null", lambda value: value is None or _is_int(value) and 0 < value < 3),
    "num_attention_heads": Field(None, f"an integer from 1 to {MAX_RANK}, or null", _is_size),
    "num_layers": Field(None, f"an integer from 1 to {MAX_RANK}, or null", _is_size),
    # How training began; the prompt in the file is what became of it.
    "prompt_tuning_init": Field("RANDOM", "a string", lambda value: isinstance(value, str)),
    "prompt_tuning_init_text": Field(None, "a string or null", _is_text),
    "tokenizer_name_or_path": Field(None, "a string or null", _is_text),
    "tokenizer_kwargs": Field(None, "an object or null", _is_mapping(_anything)),
}
# Ways of initialising LoRA that leave the base weights alone, so that the file holds a plain LoRA.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")

# Adapter type -> its fields, and the default targets of those that are put on modules. Another type is another row, and a
# reader in ``peft``.
FIELDS: dict[str, dict[str, Field]] = {"LORA": _COMMON | _MODULES | _LORA, "PROMPT_TUNING": _COMMON | _PROMPT}
_ATTENTION = {
    **dict.fromkeys(("bert", "roberta"), ("query", "value")),
    **dict.fromkeys(("llama", "qwen2"), ("q_proj", "v_proj")),
    "t5": ("q", "v"),
    # peft has no default for these; both names of their layers, of which a column has one.
    **dict.fromkeys(("vit", "deit", "dinov2", "dinov2_with_registers"), ("query", "value", "q_proj", "v_proj")),
    **dict.fromkeys(("clip", "clip_text_model", "clip_vision_model"), ("q_proj", "v_proj")),
    "mpnet": ("q", "v"),
}
DEFAULT_TARGETS: dict[str, dict[str, tuple[str, ...]]] = {"LORA": _ATTENTION}


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads and checks ``adapter_config.json``; absent fields get their defaults.

    Raises:
      FileNotFoundError: if there is none, naming adapters in sub-folders.
      ValueError: naming the field, its value, and what is implemented or what to do.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        inside = sorted(found.parent.name for found in Path(folder).glob(f"*/{CONFIG}"))[:8]
        hint = f"; adapters are in its sub-folders {', '.join(inside)}" if inside else ""
        raise FileNotFoundError(f"{folder} has no {CONFIG}: this is not a PEFT adapter's folder{hint}")
    with open(path, "rb") as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES} bytes: no adapter's configuration is")
    return validate(decode_json(text, path, "the configuration"), str(path))


def validate(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Checks a configuration against ``FIELDS``; see :func:`read_config`."""
    kind = raw.get("peft_type")
    if not isinstance(kind, str) or kind not in FIELDS:
        raise ValueError(f"{where}: peft_type={_short(kind)} is not implemented; implemented: {', '.join(FIELDS)}. {_MERGE}")
    fields, problems = FIELDS[kind], []
    for name, value in raw.items():
        field = fields.get(name)
        if field is None:
            if value not in (None, False, [], {}, ""):
                problems.append(f"{name}={_short(value)} is not known here; delete it if it changes nothing")
        elif field.refuse and (value or not (value is None or value is False or value == field.default)):
            problems.append(f"{name}={_short(value)} is not implemented: {field.refuse}")
        elif not field.refuse and not field.valid(value):
            problems.append(f"{name}={_short(value)} should be {field.expected}")
    config = {name: field.default for name, field in fields.items()} | {n: v for n, v in raw.items() if n in fields}
    if not problems and kind == "LORA" and config["init_lora_weights"] not in _PLAIN_STARTS:
        problems.append(
            f"init_lora_weights={_short(config['init_lora_weights'])} changed the base weights when training began, and the "
            "adapter is relative to those: save it with peft's path_initial_model_for_weight_conversion, as a plain LoRA"
        )
    if not problems and kind == "PROMPT_TUNING" and config["num_virtual_tokens"] is None:
        problems.append(f"num_virtual_tokens is missing; it should be {fields['num_virtual_tokens'].expected}")
    for name in ("modules_to_save", "layers_pattern"):
        entries = config[name] if isinstance(config.get(name), list) else [config.get(name) or "x"]
        if not problems and not all(re.fullmatch(r"[\w.\-]{1,500}", entry) for entry in entries):
            problems.append(f"{name}={_short(config[name])} should hold plain names of modules")
    if not problems and config.get("layers_pattern") and config["layers_to_transform"] is None:
        problems.append("layers_pattern without layers_to_transform, which peft refuses as well")
    if not problems and isinstance(config.get("target_modules"), str) and config["layers_to_transform"] is not None:
        problems.append("layers_to_transform with a pattern as target_modules, which peft refuses as well; list names")
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise ValueError(f"{where}: " + "; ".join(problems[:8]) + more)
    return config


class Selection:
    """What a configuration selects among the modules of a column, by peft's rules.

    Args:
      config: as from :func:`read_config`.
      model_types: of the family, for default targets.

    Raises:
      ValueError: for a pattern that cannot be read, or no targets and no default.
    """

    def __init__(self, config: Mapping[str, Any], model_types: Iterable[str]):
        self._config, self._budget = config, Budget()
        self._saved = list(config["modules_to_save"] or ())
        self._exclude = self._matcher(config["exclude_modules"] or [], "exclude_modules")
        targets = config["target_modules"]
        self.all_linear = isinstance(targets, str) and targets.lower() == "all-linear"
        if targets is None:
            defaults = DEFAULT_TARGETS[config["peft_type"]]
            targets = next((list(defaults[kind]) for kind in model_types if kind in defaults), None)
            if targets is None:
                raise ValueError(f"target_modules is null and {', '.join(model_types)} has no default; name the modules")
        self._listed = set(targets) if isinstance(targets, list) else set()
        self._target = self._matcher([] if self.all_linear else targets, "target_modules")
        self._patterns = {
            name: [(Pattern(key, name, self._budget), value) for key, value in (config[name] or {}).items()]
            for name in ("rank_pattern", "alpha_pattern")
            if name in config
        }

    def _matcher(self, given: str | list[str], what: str) -> Callable[[str], bool]:
        if isinstance(given, str):
            return Pattern(given, what, self._budget).fullmatch
        wanted = set(given)
        # A name matches if it is listed, or ends in a dot and what is listed.
        return lambda name: name in wanted or any(name[m.end() :] in wanted for m in re.finditer(r"\.", name))

    def modules(self, column: Column) -> set[str]:
        """The names of the modules that are adapted.

        Raises:
          ValueError: if a pattern also selects a module that no adapter can be put on.
        """
        kinds = {name: modules[0].kind for name, modules in column.modules.items()}
        if self.all_linear:
            left_out = {name for name in kinds if name.endswith(_OUTPUTS)}
            if not left_out and self._config["task_type"] == "SEQ_CLS":
                left_out = set(next(([head] for head in _HEADS if head in kinds), []))
            return {n for n, kind in kinds.items() if kind == "linear" and n not in left_out and not self._skipped(n)}
        chosen = set()
        for name in [*kinds, *sorted(containers(kinds) - set(kinds))]:
            if not name or self._skipped(name) or not self._target(name) or not self._layer(name):
                continue
            if kinds.get(name, "other") == "other":
                raise ValueError(
                    f"target_modules={_short(self._config['target_modules'])} selects {name!r}, which is not a linear layer, a "
                    "convolution or an embedding; narrow it"
                )
            chosen.add(name)
        return chosen

    def _skipped(self, name: str) -> bool:
        return self._exclude(name) or self.saves(name)

    def saves(self, name: str) -> bool:
        """Whether ``modules_to_save`` names the module or one that holds it."""
        dotted = f".{name}."
        return any(f".{saved}." in dotted for saved in self._saved)

    def saves_weights(self, name: str) -> bool:
        """Whether peft saves the whole module: the name of it, or of one that holds it, ends in an entry of the list."""
        parts = name.split(".")
        return any(".".join(parts[: i + 1]).endswith(saved) for i in range(len(parts)) for saved in self._saved)

    def _layer(self, name: str) -> bool:
        """Whether ``layers_to_transform`` keeps the module: the first number behind the name of a stack of layers.

        A module whose full name is listed is kept whatever its layer.
        """
        wanted, stacks = self._config["layers_to_transform"], self._config["layers_pattern"]
        if wanted is None or wanted == [] or name in self._listed:
            return True
        stacks = [stacks] if isinstance(stacks, str) else stacks
        numbers = [(m.start(), int(m[1])) for m in re.finditer(r"\.(\d{1,9})(?=\.)", name)]
        if stacks:
            found = next(
                (n for stack in stacks for at, n in numbers if name[:at] == stack or name[:at].endswith("." + stack)), None
            )
        else:  # any name, but one that has something in front of it
            found = next((n for at, n in numbers if "." in name[:at]), None)
        return found is not None and found in ([wanted] if _is_int(wanted) else wanted)

    def value(self, pattern: str, name: str, default: Any) -> Any:
        """The value for a module in ``rank_pattern`` or ``alpha_pattern``: the first key that matches its end."""
        return next((value for key, value in self._patterns[pattern] if key.matches_tail(name)), default)


def complete(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with all fields of its type, for writing.

    Raises:
      ValueError: for a field that the type does not have, or a value that is not valid.
    """
    fields = FIELDS[kind]
    unknown: Collection[str] = given.keys() - fields.keys()
    if unknown:
        raise ValueError(f"{kind} adapters have no field {', '.join(sorted(unknown))}")
    defaults = {name: field.default for name, field in fields.items()}
    config = defaults | {"peft_type": kind, "peft_version": PEFT_VERSION, "inference_mode": True} | dict(given)
    validate(config, "the configuration to be written")
    return config


def _short(value: Any, limit: int = 160) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a huge number"
    return text if len(text) <= limit else text[:limit] + "..."
