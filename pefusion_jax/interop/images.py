"""Loads a model's image preprocessing: pictures to ``pixel_values``, without torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from pefusion_jax.interop import hub
from pefusion_jax.interop.headers import decode_json

PROCESSOR = "preprocessor_config.json"
_MAX_CONFIG_BYTES = 2**20
_MAX_SIDE = 16_384


def load_image_processor(name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> Callable[[Any], np.ndarray]:
    """Loads a model's image preprocessing from its ``preprocessor_config.json``, through transformers' Pillow processors.

    Resizing, cropping and scaling are the model's own and differ between models of one kind, so they are always read from the
    file. Transformers has each processor twice; this is always the one on Pillow and numpy, which needs neither torch nor
    torchvision, so that the numbers do not depend on what else is installed::

        process = load_image_processor("path/of/a/folder")
        outputs = model.apply({"params": params}, process(images))

    Args:
      name_or_path: a folder, or a Hub id (see ``hub.locate``).
      revision: branch, tag or commit on the Hub.

    Returns:
      ``images -> pixel_values``, float32 ``[batch, channels, height, width]``. Images are one or several of: a Pillow image, or
      a uint8 array ``[height, width, 3]`` or ``[height, width]``; an array ``[batch, height, width, 3]`` is several. All are
      taken as RGB; grey is made into it.

    Raises:
      FileNotFoundError: if the folder or its ``preprocessor_config.json`` is not there.
      ValueError: if that file is not one, or names a processor that there is not. What it returns raises it for images that
        are none of these, and for sizes that do not make one batch.
      ImportError: if transformers or Pillow is not installed.
    """
    folder = hub.locate(name_or_path, revision, needs=(PROCESSOR,)).path
    path = folder / PROCESSOR
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {PROCESSOR}: copy it from the model's repository")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; a configuration has at most {_MAX_CONFIG_BYTES}")
    raw = decode_json(path.read_bytes(), path, "the preprocessing configuration")
    for field in ("size", "crop_size", "pad_size"):
        sides = raw.get(field)
        values = sides.values() if isinstance(sides, Mapping) else [sides]
        if any(value is not None and not _is_side(value) for value in values):
            raise ValueError(f"{path}: {field}={sides!r:.200} must be sides of 1 to {_MAX_SIDE} pixels")

    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(
            str(folder), backend="pil", local_files_only=True, trust_remote_code=False
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # whatever a malformed file makes it raise
        raise ValueError(f"{path} is not a preprocessing that transformers can load: {error}") from error

    def process(images: Any) -> np.ndarray:
        pictures = _pictures(images)
        try:
            batch = processor(images=pictures, return_tensors="np")
            pixels = np.asarray(batch["pixel_values"], np.float32)
        except (ValueError, TypeError) as error:
            sizes = sorted({picture.size[::-1] for picture in pictures})
            raise ValueError(f"images of the sizes {sizes[:8]} do not make one batch under {path}: {error}") from error
        if pixels.ndim != 4:
            raise ValueError(f"{path}: {type(processor).__name__} gives pixel_values of shape {pixels.shape}, not four axes")
        return pixels

    return process


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MAX_SIDE


def _pictures(images: Any) -> list[Any]:
    """Pillow images in RGB.

    Raises:
      ValueError: naming what is not an image.
    """
    from PIL import Image

    single = isinstance(images, Image.Image) or (
        isinstance(images, np.ndarray) and (images.ndim < 3 or (images.ndim == 3 and images.shape[-1] == 3))
    )
    if not single and not isinstance(images, Iterable):
        raise ValueError(f"images must be one image or several, not {type(images).__name__}")
    pictures = []
    for index, image in enumerate([images] if single else images):
        if isinstance(image, np.ndarray):
            # Floats would be divided by 255 once more without a word.
            if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[-1] == 3)) or not image.size:
                raise ValueError(
                    f"image {index} is {image.dtype} of shape {image.shape}; arrays must be uint8 [height, width, 3] or "
                    "[height, width] with values from 0 to 255"
                )
            image = Image.fromarray(np.ascontiguousarray(image))
        if not isinstance(image, Image.Image):
            raise ValueError(f"image {index} is a {type(image).__name__}; expected a Pillow image or a uint8 array")
        pictures.append(image.convert("RGB"))
    if not pictures:
        raise ValueError("there is no image")
    return pictures
