"""Multitask prompt tuning: the tasks share one prompt, each with a low-rank factor of its own for every number in it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax import trees
from pefusion_jax.generators.layout import Layout
from pefusion_jax.generators.names import different


@dataclasses.dataclass(frozen=True, kw_only=True)
class MPT:
    r"""Shares the adapters of all tasks up to factors of low rank.

    .. math:: P_k = P^\star \circ (C_k R_k), \qquad C_k \in \mathbb{R}^{n \times r}, \quad R_k \in \mathbb{R}^{r \times d}

    for every leaf :math:`P` ``[..., n, d]``, whose leading axes (layers under a scan) are batch axes. Meant for the prompt of
    ``pf.PromptTuning(length=n)``, and as good for the matrices of other methods. A prompt ``[100, 768]`` has 76,800 numbers for
    all tasks and 868 for each, at rank 1.

    Attributes:
      tasks: names of the tasks, in order: that of the leading axis of the tasks' leaves.
      rank: rank :math:`r` of the factors.
      start: how the factors start:

        * ``"ones"``: :math:`P_k = P^\star` for every task. Beyond rank 1 further columns of :math:`C` are standard normal and
          their rows of :math:`R` zero: with equal columns, rank r would stay rank 1.
        * ``"normal"``: both normal with deviation 0.02, as in PEFT: :math:`P_k` is near zero whatever :math:`P^\star` is.

    Example::

      made = generate(adapt(model, PromptTuning(length=100)), MPT(tasks=("rte", "mrpc")))
      tree = made.init(jax.random.key(0), params, **batch)
      tree |= {"shared": prompt_from_tokens(tree["shared"], params, key=jax.random.key(1))}

    Reference: Z. Wang et al., Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning, 2023, with PEFT's code for
    what the text leaves open. Where we depart: the start at :math:`P^\star`; and their first stage, which distils prompts that
    were trained for each task on its own into the shared one, is left out, since the weights of its losses are not known to us:
    the shared prompt is trained with the tasks' own losses.
    """

    tasks: tuple[str, ...]
    rank: int = 1
    start: Literal["ones", "normal"] = "ones"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", different("tasks", self.tasks))
        if self.rank < 1 or self.rank != int(self.rank):
            raise ValueError(f"rank must be a positive integer, got {self.rank}")
        if self.start not in ("ones", "normal"):
            raise ValueError(f"start={self.start!r} must be 'ones' or 'normal'")

    def init(self, key: jax.Array, adapters: dict[str, Any], params: dict[str, Any], layout: Layout) -> dict[str, Any]:
        """``shared/PATH`` as in the adapters; ``tasks/PATH/columns`` ``[task, ..., n, r]`` and ``rows`` ``[task, ..., r, d]``.

        Raises:
          ValueError: if a leaf is no matrix.
        """
        del params
        flat: dict[str, Any] = {}
        for number, (path, leaf) in enumerate(sorted(adapters.items())):
            if leaf.ndim - any(path.startswith(node + "/") for node in layout.scanned) < 2:
                raise ValueError(
                    f"MPT makes matrices [..., n, d], and the adapters have {path!r} {leaf.shape}: use a method without such "
                    "leaves, or PerTask, which takes any"
                )
            *lead, n, d = leaf.shape
            keys = jax.random.split(jax.random.fold_in(key, number))
            columns = jax.random.normal(keys[0], (len(self.tasks), *lead, n, self.rank), jnp.float32)
            rows = jax.random.normal(keys[1], (len(self.tasks), *lead, self.rank, d), jnp.float32)
            if self.start == "ones":
                columns, rows = columns.at[..., 0].set(1.0), jnp.zeros_like(rows).at[..., 0, :].set(1.0)
            else:
                columns, rows = 0.02 * columns, 0.02 * rows
            flat |= {f"shared/{path}": leaf, f"tasks/{path}/columns": columns, f"tasks/{path}/rows": rows}
        return trees.nest(flat)

    def make(self, tree: Any, params: dict[str, Any], layout: Layout, task: jax.Array | None) -> dict[str, Any]:
        """The leaves of a task."""
        del params, layout
        factors = trees.flat(tree["tasks"])
        made: dict[str, Any] = {}
        for path, leaf in trees.flat(tree["shared"]).items():
            columns, rows = factors[f"{path}/columns"], factors[f"{path}/rows"]
            if columns.shape[0] != len(self.tasks):
                raise ValueError(f"the tree has {columns.shape[0]} tasks at {path!r}, the generator {len(self.tasks)}")
            made[path] = leaf * (columns[task] @ rows[task])
        return made

    def trained(self, tree: Any) -> dict[str, Any]:
        """All of it."""
        return trees.nest(trees.flat(tree))

    def moving(self, tree: Any) -> dict[str, Any]:
        """Without what only ever meets a factor of zero."""
        flat = trees.flat(tree)
        kept: dict[str, Any] = {}
        for path in trees.flat(tree["shared"]):
            names = (f"shared/{path}", f"tasks/{path}/columns", f"tasks/{path}/rows")
            still = [_is_zero(flat[name]) for name in names]
            kept |= {name: flat[name] for at, name in enumerate(names) if not any(still[:at] + still[at + 1 :])}
        return trees.nest(kept)


def _is_zero(leaf: jax.Array) -> bool:
    return not isinstance(leaf, jax.core.Tracer) and not np.any(np.asarray(leaf))
