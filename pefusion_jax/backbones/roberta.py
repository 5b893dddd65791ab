"""RoBERTa encoders in Flax Linen, with Hugging Face's parameter names.

Parameter paths are Hugging Face's names with ``/`` for ``.``, without the prefix ``roberta.`` of headed models: BERT's
(see ``bert.py``) for embeddings, blocks and pooler, and for the heads::

    lm_head/{dense/{kernel,bias}, layer_norm/{scale,bias}, bias}     (masked language models; the decoder is tied)
    classifier/{dense,out_proj}/{kernel,bias}                        (sequence classifiers)

What differs from BERT: positions are counted from ``pad_token_id + 1`` and skip padding; the heads. Blocks and taps are
those of ``encoder.py``.

Reference: Liu, Ott, Goyal, Du, Joshi, Chen, Levy, Lewis, Zettlemoyer, Stoyanov, "RoBERTa: A Robustly Optimized BERT
Pretraining Approach", 2019.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pefusion_jax.backbones import configs, encoder_files, names
from pefusion_jax.backbones.encoder_files import TokenId
from pefusion_jax.backbones.family import Family
from pefusion_jax.backbones.text_encoder import TextEncoder

__all__ = ["FAMILY", "Roberta", "RobertaConfig", "name_table"]

# Fields of config.json with the only values that are implemented.
_ONLY = {"model_type": ("roberta",), **encoder_files.ONLY}


@dataclasses.dataclass(frozen=True)
class RobertaConfig:
    """The shape of a RoBERTa model; field names and defaults are Hugging Face's, except the last three.

    These say which heads the weights have: the pooler, a masked-LM head, or a classifier of so many ``classes`` on the
    first token. ``max_position_embeddings`` is the number of rows of the position table, of which the first
    ``pad_token_id + 1`` hold no token: the published models have 514 rows for 512 tokens.
    """

    vocab_size: int = 50265
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: TokenId = 1
    classifier_dropout: float | None = None
    pooler: bool = True
    masked_lm: bool = False
    classes: int | None = None

    def __post_init__(self) -> None:
        configs.validate(self)
        configs.require_multiple(self, "hidden_size", "num_attention_heads")
        encoder_files.check_heads(self)
        encoder_files.check_pad(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], tensors: Mapping[str, Any] | None = None) -> RobertaConfig:
        """Reads the dictionary of a ``config.json``.

        Args:
          raw: the dictionary.
          tensors: canonical names of the weights' file (see ``family.canonical``), which decide on pooler and heads.
            Without them the architecture in ``raw`` does.

        Raises:
          ValueError: naming every field or value that this file does not implement.
        """
        return encoder_files.read_config(cls, raw, tensors, "RoBERTa", _ONLY)

    def to_dict(self) -> dict[str, Any]:
        """The dictionary of a ``config.json`` from which transformers builds the same model."""
        return encoder_files.write_config(self, "roberta", "Roberta")


class Roberta(TextEncoder):
    """A RoBERTa encoder; attributes (``config`` is a :class:`RobertaConfig`) and inputs are those of :class:`TextEncoder`."""

    def pad(self) -> int:
        return self.config.pad_token_id


def name_table(config: RobertaConfig) -> dict[str, names.Entry]:
    """The table of canonical names of a configuration, in the loop layout."""
    return encoder_files.base_table(config, config.type_vocab_size) | encoder_files.head_table(config)


FAMILY = Family(
    name="RoBERTa",
    model_types=("roberta",),
    architectures=("RobertaModel", "RobertaForMaskedLM", "RobertaForSequenceClassification"),
    read_config=RobertaConfig.from_dict,
    write_config=RobertaConfig.to_dict,
    build=Roberta,
    table=name_table,
    prefix="roberta.",
    heads=("lm_head.", "classifier."),
    renames=encoder_files.RENAMES,
    ignored=r"embeddings\.(position_ids|token_type_ids)",  # constants
    copies=encoder_files.lm_copies,
)
