"""Figures of analyses: a PNG of the right resolution and size, its numbers beside it."""

import csv

import numpy as np
import pytest
from test_plots import check_png, read_csv

from pefusion_jax.evaluation import (
    Disentanglement,
    LayerNorms,
    LossPlane,
    Pairwise,
    plot_disentanglement,
    plot_layers,
    plot_loss_plane,
    plot_matrix,
)

NAMES = ("spam", "genre")
ALPHAS = np.linspace(-1, 2, 4)


def disentanglement(seed):
    by_task = np.random.default_rng(seed).uniform(size=(2, 4, 4))
    return Disentanglement(NAMES, ALPHAS, by_task.sum(0), by_task, (10, 20), 6)


def test_disentanglement(tmp_path):
    one = disentanglement(0)
    plot_disentanglement(one, tmp_path / "new" / "one.png")
    assert (tmp_path / "new" / "one.csv").read_text() == one.csv()
    plot_disentanglement({"LoRA": one, "L-LoRA": disentanglement(1)}, tmp_path / "two.png", title="A title")
    assert check_png(tmp_path / "two.png")[0] > 1.5 * check_png(tmp_path / "new" / "one.png")[0]
    rows = read_csv(tmp_path / "two.csv")
    assert rows[0][:2] == ["model", "alpha spam"] and len(rows) == 1 + 2 * 16 and rows[17][0] == "L-LoRA"
    with pytest.raises(ValueError, match="no disentanglement error"):
        plot_disentanglement({}, tmp_path / "bad.png")
    with pytest.raises(ValueError, match="different tasks"):
        plot_disentanglement({"a": one, "b": one._replace(names=("spam", "wic"))}, tmp_path / "bad.png")


@pytest.mark.parametrize("what", ["loss", "score"])
def test_loss_plane(tmp_path, what):
    rng = np.random.default_rng(0)
    plane = LossPlane(NAMES, ALPHAS, NAMES, rng.uniform(1, 2, (2, 4, 4)), rng.uniform(size=(2, 4, 4)), 6)
    plot_loss_plane(plane, tmp_path / "plane.png", what=what, marks={"TIES": (0.7, 0.2)})
    check_png(tmp_path / "plane.png")
    assert (tmp_path / "plane.csv").read_text() == plane.csv()
    # A surface without any height is no reason to fail.
    plot_loss_plane(plane._replace(score=0 * plane.score, loss=0 * plane.loss), tmp_path / "flat.png", what=what, task="genre")
    with pytest.raises(ValueError, match="no task 'wic'"):
        plot_loss_plane(plane, tmp_path / "bad.png", task="wic")


def test_layers(tmp_path):
    layers = tuple(f"encoder/layer/{i}/{kind}/kernel" for i in range(14) for kind in ("query", "key", "up", "down"))
    norms = LayerNorms(NAMES, layers, np.random.default_rng(0).uniform(size=(56, 2)), np.ones(2))
    plot_layers(norms, tmp_path / "norms.png", title="Norms")
    assert (tmp_path / "norms.csv").read_text() == norms.csv()
    plot_layers(norms._replace(layers=("head",), by_layer=np.ones((1, 2))), tmp_path / "one.png")
    wide, small = check_png(tmp_path / "norms.png"), check_png(tmp_path / "one.png")
    assert wide[0] > 1.8 * small[0] and wide[1] > 1.5 * small[1]  # four kinds of parameters: three panels and one below
    # Fifteen pairs and more are drawn as a range; a layer that nobody adapts is left out.
    names = tuple("abcdefg")
    values = np.random.default_rng(1).uniform(size=(56, 7, 7))
    values[3] = np.nan
    plot_layers(Pairwise("cosine", names, layers, values[0], values, np.full(values.shape, 0.5)), tmp_path / "pairs.png")
    check_png(tmp_path / "pairs.png")
    assert len(read_csv(tmp_path / "pairs.csv")) == 1 + 57 * 49
    with pytest.raises(ValueError, match="no pairs"):
        plot_layers(Pairwise("cosine", ("a",), layers, np.ones((1, 1)), np.ones((56, 1, 1))), tmp_path / "bad.png")


def test_matrix(tmp_path):
    values = np.array([[0.0, -0.25], [np.nan, 0.0]])
    plot_matrix(values, NAMES, tmp_path / "m.png", percent=True, rows="scored", columns="added", label="change, %")
    check_png(tmp_path / "m.png")
    with (tmp_path / "m.csv").open() as file:
        assert list(csv.reader(file)) == [["", *NAMES], ["spam", "0.0", "-0.25"], ["genre", "", "0.0"]]
    plot_matrix(np.ones((1, 1)), ["a"], tmp_path / "one.png", centre=None)
    with pytest.raises(ValueError, match="does not fit 3 names"):
        plot_matrix(values, ["a", "b", "c"], tmp_path / "bad.png")
