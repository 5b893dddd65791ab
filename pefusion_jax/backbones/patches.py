"""Images at the entrance of a vision transformer: sizes, patches, and position tables on a grid."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def set_pairs(config: Any, *fields: str) -> None:
    """Makes fields of a frozen configuration, given as an integer or two, into ``(height, width)``.

    Raises:
      ValueError: naming a field that is neither.
    """
    for field in fields:
        value = getattr(config, field)
        pair = (value, value) if isinstance(value, int) else value
        if (
            not isinstance(pair, (list, tuple))
            or len(pair) != 2
            or not all(isinstance(side, int) and not isinstance(side, bool) and 1 <= side < 2**20 for side in pair)
        ):
            where = f"{type(config).__name__}.{field}"
            raise ValueError(f"{where} must be a positive integer or [height, width] of such, not {value!r:.120}")
        object.__setattr__(config, field, tuple(pair))


def grid_of(config: Any) -> tuple[int, int]:
    """How many patches an image of the configuration's size has, down and across.

    Raises:
      ValueError: if a patch is larger than the image.
    """
    (height, width), (down, across) = config.image_size, config.patch_size
    if down > height or across > width:
        raise ValueError(f"{type(config).__name__}: patch_size={(down, across)} is larger than image_size={(height, width)}")
    return height // down, width // across


def plain_sizes(config: Any) -> dict[str, Any]:
    """The fields of a configuration with square pairs as one integer, as Hugging Face writes them."""
    fields = dataclasses.asdict(config)
    for field in ("image_size", "patch_size"):
        pair = fields[field]
        fields[field] = pair[0] if pair[0] == pair[1] else list(pair)
    return fields


def resize_matrix(old: int, new: int, antialias: bool = False) -> np.ndarray:
    r"""The matrix ``[new, old]`` of torch's bicubic interpolation along one axis, with ``align_corners=False``.

    Output :math:`i` lies at :math:`x = (i + \tfrac12)\,old/new - \tfrac12`. Without antialiasing its four neighbours, clamped
    to the border, have the weights of Keys' kernel with :math:`a=-0.75`; with it the kernel has :math:`a=-0.5`, is stretched by
    ``old/new`` when shrinking, and weights outside the border are dropped and the rest normalised. ``jax.image.resize`` knows
    only the latter.

    Reference: R. Keys, Cubic convolution interpolation for digital image processing, 1981.
    """
    a = -0.5 if antialias else -0.75
    scale = old / new
    centre = (np.arange(new) + 0.5) * scale - 0.5
    stretch = max(scale, 1.0) if antialias else 1.0
    reach = int(np.ceil(2 * stretch)) + 1
    taps = np.floor(centre).astype(int)[:, None] + np.arange(-reach, reach + 1)[None, :]
    t = np.abs(taps - centre[:, None]) / stretch
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    weights = np.where(t <= 1, near, np.where(t < 2, far, 0.0))
    if antialias:
        weights = np.where((taps >= 0) & (taps < old), weights, 0.0)
        weights = weights / weights.sum(1, keepdims=True)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new)[:, None].repeat(taps.shape[1], 1), taps.clip(0, old - 1)), weights)
    return matrix.astype(np.float32)


def resize_positions(
    table: jax.Array, extra: int, old: tuple[int, int], new: tuple[int, int], antialias: bool = False
) -> jax.Array:
    """Resizes a table of positions ``[extra + rows * columns, d]`` to another grid in float32; the first ``extra`` stay.

    Raises:
      ValueError: if the old grid is not square: transformers cannot resize it either.
    """
    if old == new:
        return table
    if old[0] != old[1]:
        raise ValueError(
            f"positions of a {old[0]} x {old[1]} grid cannot be resized to {new[0]} x {new[1]}: only square grids can. "
            "Resize the images to the model's size instead"
        )
    down, across = (jnp.asarray(resize_matrix(a, b, antialias)) for a, b in zip(old, new, strict=True))
    grid = table[extra:].astype(jnp.float32).reshape(*old, -1)
    exact = jax.lax.Precision.HIGHEST
    grid = jnp.einsum("ah,hwd->awd", down, grid, precision=exact)
    grid = jnp.einsum("bw,awd->abd", across, grid, precision=exact)
    return jnp.concatenate([table[:extra], grid.reshape(new[0] * new[1], -1).astype(table.dtype)])


class PatchEmbeddings(nn.Module):
    """Non-overlapping patches, projected: ``[batch, channels, height, width] -> [batch, patches, d]``, row by row."""

    width: int
    patch_size: tuple[int, int]
    dtype: Any

    @nn.compact
    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        return project_patches(pixel_values, self.width, self.patch_size, self.dtype, True, "projection")


def project_patches(pixels: jax.Array, width: int, patch: tuple[int, int], dtype: Any, bias: bool, name: str) -> jax.Array:
    """The convolution of :class:`PatchEmbeddings`, as a part of the module that calls this."""
    init = nn.initializers.normal(0.02)
    conv = nn.Conv(width, patch, strides=patch, padding="VALID", use_bias=bias, dtype=dtype, name=name, kernel_init=init)
    # Torch has the channels in front, Flax's convolution has them last.
    x = conv(pixels.astype(dtype).transpose(0, 2, 3, 1))
    return x.reshape(x.shape[0], -1, width)


def check_pixels(what: str, pixels: jax.Array, config: Any, any_size: bool, remedy: str) -> tuple[int, int]:
    """The grid of a batch of images ``[batch, channels, height, width]``.

    Raises:
      ValueError: if shape, dtype or size are wrong.
    """
    shape = jnp.shape(pixels)
    if len(shape) != 4 or shape[1] != config.num_channels:
        hint = "; the channels come second, as load_image_processor gives them" if shape[-1:] == (config.num_channels,) else ""
        raise ValueError(f"{what}: pixel_values must be [batch, {config.num_channels}, height, width], not {shape}{hint}")
    if not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise ValueError(f"{what}: pixel_values are {pixels.dtype}; they must be floats, scaled as by load_image_processor")
    if not any_size and shape[2:] != config.image_size:
        raise ValueError(f"{what}: the images are {shape[2]} x {shape[3]}, the model's {config.image_size}; {remedy}")
    grid = (shape[2] // config.patch_size[0], shape[3] // config.patch_size[1])
    if 0 in grid:
        raise ValueError(f"{what}: images of {shape[2]} x {shape[3]} are smaller than a patch {config.patch_size}")
    return grid


def arrays_of(what: str, key: str, first: Any, others: Mapping[str, Any], required: bool = True) -> dict[str, Any]:
    """The array arguments of a call by name: given singly, or all in one mapping as the first argument.

    Args:
      what: the model, for messages.
      key: the name of the first argument.
      first: the first argument, or the mapping.
      others: the other arguments by name.
      required: whether the first one must be there.

    Raises:
      ValueError: if they are given both ways, or one is unknown or missing.
    """
    if not isinstance(first, Mapping):
        given = {key: first, **others}
    elif any(array is not None for array in others.values()):
        raise ValueError(f"{what} takes either one mapping or single arrays, not both")
    elif set(first) - {key, *others}:
        raise ValueError(f"{what} takes a mapping with {key} and any of {list(others)}, not {list(first)}")
    else:
        given = {name: first.get(name) for name in (key, *others)}
    if required and given[key] is None:
        raise ValueError(f"{what} needs {key}")
    return {name: None if array is None else jnp.asarray(array) for name, array in given.items()}


def rows_of(tensors: Mapping[str, Any], name: str) -> int | None:
    """The length of the first axis of a tensor, by which a file tells its number of classes; None if it is not there."""
    infos = getattr(tensors, "infos", tensors)  # of a file's tensors, which are read to be had
    shape = tuple(getattr(infos.get(name), "shape", ()))
    return int(shape[0]) if shape else None
