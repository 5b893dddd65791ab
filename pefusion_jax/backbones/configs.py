"""Reading ``config.json``: what every backbone checks before it believes a configuration."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from pefusion_jax.backbones.layers import ACTIVATIONS

# Bounds that no real model reaches; they keep a hostile file from asking for a table of a billion names.
MAX_LAYERS, MAX_SIZE = 1024, 2**31 - 1

# Fields that change nothing about the forward pass of any model: provenance, labels, training, generation defaults.
HARMLESS = frozenset(
    """architectures _name_or_path transformers_version torch_dtype dtype initializer_range initializer_factor pad_token_id
    bos_token_id eos_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id use_cache
    gradient_checkpointing id2label label2id num_labels problem_type finetuning_task return_dict output_hidden_states
    output_attentions torchscript chunk_size_feed_forward model_max_length _attn_implementation_autoset task_specific_params
    tokenizer_class prefix _commit_hash classifier_dropout""".split()
)


def refuse_unknown(
    raw: Mapping[str, Any], what: str, own: Collection[str], only: Mapping[str, tuple[Any, ...]], harmless: Collection[str] = ()
) -> None:
    """Refuses a configuration that asks for what a backbone does not do.

    Args:
      raw: the dictionary of a ``config.json``.
      what: the backbone, for the message.
      own: fields that the backbone implements with any value that its configuration class accepts.
      only: fields with the only values that are implemented; must name ``model_type``.
      harmless: fields, besides ``HARMLESS``, that change nothing.

    Raises:
      ValueError: naming every field or value that is not implemented.
    """
    problems = [
        f"{key}={_short(raw[key])} (implemented: {' or '.join(map(repr, values))})"
        for key, values in only.items()
        if key in raw
        and not any(raw[key] is value or (type(raw[key]) is type(value) and raw[key] == value) for value in values)
    ]
    if "model_type" not in raw:
        problems.append(f"model_type is missing (implemented: {' or '.join(map(repr, only['model_type']))})")
    known = {*own, *only, *harmless, *HARMLESS}
    problems += [f"{reprlib.repr(key)[1:-1]}={_short(value)} (unknown field)" for key, value in raw.items() if key not in known]
    if problems:
        shown = problems[:12]
        more = f" and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise ValueError(
            f"this config.json asks for what the {what} backbone does not implement: {'; '.join(shown)}{more}. "
            "A field that changes nothing about the model can be deleted from a copy of the file."
        )


def validate(config: Any) -> None:
    """Checks the fields of a configuration dataclass by their annotations and by the names that all models share.

    ``int`` fields must be positive and sane, ``int | None`` may be None as well, ``float`` must be numbers, ``bool`` must
    be booleans, ``*_act`` must be a known activation, ``*dropout*`` a probability, ``*eps*`` between 0 and 1.

    Raises:
      ValueError: naming the class, the field, its value and what it should be.
    """
    name = type(config).__name__
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), str(field.type)
        where = f"{name}.{field.name}"
        if value is None and "None" in kind:
            continue
        if kind.startswith("int"):
            bound = MAX_LAYERS if "layers" in field.name else MAX_SIZE
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= bound:
                raise ValueError(f"{where} must be a positive integer up to {bound}, not {_short(value)}")
        elif kind.startswith("float"):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
                raise ValueError(f"{where} must be a number, not {_short(value)}")
        elif kind.startswith("bool"):
            if not isinstance(value, bool):
                raise ValueError(f"{where} must be true or false, not {_short(value)}")
        elif kind.startswith("str") and not isinstance(value, str):
            raise ValueError(f"{where} must be a string, not {_short(value)}")
        if field.name.endswith("_act") and value not in ACTIVATIONS:
            raise ValueError(f"{where}={_short(value)} is not implemented; implemented: {', '.join(ACTIVATIONS)}")
        if "dropout" in field.name and not 0 <= value < 1:
            raise ValueError(f"{where} must lie in [0, 1), not {_short(value)}: it is a dropout probability")
        if "eps" in field.name.split("_") and not 0 < value < 1:
            raise ValueError(f"{where} must lie in (0, 1), not {_short(value)}")


def require_multiple(config: Any, large: str, small: str) -> None:
    """Raises a ValueError if the field ``large`` of a configuration is not a multiple of the field ``small``."""
    a, b = getattr(config, large), getattr(config, small)
    if a % b:
        raise ValueError(f"{type(config).__name__}.{large}={a} is not a multiple of {small}={b}")


def num_labels(raw: Mapping[str, Any]) -> int:
    """The number of classes of a ``config.json``: the length of ``id2label``, else ``num_labels``, else 2.

    Raises:
      ValueError: if these are not a mapping and a positive integer.
    """
    labels = raw.get("id2label")
    if labels is not None and not isinstance(labels, Mapping):
        raise ValueError(f"id2label must be a mapping, not {_short(labels)}")
    return len(labels) if labels else raw.get("num_labels", 2)


def _short(value: Any) -> str:
    """The value for a message: bounded in length and depth, for it may be hostile."""
    return reprlib.repr(value)
