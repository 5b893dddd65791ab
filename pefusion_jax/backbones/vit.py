"""Vision transformers (ViT) and DeiT in Flax Linen, with the parameter names of Hugging Face's files.

Parameter paths are the names on disk with ``/`` for ``.``, without the prefix ``vit.`` or ``deit.`` of headed models. They are
the same under transformers 4 and 5, although version 5 uses others in memory (``layers.N.attention.q_proj``; see
``Family.modules``)::

    embeddings/{cls_token, distillation_token (DeiT), position_embeddings}
    embeddings/patch_embeddings/projection/{kernel,bias}
    encoder/layer/N/attention/{attention/{query,key,value},output/dense}/{kernel,bias}
    encoder/layer/N/{intermediate,output}/dense/{kernel,bias}
    encoder/layer/N/{layernorm_before,layernorm_after}/{scale,bias}
    layernorm/{scale,bias}     pooler/dense/{kernel,bias}     classifier/{kernel,bias}
    {cls_classifier,distillation_classifier}/{kernel,bias}                    (DeiT with a teacher)

With ``scan_layers=True`` the ``N`` is gone and every leaf below ``encoder/layer`` has a leading axis of layers. Taps: see
``vision``. Masked image modelling is not implemented.

References: Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale", 2021; Touvron et
al., "Training data-efficient image transformers & distillation through attention", 2021.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pefusion_jax.backbones import configs, names, patches, vision
from pefusion_jax.backbones.family import Family
from pefusion_jax.backbones.layers import ACTIVATIONS, LayerNorm

__all__ = ["DEIT", "VIT", "Vit", "VitConfig", "VitOutput", "name_table"]

LAYOUT = vision.Layout(
    norms=("layernorm_before", "layernorm_after"),
    attention="attention",
    projections=("query", "key", "value"),
    nested=True,
    mlp=False,
)
_HARMLESS = {"encoder_stride", *vision.LEGACY}
_ONLY = {"model_type": ("vit", "deit"), **vision.ONLY}
# Ours, not in a config.json: what the weights are.
_OWN = ("distilled", "pooler", "labels", "teacher")


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """The shape of a ViT or a DeiT; names and defaults are Hugging Face's, except the last four fields.

    ``image_size`` and ``patch_size`` are ``(height, width)``; an integer means a square. ``distilled`` is a DeiT, with a
    distillation token; ``labels`` the number of classes of a classifier, None without one; ``teacher`` says that there are two.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    layer_norm_eps: float = 1e-12
    image_size: Any = (224, 224)
    patch_size: Any = (16, 16)
    num_channels: int = 3
    qkv_bias: bool = True
    pooler_output_size: int | None = None
    pooler_act: str = "tanh"
    distilled: bool = False
    pooler: bool = True
    labels: int | None = None
    teacher: bool = False

    def __post_init__(self) -> None:
        configs.validate(self)
        configs.require_multiple(self, "hidden_size", "num_attention_heads")
        patches.set_pairs(self, "image_size", "patch_size")
        patches.grid_of(self)
        if self.teacher and not (self.distilled and self.labels):
            raise ValueError("VitConfig.teacher=True needs distilled=True and a number of labels")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], tensors: Mapping[str, Any] | None = None) -> VitConfig:
        """Reads the dictionary of a ``config.json``.

        Args:
          raw: the dictionary.
          tensors: canonical names of the weights' file with arrays or descriptions, which decide on pooler and classifiers.
            Without them the architecture in ``raw`` does.

        Raises:
          ValueError: naming every field or value that this file does not implement.
        """
        own = {field.name for field in dataclasses.fields(cls)} - set(_OWN)
        configs.refuse_unknown(raw, "ViT and DeiT", own, _ONLY, _HARMLESS)
        distilled = raw["model_type"] == "deit"
        if tensors is None:
            classes = str(raw.get("architectures"))
            teacher = "WithTeacher" in classes
            labels = configs.num_labels(raw) if "ForImageClassification" in classes else None
            pooler = labels is None
        else:
            teacher = "cls_classifier.weight" in tensors
            pooler = "pooler.dense.weight" in tensors
            labels = patches.rows_of(tensors, "cls_classifier.weight" if teacher else "classifier.weight")
        fields = {key: raw[key] for key in own if key in raw}
        return cls(**fields, distilled=distilled, pooler=pooler, labels=labels, teacher=teacher)

    def to_dict(self) -> dict[str, Any]:
        """The dictionary of a ``config.json`` from which transformers builds the same model."""
        fields = {key: value for key, value in patches.plain_sizes(self).items() if key not in _OWN and value is not None}
        kind, name = ("deit", "DeiT") if self.distilled else ("vit", "ViT")
        head = "Model" if self.labels is None else "ForImageClassification" + ("WithTeacher" if self.teacher else "")
        labels = {} if self.labels is None else {"num_labels": self.labels}
        return {"model_type": kind, "architectures": [name + head], **labels, **fields}

    @property
    def extra(self) -> int:
        """How many tokens stand in front of the patches."""
        return 2 if self.distilled else 1

    @property
    def stack(self) -> vision.Stack:
        """The shape of the blocks."""
        return vision.Stack(
            layout=LAYOUT,
            layers=self.num_hidden_layers,
            width=self.hidden_size,
            hidden=self.intermediate_size,
            heads=self.num_attention_heads,
            act=self.hidden_act,
            eps=self.layer_norm_eps,
            bias=self.qkv_bias,
            residual_dropout=self.hidden_dropout_prob,
            attention_dropout=self.attention_probs_dropout_prob,
        )


