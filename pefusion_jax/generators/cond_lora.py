"""CondLoRA: one linear layer per kind of module turns frozen weights into their low-rank matrices."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pefusion_jax import trees
from pefusion_jax.backbones.layers import STACKS
from pefusion_jax.generators.layout import Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class CondLoRA:
    r"""Makes LoRA's factors from the frozen weights, with two matrices for each kind of module, shared by all layers.

    With the kernel :math:`K` ``[in, out]`` of a layer:

    ============== ========================== =========================== ==========================================
    orientation    :math:`A` ``[in, rank]``   :math:`B` ``[rank, out]``   change of the kernel
    ============== ========================== =========================== ==========================================
    ``paper``      :math:`K \theta_A`         :math:`\theta_B^\top K`     :math:`K \theta_A \theta_B^\top K`
    ``official``   :math:`K^\top \theta_A`    :math:`\theta_B^\top K`     :math:`K^\top \theta_A \theta_B^\top K`
    ============== ========================== =========================== ==========================================

    times LoRA's scale. :math:`\theta_A` starts uniform in :math:`\pm 1/\sqrt n` for vectors of length :math:`n` that it reads,
    :math:`\theta_B` at zero, so the model starts unchanged. Modules are of one kind if their paths differ in the number of the
    layer only. ``(in + out) * rank`` numbers for each kind, whatever the number of layers. For a fixed model the factors are
    linear in theta: adding up thetas is adding up factors, and not adding up changes. The factors belong to the weights that
    they were made from: fold once, and never make them from folded weights.

    Attributes:
      orientation: ``"paper"``, for kernels of any shape, or ``"official"``, the released code's: square kernels only.

    Example::

      made = generate(adapt(model, LoRA(rank=8, targets=r".*/(query|value)")), CondLoRA())

    Reference: H. Kim et al., A Single Linear Layer Yields Task-Adapted Low-Rank Matrices, 2024. Their equations 5 to 7 close
    for the kernel as ``[in, out]``, which is ``"paper"``; their code takes both factors from torch's weight, which is the
    transpose of this kernel, without transposing it for the second.
    """

    orientation: Literal["paper", "official"] = "paper"

    tasks: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.orientation not in ("paper", "official"):
            raise ValueError(f"orientation={self.orientation!r} must be 'paper' or 'official'")

    def init(self, key: jax.Array, adapters: dict[str, Any], params: dict[str, Any], layout: Layout) -> dict[str, Any]:
        """``theta_a`` ``[out, rank]`` and ``theta_b`` ``[in, rank]`` for each kind of module."""
        wrong = next((path for path in adapters if path.rpartition("/")[2] not in ("lora_a", "lora_b")), None)
        if wrong is not None:
            raise ValueError(f"CondLoRA makes the factors of pf.LoRA; the adapters have a leaf {wrong!r} of another method")
        roles = layout.gather(adapters)
        theta: dict[str, Any] = {}
        for number, role in enumerate(sorted({role.rpartition("/")[0] for role in roles})):
            rank = roles[f"{role}/lora_a"].shape[-1]
            inputs, outputs = self._sizes(role, params, layout)
            read = outputs if self.orientation == "paper" else inputs
            bound = 1 / math.sqrt(read)
            start = jax.random.uniform(jax.random.fold_in(key, number), (read, rank), jnp.float32, -bound, bound)
            theta[f"{role}/theta_a"] = start
            theta[f"{role}/theta_b"] = jnp.zeros((inputs, rank), jnp.float32)
        return trees.nest(theta)

    def _sizes(self, role: str, params: dict[str, Any], layout: Layout) -> tuple[int, int]:
        """The shape of the kernels of a kind of module.

        Raises:
          ValueError: if they are no matrices of one shape, or not square where they must be.
        """
        found = {
            path: leaf.shape
            for path, leaf in params.items()
            if layout.role(path)[0] == f"{role}/kernel" and layout.adapted(f"{path.rpartition('/')[0]}/lora_a")
        }
        lead = 1 if role.partition("*")[0].rstrip("/") in layout.scanned else 0
        shapes = {shape[lead:] for shape in found.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 2:
            raise ValueError(
                f"the kernels of {role!r} have the shapes {sorted(shapes)}; CondLoRA shares its matrices over kernels "
                "[in, out] of one shape: narrow the targets of LoRA. Layers that a scan has stacked are told by the name of "
                f"the scan, {', '.join(map(repr, sorted(STACKS)))}"
            )
        inputs, outputs = next(iter(shapes))
        if self.orientation == "official" and inputs != outputs:
            raise ValueError(
                f"the kernel of {role!r} is {inputs} x {outputs}; orientation='official' needs square ones, 'paper' takes any"
            )
        return inputs, outputs

    def make(self, tree: Any, params: dict[str, Any], layout: Layout, task: jax.Array | None) -> dict[str, Any]:
        """The factors, in float32."""
        del task
        theta = trees.flat(tree)
        made: dict[str, Any] = {}
        unused = {path.rpartition("/")[0] for path in theta}
        for path, kernel in params.items():
            role = layout.role(path)[0].rpartition("/")
            if role[2] != "kernel" or f"{role[0]}/theta_a" not in theta:
                continue
            site = path.rpartition("/")[0]
            if not layout.adapted(f"{site}/lora_a"):
                continue
            unused.discard(role[0])
            fixed = jax.lax.stop_gradient(kernel).astype(jnp.float32)
            a, b = theta[f"{role[0]}/theta_a"], theta[f"{role[0]}/theta_b"]
            read = fixed if self.orientation == "paper" else fixed.swapaxes(-1, -2)
            if (fixed.shape[-2], read.shape[-1]) != (b.shape[0], a.shape[0]):
                raise ValueError(
                    f"{site!r} has a kernel {kernel.shape}, for which theta_a {a.shape} and theta_b {b.shape} do not fit; was "
                    "the tree made for another model?"
                )
            made[f"{site}/lora_a"] = read @ a
            made[f"{site}/lora_b"] = b.T @ fixed
        if unused:
            raise ValueError(
                f"the tree has matrices for {sorted(unused)[0]!r}, which LoRA does not adapt here: its targets are others than "
                "those that the tree was made for. Adapt the same layers, or make the tree with init() of this model"
            )
        return made

    def trained(self, tree: Any) -> dict[str, Any]:
        """All of it."""
        return trees.nest(trees.flat(tree))

    def moving(self, tree: Any) -> dict[str, Any]:
        """At theta_b = 0 the derivative in theta_a vanishes identically."""
        flat = trees.flat(tree)
        still = {
            path.rpartition("/")[0]
            for path, leaf in flat.items()
            if path.endswith("/theta_b") and not isinstance(leaf, jax.core.Tracer) and not np.any(np.asarray(leaf))
        }
        return trees.nest({p: leaf for p, leaf in flat.items() if p.endswith("/theta_b") or p.rpartition("/")[0] not in still})
