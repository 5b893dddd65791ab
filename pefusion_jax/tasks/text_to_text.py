"""Text-to-text tasks for encoder-decoders: the model reads a text and writes the label as a text.

    source text  --encoder-->                                        loss of the target's tokens           (training)
    target text  --decoder-->  logits [batch, seq, vocab]  -->       log-likelihood of each class's text   (classes)
                                                                     tokens written one by one             (numbers, any text)

All such tasks share one head, which has no parameters: a model is trained on several of them at once, whatever their labels.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pefusion_jax.tasks import metrics
from pefusion_jax.tasks.targets import Ranking, Targets, Writing, target_features
from pefusion_jax.tasks.task import SPLITS, Head, Task, label_number
from pefusion_jax.tasks.text import TextEncoder

TARGET_BUCKETS = (4, 8, 16, 32, 64, 128, 256, 512)


def token_logits(params: Any, features: jax.Array) -> jax.Array:
    """The features as they are."""
    del params
    return features


HEAD = Head({}, target_features, token_logits)


def text_to_text(
    name: str,
    tokenizer: Any,
    *,
    source: Callable[[Any], str] | Sequence[str],
    classes: Sequence[str] | None = None,
    target: Callable[[Any], str] | None = None,
    train: Sequence[Any],
    validation: Sequence[Any] = (),
    test: Sequence[Any] = (),
    label: str | Callable[[Any], Any] = "label",
    metric: Callable[[Any, Any], float] | None = None,
    max_length: int | None = None,
    buckets: Sequence[int] = (16, 32, 64, 128, 256),
    max_target_length: int = 32,
    length_normalize: bool = False,
    labels_at_once: int = 8,
    nearest: float = 0.2,
    otherwise: float = -1.0,
    decoder_start_token_id: int | None = None,
) -> Task:
    r"""A task whose label is a text, for an encoder-decoder such as T5. Training is teacher forcing, with the loss

    .. math:: \ell = -\frac{1}{T} \sum_{t \le T} \log p(y_t \mid x, y_{<t})

    of each example, the end token included. There are three kinds:

    * ``classes``: the label is the number or the text of one of them. The prediction is the class whose text has the largest
      :math:`\sum_t \log p(y_t)` ("rank classification"): nothing is decoded, and the encoder reads an example once for
      ``labels_at_once`` classes.
    * ``classes=()``: the label is a number, written as a multiple of ``nearest``, as T5 writes the similarities of STS-B:
      ``3.4``. The prediction is what greedy search writes.
    * ``target``: any text. The prediction is what greedy search writes. To score a classification as T5 does, give the class's
      text as the target.

    Args:
      name: of the task.
      tokenizer: a Hugging Face tokenizer with an end token.
      source: ``(example) -> text`` that the encoder reads; or names of fields, for ``name field1: ... field2: ...``.
      classes: texts of the classes in label order, ``()`` for numbers, or ``None`` with a ``target``.
      target: ``(example) -> text`` that is to be written.
      train: sequence of examples; also validation and test.
      label: see :class:`Task`; not used with a ``target``.
      metric: for classes ``(scores [n, classes], labels [n])``, accuracy by default; for numbers ``(numbers [n], labels [n])``,
        Pearson's correlation; for any text ``(texts [n], texts [n])``, exact match.
      max_length: longest source in tokens, the last bucket by default; longer ones are cut.
      buckets: lengths that sources are padded to.
      max_target_length: longest target in tokens, with the end token; greedy search stops there. Longer ones are errors.
      length_normalize: divide a class's log-likelihood by its number of tokens.
      labels_at_once: how many classes are read at a time, which bounds the memory.
      nearest: numbers are rounded to a multiple of it.
      otherwise: the number predicted by a text that is none, which counts as wrong if it lies outside of the scale.
      decoder_start_token_id: first token of the decoder; the padding token by default, as T5 has it.

    Returns:
      A task for ``finetune``, ``finetune_together``, ``evaluate`` and ``statistics``. Its labels in a batch are numbers of
      classes (with a ``target``, of the different targets, in ``Task.classes``), or float32. Decoders that continue the source
      (Llama) are not supported.

    Raises:
      ValueError: for settings that cannot work, a class that has no tokens or those of another; and, with its place, for a row
        without a field or with a target that is too long.

    Example::

      answers = ("entailment", "not entailment")
      task = text_to_text("rte", tokenizer, source=("sentence1", "sentence2"), classes=answers, train=rows)

    Reference: C. Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer, 2020; H. Liu
    et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, 2022, for the ranking.
    """
    if (classes is None) == (target is None):
        raise ValueError("give either classes= (with () for numbers) or target=, the text that is to be written")
    if isinstance(classes, str) or isinstance(source, str):
        raise ValueError(f"classes={classes!r:.80} and source={source!r:.80} must be sequences of texts, not one text")
    if max_target_length < 1 or labels_at_once < 1:
        raise ValueError(f"max_target_length={max_target_length} and labels_at_once={labels_at_once} must be 1 or more")
    if not (math.isfinite(nearest) and nearest > 0 and math.isfinite(otherwise)):
        raise ValueError(f"nearest={nearest} must be finite and above 0, otherwise={otherwise} finite")
    pad, end = (getattr(tokenizer, f"{kind}_token_id", None) for kind in ("pad", "eos"))
    if end is None:
        raise ValueError("the tokenizer has no end token (eos_token_id), so that no target would ever end")
    start = pad if decoder_start_token_id is None else decoder_start_token_id
    if start is None:
        raise ValueError("the tokenizer has no padding token, with which T5's decoder starts; pass decoder_start_token_id=")

    splits = dict(zip(SPLITS, (train, validation, test), strict=True))
    read = source if callable(source) else functools.partial(_prefixed, name, tuple(source))
    answer: Any = target
    score: Any = metric
    texts = tuple(classes or ())
    if target is not None:
        texts = _different(name, target, splits)
        places = {text: place for place, text in enumerate(texts)}
        label = functools.partial(_place, target, places)
        score = functools.partial(_texts_metric, metric or metrics.exact_match, texts)
    elif texts:
        answer = functools.partial(_class_text, label, texts)
        score = metric or metrics.accuracy
    else:
        answer = functools.partial(_number_text, label, nearest)
        score = metric or metrics.pearson
    targets = Targets(tokenizer, int(end), int(start), max_target_length)
    predict: Any = Writing(targets, otherwise if target is None else None)
    if texts and target is None:
        if len(texts) < 2:
            raise ValueError(f"task {name!r} has the classes {list(texts)!r:.200}; it needs two or more")
        ids = [targets.tokens(text) for text in texts]
        for place, tokens in enumerate(ids):
            if tokens in ids[:place]:
                twin = texts[ids.index(tokens)]
                raise ValueError(f"task {name!r}: the classes {twin!r} and {texts[place]!r} have the same tokens; rename one")
        predict = Ranking(targets.padded(texts), length_normalize, labels_at_once)
    encode = TextToText(TextEncoder(tokenizer, ("source",), tuple(buckets), max_length), read, answer, targets)
    return Task(name, texts, train, validation, test, encode, HEAD, score, metrics.token_cross_entropy, label, predict)


@dataclass(frozen=True, eq=False)
class TextToText:
    """Encodes examples: ``input_ids``, ``attention_mask`` and their decoder's counterparts, at the lengths of buckets.

    Attributes:
      sources: encoder of the sources.
      read: ``(example) -> source``.
      answer: ``(example) -> target``.
      targets: encoder of the targets.
    """

    sources: TextEncoder
    read: Callable[[Any], str]
    answer: Callable[[Any], str]
    targets: Targets

    @property
    def tokenizer(self) -> Any:
        return self.sources.tokenizer

    def __call__(self, examples: Sequence[Any]) -> dict[str, np.ndarray]:
        """Encodes a batch."""
        return self.trim(self.padded(examples))

    def problem(self, example: Any) -> str | None:
        """What is wrong with an example, or ``None``."""
        try:
            text = _of(self.read, example)
            if not isinstance(text, str):
                return f"the source is {type(text).__name__}, not text: {text!r:.60}"
            self.targets.tokens(_of(self.answer, example))
        except ValueError as error:
            return str(error)
        return None

    def refuses(self, adapted: Any) -> str | None:
        """Why a model cannot take these inputs, or ``None``."""
        model = getattr(getattr(adapted, "origin", None), "model", None)
        takes = {} if model is None else inspect.signature(type(model).__call__).parameters
        if model is None or "decoder_input_ids" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            return None
        return (
            f"{type(model).__name__} takes no decoder_input_ids: text-to-text tasks are for encoder-decoders such as T5. Score "
            "what a decoder continues with pf.score_labels or pf.generate_tokens"
        )

    def padded(self, examples: Sequence[Any]) -> dict[str, np.ndarray]:
        """Encodes examples at one width for all sources, and one for all targets."""
        for row, example in enumerate(examples):
            if (message := self.problem(example)) is not None:
                raise ValueError(f"example {row}: {message}")
        sources = self.sources.texts([self.read(example) for example in examples])
        targets = self.targets.padded([self.answer(example) for example in examples])
        longest = targets["decoder_input_ids"].shape[1]
        fill = ((0, 0), (0, self._width(longest) - longest))
        pad = getattr(self.tokenizer, "pad_token_id", None) or 0
        return {
            "input_ids": sources["input_ids"],
            "attention_mask": sources["attention_mask"],
            "decoder_input_ids": np.pad(targets["decoder_input_ids"], fill, constant_values=pad),
            "decoder_attention_mask": np.pad(targets["decoder_attention_mask"], fill),
        }

    def trim(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Cuts padding away: the arrays at the smallest buckets that hold the longest source and the longest target."""
        read = self.sources.trim({name: inputs[name] for name in ("input_ids", "attention_mask")})
        width = self._width(int(np.max(np.sum(inputs["decoder_attention_mask"], axis=1))))
        return {**read, **{name: inputs[name][:, :width] for name in ("decoder_input_ids", "decoder_attention_mask")}}

    def _width(self, length: int) -> int:
        most = self.targets.longest + 1
        return next((bucket for bucket in TARGET_BUCKETS if length <= bucket < most), most)