class VitOutput(NamedTuple):
    """What a :class:`Vit` returns; what does not apply is None.

    ``last_hidden_state [batch, tokens, d]`` after the final norm: the class token, DeiT's distillation token, the patches row
    by row. ``pooler_output [batch, d]``. ``hidden_states``: the embeddings and every block's output, before that norm.
    ``logits [batch, labels]``; with a teacher the mean of ``cls_logits`` and ``distillation_logits``.
    """

    last_hidden_state: jax.Array
    pooler_output: jax.Array | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    logits: jax.Array | None = None
    cls_logits: jax.Array | None = None
    distillation_logits: jax.Array | None = None


class _Embeddings(nn.Module):
    config: VitConfig
    dtype: Any
    deterministic: bool

    @nn.compact
    def __call__(self, pixels: jax.Array, grid: tuple[int, int]) -> jax.Array:
        config, width = self.config, self.config.hidden_size
        x = patches.PatchEmbeddings(width, config.patch_size, self.dtype, name="patch_embeddings")(pixels)
        tokens = [self.param(name, vision.INIT, (1, 1, width)) for name in ("cls_token", "distillation_token")[: config.extra]]
        lead = jnp.concatenate(tokens, axis=1).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(lead, (x.shape[0], *lead.shape[1:])), x], axis=1)
        old = patches.grid_of(config)
        table = self.param("position_embeddings", vision.INIT, (1, config.extra + old[0] * old[1], width))
        x = x + patches.resize_positions(table[0], config.extra, old, grid).astype(self.dtype)[None]
        return nn.Dropout(config.hidden_dropout_prob, deterministic=self.deterministic)(x)


class _Pooler(nn.Module):
    config: VitConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = self.config.pooler_output_size or self.config.hidden_size
        return ACTIVATIONS[self.config.pooler_act](nn.Dense(size, dtype=self.dtype, name="dense", kernel_init=vision.INIT)(x))


