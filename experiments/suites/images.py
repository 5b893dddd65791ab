"""The eight vision tasks: how each is read from its package, from a local extract or through TFDS, and written as .npz.

A file holds ``{train,validation,test}_images`` (uint8, ``[n, height, width]`` grey or ``[n, height, width, 3]`` RGB), the
``_labels`` beside them (int64), ``class_names`` and ``recipe``; it loads without pickle.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.suites import packages
from experiments.suites.choosing import SPLITS, Item, choose

SIZES = (1000, 150, 300)
RECIPE = 2  # of this file: another number makes all tasks anew
SIDE = 98  # larger pictures are scaled down to this
_MOST_PIXELS = 2**23  # of a drawing: a few are posters of 200 million

_FASHION = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
_ANIMALS = "bear,bird,cat,cow,dog,elephant,giraffe,horse,sheep,zebra"
_CLIPART = (
    "animals,buildings,computer,food,geography,office,people,plants,recreation,shapes,signs_and_symbols,tools,transportation"
)
_CIFAR = "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck"
_DTD = "banded,blotchy,braided,bubbly,bumpy,chequered,cobwebbed,cracked,crosshatched,crystalline"

# "tfds" is TensorFlow Datasets' name for what no package carries; None: it has none.
TASKS: dict[str, dict[str, Any]] = {
    "mnist": {"package": "mnist", "classes": tuple("0123456789"), "question": "handwritten digit"},
    "fashion": {
        "package": "fashion",
        "classes": tuple(_FASHION.split(",")),
        "question": "piece of clothing; official test set",
    },
    "animals": {"package": "animal", "classes": tuple(_ANIMALS.split(",")), "question": "silhouette of an animal"},
    "elpv": {
        "package": "elpv",
        "classes": ("functional", "defective"),
        "question": "electroluminescence photograph of a solar cell: defective or not (cells rated 0 or 1)",
    },
    "openclipart": {"package": "openclipart", "classes": tuple(_CLIPART.split(",")), "question": "category of a drawing"},
    "cifar10": {
        "extract": "cifar10",
        "tfds": "cifar10",
        "classes": tuple(_CIFAR.split(",")),
        "question": "object in a photograph; official test set",
    },
    "gtsrb": {
        "extract": "gtsrb",
        "tfds": None,
        "classes": tuple(f"sign {number}" for number in range(43)),
        "question": "kind of a traffic sign; official test set",
    },
    "dtd": {
        "extract": "dtd10",
        "tfds": "dtd",
        "classes": tuple(_DTD.split(",")),
        "question": "texture (the first 10 of 47 kinds)",
    },
}


def item(label: int, image: np.ndarray, group: str = "", side: str = "") -> Item:
    """A picture; equal pictures have equal keys, and without a group each stands alone."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise ValueError(f"a picture is {image.dtype} of shape {image.shape}, not uint8 [height, width] or [height, width, 3]")
    key = hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()
    return Item(label, key, group or key, image, side)


def mnist(archive: Path) -> Iterator[Item]:
    """10,000 digits as lists of numbers from 0 to 1."""
    for name, content in packages.members(archive, "package/src/digits/"):
        values = np.asarray(json.loads(content)["data"], np.float64).reshape(-1, 28, 28)
        for image in np.rint(values * 255).astype(np.uint8):
            yield item(int(Path(name).stem), image)


def fashion(archive: Path) -> Iterator[Item]:
    files = {
        Path(name).name: np.frombuffer(gzip.decompress(content), np.uint8)
        for name, content in packages.members(archive, "usr/share/datasets/fashion-mnist/")
    }
    # Six times more than is needed is enough to choose from.
    for side, name, count in (("train", "train", 12_000), ("test", "t10k", 10_000)):
        images = files[f"{name}-images-idx3-ubyte.gz"][16:].reshape(-1, 28, 28)[:count]
        labels = files[f"{name}-labels-idx1-ubyte.gz"][8:][:count]
        for image, label in zip(images, labels, strict=True):
            yield item(int(label), image, side=side)


def animals(archive: Path) -> Iterator[Item]:
    prefix = "animal_mnist/data/Animal_MNIST/animal_"
    arrays = {
        name.removeprefix(prefix).split("_")[0]: packages.unpickled_array(gzip.decompress(content), name)
        for name, content in packages.members(archive, prefix)
    }
    for image, label in zip(arrays["data"].reshape(-1, 28, 28), arrays["label"].reshape(-1), strict=True):
        yield item(int(label), image.astype(np.uint8))


