"""Thresholds found in passes over chunks, against sorting."""

import numpy as np
import pytest

from pefusion_jax.fusion import streamed


def reader(arrays):
    def read(start, count):
        out = np.zeros((len(arrays), streamed.chunk_size(count)), np.float32)
        for row, array in zip(out, arrays, strict=True):
            row[:count] = array[start : start + count]
        return tuple(out)

    return read


def kept_by_sorting(values, density):
    order = np.argsort(-np.abs(values), kind="stable")
    mask = np.zeros(values.size, bool)
    mask[order[: 0 if density <= 0 else values.size if density >= 1 else max(1, int(density * values.size))]] = True
    return mask


@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "sorted", "blocks"])
@pytest.mark.parametrize("size", [37, 5000])
def test_largest_is_what_sorting_finds(kind, size, monkeypatch):
    """Also where the sample misleads: one block of large entries, sorted entries, most entries equal."""
    monkeypatch.setattr(streamed, "CHUNK", 1024)
    monkeypatch.setattr(streamed, "_SAMPLE_BLOCKS", 3)
    monkeypatch.setattr(streamed, "_SAMPLE_BLOCK", 32)
    rng = np.random.default_rng(0)
    values = rng.normal(size=(4, size)).astype(np.float32)
    if kind == "ties":
        values = np.round(values * 2) / 2
    if kind == "zeros":
        values[:, rng.uniform(size=size) < 0.9] = 0
    if kind == "sorted":
        values = np.sort(np.abs(values), axis=1)
    if kind == "blocks":
        values[:, size // 3 : size // 3 + 20] *= 1e6
    densities = (0.3, 0.004, 1.0, 0.0)
    kept = streamed.largest(reader([np.zeros(size, np.float32), *values]), size, densities)
    for t, density in enumerate(densities):
        pattern = np.abs(values[t]).view(np.uint32)
        mask = (pattern > kept.threshold[t]) | ((pattern == kept.threshold[t]) & (np.arange(size) < kept.first[t]))
        np.testing.assert_array_equal(mask, kept_by_sorting(values[t], density), err_msg=f"task {t}")


@pytest.mark.parametrize("count", [1, 3])
def test_a_linear_combination_has_a_coefficient_for_each_tensor(count):
    pieces = tuple(np.ones((3, 4), np.float32))
    with pytest.raises(ValueError, match=rf"2 tensors are combined, but the coefficients have shape \[{count}\]"):
        streamed.linear(pieces, np.ones(count, np.float32), based=True, dtype=np.dtype("float32"))
