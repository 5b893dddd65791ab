"""Hyper-networks that make adapters from a task's and a layer's embedding: PHA, HyperFormer, HyperFormer++ and a control."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pefusion_jax import trees
from pefusion_jax.generators import contrastive, kinds
from pefusion_jax.generators.layout import Layout
from pefusion_jax.generators.names import different

_EPSILON = 1e-6  # of the code's normalisation
_TUNED = {"all": ("tasks", "kinds", "learned", "retriever"), "hypernetwork": ("tasks", "kinds"), "prototypes": ("tasks",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HyperNetwork:
    r"""Makes each adapter leaf from a code, and the code from embeddings.

    .. math:: g_{t,s,l} = \mathrm{LN}\big(V_2\, \mathrm{relu}(V_1 [k_t; p_s; e_l] + v_1) + v_2\big), \qquad
       \phi_{t,s,l} = H_\phi\, g_{t,s,l} + h_\phi

    for task :math:`t`, site :math:`s` and layer :math:`l`. Sites whose leaves have the same names and shapes share all matrices
    :math:`H` (they are one *kind*), and so do all layers and all tasks. The leaves are affine in the code, so averaging codes
    is averaging adapters; averaging tasks' embeddings is neither. It works for every adapter method.

    Attributes:
      tasks: names of the tasks, in order. They belong to the tree: rows of ``tasks`` are in this order.
      task_size: length of :math:`k_t`, which start standard normal.
      layer_size: length of :math:`e_l`, standard normal.
      places: add an embedding :math:`p_s` of the site, and share those of the layers between the sites. Without, each site has
        layer embeddings of its own.
      hidden: width of :math:`V_1`.
      code: length of the code.
      start: how the matrices begin. ``"fan-in"``: :math:`H` uniform in :math:`\pm 10^{-3} \sqrt{3 / (c f)}` for a code of
        length :math:`c` and a leaf with :math:`f` inputs (1 for vectors), :math:`V` uniform in
        :math:`\pm 1/\sqrt{\text{inputs}}`. ``"normal"``: all of deviation 0.01.
      by_stack: networks of their own for each stack of layers: for encoder and decoder.
      by_layer: matrices :math:`H` of their own for each layer, from a code without :math:`e_l`.
      learned: regular expression for whole paths of adapter leaves that are not made but learned, the same for all tasks.
      retriever: widths of the retriever :math:`z = W_2\, \mathrm{relu}(W_1 \bar h + w_1) + w_2`, whose last is ``task_size``;
        empty for none. With it the tasks' embeddings are prototypes, and two losses are added to training.
      features: length of :math:`\bar h`, what the retriever reads of an instance; needed with a retriever.
      instances: what that is. ``"outputs"``: the mean of the adapted encoder's last hidden states, as published; where the
        encoder's own adapters are made for each task it would tell the task that it is to find, and is refused. ``"base"``:
        the base model's, at the cost of its forward pass. ``"words"``: the mean of the base model's word embeddings, which
        costs next to nothing. Sentence encoders leave out of their last states what tells one kind of text from another, so
        the words often say more about the task.
      tune: what is trained: ``"all"``, ``"hypernetwork"`` (with the tasks' embeddings), or ``"prototypes"`` (these alone).
      temperature: of both losses.
      weight: of either loss; 0 trains without them.

    Reference: H. Zhao, J. Fu, Z. He, Prototype-based HyperAdapter for Sample-Efficient Multi-task Tuning, 2023; R. Karimi
    Mahabadi et al., Parameter-efficient Multi-task Fine-tuning for Transformers via Shared Hypernetworks, 2021. See
    :func:`pha`, :func:`hyperformer` and :func:`hyperformer_plus_plus` for their settings.
    """

    tasks: tuple[str, ...]
    task_size: int = 64
    layer_size: int = 64
    places: bool = False
    hidden: int = 128
    code: int = 64
    start: Literal["fan-in", "normal"] = "fan-in"
    by_stack: bool = False
    by_layer: bool = False
    learned: str = r"(?!)"
    retriever: tuple[int, ...] = ()
    features: int = 0
    instances: Literal["outputs", "base", "words"] = "outputs"
    tune: Literal["all", "hypernetwork", "prototypes"] = "all"
    temperature: float = 0.1
    weight: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", different("tasks", self.tasks))
        object.__setattr__(self, "retriever", tuple(self.retriever))
        for name in ("task_size", "layer_size", "hidden", "code"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        for name, known in (
            ("start", ("fan-in", "normal")),
            ("instances", ("outputs", "base", "words")),
            ("tune", tuple(_TUNED)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, known))}")
        if self.retriever:
            if len(self.retriever) != 2 or self.retriever[-1] != self.task_size:
                raise ValueError(f"retriever={self.retriever} must be two widths, the last task_size={self.task_size}")
            if self.features < 1:
                raise ValueError("a retriever needs features=, the width of the encoder's last hidden states")
            if len(self.tasks) < 2:
                raise ValueError(f"prototypes need two or more tasks to tell apart; there is {self.tasks[0]!r} alone")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight={self.weight} must be a finite number, 0 (train without the losses) or more")
        kinds.check_expression("learned", self.learned)

    @property
    def contrasts(self) -> bool:
        """Whether the contrastive losses are on."""
        return bool(self.retriever) and self.weight > 0

    # ----------------------------------------------------------------------------------------------------------- tree

    def init(self, key: jax.Array, adapters: dict[str, Any], params: dict[str, Any], layout: Layout) -> dict[str, Any]:
        """The tree; ``ROLE`` is a site's path with a star for the number of the layer.

        ::

            tasks                          [task, task_size]
            kinds/0/code/{in,out,norm}/... V1, V2 and the normalisation
            kinds/0/sites/ROLE/layer       [layer, layer_size]; with places: place [layer_size], and kinds/0/layers for all
            kinds/0/heads/LEAF/...         kernel [code, ...], bias [...]; by_layer: below the site, [layer, ...] in front
            learned/PATH                   as in the adapters
            retriever/{in,out}/...         W1, W2

        Raises:
          ValueError: if all leaves are learned, or ``learned`` matches none though it is set; if the retriever would read what
            a task's adapters have made of the inputs.
        """
        del params
        learned, others = kinds.split_learned(self.learned, adapters)
        if self.contrasts and self.instances == "outputs":
            told = next((path for path in sorted(others) if "decoder" not in path.split("/")), None)
            if told is not None:
                raise ValueError(
                    f"instances='outputs' reads the encoder, and {told!r} is made for each task: it would tell the retriever "
                    "the task that it is to find. Pass instances='base' or 'words', or on an encoder-decoder "
                    "learned=r'encoder/.*'"
                )
        made = layout.gather(others)
        keys = iter(jax.random.split(key, 16 + 16 * len(made)))
        flat: dict[str, Any] = {"tasks": jax.random.normal(next(keys), (len(self.tasks), self.task_size))}
        # Sites that share a table of layer embeddings have as many layers.
        listed = kinds.listed(made, layout, by_stack=self.by_stack, by_depth=self.places or self.by_layer)
        for number, (sites, leaves) in enumerate(listed):
            flat |= {f"kinds/{number}/{path}": leaf for path, leaf in self._kind(sites, leaves, layout, keys).items()}
        flat |= learned
        if self.retriever:
            flat |= kinds.dense("retriever/in", keys, self.features, self.retriever[0], self.start)
            flat |= kinds.dense("retriever/out", keys, self.retriever[0], self.retriever[1], self.start)
        return trees.nest(flat)

    def _kind(self, sites: list[str], leaves: dict[str, tuple[int, ...]], layout: Layout, keys: Any) -> dict[str, Any]:
        layers = {site: layout.layers(site) or 1 for site in sites}
        out: dict[str, Any] = {}
        width = self.task_size
        if self.places:
            width += self.layer_size
            out |= {f"sites/{site}/place": jax.random.normal(next(keys), (self.layer_size,)) for site in sites}
        if not self.by_layer:
            width += self.layer_size
            each = {f"sites/{site}/layer": count for site, count in layers.items()}
            tables = {"layers": layers[sites[0]]} if self.places else each
            out |= {path: jax.random.normal(next(keys), (count, self.layer_size)) for path, count in tables.items()}
        out |= kinds.dense("code/in", keys, width, self.hidden, self.start)
        out |= kinds.dense("code/out", keys, self.hidden, self.code, self.start)
        out |= {"code/norm/scale": jnp.ones(self.code), "code/norm/bias": jnp.zeros(self.code)}
        for where, front in {f"sites/{s}/heads": (n,) for s, n in layers.items()}.items() if self.by_layer else [("heads", ())]:
            out |= kinds.heads(where, keys, leaves, self.code, self.start, front)
        return out

    # --------------------------------------------------------------------------------------------------------- adapters

    def codes(self, tree: Any, task: jax.Array) -> dict[str, jax.Array]:
        """Site (a role) -> the codes of its layers for a task, ``[layer, code]``; ``[1, code]`` by layer."""
        out: dict[str, jax.Array] = {}
        for kind in tree["kinds"].values():
            for site, own in kinds.sites_of(kind).items():
                layers = own.get("layer", kind.get("layers"))
                count = 1 if layers is None else layers.shape[0]
                parts = [tree["tasks"][task], *([own["place"]] if self.places else [])]
                rows = [jnp.broadcast_to(part[None, :], (count, part.shape[0])) for part in parts]
                u = jnp.concatenate([*rows, *([] if layers is None else [layers])], axis=-1)
                code = kinds.affine(kind["code"]["out"], jax.nn.relu(kinds.affine(kind["code"]["in"], u)))
                out[site] = _normalised(code, kind["code"]["norm"])
        return out

    def leaves(self, tree: Any, codes: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Role -> ``[layer, ...]`` adapter leaf, from the codes: affine in them."""
        return kinds.leaves(tree["kinds"], codes, self.by_layer)

    def make(self, tree: Any, params: dict[str, Any], layout: Layout, task: jax.Array | None) -> dict[str, Any]:
        """The adapter leaves of a task, learned ones among them."""
        del params
        if task is None or tree["tasks"].shape[0] != len(self.tasks):
            raise ValueError(
                f"the tree has {tree['tasks'].shape[0]} tasks, the generator {len(self.tasks)}: {', '.join(self.tasks)!r:.200}"
            )
        return kinds.adapters(tree, self.leaves(tree, self.codes(tree, task)), layout)

    def kept(self, tree: Any) -> dict[str, str]:
        """Path in the tree -> path of the adapter leaf, of those that are learned."""
        return kinds.kept(tree)

    def trained(self, tree: Any) -> dict[str, Any]:
        """What ``tune`` says; the retriever only where the losses that teach it are on."""
        kept = _TUNED[self.tune] if self.contrasts else tuple(name for name in _TUNED[self.tune] if name != "retriever")
        return {name: part for name, part in trees.nest(trees.flat(tree)).items() if name in kept}

    def moving(self, tree: Any) -> dict[str, Any]:
        """What can change the adapters: all that is trained but the retriever."""
        return {name: part for name, part in self.trained(tree).items() if name != "retriever"}

    # ------------------------------------------------------------------------------------------------------- prototypes

    def retrieve(self, tree: Any, features: jax.Array) -> jax.Array:
        """Where instances lie among the prototypes: :math:`z` ``[batch, task_size]`` of features ``[batch, d]``."""
        if "retriever" not in tree:
            raise ValueError("this generator has no retriever; make one with retriever=(128, task_size)")
        middle = jax.nn.relu(kinds.affine(tree["retriever"]["in"], features.astype(jnp.float32)))
        return kinds.affine(tree["retriever"]["out"], middle)

    def seen(self, params: Mapping[str, Any], outputs: Callable[[], Any], inputs: Any) -> jax.Array:
        r"""What the retriever reads: :math:`\bar h` ``[batch, features]``, of parameters by path, or of outputs if it must.

        Raises:
          ValueError: if there is nothing to read, or it has another width.
        """
        if self.instances == "words":
            seen = contrastive.word_features(params, inputs)
        else:
            seen = contrastive.instance_features(outputs(), inputs)
        if seen.shape[-1] != self.features:
            what = "word embeddings" if self.instances == "words" else "hidden states"
            raise ValueError(
                f"the model's {what} are {seen.shape[-1]} wide, the retriever's features={self.features}; make the "
                f"generator with features={seen.shape[-1]}"
            )
        return seen

    @property
    def reads(self) -> Callable[..., jax.Array] | None:
        """``(params, outputs, inputs)``, refused by ``init`` already where training would refuse them."""
        return self.seen if self.contrasts else None

    @property
    def auxiliary(self) -> Callable[..., jax.Array] | None:
        """The contrastive losses, if they are on."""
        return self._contrast if self.contrasts else None

    def _contrast(self, tree: Any, params: Mapping[str, Any], outputs: Any, inputs: Any, base: Callable[[], Any]) -> jax.Array:
        """``weight * (instance loss + prototype loss)``.

        Raises:
          ValueError: if the batch is of one task: no instance then has another to be told from.
        """
        ids = jnp.asarray(inputs["task"], jnp.int32)
        if ids.size == 1:
            raise ValueError(
                "the contrastive losses need instances of two or more tasks in a batch, and this one has a single task: train "
                "with finetune_together(groups=2 or more), or without the losses: dataclasses.replace(generator, weight=0.0)"
            )
        z = self.retrieve(tree, self.seen(params, base if self.instances == "base" else lambda: outputs, inputs))
        rows = jnp.repeat(ids, z.shape[0] // ids.shape[0])
        apart = contrastive.instance_loss(z, rows, self.temperature)
        around = contrastive.prototype_loss(z, tree["tasks"], rows, self.temperature)
        return jnp.float32(self.weight) * (apart + around)


def pha(tasks: Any, features: int, *, size: int = 64, **settings: Any) -> HyperNetwork:
    """Prototype-based HyperAdapter: prototypes of length 64, a retriever 128 wide, layer embeddings, the two losses at 0.1.

    Meant for parallel bottleneck adapters beside the feed-forward layers, ``pf.parallel(bottleneck=64, scale=1.0,
    init="xavier")``. On an encoder-decoder, as released, the decoder's adapters are made and the encoder's learned:
    ``learned=r"encoder/.*"``. On an encoder all are made: ``instances="base"``, or ``"words"``.

    Args:
      tasks: names of the tasks.
      features: width of the encoder's hidden states.
      size: length of prototypes, layer embeddings and codes.
      settings: of :class:`HyperNetwork`.

    Reference: H. Zhao, J. Fu, Z. He, Prototype-based HyperAdapter for Sample-Efficient Multi-task Tuning, 2023, as their
    code has it.
    """
    given = {"task_size": size, "layer_size": size, "code": size, "retriever": (128, size), **settings}
    return HyperNetwork(tasks=tasks, features=features, **given)


def task_embeddings(tasks: Any, **settings: Any) -> HyperNetwork:
    """The control without prototypes: the same network from learned task embeddings, and no loss beside the tasks' own."""
    return HyperNetwork(tasks=tasks, **settings)


def hyperformer(tasks: Any, **settings: Any) -> HyperNetwork:
    """HyperFormer: a network for each layer, shared by the tasks, which sees the task's embedding alone.

    Reference: R. Karimi Mahabadi et al., Parameter-efficient Multi-task Fine-tuning for Transformers via Shared Hypernetworks,
    2021, as its text says; the released settings share one network among the layers.
    """
    return HyperNetwork(tasks=tasks, **{"start": "normal", "by_layer": True, "by_stack": True, **settings})


def hyperformer_plus_plus(tasks: Any, **settings: Any) -> HyperNetwork:
    """HyperFormer++: one network for each stack, from the embeddings of task, layer and position.

    Meant for Houlsby's adapters with a normalisation, whose scale and bias are made too.

    Reference: as :func:`hyperformer`.
    """
    return HyperNetwork(tasks=tasks, **{"start": "normal", "places": True, "by_stack": True, **settings})


def _normalised(x: jax.Array, norm: Any) -> jax.Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    scaled = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + _EPSILON)
    return scaled * norm["scale"][None, :] + norm["bias"][None, :]
