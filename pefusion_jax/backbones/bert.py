"""BERT encoders (BERT, MiniLM and their kin) in Flax Linen, with Hugging Face's parameter names.

Parameter paths are Hugging Face's names with ``/`` for ``.``, without the prefix ``bert.`` of headed models::

    embeddings/{word,position,token_type}_embeddings/embedding      embeddings/LayerNorm/{scale,bias}
    encoder/layer/N/attention/self/{query,key,value}/{kernel,bias}
    encoder/layer/N/attention/output/{dense/{kernel,bias}, LayerNorm/{scale,bias}}
    encoder/layer/N/intermediate/dense/{kernel,bias}
    encoder/layer/N/output/{dense/{kernel,bias}, LayerNorm/{scale,bias}}
    pooler/dense/{kernel,bias}                                 (where the checkpoint has one)
    cls/predictions/{transform/{dense,LayerNorm}/..., bias}    (masked language models; the decoder is tied)
    classifier/{kernel,bias}                                   (sequence classifiers)

With ``scan_layers=True`` the ``N`` is gone and every leaf below ``encoder/layer`` has a leading axis of layers.

Blocks and taps are those of ``encoder.py``.

Reference: Devlin, Chang, Lee, Toutanova, "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding", 2019.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from pefusion_jax.backbones import configs, encoder_files, names
from pefusion_jax.backbones.encoder import Embeddings, EncoderOutput, Part
from pefusion_jax.backbones.family import Family
from pefusion_jax.backbones.layers import ACTIVATIONS
from pefusion_jax.backbones.text_encoder import TextEncoder

__all__ = ["FAMILY", "Bert", "BertConfig", "BertOutput", "name_table"]

# Fields of config.json that change nothing about the forward pass, and those with the only values that are implemented.
_HARMLESS = frozenset(
    """directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type""".split()
)
_ONLY = {"model_type": ("bert",), **encoder_files.ONLY}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The shape of a BERT model; field names and defaults are Hugging Face's, except the last three.

    These say which heads the weights have: the pooler, a masked-LM head, or a classifier of so many ``classes`` on the
    pooler's output.
    """

    vocab_size: int = 30522
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
    classifier_dropout: float | None = None
    pooler: bool = True
    masked_lm: bool = False
    classes: int | None = None

    def __post_init__(self) -> None:
        configs.validate(self)
        configs.require_multiple(self, "hidden_size", "num_attention_heads")
        encoder_files.check_heads(self)
        if self.classes is not None and not self.pooler:
            raise ValueError(f"BertConfig: a classifier of classes={self.classes} reads the pooler's output, but pooler=False")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], tensors: Mapping[str, Any] | None = None) -> BertConfig:
        """Reads the dictionary of a ``config.json``.

        Args:
          raw: the dictionary.
          tensors: canonical names of the weights' file (see ``family.canonical``), which decide on pooler and heads.
            Without them the architecture in ``raw`` does.

        Raises:
          ValueError: naming every field or value that this file does not implement.
        """
        return encoder_files.read_config(
            cls, raw, tensors, "BERT", _ONLY, _HARMLESS, lm_head="cls.predictions.", classifier_pools=True
        )

    def to_dict(self) -> dict[str, Any]:
        """The dictionary of a ``config.json`` from which transformers builds the same model."""
        return encoder_files.write_config(self, "bert", "Bert")


BertOutput = EncoderOutput


class _Transform(Part):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.dense(self.config.hidden_size, "dense")(x)
        return self.norm()(ACTIVATIONS[self.config.hidden_act](x))


class _Predictions(Part):
    @nn.compact
    def __call__(self, x: jax.Array, embeddings: Embeddings) -> jax.Array:
        bias = self.param("bias", nn.initializers.zeros_init(), (self.config.vocab_size,))
        logits = embeddings.decode(_Transform(**self.parts(), name="transform")(x))
        return logits + bias.astype(self.dtype)[None, None, :]


class _MaskedLMHead(Part):
    @nn.compact
    def __call__(self, x: jax.Array, embeddings: Embeddings) -> jax.Array:
        return _Predictions(**self.parts(), name="predictions")(x, embeddings)


class Bert(TextEncoder):
    """A BERT encoder; attributes (``config`` is a :class:`BertConfig`) and inputs are those of :class:`TextEncoder`."""

    def language_model(self, parts: dict[str, Any], last: jax.Array, embeddings: Embeddings) -> jax.Array:
        return _MaskedLMHead(**parts, name="cls")(last, embeddings)

    def classify(self, parts: dict[str, Any], rate: float, last: jax.Array, pooled: jax.Array | None) -> jax.Array:
        x = nn.Dropout(rate, deterministic=parts["deterministic"])(pooled)
        init = nn.initializers.normal(0.02)
        return nn.Dense(self.config.classes, dtype=self.dtype, kernel_init=init, name="classifier")(x)


def name_table(config: BertConfig) -> dict[str, names.Entry]:
    """The table of canonical names of a configuration, in the loop layout."""
    width = config.hidden_size
    table = encoder_files.base_table(config, config.type_vocab_size)
    if config.masked_lm:
        table |= encoder_files.dense("cls.predictions.transform.dense", width, width)
        table |= encoder_files.norm("cls.predictions.transform.LayerNorm", width)
        table["cls/predictions/bias"] = names.Entry("cls.predictions.bias", (config.vocab_size,))
    if config.classes is not None:
        table |= encoder_files.dense("classifier", width, config.classes)
    return table


FAMILY = Family(
    name="BERT",
    model_types=("bert",),
    architectures=("BertModel", "BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification"),
    read_config=BertConfig.from_dict,
    write_config=BertConfig.to_dict,
    build=Bert,
    table=name_table,
    prefix="bert.",
    heads=("cls.", "classifier."),
    renames=encoder_files.RENAMES,
    # The constant 0, 1, 2, ..., and the next-sentence head of pretraining, which this model does not have.
    ignored=r"embeddings\.position_ids|cls\.seq_relationship\.(weight|bias)",
    copies=lambda config: (
        {
            "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        }
        if config.masked_lm
        else {}
    ),
)
