"""The reader of ONNX files in experiments/fetch_models.py, on files written here byte by byte, whole and damaged."""

import numpy as np
import pytest

from experiments.fetch_models import fields, onnx_tensors


def varint(value):
    out = bytearray()
    while True:
        value, low = value >> 7, value & 127
        out.append(low | (128 if value else 0))
        if not value:
            return bytes(out)


def field(number, content):
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    content = content.encode() if isinstance(content, str) else content
    return varint(number << 3 | 2) + varint(len(content)) + content


def tensor(name, array, data_type=1):
    return b"".join(field(1, side) for side in array.shape) + field(2, data_type) + field(8, name) + field(9, array.tobytes())


def model(tmp_path, *parts):
    path = tmp_path / "model.onnx"
    # A version, fields of 32 and 64 bits that nobody reads, and the graph.
    path.write_bytes(field(1, 300) + b"\x15abcd" + b"\x19abcdefgh" + field(7, b"".join(parts)))
    return path


def test_tensors_and_nodes_are_read(tmp_path):
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.full(200, 0.5, np.float32)
    node = field(1, "x") + field(1, "weight") + field(2, "y") + field(3, "/layer/MatMul") + field(4, "MatMul")
    path = model(
        tmp_path,
        field(5, tensor("weight", a)),
        field(1, node),
        field(5, tensor("b", b)),
        field(5, tensor("ids", b, data_type=7)),
    )
    tensors, nodes = onnx_tensors(path)
    assert nodes == [("/layer/MatMul", "MatMul", ["x", "weight"])] and set(tensors) == {"weight", "b"}
    np.testing.assert_array_equal(tensors["weight"], a)
    np.testing.assert_array_equal(tensors["b"], b)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (b"\x80", "cut off"),
        (b"\x0a\x05ab", "cut off"),
        (b"\x0d\x01", "cut off"),
        (b"\x08" + b"\xff" * 11, "endless"),
        (b"\x0b", "wire type 3"),
    ],
)
def test_damaged_messages_are_refused(message, error):
    with pytest.raises(ValueError, match=error):
        list(fields(memoryview(message)))


def test_a_shape_that_is_not_the_data_s_is_refused(tmp_path):
    wrong = field(1, 2**40) + field(2, 1) + field(8, "a") + field(9, bytes(8))
    with pytest.raises(ValueError):
        onnx_tensors(model(tmp_path, field(5, wrong)))
    with pytest.raises(ValueError):
        onnx_tensors(model(tmp_path, field(5, field(1, 3) + field(2, 1) + field(8, "a") + field(9, bytes(7)))))
