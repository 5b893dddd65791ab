"""Hostile versions of good files: random bytes, and JSON whose values are swapped for others, all from one seed."""

import copy
import json
import random

# Values that have broken parsers before: wrong types, huge and negative numbers, paths, markup, deep nesting.
VALUES = [
    None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, 10**40, -(2**63), 0.5, -0.0, 1e308, 1e-320,
    "", "0", "F32", "../x", "/etc/passwd", "\u0000", "a" * 300, "\ud7ff", "(a+)+$", ".*", "lora",
    [], {}, [[]], [0], [-1], [2**40, 2**40], [1.5], ["x"], ["../x"], [None] * 3, {"a": {}}, {"": 0}, {"x": "../x"},
]  # fmt: skip


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """One to four bytes changed, put in, or taken out."""
    out = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        position = rng.randrange(len(out)) if out else 0
        action = rng.randrange(4)
        if action == 0 and out:
            out[position] = rng.randrange(256)
        elif action == 1:
            out[position:position] = bytes(rng.randrange(32, 127) for _ in range(rng.randint(1, 3)))
        elif action == 2:
            del out[position : position + rng.randint(1, 8)]
        elif out:
            out[position] ^= 1 << rng.randrange(8)
    return bytes(out)


def mutated_json(content: dict, rng: random.Random) -> dict:
    """One to three values, somewhere in the tree, replaced, removed, renamed or put in."""
    out = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        places: list[tuple[dict | list, object]] = []
        stack: list[object] = [out]
        while stack:
            node = stack.pop()
            items = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())
            places += [(node, key) for key, _ in items]
            stack += [value for _, value in items]
        if not places:
            break
        node, key = rng.choice(places)
        action = rng.randrange(4)
        if action == 0:
            node[key] = copy.deepcopy(rng.choice(VALUES))
        elif action == 1:
            del node[key]
        elif action == 2 and isinstance(node, dict):
            node[rng.choice(["x", "../x", "", str(key) + "x", "a" * 200])] = node.pop(key)
        elif isinstance(node, dict):
            node[rng.choice(["x", "extra", "../x"])] = copy.deepcopy(rng.choice(VALUES))
    return out


def raw_header(header: dict, data: bytes) -> bytes:
    """A safetensors file with that header, whatever it says."""
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data
