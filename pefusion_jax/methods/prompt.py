"""Prompt tuning: trained positions in front of the embedded tokens, and what compares and starts such prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from pefusion_jax import trees
from pefusion_jax.layers import Layer
from pefusion_jax.rules import Leaves, join

# Of BERT, RoBERTa and MPNet; Llama and Qwen2; T5, whose decoder looks its tokens up in the same table.
WORD_EMBEDDINGS = r"(.*/)?(word_embeddings|embed_tokens|shared)"

LEAF = "prompt"
_HERE = -1  # the token id that stands for a position of the prompt
_READ = "prompt"  # entry of a decoder's cache that has read the prompt
_STARTS: dict[str, Callable[..., jax.Array]] = {
    "normal": jax.nn.initializers.normal(0.02),
    "uniform": lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -0.5, 0.5),
    "unit": jax.nn.initializers.normal(1.0),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptTuning:
    r"""Puts trained vectors in front of the embeddings of the tokens.

    .. math:: f_P(x) = f([P; E(x)])_{n:}, \qquad P \in \mathbb{R}^{n \times d}

    where :math:`E` is the table of word embeddings. The one leaf is ``prompt`` ``[n, d]``, beside the table. Positional and
    token type embeddings are added to :math:`P` as to any token, and every token attends to it. The adapted model takes and
    gives what the base model does: masks, token types (the prompt's are 0), positions (the prompt begins at the first one
    given, the rest move by :math:`n`), caches of decoders and encoder-decoders are made longer on the way in, and on the way
    out outputs ``[batch, seq, ...]`` with three axes or more lose the positions of the prompt, so heads and masks fit. Pooled
    outputs are the model's: what BERT pools, its first position, is then the prompt's. In an encoder-decoder the prompt is the
    encoder's. A sequence of :math:`n + \mathrm{seq}` positions has the cost of one.

    The prompt is no change of the weights: the method does not fold, ``deltas`` raises, and prompts are fused as trees
    (``fuse(..., space="adapter")``) or linearized over the network. The model starts near the base model at best.

    A prompt for a new task starts from that of another (SPoT) with ``finetune(..., adapters=source)``; which one is nearest,
    :func:`prompt_similarity` says. :func:`prompt_from_tokens` starts it from words. Several tasks share one with
    ``generators.MPT``.

    Attributes:
      length: number :math:`n` of trained positions.
      targets: regular expression that must match the whole slash path of the word embeddings, and of no other embedding.
      init: how the prompt starts: ``"normal"`` with deviation 0.02, that of the tables of BERT's kin before training;
        ``"uniform"`` in :math:`\pm 0.5` (Lester et al.); ``"unit"``, normal with deviation 1 (PEFT's ``RANDOM``).
      ids: name of the model's argument with the token ids, where they are given by name.

    Raises:
      ValueError: by ``apply``, if there are no token ids ``[batch, seq]``, if more than one argument is given without its name,
        if ``encoder_outputs`` are given, which come after the prompt, or a cache of a kind that is not known here.

    Example::

      adapted = adapt(model, PromptTuning(length=100))
      prompt = adapted.init(jax.random.key(0), params, **batch)
      prompt = prompt_from_tokens(prompt, params, key=jax.random.key(1))

    Reference: B. Lester, R. Al-Rfou, N. Constant, The Power of Scale for Parameter-Efficient Prompt Tuning, 2021. Where we
    depart from PEFT: it forgets token types and given positions. ``load_peft`` reads the prompts that PEFT writes, and
    ``save_peft`` writes them, as adapters of type ``PROMPT_TUNING``.
    """

    length: int = 20
    targets: str = WORD_EMBEDDINGS
    init: Literal["normal", "uniform", "unit"] = "normal"
    ids: str = "input_ids"

    acts_on: ClassVar[str] = "layers"
    folds: ClassVar[bool] = False
    stochastic: ClassVar[bool] = False
    names: ClassVar[tuple[str, ...]] = (LEAF,)

    def __post_init__(self) -> None:
        if self.length < 1 or self.length != int(self.length):
            raise ValueError(f"length must be a positive integer, got {self.length}")
        if self.init not in _STARTS:
            raise ValueError(f"init={self.init!r} is not one of {', '.join(map(repr, _STARTS))}")

    def owns(self, leaf: str) -> str:
        """Nothing: the leaf is of a layer, not of a parameter."""
        return ""

    def leaves(self, site: Layer) -> dict[str, tuple[Callable[..., jax.Array], tuple[int, ...]]]:
        """``prompt`` with its initialiser and shape.

        Raises:
          ValueError: if the site is no embedding.
        """
        if site.kernel != "embedding":
            raise ValueError(
                f"targets={self.targets!r} matches {site.path!r}, which is no embedding; PromptTuning stands at the word "
                "embeddings: narrow the targets"
            )
        return {LEAF: (_STARTS[self.init], (self.length, *site.outputs))}

    def beneath(self, x: Any, y: jax.Array) -> jax.Array:
        """``y`` with zeros at the prompt's positions, where the table has nothing to say."""
        # Not left to the branch: a difference to the table's rows would be rounded at their size, not at the prompt's.
        return jnp.where(x[..., None] == _HERE, jnp.zeros_like(y), y) if self._stands_in(x) else y

    def branch(self, layer: Layer, leaves: Leaves, x: Any, y: jax.Array, key: jax.Array | None) -> jax.Array:
        """The prompt at its positions, zeros at all others."""
        prompt, n = leaves[LEAF], self.length
        if prompt.shape[0] != n:
            raise ValueError(f"the prompt at {layer.path!r} has {prompt.shape[0]} positions, PromptTuning(length={n}) has {n}")
        if not self._stands_in(x):
            return jnp.zeros_like(y)
        front = jnp.where(x[:, :n, None] == _HERE, prompt[None], jnp.zeros_like(prompt)[None])
        return jnp.pad(front, ((0, 0), (0, y.shape[1] - n), (0, 0)))

    def _stands_in(self, x: Any) -> bool:
        """Whether ``x`` may have the prompt's positions: not the input of a head that is tied to the table, nor few tokens."""
        return bool(jnp.issubdtype(x.dtype, jnp.integer)) and x.ndim == 2 and x.shape[1] >= self.length

    def change(self, path: str, leaves: Leaves, weights: Mapping[str, jax.Array]) -> dict[str, Any]:
        """None: always raises a ValueError."""
        raise ValueError(
            f"the PromptTuning at {path!r} is no change of the weights: its positions are read by attention, nonlinearly, and "
            "no weights put them in front of the tokens. Fuse prompts as trees, fuse(method, trees, space='adapter'), or train "
            "linearize(adapted, adapters0), whose outputs are linear in the displacement"
        )

    def trained(self, leaves: Leaves) -> tuple[str, ...]:
        """The prompt."""
        return self.names

    def moving(self, leaves: Leaves) -> tuple[str, ...]:
        """The prompt, wherever it is."""
        return self.names

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call`` with the prompt's positions in front of its inputs, and without them in its outputs."""

        def prompted(*inputs: Any, **kwargs: Any) -> Any:
            if len(inputs) > 1:
                raise ValueError(
                    f"PromptTuning cannot tell what {len(inputs)} arguments without names are: give all but the token ids by "
                    f"name, apply(params, adapters, {self.ids}, attention_mask=mask)"
                )
            first = inputs[0] if inputs else {}
            given = {**kwargs, **(first if isinstance(first, Mapping) else {self.ids: first})}
            edited, size = self._longer(given)
            if isinstance(first, Mapping):
                inputs = ({name: edited.get(name, array) for name, array in first.items()},) if inputs else ()
            else:
                inputs = (edited.get(self.ids, first),)
            try:
                outputs = call(*inputs, **{name: edited.get(name, array) for name, array in kwargs.items()})
            except ValueError as error:
                if size is None or str(size[1]) not in str(error):
                    raise
                raise ValueError(
                    f"{error} (PromptTuning puts {self.length} positions in front of the {size[1] - self.length} of the inputs)"
                ) from error
            if size is not None:
                outputs = _shorter(outputs, size, self.length, decoder=given.get("decoder_input_ids") is not None)
            cache = given.get("cache")
            if cache is not None and "cross_key" not in cache:
                outputs = outputs._replace(cache={**outputs.cache, _READ: jnp.int32(self.length)})
            return outputs

        return prompted

    def _longer(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[int, int] | None]:
        """The arguments that change, and the batch and length of the token ids; ``None`` if the prompt was read before."""
        n, ids, cache = self.length, given.get(self.ids), given.get("cache")
        edited: dict[str, Any] = {}
        if cache is not None and not (isinstance(cache, Mapping) and {"key", "value", "index"} <= cache.keys()):
            raise ValueError(f"PromptTuning does not know how to make a cache of this kind longer: {type(cache).__name__}")
        if given.get("encoder_outputs") is not None:
            raise ValueError(
                "encoder_outputs have no place for the prompt of PromptTuning, which stands in front of the encoder's tokens: "
                f"give {self.ids}, or the cache of a call that had them"
            )
        crossed = cache is not None and "cross_key" in cache
        read = ids is None if crossed else cache is not None and _READ in cache
        size = None
        if not read:
            ids = None if ids is None else jnp.asarray(ids)
            if ids is None or ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
                found = "there are none" if ids is None else f"they are {ids.dtype} of shape {ids.shape}"
                raise ValueError(
                    f"PromptTuning needs token ids [batch, seq], integers, and {found}: give them as the first argument or as "
                    f"{self.ids}=; PromptTuning(ids='name') where the model has another name for them"
                )
            ids = ids if jnp.issubdtype(ids.dtype, jnp.signedinteger) else ids.astype(jnp.int32)
            edited[self.ids] = jnp.pad(ids, ((0, 0), (n, 0)), constant_values=_HERE)
            size = edited[self.ids].shape
            if given.get("token_type_ids") is not None:
                edited["token_type_ids"] = jnp.pad(jnp.asarray(given["token_type_ids"]), ((0, 0), (n, 0)))
        if cache is not None:
            names, most = (("cross_key", "cross_value"), size and size[1]) if crossed else (("key", "value"), None)
            cache = {name: array for name, array in cache.items() if name != _READ}
            for name in () if read else names:
                # Of a crossed cache that was filled before, the encoder's part is long enough already.
                more = n if most is None else max(most - cache[name].shape[-2], 0)
                cache[name] = jnp.pad(cache[name], (*((0, 0) for _ in cache[name].shape[:-2]), (0, more), (0, 0)))
            edited["cache"] = cache
        if given.get("attention_mask") is not None:
            mask = jnp.pad(jnp.asarray(given["attention_mask"]), ((0, 0), (n, 0)), constant_values=1)
            # For a cache that has become longer, the mask may be as long as it is or as it was.
            edited["attention_mask"] = mask[:, : cache["key"].shape[-2]] if cache is not None and not crossed else mask
        if given.get("position_ids") is not None:
            positions = jnp.asarray(given["position_ids"])
            before = positions[:, :0] if read else positions[:, :1] + jnp.arange(n, dtype=positions.dtype)[None, :]
            edited["position_ids"] = jnp.concatenate([before, positions + n], axis=1)
        return edited, size


def prompt_from_tokens(
    tree: Any, params: Any, ids: Any = None, *, key: jax.Array | None = None, most_frequent: int = 5000
) -> dict[str, Any]:
    r"""A prompt that starts as the embeddings of tokens: :math:`P_i = E(t_i)`.

    Args:
      tree: adapters with a prompt, as ``init`` made them; other leaves stay as they are.
      params: the base parameters.
      ids: token ids ``[m]``, such as ``tokenizer(text)["input_ids"]``: cut to the prompt's length, or repeated.
      key: in place of ``ids``: draws tokens among the first ``most_frequent`` of the vocabulary, none twice while they last.
      most_frequent: vocabularies of SentencePiece (T5, Llama) are in the order of frequency; 5000 is Lester et al.'s number.

    Returns:
      Adapters of the same structure.

    Raises:
      ValueError: if there is no prompt, not one of ``ids`` and ``key``, or an id that is not in the vocabulary.

    Reference: B. Lester, R. Al-Rfou, N. Constant, The Power of Scale for Parameter-Efficient Prompt Tuning, 2021.
    """
    if (ids is None) == (key is None):
        raise ValueError("give either ids=, tokens to start from, or key=, with which tokens are drawn")
    leaves = trees.flat(tree)
    path, prompt = _only_prompt(leaves, "the adapters")
    weights = trees.flat(params["params"] if isinstance(params.get("params"), Mapping) else params)
    where = join(path.rpartition("/")[0], "embedding")
    if where not in weights:
        raise ValueError(f"the base parameters have no {where!r}{trees.did_you_mean(where, weights)}: made for another model?")
    table, n = weights[where], prompt.shape[0]
    if key is not None:
        among = min(most_frequent, table.shape[0])
        chosen = jax.random.choice(key, among, (n,), replace=n > among)
    else:
        chosen = jnp.asarray(ids)
        if chosen.ndim != 1 or not chosen.size or not jnp.issubdtype(chosen.dtype, jnp.integer):
            raise ValueError(f"ids must be integers [m], one or more, not {chosen.dtype} of shape {chosen.shape}")
        if not isinstance(chosen, jax.core.Tracer) and not 0 <= int(chosen.min()) <= int(chosen.max()) < table.shape[0]:
            raise ValueError(f"ids go from {int(chosen.min())} to {int(chosen.max())}, the vocabulary has {table.shape[0]}")
        chosen = jnp.resize(chosen, (n,))
    return trees.nest({**leaves, path: jnp.take(table, chosen, axis=0).astype(prompt.dtype)})


def prompt_similarity(prompt: Any, others: Mapping[str, Any], *, per_token: bool = False) -> dict[str, float]:
    r"""How alike a trained prompt and those of other tasks are.

    .. math:: \cos\Big(\frac1n \sum_i p_i, \frac1m \sum_j q_j\Big) \qquad\text{or, per token,}\qquad
       \frac1{nm} \sum_{i,j} \cos(p_i, q_j)

    SPoT trains a prompt for the new task for a short while, and starts again from the prompt of the task that is most alike:
    ``finetune(adapted, params, task, adapters=others[max(similar, key=similar.get)])``.

    Args:
      prompt: adapters with a prompt ``[n, d]``.
      others: name -> adapters with a prompt ``[m, d]`` of the same base model.
      per_token: which of the two.

    Returns:
      Name -> similarity.

    Raises:
      ValueError: if a tree has no prompt, or one of another width.

    Reference: T. Vu et al., SPoT: Better Frozen Model Adaptation through Soft Prompt Transfer, 2022.
    """

    def direction(tree: Any, whose: str) -> jax.Array:
        rows = _only_prompt(trees.flat(tree), whose)[1].astype(jnp.float32)
        rows = rows if per_token else jnp.mean(rows, axis=0, keepdims=True)
        rows = rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        return jnp.mean(rows, axis=0)  # the mean of all products is the product of the means

    own, found = direction(prompt, "the prompt"), {}
    for name, tree in others.items():
        other = direction(tree, repr(name))
        if other.shape != own.shape:
            raise ValueError(f"the prompt of {name!r} is {other.shape[0]} wide, this one {own.shape[0]}: of another model?")
        found[name] = float(own @ other)
    return found


def _only_prompt(leaves: Mapping[str, jax.Array], whose: str) -> tuple[str, jax.Array]:
    found = [path for path in leaves if path.rpartition("/")[2] == LEAF]
    if len(found) != 1:
        raise ValueError(
            f"{whose}: there must be one leaf {LEAF!r}, of PromptTuning, and there are {len(found)}: {[*leaves][:6]}"
        )
    return found[0], leaves[found[0]]


def _shorter(outputs: Any, size: tuple[int, int], n: int, decoder: bool) -> Any:
    """Outputs without the prompt's positions; with a decoder all but the encoder's outputs are of other positions."""

    def cut(path: Any, leaf: Any) -> Any:
        name = str(getattr(path[0], "name", getattr(path[0], "key", ""))) if path else ""
        if name == "cache" or decoder and not name.startswith("encoder") or leaf.ndim < 3 or leaf.shape[:2] != size:
            return leaf
        return leaf[:, n:]

    return jax.tree_util.tree_map_with_path(cut, outputs)