def _of(function: Callable[[Any], Any], example: Any) -> Any:
    """What a function of the caller's makes of an example; a missing field is a ValueError that lists those there are."""
    try:
        return function(example)
    except KeyError as error:
        fields = sorted(example) if isinstance(example, Mapping) else example
        raise ValueError(f"no field {error.args[0]!r}, there are {fields}; correct source= or target=, or the row") from error


def _prefixed(name: str, fields: tuple[str, ...], example: Mapping[str, Any]) -> str:
    return " ".join([name, *(f"{each}: {example[each]}" for each in fields)])


def _class_text(label: Any, classes: tuple[str, ...], example: Any) -> str:
    return classes[int(label_number(example, label, classes))]


def _number_text(label: Any, nearest: float, example: Any) -> str:
    places = next((n for n in range(9) if math.isclose(nearest * 10**n, round(nearest * 10**n))), 9)
    return f"{np.round(label_number(example, label, ()) / nearest) * nearest + 0.0:.{places}f}"


def _different(name: str, target: Callable[[Any], str], splits: Mapping[str, Sequence[Any]]) -> tuple[str, ...]:
    """All different targets, in the order in which they come."""
    found: dict[str, None] = {}
    for split, examples in splits.items():
        for row, example in enumerate(examples):
            try:
                text = _of(target, example)
                if not isinstance(text, str):
                    raise ValueError(f"the target is {type(text).__name__}, not text: {text!r:.60}")
            except ValueError as error:
                where = getattr(examples, "where", None)
                place = f"{split}, example {row}" if where is None else where(row)
                raise ValueError(f"task {name!r}: {place}: {error}") from error
            found[text] = None
    return tuple(found)


def _place(target: Callable[[Any], str], places: Mapping[str, int], example: Any) -> int:
    text = target(example)
    if text not in places:
        raise ValueError(f"the target {text!r:.60} is that of no example of the task's splits; add the example to one of them")
    return places[text]


def _texts_metric(metric: Callable[[Any, Any], float], texts: tuple[str, ...], written: Any, labels: Any) -> float:
    return metric(list(written), [texts[int(label)] for label in labels])
