"""Thousands of damaged adapters: each is read, or refused by one of our errors, soon, and nothing is left behind."""

import json
import random
import struct
import time
import warnings

import numpy as np
import pytest
from peft_cases import base, write

from pefusion_jax.interop import read_peft
from pefusion_jax.interop.peft_config import FIELDS

CONFIGS, HEADERS, SLOW_SECONDS = 3500, 2500, 8.0

JUNK = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**400, 1e300, -0.5, "", "x", "LORA", "none", "all", "query", "../../x",
    "\x00", "é" * 40, [], [[]], ["query"], ["query", 1], [None], {}, {"query": 3}, {"query": "x"}, {"a": {"b": {"c": []}}},
    {"": 1},
    "(a|a)*b", "(.*)*query", "(.+.+.+.+)+$", "(?!(?!(?!x)))", "[", "\\", "(?P<n>.)(?P=n)", "(" * 30, "a{1000000000}",
    "(a{999}){999}{9}", ".*" * 1500, "|" * 4000, "(.*a){40}", {"(.*)*x": 2, "(x|x)*y": 2}, {f".*{i}.*": i for i in range(300)},
    [f"m{i}" for i in range(3000)], {"(" * i: 1 for i in range(10)}, "all-linear", ["dense", "key"],
    {r".*\.query": 3}, {"layer.0.attention.self.key": 2},
]  # fmt: skip


def adapter():
    rng = np.random.default_rng(0)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query", "key"], "bias": "none"}
    tensors = {}
    for layer in range(2):
        for name in ("query", "key"):
            at = f"base_model.model.encoder.layer.{layer}.attention.self.{name}"
            tensors[f"{at}.lora_A.weight"] = rng.normal(size=(2, 16)).astype(np.float32)
            tensors[f"{at}.lora_B.weight"] = rng.normal(size=(16, 2)).astype(np.float32)
    return config, tensors


def prompt():
    sizes = {"num_virtual_tokens": 3, "token_dim": 16, "num_transformer_submodules": 1, "num_layers": 2}
    config = {"peft_type": "PROMPT_TUNING", "task_type": "SEQ_CLS", "modules_to_save": ["pooler"], **sizes}
    names = {"prompt_embeddings": (3, 16), "base_model.pooler.dense.weight": (16, 16), "base_model.pooler.dense.bias": (16,)}
    return config, {name: np.ones(shape, np.float32) for name, shape in names.items()}


def damaged_config(rng, config):
    """The bytes of a configuration with a few fields, or a few bytes, changed."""
    config = dict(config)
    fields = [*FIELDS[config["peft_type"]], "surprise", "../x"]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if rng.random() < 0.1:
            config.pop(rng.choice(list(config)), None)
        else:
            config[rng.choice(fields)] = rng.choice(JUNK)
    text = json.dumps(config).encode()
    kind = rng.random()
    if kind < 0.1:
        return text[: rng.randrange(len(text))]
    if kind < 0.2:
        at = rng.randrange(len(text))
        return text[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(4))) + text[at + 1 :]
    if kind < 0.25:
        return text[:-1] + b', "r": 2}'
    if kind < 0.3:
        return text.replace(b"4", b"1e999").replace(b"2", b"NaN", 1)
    return text


def damaged_weights(rng, whole):
    """The bytes of a safetensors file whose header says something else than before."""
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choice(names)
        entry = header.get(name)
        kind = rng.randrange(9)
        if not isinstance(entry, dict) or kind == 0:
            header[rng.choice(["x", "../../x", "base_model.model.", "base_model.model.a.lora_A.weight", ""])] = entry or {}
        elif kind == 1:
            entry["shape"] = rng.choice(
                [[], [2], [16, 2], [32], [1, 32], [2, 16, 1], [2**40, 2**40], [-2, -16], ["2", 16], None]
            )
        elif kind == 2:
            entry["dtype"] = rng.choice(["F64", "I32", "BF16", "F16", "BOOL", "U8", "F128", None, 3, "C64", "F8_E4M3"])
        elif kind == 3:
            entry["data_offsets"] = rng.choice([[0, 0], [0, 128], [128, 0], [-1, 127], [0, 2**63], ["0", 128], None, [0]])
        elif kind == 4:
            header[
                name.replace(
                    rng.choice(["lora_A", "query", "layer", ".weight", "0", "base_model."]), rng.choice(["", "x", "lora_B"])
                )
            ] = header.pop(name)
        elif kind == 5:
            del header[name]
        elif kind == 6:
            entry[rng.choice(["shape", "more", "dtype"])] = rng.choice(JUNK)
        elif kind == 7:
            header[name] = rng.choice(JUNK)
        else:
            first, second = name, rng.choice(names)
            if second in header:
                header[first], header[second] = header[second], header[first]
    text = json.dumps(header).encode()
    if rng.random() < 0.15:
        at = rng.randrange(len(text))
        text = text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]
    if rng.random() < 0.05:
        data = bytes(rng.randrange(256) for _ in range(len(data)))
    size = len(text) if rng.random() < 0.95 else rng.choice([0, 1, 2**63, len(text) + 9])
    whole = struct.pack("<Q", size) + text + data
    return whole if rng.random() < 0.95 else whole[: rng.randrange(len(whole))]


def attempt(folder, home, seed):
    """Reads the folder; whether it could. Any error but ours fails the test."""
    begin = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*modules match", category=UserWarning)
        try:
            adapter = read_peft(folder, home.model, home.params, strict=seed % 2 == 0)
        except (ValueError, OSError):
            adapter = None
        assert time.monotonic() - begin < SLOW_SECONDS, seed
    if adapter is not None:
        assert adapter.report.matched and all(np.isfinite(array).all() for array in _leaves(adapter.adapters))
    return adapter is not None


def _leaves(tree):
    return [leaf for node in tree.values() for leaf in (_leaves(node) if isinstance(node, dict) else [np.asarray(node)])]


@pytest.mark.parametrize("made, seeds", [(adapter, CONFIGS), (prompt, CONFIGS // 5)])
def test_damaged_configurations(made, seeds, tmp_path):
    home = base("bert")
    config, tensors = made()
    write(tmp_path, config, tensors)
    before = sorted(path.name for path in tmp_path.iterdir())
    read = 0
    for seed in range(seeds):
        (tmp_path / "adapter_config.json").write_bytes(damaged_config(random.Random(seed), config))
        read += attempt(tmp_path, home, seed)
    assert 0.02 * seeds < read < 0.6 * seeds  # the damage neither always nor never matters
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("made, seeds", [(adapter, HEADERS), (prompt, HEADERS // 5)])
def test_damaged_weights(made, seeds, tmp_path):
    home = base("bert")
    config, tensors = made()
    write(tmp_path, config, tensors)
    whole = (tmp_path / "adapter_model.safetensors").read_bytes()
    read = 0
    for seed in range(seeds):
        (tmp_path / "adapter_model.safetensors").write_bytes(damaged_weights(random.Random(seed), whole))
        read += attempt(tmp_path, home, seed)
    assert 0.02 * seeds < read < 0.6 * seeds
