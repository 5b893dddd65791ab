"""Thousands of hostile headers, indexes, configurations and manifests: each is read or refused by one of our errors.

No crash, no hang, no file opened outside the folder, nothing written.
"""

import builtins
import collections
import json
import os
import random
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from mutations import mutated_bytes, mutated_json, raw_header

from pefusion_jax import checkpoints
from pefusion_jax.backbones import FAMILIES, Bert, BertConfig
from pefusion_jax.interop import load_pretrained, manifest, read_header, safetensors, save_pretrained
from pefusion_jax.interop.pretrained import open_checkpoint

CONFIG = BertConfig(
    vocab_size=7,
    hidden_size=4,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=5,
    max_position_embeddings=4,
    pooler=False,
)
SLOWEST = 5.0  # seconds for one file, on a machine with other things to do; a hang would be far longer


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    shapes = jax.eval_shape(Bert(CONFIG).init, jax.random.key(0), np.ones((1, 2), np.int32))["params"]
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    save_pretrained(folder, Bert(CONFIG), params, max_shard_bytes=900)
    for name in ("x", "out.safetensors"):  # what a hostile name might reach
        (folder.parent / name).write_bytes(b"secret")
    return folder


@pytest.fixture
def watched(monkeypatch):
    """Every path that is opened while ``allowed`` is set must lie in it, and for reading only."""
    real, state = builtins.open, {"allowed": None}

    def spying(file, mode="r", *args, **kwargs):
        allowed = state["allowed"]
        if allowed is not None and isinstance(file, (str, os.PathLike)):
            assert Path(file).resolve().is_relative_to(allowed.resolve()), f"{file} was opened"
            assert set(mode) <= set("rbt"), f"{file} was opened as {mode}"
        return real(file, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", spying)
    return state


def attempt(read, seen):
    """Runs ``read``: a result, a ValueError or an OSError of ours with a text; nothing else, and not slowly."""
    start = time.perf_counter()
    try:
        read()
        seen["read"] += 1
    except (ValueError, OSError) as error:
        # ours, not one that a library let through: it names a file and says more than that library would
        assert type(error).__module__.startswith(("pefusion_jax", "builtins")) and str(error), repr(error)
        assert not isinstance(error, (UnicodeError, json.JSONDecodeError)), repr(error)
        seen["refused"] += 1
    assert time.perf_counter() - start < SLOWEST


def test_headers(tmp_path, watched):
    rng, seen = random.Random(1), collections.Counter()
    path = tmp_path / "model.safetensors"
    data = np.arange(24, dtype=np.uint8).tobytes()
    good = {
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b.weight": {"dtype": "I64", "shape": [1], "data_offsets": [16, 24]},
        "__metadata__": {"format": "pt"},
    }
    whole = raw_header(good, data)
    for number in range(10_000):
        content = mutated_bytes(whole, rng) if number % 2 else raw_header(mutated_json(good, rng), data)
        path.write_bytes(content)
        watched["allowed"] = tmp_path
        attempt(lambda: list(safetensors.iter_safetensors(path)), seen)
        watched["allowed"] = None
    assert seen["refused"] > 7000 and seen["read"] > 300, seen


def test_indexes(shards, watched):
    rng, seen = random.Random(2), collections.Counter()
    index = shards / "model.safetensors.index.json"
    content = index.read_bytes()
    good = json.loads(content)
    try:
        for number in range(2500):
            index.write_bytes(mutated_bytes(content, rng) if number % 2 else json.dumps(mutated_json(good, rng)).encode())
            watched["allowed"] = shards
            attempt(lambda: open_checkpoint(shards), seen)
            watched["allowed"] = None
    finally:
        index.write_bytes(content)
    assert seen["refused"] > 2000, seen
    assert {file.name for file in shards.parent.iterdir()} == {"model", "x", "out.safetensors"}


def test_configurations_of_every_family():
    """The dictionaries themselves, without a file: whatever is in them, a configuration and its table, or a ValueError."""
    rng, seen = random.Random(3), collections.Counter()
    for family in FAMILIES:
        default = family.write_config(family.read_config({"model_type": family.model_types[0]}, None))
        for _ in range(600):
            raw = mutated_json(default, rng)

            def read(family=family, raw=raw):
                config = family.read_config(raw, None)
                family.table(config)
                hash(config)
                family.build(config, dtype=np.float32, scan_layers=False, remat=False)

            attempt(read, seen)
    assert seen["refused"] > 250 * len(FAMILIES) and seen["read"] > 30 * len(FAMILIES), seen


def test_configuration_files(shards, watched):
    rng, seen = random.Random(4), collections.Counter()
    path = shards / "config.json"
    content = path.read_bytes()
    try:
        for number in range(1500):
            path.write_bytes(
                mutated_bytes(content, rng) if number % 2 else json.dumps(mutated_json(json.loads(content), rng)).encode()
            )
            watched["allowed"] = shards
            attempt(lambda: checkpoints.inspect(shards), seen)
            watched["allowed"] = None
    finally:
        path.write_bytes(content)
    assert seen["refused"] > 700, seen
    load_pretrained(shards)


def test_manifests(shards, watched):
    rng, seen = random.Random(5), collections.Counter()
    path = shards / manifest.NAME
    content = path.read_bytes()
    try:
        for number in range(1500):
            path.write_bytes(
                mutated_bytes(content, rng) if number % 2 else json.dumps(mutated_json(json.loads(content), rng)).encode()
            )
            watched["allowed"] = shards
            attempt(lambda: manifest.verify(shards), seen)
            watched["allowed"] = None
    finally:
        path.write_bytes(content)
    assert seen["refused"] > 300, seen


def test_a_thousand_layers_are_refused_quickly(shards):
    """A configuration must not make us build a table of a billion names."""
    for family in FAMILIES:
        default = family.write_config(family.read_config({"model_type": family.model_types[0]}, None))
        for key in [key for key in default if key.endswith("layers")]:
            for value in (2**31, 10**12):
                start = time.perf_counter()
                with pytest.raises(ValueError, match=key):
                    family.read_config({**default, key: value}, None)
                assert time.perf_counter() - start < SLOWEST


def test_headers_are_read_in_bounded_time_and_memory(tmp_path):
    """The length of a header is believed only up to the limit, also for a sparse file that is large enough."""
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write((2**34).to_bytes(8, "little"))
        file.truncate(2**35)
    start = time.perf_counter()
    with pytest.raises(safetensors.WeightFileError, match="header length"):
        read_header(path)
    assert time.perf_counter() - start < SLOWEST
