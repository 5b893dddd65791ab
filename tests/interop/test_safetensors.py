"""The reader against files that lie, and reader and writer against the reference implementation."""

import json
import os
import random
import struct

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from pefusion_jax.interop import safetensors as sf
from pefusion_jax.interop.safetensors import WeightFileError


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(2,), begin=0, end=8, **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


A = entry()
B = entry(begin=8, end=16)
HOSTILE = {
    "empty file": (None, b"", "too short"),
    "header length above the limit": ({"a": A}, bytes(8), "header length", 2**63),
    "header length above the file": ({"a": A}, bytes(8), "header length", 4096),
    "header length zero": (b"", b"", "header length"),
    "not JSON": (b"{]", b"", "not a UTF-8 JSON object"),
    "not UTF-8": (b'{"\xff":1}', b"", "not a UTF-8 JSON object"),
    "lone surrogate": (b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"", "not a UTF-8 JSON object"),
    "JSON array": (b"[1,2]", b"", "not a JSON object"),
    "nested beyond recursion": (b"[" * 200_000 + b"]" * 200_000, b"", "not a UTF-8 JSON object"),
    "NaN in the header": (b'{"a": NaN}', b"", "NaN is not JSON"),
    "integer of 5000 digits": (b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}', b"", "JSON"),
    "the same name twice": (f'{{"a":{json.dumps(A)},"a":{json.dumps(A)}}}'.encode(), bytes(8), "stands twice"),
    "the same field twice": (
        b'{"a":{"dtype":"U8","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
        "stands twice",
    ),
    "unknown dtype": ({"a": entry("F128")}, bytes(8), "unknown dtype"),
    "dtype narrower than a byte": ({"a": entry("F4", (16,))}, bytes(8), "unknown dtype"),
    "dtype not a string": ({"a": entry(["F32"])}, bytes(8), "unknown dtype"),
    "negative dimension": ({"a": entry(shape=(-1, -2))}, bytes(8), "non-negative"),
    "fractional dimension": ({"a": entry(shape=(2.0,))}, bytes(8), "non-negative"),
    "boolean dimension": ({"a": entry(shape=(True, 2))}, bytes(8), "non-negative"),
    "shape not a list": ({"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}, bytes(8), "non-negative"),
    "nine dimensions": ({"a": entry(shape=(1,) * 8 + (2,))}, bytes(8), "too many dimensions"),
    "a product that wraps around 64 bits": ({"a": entry(shape=(2**32, 2**32, 2), end=0)}, b"", "larger than memory"),
    "empty, yet beyond 63 bits": ({"a": entry(shape=(0, 2**40, 2**40), end=0)}, b"", "larger than memory"),
    "size is not the shape's": ({"a": entry(shape=(3,))}, bytes(8), "does not fit"),
    "offsets reversed": ({"a": entry(begin=8, end=0)}, bytes(8), "ends before"),
    "offsets negative": ({"a": entry(begin=-8, end=0)}, bytes(8), "data_offsets"),
    "three offsets": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, bytes(8), "data_offsets"),
    "fractional offsets": ({"a": entry(begin=0.0)}, bytes(8), "data_offsets"),
    "overlap": ({"a": A, "b": entry(begin=4, end=12)}, bytes(12), "overlap"),
    "two tensors on the same bytes": ({"a": A, "b": A}, bytes(8), "overlap"),
    "hole between": ({"a": A, "b": entry(begin=12, end=20)}, bytes(20), "hole"),
    "hole in front": ({"a": entry(begin=4, end=12)}, bytes(12), "hole"),
    "truncated": ({"a": A, "b": B}, bytes(15), "cut short"),
    "trailing bytes": ({"a": A}, bytes(9), "no tensor owns"),
    "bytes without tensors": ({}, bytes(8), "no tensor owns"),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "wrong fields"),
    "additional field": ({"a": entry(code="x")}, bytes(8), "wrong fields"),
    "entry not an object": ({"a": 3}, bytes(8), "wrong fields"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": A}, bytes(8), "metadata"),
    "metadata not an object": ({"__metadata__": "x", "a": A}, bytes(8), "metadata"),
}


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case.replace(" ", "-"))
def test_hostile_files_are_refused_before_data_is_read(case, tmp_path):
    header, data, message, *length = HOSTILE[case]
    path = tmp_path / "model.safetensors"
    if header is None:
        path.write_bytes(data)
    else:
        write(path, header, data, *length)
    with pytest.raises(WeightFileError, match=message) as caught:
        sf.read_header(path)
    assert str(path) in str(caught.value) and "remedy:" in str(caught.value)
    assert len(str(caught.value)) < 2000
    with pytest.raises(WeightFileError):
        sf.load_safetensors(path)


