"""A whole post-norm text encoder, of which BERT, RoBERTa and MPNet are kinds: inputs, embeddings, blocks, pooler, head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

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


class TextEncoder(nn.Module):
    """A text encoder, post-norm: ``x = LN(x + Attention(x)); x = LN(x + W2 act(W1 x))``.

    Attributes:
      config: the model's shape.
      dtype: of the computation; parameters may be float32 or the same. Softmax and norms are float32 in any case.
      scan_layers: one traced block scanned over stacked parameters instead of a loop (see ``stack_layers``).
      remat: recompute each block in the backward pass instead of storing its activations.
    """

    config: Any
    dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: bool = False

    blocks: ClassVar[type[Encoder]] = Encoder

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
          token_type_ids: ``[batch, seq]``; zeros by default, and ignored by models without token types, since inputs made for
            any text encoder name them.
          position_ids: ``[batch, seq]`` or ``[1, seq]``; by default 0, 1, 2, ..., or for RoBERTa and MPNet counted from
            ``pad + 1`` over the tokens other than padding, which itself stands at ``pad``.
          deterministic: False switches dropout on, which needs ``rngs={"dropout": key}``.
          output_hidden_states: also return every block's output.

        Raises:
          ValueError: if a shape is wrong or the sequence is longer than the position table.
        """
        config, pad, types = self.config, self.pad(), self.token_types()
        others = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, "position_ids": position_ids}
        rows = config.max_position_embeddings
        ids, arrays = read_inputs(type(self).__name__, input_ids, others, rows if pad is None else rows - pad - 1, rows)
        positions = arrays["position_ids"]
        if positions is None:
            in_order = jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :]
            positions = in_order if pad is None else positions_after_padding(ids, pad)

        parts = {"config": config, "dtype": self.dtype, "deterministic": deterministic}
        embeddings = Embeddings(**parts, token_types=types, name="embeddings")
        first = embeddings(ids, arrays["token_type_ids"] if types else None, positions)
        encoder = self.blocks(
            **parts, keep=output_hidden_states, scan_layers=self.scan_layers, remat=self.remat, name="encoder"
        )
        last, kept = encoder(first, arrays["attention_mask"])
        pooled = Pooler(**parts, name="pooler")(last) if config.pooler else None
        logits = None
        if config.masked_lm:
            logits = self.language_model(parts, last, embeddings)
        elif config.classes is not None:
            rate = getattr(config, "classifier_dropout", None)
            logits = self.classify(parts, config.hidden_dropout_prob if rate is None else rate, last, pooled)
        return EncoderOutput(last, pooled, (first, *kept) if kept is not None else None, logits)

    def pad(self) -> int | None:
        """The id of padding that positions are counted from; None: they are 0, 1, 2, ..."""
        return None

    def token_types(self) -> int:
        """Rows of the table of token types; 0: there is none."""
        return self.config.type_vocab_size

    def language_model(self, parts: dict[str, Any], last: jax.Array, embeddings: Embeddings) -> jax.Array:
        """Logits ``[batch, seq, vocab]``, with the word embeddings as the decoder."""
        return LMHead(**parts, name="lm_head")(last, embeddings)

    def classify(self, parts: dict[str, Any], rate: float, last: jax.Array, pooled: jax.Array | None) -> jax.Array:
        """Logits ``[batch, classes]``; ``rate`` is the head's dropout."""
        return ClassificationHead(**parts, rate=rate, name="classifier")(last)
