"""Hyper-networks that look at the instance: adapters for each row, from what the base model sees in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pefusion_jax import trees
from pefusion_jax.generators import kinds
from pefusion_jax.generators.contrastive import instance_features
from pefusion_jax.generators.layout import Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class HyperDecoder:
    r"""Makes each adapter leaf from the layer's embedding and the mean of the encoder's hidden states.

    .. math:: u = W_2\, \mathrm{relu}(W_1 \bar h(x) + w_1) + w_2, \qquad
       g_{s,l} = \mathrm{relu}(V [u; e_{s,l}] + v), \qquad \phi_{s,l} = H_\phi\, g_{s,l} + h_\phi

    for an instance :math:`x`, site :math:`s` and layer :math:`l`. Each row of a batch gets adapters of its own, so the model is
    mapped over the rows, and the base model's encoder runs once more. Sites of one kind share :math:`V` and :math:`H`, as in
    :class:`HyperNetwork`. It makes no difference between tasks, and works for every adapter method.

    Attributes:
      features: length of :math:`\bar h`, the width of the encoder's last hidden states; :math:`W` are ``[features, features]``.
      layer_size: length of :math:`e_{s,l}`, standard normal.
      hidden: length of :math:`g`.
      learned: regular expression for whole paths of adapter leaves that are not made but learned, the same for all instances.

    See :func:`hyperdecoder`.
    """

    features: int
    layer_size: int = 10
    hidden: int = 128
    learned: str = r"(?!)"

    def __post_init__(self) -> None:
        for name in ("features", "layer_size", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        kinds.check_expression("learned", self.learned)

    @property
    def tasks(self) -> tuple[str, ...]:
        """None: what it makes depends on the instance alone."""
        return ()

    def init(self, key: jax.Array, adapters: dict[str, Any], params: dict[str, Any], layout: Layout) -> dict[str, Any]:
        """The tree; ``ROLE`` is a site's path with a star for the number of the layer.

        ::

            reader/{in,out}/...            W1, W2
            kinds/0/code/...               V
            kinds/0/sites/ROLE/layer       [layer, layer_size]
            kinds/0/heads/LEAF/...         kernel [hidden, ...], bias [...]
            learned/PATH                   as in the adapters

        Raises:
          ValueError: if all leaves are learned, or ``learned`` matches none though it is set.
        """
        del params
        learned, others = kinds.split_learned(self.learned, adapters)
        made = layout.gather(others)
        keys = iter(jax.random.split(key, 16 + 16 * len(made)))
        flat = kinds.dense("reader/in", keys, self.features, self.features, "fan-in")
        flat |= kinds.dense("reader/out", keys, self.features, self.features, "fan-in")
        for number, (sites, leaves) in enumerate(kinds.listed(made, layout)):
            at = f"kinds/{number}"
            for site in sites:
                shape = (layout.layers(site) or 1, self.layer_size)
                flat[f"{at}/sites/{site}/layer"] = jax.random.normal(next(keys), shape)
            flat |= kinds.dense(f"{at}/code", keys, self.features + self.layer_size, self.hidden, "fan-in")
            flat |= kinds.heads(f"{at}/heads", keys, leaves, self.hidden, "fan-in")
        return trees.nest(flat | learned)

    def observe(self, tree: Any, params: dict[str, Any], inputs: dict[str, Any], base: Callable[[], Any]) -> jax.Array:
        r""":math:`\bar h` ``[batch, features]`` of the base model, padding left out.

        Raises:
          ValueError: if the model's hidden states have another width.
        """
        del tree, params
        seen = instance_features(base(), inputs)
        if seen.shape[-1] != self.features:
            raise ValueError(
                f"the base model's hidden states are {seen.shape[-1]} wide, the generator's features={self.features}; make it "
                f"with hyperdecoder({seen.shape[-1]})"
            )
        return seen

    def make(self, tree: Any, params: dict[str, Any], layout: Layout, task: Any) -> dict[str, Any]:
        """The adapter leaves of a row, learned ones among them."""
        del params
        _, seen = task
        u = kinds.affine(tree["reader"]["out"], jax.nn.relu(kinds.affine(tree["reader"]["in"], seen[None, :])))
        codes: dict[str, jax.Array] = {}
        for kind in tree["kinds"].values():
            for site, own in kinds.sites_of(kind).items():
                rows = jnp.broadcast_to(u, (own["layer"].shape[0], self.features))
                codes[site] = jax.nn.relu(kinds.affine(kind["code"], jnp.concatenate([rows, own["layer"]], axis=-1)))
        return kinds.adapters(tree, kinds.leaves(tree["kinds"], codes), layout)

    def kept(self, tree: Any) -> dict[str, str]:
        """Path in the tree -> path of the adapter leaf, of those that are learned."""
        return kinds.kept(tree)

    def trained(self, tree: Any) -> dict[str, Any]:
        """All of it."""
        return trees.nest(trees.flat(tree))

    def moving(self, tree: Any) -> dict[str, Any]:
        """All of it."""
        return self.trained(tree)


def hyperdecoder(features: int, **settings: Any) -> HyperDecoder:
    """HyperDecoder: adapters for each instance, from the mean of the encoder's hidden states.

    Meant for parallel bottleneck adapters beside the feed-forward layers, ``pf.parallel(bottleneck=64)``. On an
    encoder-decoder the decoder's adapters are made from the encoder's states and the encoder's are learned:
    ``learned=r"encoder/.*"``. On an encoder all are made.

    Args:
      features: width of the encoder's hidden states.
      settings: of :class:`HyperDecoder`.

    Reference: H. Ivison, M. Peters, Hyperdecoders: Instance-specific decoders for multi-task NLP, 2022. Where we depart: the
    hidden states are the base model's, and not those of the encoder with its own adapters, so that on an encoder too the made
    adapters do not depend on themselves. The cost is a forward pass of the base's encoder.
    """
    return HyperDecoder(features=features, **settings)