def picture(content: bytes, mode: str) -> np.ndarray:
    """A PNG at 98 by 98 pixels; transparent parts become white."""
    from PIL import Image

    with Image.open(io.BytesIO(content)) as opened:
        image = opened.convert("RGBA") if mode == "RGB" else opened.convert(mode)
        if mode == "RGB":
            # What is drawn, without the empty page around it: its longer side becomes 98 pixels, centred on a white square.
            image = image.crop(image.getchannel("A").getbbox())
            image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
            square = Image.new("RGBA", (SIDE, SIDE), "white")
            square.alpha_composite(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
            return np.asarray(square.convert("RGB"))
        return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def elpv(archive: Path) -> Iterator[Item]:
    files = dict(packages.members(archive, "elpv_dataset/data/"))
    for line in files["elpv_dataset/data/labels.csv"].decode("ascii").splitlines():
        name, probability, _ = line.split()
        if float(probability) in (0.0, 1.0):  # between them, the raters were not sure
            yield item(int(float(probability)), picture(files[f"elpv_dataset/data/{name}"], "L"))


def openclipart(archive: Path) -> Iterator[Item]:
    """Files of the 13 categories; a category's files whose names differ in digits only, or in a short ending, are one group."""
    prefix = "usr/share/openclipart/png/"
    classes = TASKS["openclipart"]["classes"]
    for name, content in packages.members(archive, prefix):
        category = name.removeprefix(prefix).split("/")[0]
        if category in classes and name.endswith(".png"):
            if int.from_bytes(content[16:20]) * int.from_bytes(content[20:24]) > _MOST_PIXELS:  # PNG: width and height
                continue
            group = re.sub(r"[\d_\-.]+.?$", "", Path(name).stem.lower())
            try:
                image = picture(content, "RGB")
            except (OSError, SyntaxError):  # how Pillow says that a file is damaged
                continue
            yield item(classes.index(category), image, f"{category}/{group}")


_READERS = {"mnist": mnist, "fashion": fashion, "animals": animals, "elpv": elpv, "openclipart": openclipart}


def extract(path: Path, name: str, official: bool) -> tuple[list[Item], tuple[str, ...]]:
    """Rows and class names of a local .npz with ``{train,test}_{images,labels}`` and ``class_names``.

    Raises:
      ValueError: if it is not such a file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        classes = tuple(str(each) for each in arrays["class_names"])
        rows = [
            item(int(label), image, side=side if official else "")
            for side in ("train", "test")
            for image, label in zip(arrays[f"{side}_images"], arrays[f"{side}_labels"], strict=True)
        ]
    except (KeyError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"{path} is not an extract of {name}: expected an .npz with train_images, train_labels, test_images, test_labels "
            f"and class_names ({error})"
        ) from error
    if len(classes) != len(TASKS[name]["classes"]) or {row.label for row in rows} != set(range(len(classes))):
        raise ValueError(f"{path} has the classes {classes[:12]}; {name} has {len(TASKS[name]['classes'])}")
    return rows, classes


def from_tfds(name: str) -> tuple[list[Item], tuple[str, ...]]:
    """Rows through TensorFlow Datasets, which downloads the whole data set.

    Raises:
      ValueError: if TFDS does not have it, or cannot get it here; the remedy is ``--extracts``.
    """
    import pefusion_jax as pf

    known, classes = TASKS[name]["tfds"], TASKS[name]["classes"]
    remedy = f"give a folder with images/{TASKS[name]['extract']}.npz by --extracts (its form: README.md)"
    if known is None:
        raise ValueError(f"TensorFlow Datasets has no {name}, and no package carries it; {remedy}")
    rows = []
    for side in ("train", "test"):
        try:
            source = pf.tasks.tfds_source(known, side)
        except Exception as error:  # downloads fail in as many ways as there are networks
            raise ValueError(
                f"TensorFlow Datasets cannot get {known} ({type(error).__name__}: {str(error)[:200]}); {remedy}"
            ) from error
        names = source.classes["label"]
        for index in range(len(source)):
            example = source[index]
            if names[int(example["label"])] in classes:
                image = np.asarray(example["image"], np.uint8)
                if max(image.shape[:2]) > SIDE:
                    image = _square(image)
                rows.append(item(classes.index(names[int(example["label"])]), image, side=side if name == "cifar10" else ""))
    return rows, classes


def _square(image: np.ndarray) -> np.ndarray:
    from PIL import Image, ImageOps

    return np.asarray(ImageOps.fit(Image.fromarray(image), (56, 56), Image.Resampling.BICUBIC))


def make(name: str, archive: Path | None, target: Path, extracts: Path | None) -> dict[str, list[Item]]:
    """Writes a task's file and returns its splits.

    Raises:
      ValueError: if the source is not what it should be; for what no package carries, also if there is neither an extract nor
        TFDS.
    """
    classes: tuple[str, ...] = TASKS[name]["classes"]
    if archive is not None:
        rows = list(_READERS[name](archive))
    else:
        path = None if extracts is None else extracts.expanduser() / "images" / f"{TASKS[name]['extract']}.npz"
        if path is not None and not path.is_file():
            raise ValueError(f"{path} is not there; --extracts must hold images/{path.name}")
        rows, classes = from_tfds(name) if path is None else extract(path, name, official=name != "dtd")
    chosen = choose(rows, len(classes), SIZES)
    arrays: dict[str, Any] = {"class_names": np.asarray(classes), "recipe": np.int64(RECIPE)}
    for split in SPLITS:
        arrays[f"{split}_images"] = np.stack([each.row for each in chosen[split]])
        arrays[f"{split}_labels"] = np.asarray([each.label for each in chosen[split]], np.int64)
    np.savez_compressed(target, **arrays)
    return chosen


def is_made(path: Path) -> bool:
    """Whether this version of the recipe has made the file; files appear whole or not at all."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return int(file["recipe"]) == RECIPE
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
        return False
