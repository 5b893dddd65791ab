"""ATTEMPT: the prompt of an instance is a task's own and a mixture of prompts of other tasks, by attention."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pefusion_jax import trees
from pefusion_jax.generators.layout import Layout
from pefusion_jax.generators.names import texts

_EPSILON = 1e-5  # of the attention's normalisation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    r"""Mixes frozen source prompts into a trained one, for each row by what the row says.

    .. math:: \hat x = \max_i e(x_i), \quad \hat p_j = \max_i P_{ji}, \quad
       q = \mathrm{LN}\big(W_u\, \mathrm{silu}(W_d\, \hat x)\big), \quad
       a = \mathrm{softmax}_j(\hat p_j \cdot q / \tau), \quad P(x) = P_t + \sum_j a_j P_j

    with word embeddings :math:`e`, maxima over positions (those of the inputs without padding), and :math:`j` over the sources
    and the target :math:`t` itself. It makes the prompt of ``pf.PromptTuning`` and nothing else. Each row of a batch has a
    prompt of its own, so the model is mapped over the rows.

    Attributes:
      sources: names of the source prompts, in order.
      tasks: names of tasks with a target prompt each, which share the attention; empty for one target.
      width: rows of :math:`W_d`.
      temperature: :math:`\tau`; :math:`e\, d` by default, for prompts ``[n, d]``.
      ids: name of the input with the token ids, as ``PromptTuning`` has it.
      prompts: ``[source, n, d]``, what ``init`` puts into the tree. It is no setting: who has a tree needs none.

    Example::

      sources = {name: finetune(prompted, params, task) for name, task in large.items()}
      stacked = jnp.stack([tree["shared"]["prompt"] for tree in sources.values()])  # T5's table of words is "shared"
      made = generate(prompted, Attempt(sources=tuple(sources), prompts=stacked))
      tree = finetune(made, params, small)

    Reference: A. Asai et al., ATTEMPT: Parameter-Efficient Multi-task Tuning via Attentional Mixtures of Soft Prompts, 2022, as
    their code has it (``sub``); there is no bias. The start of :math:`W`, uniform in :math:`\pm 1/\sqrt{\text{inputs}}`, is
    ours.
    """

    sources: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    width: int = 100
    temperature: float | None = None
    ids: str = "input_ids"
    prompts: dataclasses.InitVar[Any] = None

    def __post_init__(self, prompts: Any) -> None:
        for what in ("sources", "tasks"):
            object.__setattr__(self, what, texts(what, getattr(self, what)))
        # An array is neither to be compared nor to be written into a run's settings, so it is no field.
        object.__setattr__(self, "prompts", prompts)
        for what in ("sources", "tasks"):
            names = getattr(self, what)
            if len(set(names)) != len(names) or what == "sources" and not names:
                raise ValueError(f"{what}={names!r:.200} must be different names, of sources one or more")
        if self.width < 1:
            raise ValueError(f"width={self.width} must be 1 or more")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")
        shape = None if prompts is None else jnp.shape(prompts)
        if shape is not None and (len(shape) != 3 or shape[0] != len(self.sources)):
            raise ValueError(
                f"prompts have the shape {shape}; they must be [{len(self.sources)}, n, d], one for each of sources, stacked"
            )

    def init(self, key: jax.Array, adapters: dict[str, Any], params: dict[str, Any], layout: Layout) -> dict[str, Any]:
        """The tree, whose targets start as the adapters do.

        ::

            target/PATH               [n, d], PATH the prompt's; with tasks [task, n, d]
            sources                   [source, n, d], not trained
            attention/down, up        [d, width], [width, d]
            attention/norm/...        scale and bias [d]

        Raises:
          ValueError: if the adapters are no prompt alone, or the source prompts are missing or have another shape.
        """
        del params, layout
        paths = [path for path in adapters if path.rpartition("/")[2] == "prompt"]
        if len(paths) != 1 or len(adapters) != 1:
            raise ValueError(
                "Attempt makes the one leaf of pf.PromptTuning, and the model has the adapter leaves "
                f"{', '.join(sorted(adapters))!r:.200}; adapt it with pf.PromptTuning alone"
            )
        start = jnp.asarray(adapters[paths[0]], jnp.float32)
        prompts = self.prompts  # type: ignore[attr-defined]
        if prompts is None:
            raise ValueError(
                f"Attempt has the names of its sources and not their prompts; pass prompts=[{len(self.sources)}, "
                f"{start.shape[0]}, {start.shape[1]}], the leaves of trained prompts stacked"
            )
        sources = jnp.asarray(prompts, jnp.float32)
        if sources.shape[1:] != start.shape:
            raise ValueError(f"the source prompts are {sources.shape[1:]}, the model's {start.shape}; train them at one length")
        d = start.shape[1]
        down_key, up_key = jax.random.split(key)

        def uniform(key: jax.Array, inputs: int, outputs: int) -> jax.Array:
            return jax.random.uniform(key, (inputs, outputs), jnp.float32, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))

        target = jnp.tile(start[None], (len(self.tasks), 1, 1)) if self.tasks else start
        flat = {
            f"target/{paths[0]}": target,
            "sources": sources,
            "attention/down": uniform(down_key, d, self.width),
            "attention/up": uniform(up_key, self.width, d),
            "attention/norm/scale": jnp.ones(d),
            "attention/norm/bias": jnp.zeros(d),
        }
        return trees.nest(flat)

    def observe(self, tree: Any, params: dict[str, Any], inputs: dict[str, Any], base: Callable[[], Any]) -> jax.Array:
        r""":math:`\hat x` ``[batch, d]``; zeros for rows that are all padding.

        Raises:
          ValueError: if there are no token ids, or no table of word embeddings where the prompt is.
        """
        del base
        path, _ = _target(tree)
        table = path.rpartition("/")[0] + "/embedding"
        if inputs.get(self.ids) is None or table not in params:
            raise ValueError(
                f"Attempt looks up {self.ids!r} in the table {table!r}; the inputs have {', '.join(map(repr, inputs))}, and "
                f"the base parameters {'have' if table in params else 'lack'} the table. Name the token ids as "
                "PromptTuning(ids=...) does: Attempt(ids=...)"
            )
        words = jnp.take(jnp.asarray(params[table]), inputs[self.ids], axis=0).astype(jnp.float32)
        mask = inputs.get("attention_mask")
        if mask is None:
            return jnp.max(words, axis=1)
        real = jnp.asarray(mask).astype(bool)
        most = jnp.max(jnp.where(real[:, :, None], words, -jnp.inf), axis=1)
        return jnp.where(jnp.any(real, axis=1)[:, None], most, 0.0)

    def attention(self, tree: Any, x: jax.Array, prompts: jax.Array) -> jax.Array:
        r"""The weights :math:`a` ``[source + 1]`` of a row.

        Args:
          tree: the generator's.
          x: :math:`\hat x` ``[d]``.
          prompts: ``[source + 1, n, d]``, the target last.
        """
        net = tree["attention"]
        raw = jax.nn.silu(x @ net["down"]) @ net["up"]
        centred = raw - jnp.mean(raw)
        q = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred)) + _EPSILON) * net["norm"]["scale"] + net["norm"]["bias"]
        temperature = math.e * x.shape[0] if self.temperature is None else self.temperature
        return jax.nn.softmax(jnp.max(prompts, axis=1) @ q / temperature)

    def make(self, tree: Any, params: dict[str, Any], layout: Layout, task: Any) -> dict[str, Any]:
        """The prompt of a row."""
        del params, layout
        number, x = task
        path, target = _target(tree)
        found = (tree["sources"].shape[0], target.shape[0] if target.ndim == 3 else 0)
        known = (len(self.sources), len(self.tasks))
        if found != known:
            raise ValueError(f"the tree has {found[0]} sources and {found[1]} tasks, the generator {known[0]} and {known[1]}")
        own = target if number is None else target[number]
        prompts = jnp.concatenate([tree["sources"], own[None]])
        return {path: own + jnp.tensordot(self.attention(tree, x, prompts), prompts, 1)}

    def trained(self, tree: Any) -> dict[str, Any]:
        """The targets and the attention; the sources are held still."""
        return {name: part for name, part in trees.nest(trees.flat(tree)).items() if name != "sources"}

    def moving(self, tree: Any) -> dict[str, Any]:
        """All that is trained."""
        return self.trained(tree)


def _target(tree: Any) -> tuple[str, jax.Array]:
    """Path of the prompt, and the targets."""
    ((path, target),) = trees.flat(tree["target"]).items()
    return path, target
