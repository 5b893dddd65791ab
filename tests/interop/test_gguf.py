"""The GGUF reader against files and numbers made by hand, and against damaged files."""

import struct

import numpy as np
import pytest

from pefusion_jax.interop import WeightFileError
from pefusion_jax.interop.gguf import read_gguf


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(metadata, tensors, version=3, alignment=32):
    """``metadata``: name -> (type, packed value); ``tensors``: name -> (shape, code, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for name, (kind, packed) in metadata.items():
        head += text(name) + struct.pack("<I", kind) + packed
    body = b""
    for name, (shape, code, data) in tensors.items():
        body += b"\0" * (-len(body) % alignment)
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", code, len(body))
        body += data
    return head + b"\0" * (-len(head) % alignment) + body


def half(value):
    return np.float16(value).tobytes()


RNG = np.random.default_rng(0)
NIBBLES = RNG.integers(0, 16, (3, 32))
BYTES = RNG.integers(-128, 128, (3, 32)).astype(np.int8)
SCALES, OFFSETS = np.float16(RNG.normal(size=3)), np.float16(RNG.normal(size=3))
PACKED = [bytes(int(low | high << 4) for low, high in zip(row[:16], row[16:], strict=True)) for row in NIBBLES]
METADATA = {
    "name": (8, text("äöü")),
    "small": (0, b"\x07"),
    "negative": (11, struct.pack("<q", -5)),
    "yes": (7, b"\x01"),
    "wide": (12, struct.pack("<d", 0.1)),
    "words": (9, struct.pack("<IQ", 8, 2) + text("a") + text("bc")),
    "numbers": (9, struct.pack("<IQ", 5, 3) + struct.pack("<3i", 1, -2, 3)),
}
TENSORS = {
    "f32": ((2, 3), 0, np.arange(6, dtype="<f4").tobytes()),
    "f16": ((5,), 1, np.arange(5, dtype="<f2").tobytes()),
    "q4_0": ((3, 32), 2, b"".join(half(s) + p for s, p in zip(SCALES, PACKED, strict=True))),
    "q4_1": ((1, 96), 3, b"".join(half(s) + half(m) + p for s, m, p in zip(SCALES, OFFSETS, PACKED, strict=True))),
    "q8_0": ((3, 32), 8, b"".join(half(s) + row.tobytes() for s, row in zip(SCALES, BYTES, strict=True))),
}
WHOLE = gguf(METADATA, TENSORS)


@pytest.fixture
def file(tmp_path):
    def write(content):
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return path

    return write


def test_metadata_and_tensors_are_read(file):
    metadata, tensors = read_gguf(file(WHOLE))
    assert metadata == {
        "name": "äöü",
        "small": 7,
        "negative": -5,
        "yes": True,
        "wide": 0.1,
        "words": ["a", "bc"],
        "numbers": [1, -2, 3],
    }
    scale, offset = (values.astype(np.float32)[:, None] for values in (SCALES, OFFSETS))
    want = {
        "f32": np.arange(6.0).reshape(2, 3),
        "f16": np.arange(5.0),
        "q4_0": scale * (NIBBLES - 8).astype(np.float32),
        "q4_1": (scale * NIBBLES.astype(np.float32) + offset).reshape(1, 96),
        "q8_0": scale * BYTES.astype(np.float32),
    }
    assert tensors.keys() == want.keys()
    for name, array in want.items():
        assert tensors[name].kind == name.upper() and tensors[name].shape == array.shape
        got = tensors[name].read()
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, array)
    wide = gguf({"general.alignment": (4, struct.pack("<I", 64))}, TENSORS, alignment=64)
    np.testing.assert_array_equal(read_gguf(file(wide))[1]["q8_0"].read(), want["q8_0"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a GGUF file"),
        (b"PK\3\4" + WHOLE, "is not a GGUF file"),
        (gguf(METADATA, TENSORS, version=1), "unknown GGUF version"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "cut off or damaged"),
        (gguf({"a": (99, b"")}, {}), "metadata of an unknown type"),
        (gguf({"a": (9, struct.pack("<IQ", 9, 1))}, {}), "an array of an unknown type"),
        (gguf({"a": (9, struct.pack("<IQ", 4, 2**61))}, {}), "cut off or damaged"),
        (gguf({"general.alignment": (4, struct.pack("<I", 0))}, {}), "general.alignment"),
        (gguf({}, {"a": ((32,), 12, bytes(99))}), "a kind that is not implemented"),
        (gguf({}, {"a": ((33,), 3, bytes(99))}), "of a wrong shape"),
        (gguf({}, {"a": ((), 3, bytes(99))}), "of a wrong shape"),
        (gguf({}, {"a": ((2**40, 2**40), 0, bytes(99))}), "cut off"),
        (gguf({}, {"a": ((1, 1, 1, 1, 1), 0, bytes(4))}), "too many axes"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_damage_is_named(content, message, file):
    with pytest.raises(WeightFileError, match=message):
        read_gguf(file(content))


def test_no_damage_causes_another_error(file):
    for cut in range(0, len(WHOLE), 7):
        with pytest.raises(WeightFileError):
            read_gguf(file(WHOLE[:cut]))
    head = WHOLE.index(np.arange(6, dtype="<f4").tobytes())
    for _ in range(500):
        damaged = bytearray(WHOLE)
        for at in RNG.integers(0, head, RNG.integers(1, 4)):
            damaged[at] = RNG.integers(256)
        try:
            for tensor in read_gguf(file(bytes(damaged)))[1].values():
                with np.errstate(all="ignore"):
                    tensor.read()
        except WeightFileError:
            pass
