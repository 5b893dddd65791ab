"""BERT encoders (BERT, MiniLM and their kin) in Flax Linen, with Hugging Face's parameter names.

Parameter paths are Hugging Face's names with ``/`` for ``.``, without the prefix ``bert.`` of headed models::

    embeddings/{word,position,token_type}_embeddings/embedding      embeddings/LayerNorm/{scale,bias}
    encoder/layer/N/attention/self/{query,key,value}/{kernel,bias}
    encoder/layer/N/attention/output/{dense/{kernel,bias}, LayerNorm/{scale,bias}}
    encoder/layer/N/intermediate/dense/{kernel,bias}
    encoder/layer/N/output/{dense/{kernel,bias}, LayerNorm/{scale,bias}}
    pooler/dense/{kernel,bias}                                 (where the checkpoint has one)
    cls/predictions/{transform/{dense,LayerNorm}/..., bias}    (masked language models; the decoder is tied)

With ``scan_layers=True`` the ``N`` is gone and every leaf below ``encoder/layer`` has a leading axis of layers.

Taps (:class:`Tap`) of a layer, each ``[batch, seq, d_model]`` unless said otherwise::

    attention/self/tap_{query,key,value}    after the projections; key and value may get positions put in front,
                                            which every query then attends to
    attention/self/tap_context              attention's output, before the output projection
    intermediate/tap_hidden                 after the activation, [batch, seq, d_ff]
    output/tap_output                       the feed-forward output, before the residual sum
    tap_block                               the block's output

Reference: Devlin, Chang, Lee, Toutanova, "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding", 2019.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax.backbones import names
from pefusion_jax.backbones.layers import ACTIVATIONS, LayerNorm, stack_layers, unstack_layers
from pefusion_jax.backbones.taps import Tap

__all__ = [
    "Bert",
    "BertConfig",
    "BertOutput",
    "name_table",
    "params_from_hf",
    "params_to_hf",
    "stack_layers",
    "unstack_layers",
]

# Fields of config.json that change nothing about the forward pass.
_HARMLESS = frozenset(
    """architectures _name_or_path transformers_version torch_dtype dtype initializer_range pad_token_id
    bos_token_id eos_token_id sep_token_id cls_token_id mask_token_id use_cache gradient_checkpointing
    classifier_dropout id2label label2id num_labels problem_type finetuning_task return_dict output_hidden_states
    output_attentions torchscript chunk_size_feed_forward model_max_length _attn_implementation_autoset directionality
    pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type""".split()
)
# Fields with the only values that are implemented.
_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("bert",),
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


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The shape of a BERT model; field names and defaults are Hugging Face's, except ``pooler`` and ``masked_lm``.

    These two say which heads the weights have.
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
    pooler: bool = True
    masked_lm: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"BertConfig.{field.name} must be a positive integer, not {value!r}")
            if field.type == "float" and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise ValueError(f"BertConfig.{field.name} must be a number, not {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"BertConfig.hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"BertConfig.hidden_act={self.hidden_act!r} is not implemented; implemented: {', '.join(ACTIVATIONS)}"
            )
        if not (0 <= self.hidden_dropout_prob < 1 and 0 <= self.attention_probs_dropout_prob < 1):
            raise ValueError("BertConfig: dropout probabilities must lie in [0, 1)")
        if not 0 < self.layer_norm_eps < 1:
            raise ValueError(f"BertConfig.layer_norm_eps must lie in (0, 1), not {self.layer_norm_eps!r}")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], tensor_names: Iterable[str] | None = None) -> BertConfig:
        """Reads the dictionary of a ``config.json``.

        Args:
          raw: the dictionary.
          tensor_names: the tensors of the weights' file, which decide on pooler and masked-LM head. Without them
            the architecture in ``raw`` does.

        Raises:
          ValueError: naming every field or value that this file does not implement.
        """
        problems = [
            f"{key}={raw[key]!r} (implemented: {' or '.join(map(repr, values))})"
            for key, values in _ONLY.items()
            if key in raw and raw[key] not in values
        ]
        if "model_type" not in raw:
            problems.append("model_type is missing (implemented: 'bert')")
        own = {field.name for field in dataclasses.fields(cls)} - {"pooler", "masked_lm"}
        known = own | _HARMLESS | set(_ONLY)
        problems += [f"{key}={raw[key]!r} (unknown field)" for key in raw if key not in known]
        if problems:
            raise ValueError(
                "this config.json asks for what the BERT backbone does not implement: "
                + "; ".join(problems)
                + ". A field that changes nothing about the model can be deleted from a copy of the file."
            )
        if tensor_names is None:
            masked_lm = any("MaskedLM" in name for name in raw.get("architectures") or ())
            pooler = not masked_lm
        else:
            stripped = {name.removeprefix("bert.") for name in tensor_names}
            masked_lm = any(name.startswith("cls.predictions.") for name in stripped)
            pooler = any(name.startswith("pooler.") for name in stripped)
        return cls(**{key: raw[key] for key in own if key in raw}, pooler=pooler, masked_lm=masked_lm)


class BertOutput(NamedTuple):
    """What a :class:`Bert` returns; what does not apply is None.

    ``last_hidden_state [batch, seq, d_model]``; ``pooler_output [batch, d_model]``; ``hidden_states``: the
    embeddings and every block's output, each ``[batch, seq, d_model]``; ``logits [batch, seq, vocab]``.
    """

    last_hidden_state: jax.Array
    pooler_output: jax.Array | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    logits: jax.Array | None = None


Hidden = tuple[jax.Array, ...] | None


class _Part(nn.Module):
    """What every part needs to know."""

    config: BertConfig
    dtype: Any
    deterministic: bool

    def dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(features, dtype=self.dtype, name=name, kernel_init=nn.initializers.normal(0.02))

    def norm(self) -> LayerNorm:
        return LayerNorm(epsilon=self.config.layer_norm_eps, dtype=self.dtype, name="LayerNorm")

    def dropout(self, x: jax.Array, rate: float) -> jax.Array:
        return nn.Dropout(rate, deterministic=self.deterministic)(x)

    def parts(self) -> dict[str, Any]:
        return {"config": self.config, "dtype": self.dtype, "deterministic": self.deterministic}


class _Embeddings(_Part):
    def setup(self) -> None:
        def table(rows: int) -> nn.Embed:
            init = nn.initializers.normal(0.02)
            return nn.Embed(rows, self.config.hidden_size, dtype=self.dtype, embedding_init=init)

        self.word_embeddings = table(self.config.vocab_size)
        self.position_embeddings = table(self.config.max_position_embeddings)
        self.token_type_embeddings = table(self.config.type_vocab_size)
        self.LayerNorm = LayerNorm(epsilon=self.config.layer_norm_eps, dtype=self.dtype)
        self.drop = nn.Dropout(self.config.hidden_dropout_prob, deterministic=self.deterministic)

    def __call__(self, input_ids: jax.Array, token_type_ids: jax.Array, position_ids: jax.Array) -> jax.Array:
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        return self.drop(self.LayerNorm(x + self.position_embeddings(position_ids)))

    def decode(self, x: jax.Array) -> jax.Array:
        return self.word_embeddings.attend(x)


class _SelfAttention(_Part):
    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        heads, width = self.config.num_attention_heads, self.config.hidden_size
        query, key, value = (Tap(name=f"tap_{name}")(self.dense(width, name)(x)) for name in ("query", "key", "value"))
        # Heads in front: plain batched products, which XLA's CPU backend runs a fifth faster than the einsum over [b, s, h, d].
        query, key, value = (y.reshape(*y.shape[:2], heads, width // heads).swapaxes(1, 2) for y in (query, key, value))
        # Scores and softmax are float32 whatever the compute dtype.
        scores = jnp.matmul(query, key.swapaxes(2, 3), preferred_element_type=jnp.float32)
        scores = scores * jnp.float32((width // heads) ** -0.5)
        if mask is not None:
            prefix = key.shape[2] - mask.shape[1]
            if prefix > 0:  # positions that a method put in front of keys and values
                mask = jnp.pad(mask, ((0, 0), (prefix, 0)), constant_values=True)
            # A finite minimum: a row without any kept position attends uniformly instead of giving NaN.
            scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        weights = self.dropout(weights, self.config.attention_probs_dropout_prob)
        context = jnp.matmul(weights, value).swapaxes(1, 2)
        return Tap(name="tap_context")(context.reshape(*x.shape[:2], width))


class _ResidualOutput(_Part):
    """``LayerNorm(dropout(dense(x)) + residual)``, the end of both halves of a block."""

    tapped: bool

    @nn.compact
    def __call__(self, x: jax.Array, residual: jax.Array) -> jax.Array:
        x = self.dense(self.config.hidden_size, "dense")(x)
        if self.tapped:
            x = Tap(name="tap_output")(x)
        return self.norm()(self.dropout(x, self.config.hidden_dropout_prob) + residual)


class _Attention(_Part):
    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        context = _SelfAttention(**self.parts(), name="self")(x, mask)
        return _ResidualOutput(**self.parts(), tapped=False, name="output")(context, x)


class _Intermediate(_Part):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.dense(self.config.intermediate_size, "dense")(x)
        return Tap(name="tap_hidden")(ACTIVATIONS[self.config.hidden_act](x))


class _Block(_Part):
    keep: bool  # whether the block's output is collected as well as carried

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        x = _Attention(**self.parts(), name="attention")(x, mask)
        hidden = _Intermediate(**self.parts(), name="intermediate")(x)
        x = _ResidualOutput(**self.parts(), tapped=True, name="output")(hidden, x)
        x = Tap(name="tap_block")(x)
        return x, x if self.keep else None


class _LoopedBlocks(_Part):
    keep: bool
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, Hidden]:
        block = nn.remat(_Block) if self.remat else _Block
        kept = []
        for layer in range(self.config.num_hidden_layers):
            x, _ = block(**self.parts(), keep=self.keep, name=str(layer))(x, mask)
            kept.append(x)
        return x, tuple(kept) if self.keep else None


class _Encoder(_Part):
    keep: bool
    scan_layers: bool
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, Hidden]:
        if not self.scan_layers:
            return _LoopedBlocks(**self.parts(), keep=self.keep, remat=self.remat, name="layer")(x, mask)
        scanned = nn.scan(
            # Inside a scan, common subexpressions cannot undo the rematerialisation.
            nn.remat(_Block, prevent_cse=False) if self.remat else _Block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=self.config.num_hidden_layers,
        )
        x, kept = scanned(**self.parts(), keep=self.keep, name="layer")(x, mask)
        return x, None if kept is None else tuple(kept)


class _Pooler(_Part):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.dense(self.config.hidden_size, "dense")(x[:, 0]))


class _Transform(_Part):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.dense(self.config.hidden_size, "dense")(x)
        return self.norm()(ACTIVATIONS[self.config.hidden_act](x))


class _Predictions(_Part):
    @nn.compact
    def __call__(self, x: jax.Array, embeddings: _Embeddings) -> jax.Array:
        bias = self.param("bias", nn.initializers.zeros_init(), (self.config.vocab_size,))
        logits = embeddings.decode(_Transform(**self.parts(), name="transform")(x))
        return logits + bias.astype(self.dtype)[None, None, :]


class _MaskedLMHead(_Part):
    @nn.compact
    def __call__(self, x: jax.Array, embeddings: _Embeddings) -> jax.Array:
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
        arrays: tuple[jax.Array | None, ...] = (attention_mask, token_type_ids, position_ids)
        if isinstance(input_ids, Mapping):
            allowed = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
            if "input_ids" not in input_ids or set(input_ids) - set(allowed):
                raise ValueError(f"Bert takes a mapping with input_ids and any of {allowed[1:]}, not {list(input_ids)}")
            if any(array is not None for array in arrays):
                raise ValueError("Bert takes either one mapping or single arrays, not both")
            arrays = tuple(input_ids.get(name) for name in allowed[1:])
            input_ids = input_ids["input_ids"]
        ids = jnp.asarray(input_ids)
        self._check_shapes(ids, *arrays)
        mask, types, positions = (None if array is None else jnp.asarray(array) for array in arrays)
        mask = None if mask is None else mask.astype(bool)
        types = jnp.zeros_like(ids) if types is None else types
        positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :] if positions is None else positions

        parts = {"config": self.config, "dtype": self.dtype, "deterministic": deterministic}
        embeddings = _Embeddings(**parts, name="embeddings")
        first = embeddings(ids, types, positions)
        encoder = _Encoder(**parts, keep=output_hidden_states, scan_layers=self.scan_layers, remat=self.remat, name="encoder")
        last, kept = encoder(first, mask)
        return BertOutput(
            last_hidden_state=last,
            pooler_output=_Pooler(**parts, name="pooler")(last) if self.config.pooler else None,
            hidden_states=(first, *kept) if kept is not None else None,
            logits=_MaskedLMHead(**parts, name="cls")(last, embeddings) if self.config.masked_lm else None,
        )

    def _check_shapes(self, ids: jax.Array, *others: Any) -> None:
        if ids.ndim != 2:
            raise ValueError(f"Bert: input_ids must be [batch, seq], not of shape {ids.shape}")
        if ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"Bert: the sequence has {ids.shape[1]} tokens, the model at most "
                f"{self.config.max_position_embeddings}: truncate when tokenizing"
            )
        for name, array in zip(("attention_mask", "token_type_ids", "position_ids"), others, strict=True):
            allowed = {ids.shape, (1, ids.shape[1])} if name == "position_ids" else {ids.shape}
            if array is not None and jnp.shape(array) not in allowed:
                raise ValueError(f"Bert: {name} has shape {jnp.shape(array)}, input_ids has {ids.shape}")


# Tensors of real files that are no parameters of this model, by their full names after the "bert." prefix.
_IGNORED = frozenset(
    {
        "embeddings.position_ids",  # a constant 0, 1, 2, ...
        "cls.seq_relationship.weight",  # the next-sentence head of pretraining, which this model does not have
        "cls.seq_relationship.bias",
    }
)
# Copies that some files store of tied tensors; they must equal the original.
_TIED = {
    "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


def name_table(config: BertConfig) -> dict[str, names.Entry]:
    """The table of Hugging Face names for a configuration, without the ``bert.`` prefix, in the loop layout."""
    width, hidden = config.hidden_size, config.intermediate_size
    table: dict[str, names.Entry] = {}
    for kind, rows in (
        ("word", config.vocab_size),
        ("position", config.max_position_embeddings),
        ("token_type", config.type_vocab_size),
    ):
        table |= names.embedding(f"embeddings/{kind}_embeddings", f"embeddings.{kind}_embeddings", rows, width)
    layers = [f"encoder.layer.{layer}" for layer in range(config.num_hidden_layers)]
    denses, norms = [], ["embeddings.LayerNorm"]
    for layer in layers:
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            denses.append((f"{layer}.attention.{part}", width, width))
        denses.append((f"{layer}.intermediate.dense", width, hidden))
        denses.append((f"{layer}.output.dense", hidden, width))
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    if config.pooler:
        denses.append(("pooler.dense", width, width))
    if config.masked_lm:
        denses.append(("cls.predictions.transform.dense", width, width))
        norms.append("cls.predictions.transform.LayerNorm")
        table["cls/predictions/bias"] = names.Entry("cls.predictions.bias", (config.vocab_size,))
    for name, inputs, outputs in denses:
        table |= names.linear(name.replace(".", "/"), name, inputs, outputs)
    for name in norms:
        table |= names.norm(name.replace(".", "/"), name, width)
    return table


def params_from_hf(tensors: Mapping[str, np.ndarray], config: BertConfig) -> dict[str, Any]:
    """Builds the parameters (loop layout, dtypes as in the file) from the tensors of a Hugging Face file.

    Accepts names with and without ``bert.``, ``LayerNorm.gamma/beta`` of old files, and copies of tied tensors.

    Raises:
      ValueError: listing every missing, unexpected and wrongly shaped tensor, or naming a tied copy that differs.
    """
    plain: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        new = name.removeprefix("bert.")
        for old, modern in ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")):
            new = new.removesuffix(old) + modern if new.endswith(old) else new
        if new in plain:
            raise ValueError(f"two tensors are both {new!r}, the second is {name!r}: the file is ambiguous")
        if new not in _IGNORED:
            plain[new] = array
    for copy, original in _TIED.items():
        if copy in plain and original in plain and config.masked_lm:
            if not np.array_equal(plain.pop(copy), plain[original]):
                raise ValueError(f"{copy} differs from {original}: an untied decoder is not implemented")
    return names.read(plain, name_table(config), "this BERT configuration")


def params_to_hf(params: Mapping[str, Any], config: BertConfig) -> dict[str, np.ndarray]:
    """The inverse of :func:`params_from_hf`, from either layout; ``bert.`` is written where Hugging Face writes it.

    Raises:
      ValueError: if the parameters are not those of the configuration.
    """
    plain = names.write(unstack_layers(params), name_table(config), "this BERT configuration")
    headed = "bert." if config.masked_lm else ""
    return {name if name.startswith("cls.") else headed + name: array for name, array in plain.items()}
