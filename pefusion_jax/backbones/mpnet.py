"""MPNet encoders in Flax Linen, with Hugging Face's parameter names.

Parameter paths are Hugging Face's names with ``/`` for ``.``, without the prefix ``mpnet.`` of headed models::

    embeddings/{word,position}_embeddings/embedding                  embeddings/LayerNorm/{scale,bias}
    encoder/relative_attention_bias/embedding                        [buckets, heads], of all layers
    encoder/layer/N/attention/attn/{q,k,v,o}/{kernel,bias}           encoder/layer/N/attention/LayerNorm/{scale,bias}
    encoder/layer/N/intermediate/dense/{kernel,bias}
    encoder/layer/N/output/{dense/{kernel,bias}, LayerNorm/{scale,bias}}
    pooler/dense/{kernel,bias}                                       (where the checkpoint has one)
    lm_head/{dense/{kernel,bias}, layer_norm/{scale,bias}, bias}     (masked language models; the decoder is tied)
    classifier/{dense,out_proj}/{kernel,bias}                        (sequence classifiers)

With ``scan_layers=True`` the ``N`` is gone and every leaf below ``encoder/layer`` has a leading axis of layers.

Taps are those of ``encoder.py``, those of attention below ``attention/attn``.

Reference: Song, Tan, Qin, Lu, Liu, "MPNet: Masked and Permuted Pre-training for Language Understanding", 2020; the
relative positions are those of Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer", 2020.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax.backbones import configs, encoder_files, names
from pefusion_jax.backbones.encoder import Encoder, Part, SelfAttention
from pefusion_jax.backbones.family import Family
from pefusion_jax.backbones.t5_blocks import relative_buckets
from pefusion_jax.backbones.text_encoder import TextEncoder

__all__ = ["FAMILY", "MPNet", "MPNetConfig", "name_table"]

_ONLY = {"model_type": ("mpnet",), **encoder_files.ONLY}

# The id of padding that positions are counted from and the buckets of relative positions are constants of the model in
# transformers, whatever its configuration says: the fields only size its tables.
_PAD, _BUCKETS, _MAX_DISTANCE = 1, 32, 128


@dataclasses.dataclass(frozen=True)
class MPNetConfig:
    """The shape of an MPNet model; field names and defaults are Hugging Face's, except the last three.

    These say which heads the weights have: the pooler, a masked-LM head, or a classifier of so many ``classes`` on the
    first token. ``max_position_embeddings`` is the number of rows of the position table, of which the first two hold no
    token: the published models have 514 rows for 512 tokens.
    """

    vocab_size: int = 30527
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    relative_attention_num_buckets: int = 32
    pooler: bool = True
    masked_lm: bool = False
    classes: int | None = None

    def __post_init__(self) -> None:
        configs.validate(self)
        configs.require_multiple(self, "hidden_size", "num_attention_heads")
        encoder_files.check_heads(self)
        if self.relative_attention_num_buckets < _BUCKETS:
            raise ValueError(
                f"MPNetConfig.relative_attention_num_buckets={self.relative_attention_num_buckets}: the model looks up "
                f"{_BUCKETS} buckets whatever the size of the table, so it must have at least as many rows"
            )
        for field in ("vocab_size", "max_position_embeddings"):
            if getattr(self, field) <= _PAD:
                raise ValueError(f"MPNetConfig.{field}={getattr(self, field)} has no row for padding, whose id is {_PAD}")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], tensors: Mapping[str, Any] | None = None) -> MPNetConfig:
        """Reads the dictionary of a ``config.json``.

        Args:
          raw: the dictionary.
          tensors: canonical names of the weights' file (see ``family.canonical``), which decide on pooler and heads.
            Without them the architecture in ``raw`` does.

        Raises:
          ValueError: naming every field or value that this file does not implement.
        """
        return encoder_files.read_config(cls, raw, tensors, "MPNet", _ONLY)

    def to_dict(self) -> dict[str, Any]:
        """The dictionary of a ``config.json`` from which transformers builds the same model."""
        return encoder_files.write_config(self, "mpnet", "MPNet")


class _SelfAttention(SelfAttention):
    projections: tuple[str, str, str] = ("q", "k", "v")

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, bias: jax.Array | None) -> jax.Array:
        return self.dense(self.config.hidden_size, "o")(self.attend(x, mask, bias))


class _Attention(Part):
    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, bias: jax.Array | None) -> jax.Array:
        out = _SelfAttention(**self.parts(), name="attn")(x, mask, bias)
        return self.norm()(self.dropout(out, self.config.hidden_dropout_prob) + x)


class _Encoder(Encoder):
    attention_kind: type[Part] = _Attention

    def bias(self, length: int) -> jax.Array:
        init = nn.initializers.normal(0.02)
        rows, heads = self.config.relative_attention_num_buckets, self.config.num_attention_heads
        # In float32 whatever the compute dtype, as the scores it is added to.
        table = nn.Embed(rows, heads, dtype=jnp.float32, embedding_init=init, name="relative_attention_bias")
        ahead = np.arange(length)[None, :] - np.arange(length)[:, None]
        buckets = relative_buckets(ahead, True, _BUCKETS, _MAX_DISTANCE).astype(np.int32)
        return table(jnp.asarray(buckets)).transpose(2, 0, 1)[None]


class MPNet(TextEncoder):
    """An MPNet encoder, with one table of relative positions: ``softmax(q k^T / sqrt(d) + bias) v``.

    Attributes (``config`` is a :class:`MPNetConfig`) and inputs are those of :class:`TextEncoder`; relative positions do not
    depend on ``position_ids``.
    """

    blocks = _Encoder

    def pad(self) -> int:
        return _PAD

    def token_types(self) -> int:
        return 0


def name_table(config: MPNetConfig) -> dict[str, names.Entry]:
    """The table of canonical names of a configuration, in the loop layout."""
    table = encoder_files.base_table(config, 0, ("attn.q", "attn.k", "attn.v", "attn.o"), "LayerNorm")
    bias = "encoder.relative_attention_bias"
    table |= names.embedding(bias.replace(".", "/"), bias, config.relative_attention_num_buckets, config.num_attention_heads)
    return table | encoder_files.head_table(config)


FAMILY = Family(
    name="MPNet",
    model_types=("mpnet",),
    architectures=("MPNetModel", "MPNetForMaskedLM", "MPNetForSequenceClassification"),
    read_config=MPNetConfig.from_dict,
    write_config=MPNetConfig.to_dict,
    build=MPNet,
    table=name_table,
    prefix="mpnet.",
    heads=("lm_head.", "classifier."),
    renames=encoder_files.RENAMES,
    ignored=r"embeddings\.position_ids",  # a constant
    copies=encoder_files.lm_copies,
)
