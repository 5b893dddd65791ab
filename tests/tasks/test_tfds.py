"""TensorFlow Datasets without TensorFlow and without a network, in a process of its own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pefusion_jax.tasks import tfds_source

SCRIPT = """
import sys
import numpy as np
import tensorflow_datasets as tfds
from pefusion_jax.tasks import tfds_source

class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "sentence": tfds.features.Text(),
            "pixels": tfds.features.Tensor(shape=(2, 2), dtype=np.uint8),
            "label": tfds.features.ClassLabel(names=["no", "yes"]),
        }))
    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}
    def _generate_examples(self):
        for i in range(20):
            yield i, {"sentence": f"Größe {i}", "pixels": np.full((2, 2), i, np.uint8), "label": i % 2}

folder = sys.argv[1]
builder = Tiny(data_dir=folder, file_format="array_record")
examples = tfds_source(builder, "train")
assert len(examples) == 20 and examples.classes == {"label": ("no", "yes")}
numbers = sorted(int(e["sentence"].removeprefix("Größe ")) for e in examples)
assert numbers == list(range(20)), numbers
for e in examples[2:5]:
    number = int(e["sentence"].split()[1])
    assert e["label"] == number % 2 and e["pixels"].shape == (2, 2) and (e["pixels"] == number).all()
assert len(tfds_source(builder, "train[:50%]")) == 10
assert examples[-1]["sentence"] == examples[19]["sentence"]
assert examples.where(3).endswith("split train, example 3"), examples.where(3)

def fails(kind, text, *args, **options):
    try:
        tfds_source(*args, **options)
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(text)

fails(ValueError, "has no split 'dev'; it has: train", builder, "dev")
fails(ValueError, "no 'no_such_set'", "no_such_set", "train")
other = Tiny(data_dir=folder + "/parquet", file_format="parquet")
fails(ValueError, "file_format='array_record'", other, "train[:50%]")

# glue is not registered without TensorFlow until its module is imported; its data would have to be downloaded.
fails(ValueError, "glue/mrpc", "glue/mrpc", "train", data_dir=folder, download=False)

with tfds.testing.mock_data(num_examples=3):
    images = tfds_source("mnist", "train", data_dir=folder, download=False)
    assert images[0]["image"].shape == (28, 28, 1) and len(images.classes["label"]) == 10
assert "tensorflow" not in sys.modules
print("all well")
"""


def test_tfds_without_tensorflow(tmp_path):
    root = Path(__file__).resolve().parents[2]
    script = tmp_path / "tiny.py"
    script.write_text(textwrap.dedent(SCRIPT), "utf-8")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "data")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 and "all well" in done.stdout, done.stderr[-3000:]


def test_without_tensorflow_datasets_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match="pip install tensorflow-datasets"):
        tfds_source("mnist", "train")
