"""Figures: a PNG of the right resolution, its numbers beside it, no global state, atomic writes."""

import csv
import struct

import numpy as np
import pytest

from pefusion_jax.evaluation import Comparison, Row, Scores, plot_cosine, plot_scores, plot_sweep

TASKS = ["CoLA", "MNLI", "RTE"]


def read_csv(path):
    with path.open() as file:
        return list(csv.reader(file))


def check_png(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    start = content.index(b"pHYs") + 4
    assert struct.unpack(">I", content[start : start + 4])[0] == round(200 / 0.0254)  # 200 dots an inch
    return width, height


def comparison(methods=7):
    rng = np.random.default_rng(0)
    rows = [
        Row(f"method {m}", kind, Scores(dict(zip(TASKS, rng.uniform(0.3, 1, 3), strict=True))))
        for kind in ("LoRA", "L-LoRA")
        for m in range(methods)
    ]
    return Comparison(rows, dict.fromkeys(TASKS, 0.9), "A title")


def test_scores(tmp_path):
    plot_scores(comparison(), tmp_path / "new" / "scores.png")
    small = check_png(tmp_path / "new" / "scores.png")
    assert (tmp_path / "new" / "scores.csv").read_text() == comparison().csv()
    plot_scores(comparison(methods=14), tmp_path / "more.png")
    assert check_png(tmp_path / "more.png")[1] > 1.5 * small[1]  # it grows with its rows
    plot_scores(Comparison([Row("one", "LoRA", Scores({"p": 0.5}))]), tmp_path / "one.png")


def test_sweep(tmp_path):
    x = np.linspace(0, 1, 11)
    curves = {task: 0.1 * t + x * (1 - x) for t, task in enumerate(TASKS)}
    plot_sweep(x, {"LoRA": curves, "L-LoRA": {"RTE": x}}, tmp_path / "panels.png")
    rows = read_csv(tmp_path / "panels.csv")
    assert rows[0] == ["panel", "coefficient", *TASKS, "mean"] and len(rows) == 1 + 2 * 11
    assert float(rows[6][-1]) == pytest.approx(0.1 + 0.25) and rows[-1] == [
        "L-LoRA",
        "1.0",
        "",
        "",
        "1.0",
        "1.0",
    ]
    plot_sweep(x, curves, tmp_path / "one.png")
    assert check_png(tmp_path / "one.png")[0] < check_png(tmp_path / "panels.png")[0]
    with pytest.raises(ValueError, match=r"'p' has scores \(3,\)"):
        plot_sweep(x, {"p": [1, 2, 3]}, tmp_path / "bad.png")
    with pytest.raises(ValueError, match="no scores"):
        plot_sweep(x, {}, tmp_path / "bad.png")


def test_cosine(tmp_path):
    matrix = np.array([[1, 0.2, -0.1], [0.2, 1, 0], [-0.1, 0, 1]])
    plot_cosine(matrix, TASKS, tmp_path / "cosine.png", title="Task vectors")
    check_png(tmp_path / "cosine.png")
    rows = read_csv(tmp_path / "cosine.csv")
    np.testing.assert_array_equal(np.array([row[1:] for row in rows[1:]], float), matrix)
    with pytest.raises(ValueError, match="does not fit 2 names"):
        plot_cosine(matrix, TASKS[:2], tmp_path / "bad.png")
    plot_cosine(np.eye(1), ["one"], tmp_path / "one.png")


def test_no_global_state_and_no_leftovers(tmp_path):
    plot_cosine(np.eye(2), ["a", "b"], tmp_path / "cosine.png")
    from matplotlib import pyplot

    assert pyplot.get_fignums() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cosine.csv", "cosine.png"]
    with pytest.raises(ValueError, match=r"end it with \.png"):
        plot_cosine(np.eye(2), ["a", "b"], tmp_path / "cosine.pdf")
