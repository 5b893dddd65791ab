"""TensorFlow Datasets as a source of examples, without TensorFlow."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pefusion_jax.tasks.sources import PathLike


@dataclass(frozen=True, eq=False)
class TfdsExamples(Sequence[dict[str, Any]]):
    """Examples of a TensorFlow Datasets split, read one by one; texts are ``str``, all else as TFDS gives it.

    Attributes:
      data: the TFDS data source.
      source: name and split.
      texts: names of the features that hold text.
      classes: class names of each feature that is a class label.
    """

    data: Sequence[Any]
    source: str
    texts: frozenset[str]
    classes: dict[str, tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        example = self.data[range(len(self))[index]]
        return {
            name: value.decode("utf-8") if name in self.texts and isinstance(value, bytes) else value
            for name, value in example.items()
        }

    def where(self, index: int) -> str:
        """Place of a row, in words."""
        return f"{self.source}, example {index}"


def tfds_source(name: Any, split: str, *, data_dir: PathLike | None = None, download: bool = True) -> TfdsExamples:
    """Opens a TensorFlow Datasets split for random access, without TensorFlow.

    Args:
      name: such as ``"mnist"`` or ``"glue/mrpc"``, or a builder object.
      split: such as ``"train"`` or ``"train[:10%]"``.
      data_dir: where TFDS keeps its data, if not in its default place.
      download: whether the data may be downloaded and prepared.

    Raises:
      ImportError: if tensorflow-datasets is not installed.
      ValueError: if there is no such data set or split, or it was prepared in a format without random access.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError("tfds_source needs TensorFlow Datasets: pip install tensorflow-datasets") from error
    builder = name
    if isinstance(name, str):
        if name.split("/")[0] == "glue":
            # Without TensorFlow the class is shipped but not registered until its module is imported.
            from tensorflow_datasets.text import glue  # noqa: F401
        try:
            builder = tfds.builder(name, data_dir=None if data_dir is None else os.fspath(data_dir), file_format="array_record")
        except tfds.core.registered.DatasetNotFoundError as error:
            raise ValueError(f"TensorFlow Datasets has no {name!r}: {error}") from error
    if download:
        builder.download_and_prepare()
    file_format = getattr(builder.info.file_format, "value", None)
    if file_format != "array_record":
        # Parquet would ignore slices without a word, tfrecord needs TensorFlow.
        raise ValueError(
            f"{builder.info.full_name} is stored as {file_format}; prepare it with file_format='array_record', "
            "for instance in another data_dir"
        )
    features = builder.info.features
    try:
        data = builder.as_data_source(split=split)
    except (ValueError, KeyError) as error:
        there = ", ".join(builder.info.splits)
        raise ValueError(f"{builder.info.full_name} has no split {split!r}; it has: {there or 'none yet'}") from error
    return TfdsExamples(
        data,
        f"tfds {builder.info.full_name}, split {split}",
        frozenset(key for key, feature in features.items() if isinstance(feature, tfds.features.Text)),
        {key: tuple(f.names) for key, f in features.items() if isinstance(f, tfds.features.ClassLabel) and f.names},
    )