class Vit(nn.Module):
    """A vision transformer, pre-norm: ``x = x + Attention(LN(x)); x = x + W2 act(W1 LN(x))`` over patches and a class token.

    Attributes:
      config: the model's shape.
      dtype: of the computation; parameters may be float32 or the same. Softmax and norms are float32 in any case.
      scan_layers: one traced block scanned over stacked parameters instead of a loop (see ``stack_layers``).
      remat: recompute each block in the backward pass instead of storing its activations.
    """

    config: VitConfig
    dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        pixel_values: jax.Array | Mapping[str, jax.Array],
        *,
        interpolate_pos_encoding: bool = False,
        deterministic: bool = True,
        output_hidden_states: bool = False,
    ) -> VitOutput:
        """Runs the encoder.

        Args:
          pixel_values: images ``[batch, channels, height, width]`` as in Hugging Face, or a mapping with that name. They are
            transposed inside: Flax's convolution wants the channels last.
          interpolate_pos_encoding: take images of any size and resize the positions to their grid, bicubically in float32. As
            in transformers, only a model with a square grid can.
          deterministic: False switches dropout on, which needs ``rngs={"dropout": key}``.
          output_hidden_states: also return the embeddings and every block's output.

        Raises:
          ValueError: if shape, dtype or size of the images are wrong.
        """
        config = self.config
        pixels = patches.arrays_of("Vit", "pixel_values", pixel_values, {})["pixel_values"]
        remedy = "resize them, or pass interpolate_pos_encoding=True"
        grid = patches.check_pixels("Vit", pixels, config, interpolate_pos_encoding, remedy)
        first = _Embeddings(config, self.dtype, deterministic, name="embeddings")(pixels, grid)
        last, kept = vision.Encoder(
            config.stack,
            self.dtype,
            deterministic,
            node="layer",
            keep=output_hidden_states,
            scan_layers=self.scan_layers,
            remat=self.remat,
            name="encoder",
        )(first)
        last = LayerNorm(epsilon=config.layer_norm_eps, dtype=self.dtype, name="layernorm")(last)

        def classify(token: int, name: str) -> jax.Array:
            return nn.Dense(config.labels or 0, dtype=self.dtype, name=name, kernel_init=vision.INIT)(last[:, token])

        logits = cls_logits = distillation_logits = None
        if config.teacher:
            cls_logits, distillation_logits = classify(0, "cls_classifier"), classify(1, "distillation_classifier")
            logits = (cls_logits + distillation_logits) / 2
        elif config.labels is not None:
            logits = classify(0, "classifier")
        return VitOutput(
            last_hidden_state=last,
            pooler_output=_Pooler(config, self.dtype, name="pooler")(last[:, 0]) if config.pooler else None,
            hidden_states=None if kept is None else (first, *kept),
            logits=logits,
            cls_logits=cls_logits,
            distillation_logits=distillation_logits,
        )


def name_table(config: VitConfig) -> dict[str, names.Entry]:
    """The table of canonical names of a configuration, in the loop layout."""
    width, (rows, columns) = config.hidden_size, patches.grid_of(config)
    at = "embeddings/patch_embeddings/projection"
    table = names.conv(at, at.replace("/", "."), config.num_channels, width, config.patch_size)
    shapes = {"cls_token": 1, "distillation_token": 1, "position_embeddings": config.extra + rows * columns}
    for name, length in shapes.items():
        if name != "distillation_token" or config.distilled:
            table[f"embeddings/{name}"] = names.Entry(f"embeddings.{name}", (1, length, width))
    table |= vision.stack_table(config.stack, "encoder.layer")
    table |= names.norm("layernorm", "layernorm", width)
    if config.pooler:
        table |= names.linear("pooler/dense", "pooler.dense", width, config.pooler_output_size or width)
    if config.labels is not None:
        for name in ("cls_classifier", "distillation_classifier") if config.teacher else ("classifier",):
            table |= names.linear(name, name, width, config.labels)
    return table


# From the names on disk to those in transformers 5's memory.
ATTENTION_MODULES = (
    (r"\.attention\.attention\.query$", ".attention.q_proj"),
    (r"\.attention\.attention\.key$", ".attention.k_proj"),
    (r"\.attention\.attention\.value$", ".attention.v_proj"),
    (r"\.attention\.output\.dense$", ".attention.o_proj"),
)
_MODULES = (
    (r"^encoder\.layer\.", "layers."),
    *ATTENTION_MODULES,
    (r"^(layers\.\d+)\.intermediate\.dense$", r"\1.mlp.fc1"),
    (r"^(layers\.\d+)\.output\.dense$", r"\1.mlp.fc2"),
)

VIT = Family(
    name="ViT",
    model_types=("vit",),
    architectures=("ViTModel", "ViTForImageClassification"),
    read_config=VitConfig.from_dict,
    write_config=VitConfig.to_dict,
    build=Vit,
    table=name_table,
    prefix="vit.",
    heads=("classifier.",),
    modules=_MODULES,
)
DEIT = VIT._replace(
    name="DeiT",
    model_types=("deit",),
    architectures=("DeiTModel", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"),
    prefix="deit.",
    heads=("classifier.", "cls_classifier.", "distillation_classifier."),
)
