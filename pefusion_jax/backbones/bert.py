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
import jax.numpy as jnp

from pefusion_jax.backbones import configs, encoder_files, names
from pefusion_jax.backbones.encoder import Embeddings, Encoder, EncoderOutput, Part, Pooler, read_inputs
from pefusion_jax.backbones.family import Family
from pefusion_jax.backbones.layers import ACTIVATIONS

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


class Bert(nn.Module):
    """A BERT encoder, post-norm: ``x = LN(x + Attention(x)); x = LN(x + W2 act(W1 x))``.

    Attributes:
      config: the model's shape.
      dtype: of the computation; parameters may be float32 or the same. Softmax and norms are float32 in any case.
      scan_layers: one traced block scanned over stacked parameters instead of a loop (see ``stack_layers``).
      remat: recompute each block in the backward pass instead of storing its activations.
    """

    config: BertConfig
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
    ) -> BertOutput:
        """Runs the encoder.

        Args:
          input_ids: token ids ``[batch, seq]``, or a mapping with the names of the array arguments.
          attention_mask: ``[batch, seq]``, non-zero = keep; all by default.
          token_type_ids: ``[batch, seq]``; zeros by default.
          position_ids: ``[batch, seq]`` or ``[1, seq]``; 0, 1, 2, ... by default.
          deterministic: False switches dropout on, which needs ``rngs={"dropout": key}``.
          output_hidden_states: also return every block's output.

        Raises:
          ValueError: if a shape is wrong or the sequence is longer than the position table.
        """
        others = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, "position_ids": position_ids}
        rows = self.config.max_position_embeddings
        ids, arrays = read_inputs("Bert", input_ids, others, rows, rows)
        positions = arrays["position_ids"]
        positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :] if positions is None else positions

        config = self.config
        parts = {"config": config, "dtype": self.dtype, "deterministic": deterministic}
        embeddings = Embeddings(**parts, token_types=config.type_vocab_size, name="embeddings")
        first = embeddings(ids, arrays["token_type_ids"], positions)
        encoder = Encoder(**parts, keep=output_hidden_states, scan_layers=self.scan_layers, remat=self.remat, name="encoder")
        last, kept = encoder(first, arrays["attention_mask"])
        pooled = Pooler(**parts, name="pooler")(last) if config.pooler else None
        logits = None
        if config.masked_lm:
            logits = _MaskedLMHead(**parts, name="cls")(last, embeddings)
        elif config.classes is not None:
            rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
            x = nn.Dropout(rate, deterministic=deterministic)(pooled)
            init = nn.initializers.normal(0.02)
            logits = nn.Dense(config.classes, dtype=self.dtype, kernel_init=init, name="classifier")(x)
        return EncoderOutput(last, pooled, (first, *kept) if kept is not None else None, logits)


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
