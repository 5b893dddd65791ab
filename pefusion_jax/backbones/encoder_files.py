"""How text encoders are described in files: the fields of ``config.json`` and the names of tensors that they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pefusion_jax.backbones import configs, names

# Fields of config.json with the only values that are implemented.
ONLY: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "tie_encoder_decoder": (False, None),
    "tie_word_embeddings": (True, None),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}

# Fields of our configurations that say which heads the weights have; config.json says it by the architecture.
HEADS = ("pooler", "masked_lm", "classes")

# Names in files of long ago.
RENAMES = ((r"\.LayerNorm\.gamma$", ".LayerNorm.weight"), (r"\.LayerNorm\.beta$", ".LayerNorm.bias"))

# A token id, which may be 0, unlike the sizes that configs.validate takes integers for.
TokenId = int

Config = TypeVar("Config")


def read_config(
    cls: type[Config],
    raw: Mapping[str, Any],
    tensors: Mapping[str, Any] | None,
    what: str,
    only: Mapping[str, tuple[Any, ...]],
    harmless: Iterable[str] = (),
    lm_head: str = "lm_head.",
    classifier_pools: bool = False,
) -> Config:
    """Reads the dictionary of a ``config.json`` into a configuration class with the fields ``HEADS``.

    Args:
      cls: the class.
      raw: the dictionary.
      tensors: canonical names of the weights' file (see ``family.canonical``), which decide on the heads. Without them
        the architecture in ``raw`` does.
      what: the backbone, for messages.
      only: fields with the only values that are implemented.
      harmless: fields that change nothing.
      lm_head: beginning of the names of the masked-LM head.
      classifier_pools: whether a sequence classifier reads the pooler's output.

    Raises:
      ValueError: naming every field or value that is not implemented.
    """
    own = {field.name for field in dataclasses.fields(cls)} - set(HEADS)  # type: ignore[arg-type]  # a dataclass
    configs.refuse_unknown(raw, what, own, only, tuple(harmless))
    if tensors is None:
        architectures = raw.get("architectures") or ()
        if not isinstance(architectures, (list, tuple)):
            raise ValueError(f"architectures must be a list of names, not {type(architectures).__name__}")
        masked_lm = any("MaskedLM" in str(name) for name in architectures)
        classifies = any("SequenceClassification" in str(name) for name in architectures)
        pooler = not masked_lm and (classifier_pools or not classifies)
    else:
        masked_lm = any(name.startswith(lm_head) for name in tensors)
        classifies = any(name.startswith("classifier.") for name in tensors)
        pooler = any(name.startswith("pooler.") for name in tensors) or (classifies and classifier_pools)
    heads = {"pooler": pooler, "masked_lm": masked_lm, "classes": configs.num_labels(raw) if classifies else None}
    return cls(**{key: raw[key] for key in own if key in raw}, **heads)


def check_heads(config: Any) -> None:
    """Raises a ValueError if a configuration has two heads, which would both give logits."""
    if config.masked_lm and config.classes is not None:
        raise ValueError(
            f"{type(config).__name__}: masked_lm and classes={config.classes} are two heads, of which a model has one; set "
            "masked_lm=False or classes=None (in a file: drop the tensors of the other head)"
        )


def check_pad(config: Any) -> None:
    """Raises a ValueError unless ``pad_token_id`` is a row of both tables that it indexes."""
    pad, rows = config.pad_token_id, min(config.vocab_size, config.max_position_embeddings)
    if not isinstance(pad, int) or isinstance(pad, bool) or not 0 <= pad < rows:
        shown = str(pad) if isinstance(pad, int) else type(pad).__name__
        raise ValueError(
            f"{type(config).__name__}.pad_token_id must be an integer from 0 to {rows - 1}, not {shown}: positions are counted "
            "from it"
        )


def write_config(config: Any, model_type: str, model: str) -> dict[str, Any]:
    """The dictionary of a ``config.json`` from which transformers builds the same model.

    Args:
      config: a configuration with the fields ``HEADS``.
      model_type: of the file.
      model: beginning of the names of transformers' classes, such as ``Bert``.
    """
    fields = {key: value for key, value in dataclasses.asdict(config).items() if key not in HEADS}
    kind = "ForMaskedLM" if config.masked_lm else "ForSequenceClassification" if config.classes is not None else "Model"
    labels = {} if config.classes is None else {"num_labels": config.classes}
    return {"model_type": model_type, "architectures": [model + kind], **fields, **labels}


def dense(name: str, inputs: int, outputs: int) -> dict[str, names.Entry]:
    """Rows of a linear layer whose path is its name."""
    return names.linear(name.replace(".", "/"), name, inputs, outputs)


def norm(name: str, width: int) -> dict[str, names.Entry]:
    """Rows of a layer norm whose path is its name."""
    return names.norm(name.replace(".", "/"), name, width)


def base_table(
    config: Any, token_types: int, projections: tuple[str, ...] = (), attention_norm: str = ""
) -> dict[str, names.Entry]:
    """The rows of embeddings, blocks and pooler, with canonical names, in the loop layout.

    Args:
      config: the configuration.
      token_types: rows of the token-type table; 0 for none.
      projections: names of the four projections below ``attention``; BERT's by default.
      attention_norm: name of the norm below ``attention``; BERT's by default.
    """
    projections = projections or ("self.query", "self.key", "self.value", "output.dense")
    width, hidden = config.hidden_size, config.intermediate_size
    rows = {"word": config.vocab_size, "position": config.max_position_embeddings, "token_type": token_types}
    table: dict[str, names.Entry] = {}
    for kind, count in rows.items():
        if count:
            table |= names.embedding(f"embeddings/{kind}_embeddings", f"embeddings.{kind}_embeddings", count, width)
    table |= norm("embeddings.LayerNorm", width)
    for layer in (f"encoder.layer.{index}" for index in range(config.num_hidden_layers)):
        for projection in projections:
            table |= dense(f"{layer}.attention.{projection}", width, width)
        table |= norm(f"{layer}.attention.{attention_norm or 'output.LayerNorm'}", width)
        table |= dense(f"{layer}.intermediate.dense", width, hidden)
        table |= dense(f"{layer}.output.dense", hidden, width)
        table |= norm(f"{layer}.output.LayerNorm", width)
    if config.pooler:
        table |= dense("pooler.dense", width, width)
    return table


def head_table(config: Any) -> dict[str, names.Entry]:
    """The rows of the masked-LM and classification heads of RoBERTa and MPNet."""
    width = config.hidden_size
    table: dict[str, names.Entry] = {}
    if config.masked_lm:
        table |= dense("lm_head.dense", width, width) | norm("lm_head.layer_norm", width)
        table["lm_head/bias"] = names.Entry("lm_head.bias", (config.vocab_size,))
    if config.classes is not None:
        table |= dense("classifier.dense", width, width) | dense("classifier.out_proj", width, config.classes)
    return table


def lm_copies(config: Any) -> dict[str, str]:
    """Tensors that files of RoBERTa's and MPNet's masked language models may repeat."""
    if not config.masked_lm:
        return {}
    return {"lm_head.decoder.weight": "embeddings.word_embeddings.weight", "lm_head.decoder.bias": "lm_head.bias"}