def test_error_names_tensor_expected_and_found(tmp_path):
    path = write(tmp_path / "w.safetensors", {"layer.weight": entry(shape=(3,))}, bytes(8))
    with pytest.raises(WeightFileError) as caught:
        sf.read_header(path)
    error = caught.value
    assert (error.tensor, error.expected, error.found) == ("layer.weight", "12 bytes for F32 [3]", "8 bytes")
    for part in ("layer.weight", error.expected, error.found, error.remedy):
        assert part in str(error)


def test_header_limit_is_adjustable(tmp_path):
    path = tmp_path / "w.safetensors"
    sf.save_safetensors(path, {"a": np.zeros(2)}, {"note": "x" * 5000})
    with pytest.raises(WeightFileError, match="raise max_header_bytes"):
        sf.read_header(path, max_header_bytes=4096)
    assert sf.load_safetensors(path, max_header_bytes=8192)["a"].shape == (2,)


def test_what_the_format_allows_is_read(tmp_path):
    header = b'  {"z":{"dtype":"U8","shape":[0,7],"data_offsets":[4,4]},"s":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}  '
    path = write(tmp_path / "w.safetensors", header, struct.pack("<f", 2.5))
    tensors = sf.load_safetensors(path)
    assert tensors["s"].shape == () and tensors["s"] == np.float32(2.5) and tensors["z"].shape == (0, 7)
    assert sf.load_safetensors(write(tmp_path / "empty.safetensors", {})) == {}
    strange = write(tmp_path / "names.safetensors", {"../../x\n": A}, bytes(8))
    assert list(sf.load_safetensors(strange)) == ["../../x\n"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.PKL", "disguised.safetensors"])
def test_pickles_are_refused_with_the_remedy(name, tmp_path):
    path = tmp_path / name
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(WeightFileError, match="pickle") as caught:
        sf.load_safetensors(path)
    assert "save_pretrained" in caught.value.remedy


def test_missing_file_and_missing_tensor(tmp_path):
    with pytest.raises(FileNotFoundError):
        sf.read_header(tmp_path / "none.safetensors")
    sf.save_safetensors(tmp_path / "w.safetensors", {"a": np.ones(2)})
    with pytest.raises(WeightFileError, match="a tensor is missing"):
        sf.load_safetensors(tmp_path / "w.safetensors", ["b"])
    assert list(sf.load_safetensors(tmp_path / "w.safetensors", ["a"])) == ["a"]


def test_booleans_are_checked(tmp_path):
    path = write(tmp_path / "w.safetensors", {"flags": entry("BOOL", (2,), 0, 2)}, b"\x01\x07")
    assert list(sf.read_header(path)) == ["flags"]
    with pytest.raises(WeightFileError, match="neither 0 nor 1"):
        sf.load_safetensors(path)


def test_fuzzed_headers_never_read_what_the_reference_refuses(tmp_path):
    """Mutated files: we raise WeightFileError or agree with the reference implementation bit for bit."""
    path = tmp_path / "w.safetensors"
    sf.save_safetensors(path, {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.int64)})
    good = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", good[:8])[0]
    rng = random.Random(0)
    accepted = 0
    for _ in range(3000):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            position = rng.randrange(header_end)
            action = rng.randrange(3)
            if action == 0:
                bad[position] = rng.choice(b'0123456789,:[]{}" aFI-\x00\xff')
            elif action == 1:
                del bad[position]
            else:
                bad.insert(position, rng.choice(b'0123456789,:[]{}" -'))
        path.write_bytes(bad)
        try:
            ours = sf.load_safetensors(path)
        except WeightFileError:
            continue
        theirs = safetensors.numpy.load(bytes(bad))
        accepted += 1
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            assert array.dtype == theirs[name].dtype and array.tobytes() == theirs[name].tobytes()
    assert 0 < accepted < 1000


