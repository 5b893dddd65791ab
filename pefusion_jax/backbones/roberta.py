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

import flax.linen as nn
import jax
import jax.numpy as jnp

from pefusion_jax.backbones import configs, encoder_files, names
from pefusion_jax.backbones.encoder import (
    ClassificationHead,
    Embeddings,
    Encoder,
    EncoderOutput,
    LMHead,
    Pooler,
    positions_after_padding,
    read_inputs,
)
from pefusion_jax.backbones.encoder_files import TokenId
from pefusion_jax.backbones.family import Family

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


class Roberta(nn.Module):
    """A RoBERTa encoder, post-norm: ``x = LN(x + Attention(x)); x = LN(x + W2 act(W1 x))``.

    Attributes:
      config: the model's shape.
      dtype: of the computation; parameters may be float32 or the same. Softmax and norms are float32 in any case.
      scan_layers: one traced block scanned over stacked parameters instead of a loop (see ``stack_layers``).
      remat: recompute each block in the backward pass instead of storing its activations.
    """

    config: RobertaConfig
    dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array | Mapping[str, jax.Array],
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        *,
        deterministic: bool = True,
        output_hidden_states: bool = False,
    ) -> EncoderOutput:
        """Runs the encoder.

        Args:
          input_ids: token ids ``[batch, seq]``, or a mapping with the names of the array arguments.
          attention_mask: ``[batch, seq]``, non-zero = keep; all by default.
          token_type_ids: ``[batch, seq]``; zeros by default.
          position_ids: ``[batch, seq]`` or ``[1, seq]``; by default counted from ``pad_token_id + 1`` over the tokens other
            than padding, which itself stands at ``pad_token_id``.
          deterministic: False switches dropout on, which needs ``rngs={"dropout": key}``.
          output_hidden_states: also return every block's output.

        Raises:
          ValueError: if a shape is wrong or the sequence is longer than the position table.
        """
        config = self.config
        others = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, "position_ids": position_ids}
        rows = config.max_position_embeddings
        ids, arrays = read_inputs("Roberta", input_ids, others, rows - config.pad_token_id - 1, rows)
        positions = arrays["position_ids"]
        positions = positions_after_padding(ids, config.pad_token_id) if positions is None else positions

        parts = {"config": config, "dtype": self.dtype, "deterministic": deterministic}
        embeddings = Embeddings(**parts, token_types=config.type_vocab_size, name="embeddings")
        first = embeddings(ids, arrays["token_type_ids"], positions)
        encoder = Encoder(**parts, keep=output_hidden_states, scan_layers=self.scan_layers, remat=self.remat, name="encoder")
        last, kept = encoder(first, arrays["attention_mask"])
        pooled = Pooler(**parts, name="pooler")(last) if config.pooler else None
        logits = None
        if config.masked_lm:
            logits = LMHead(**parts, name="lm_head")(last, embeddings)
        elif config.classes is not None:
            rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
            logits = ClassificationHead(**parts, rate=rate, name="classifier")(last)
        return EncoderOutput(last, pooled, (first, *kept) if kept is not None else None, logits)


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