PLAIN = [np.dtype(name) for name in "bool u1 i1 u2 i2 u4 i4 u8 i8 f2 f4 f8 c8".split()]


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(st.data())
def test_round_trip_of_any_array(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "round_trip.safetensors"
    arrays = data.draw(
        st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__"),
            st.sampled_from(PLAIN).flatmap(
                lambda dtype: hypothesis.extra.numpy.arrays(
                    dtype, hypothesis.extra.numpy.array_shapes(min_dims=0, max_dims=8, min_side=0, max_side=3)
                )
            ),
            max_size=4,
        )
    )
    sf.save_safetensors(path, arrays)
    back = sf.load_safetensors(path)
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        assert back[name].tobytes() == array.tobytes() and back[name].flags.writeable
    reference = safetensors.numpy.load_file(path)
    assert reference.keys() == arrays.keys()
    assert all(reference[name].tobytes() == array.tobytes() for name, array in arrays.items())


def test_narrow_floats_against_torch(tmp_path):
    types = {
        torch.bfloat16: ml_dtypes.bfloat16,
        torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
        torch.float8_e5m2: ml_dtypes.float8_e5m2,
    }
    tensors = {str(theirs): torch.linspace(-3, 3, 12).reshape(3, 4).to(theirs) for theirs in types}
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors")
    ours = sf.load_safetensors(tmp_path / "theirs.safetensors")
    sf.save_safetensors(tmp_path / "ours.safetensors", ours)
    again = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    for theirs, dtype in types.items():
        assert ours[str(theirs)].dtype == dtype
        np.testing.assert_array_equal(ours[str(theirs)].astype(np.float32), tensors[str(theirs)].float().numpy())
        assert torch.equal(again[str(theirs)].view(torch.uint8), tensors[str(theirs)].view(torch.uint8))


def test_layouts_in_memory_do_not_matter(tmp_path):
    base = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    views = {
        "transposed": base.transpose(2, 0, 1),
        "strided": base[:, ::2, ::-1],
        "fortran": np.asfortranarray(base),
        "big endian": base.astype(">f4"),
        "jax": jnp.asarray(base, jnp.bfloat16),
        "scalar": np.float32(3.0),
    }
    sf.save_safetensors(tmp_path / "w.safetensors", views)
    for name, array in sf.load_safetensors(tmp_path / "w.safetensors").items():
        np.testing.assert_array_equal(array, np.asarray(views[name]))


def test_bytes_depend_on_content_alone(tmp_path):
    a, b = np.ones(3, np.float32), np.ones(2, np.float64)
    sf.save_safetensors(tmp_path / "1", {"a": a, "b": b}, {"x": "1", "y": "2"})
    sf.save_safetensors(tmp_path / "2", {"b": b, "a": a}, {"y": "2", "x": "1"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert sf.read_metadata(tmp_path / "1") == {"format": "pt", "x": "1", "y": "2"}
    with safetensors.safe_open(tmp_path / "1", "numpy") as reference:
        assert reference.metadata() == {"format": "pt", "x": "1", "y": "2"}
    starts = [info.offset % 8 for info in sf.read_header(tmp_path / "1").values()]
    assert starts == [0, 0]


def test_a_failing_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    sf.save_safetensors(path, {"a": np.ones(2)})
    before = path.read_bytes()
    for bad, message in (
        ({"a": np.array(["text"])}, "dtype"),
        ({"a": np.zeros(2, object)}, "dtype"),
        ({"__metadata__": np.zeros(2)}, "name"),
        ({"a": np.zeros((1,) * 9)}, "dimensions"),
    ):
        with pytest.raises(WeightFileError, match=message):
            sf.save_safetensors(path, bad)
    with pytest.raises(WeightFileError, match="metadata"):
        sf.save_safetensors(path, {"a": np.zeros(2)}, {"epoch": 3})

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        sf.save_safetensors(path, {"a": np.zeros(1000)})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["w.safetensors"]


def test_check_finite_names_the_tensors(tmp_path):
    good = {"ids": np.arange(3), "w": np.ones(3, ml_dtypes.bfloat16)}
    sf.check_finite(good, "w.safetensors")
    bad = good | {"b": np.array([0, np.inf, np.nan], ml_dtypes.bfloat16), "c": np.array([np.nan], np.float32)}
    with pytest.raises(WeightFileError, match=r"b \(2 of 3\), c \(1 of 1\)") as caught:
        sf.check_finite(bad, "w.safetensors")
    assert caught.value.tensor == "b"
