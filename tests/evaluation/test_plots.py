"""Figures: a PNG of the right resolution, its numbers beside it, no global state, atomic writes."""

import csv
import struct

import numpy as np
import pytest

from pefusion_jax.evaluation import Comparison, Row, Scores, plot_curves, plot_ranking, plot_scores, plot_sweep, plots

TASKS = ["CoLA", "MNLI", "RTE"]
ONE = {"a": {1.0: (0.5, 0.1)}}


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


def test_the_normalized_column_is_there_if_any_row_has_a_reference(tmp_path, monkeypatch):
    rows = [
        Row("zero-shot", "base", Scores({"p": 0.5, "q": 0.4})),
        Row("TIES", "LoRA", Scores({"p": 0.8, "q": 0.6}), {"p": 0.9, "q": 0.8}),
    ]
    drawn = []
    save = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, *rest: (drawn.append(figure), save(figure, *rest)))
    for order in (rows, rows[::-1], [row._replace(reference=None) for row in rows]):
        plot_scores(Comparison(order), tmp_path / "scores.png")
    columns = [[label.get_text() for label in figure.axes[0].get_xticklabels()] for figure in drawn]
    assert columns == [["p", "q", "mean", "normalized\nmean"]] * 2 + [["p", "q", "mean"]]
    assert f"{100 * (0.8 / 0.9 + 0.6 / 0.8) / 2:.1f}" in [text.get_text() for text in drawn[0].axes[0].texts]


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


def test_curves(tmp_path):
    curves = {"PHA": {100: (0.6, 0.02), 500: (0.8, 0.01)}, "adapters": {500: (0.75, 0.0), 100: (0.5, 0.05)}}
    plot_curves(curves, tmp_path / "curves.png", x="examples", log_x=True)
    check_png(tmp_path / "curves.png")
    rows = read_csv(tmp_path / "curves.csv")
    assert rows[0] == ["curve", "examples", "mean", "spread"]
    assert [(row[0], float(row[1]), (float(row[2]), float(row[3]))) for row in rows[1:]] == [
        (name, place, points[place]) for name, points in curves.items() for place in sorted(points)
    ]
    with pytest.raises(ValueError, match="no curve"):
        plot_curves({"PHA": {}}, tmp_path / "bad.png", x="examples")


def test_ranking(tmp_path):
    groups = {"LoRA": {"TIES": (0.7, 0.02), "Iso-C": (0.8, 0.01)}, "full": {"only here": (0.9, 0.0), "TIES": (0.75, 0.0)}}
    plot_ranking(groups, tmp_path / "ranking.png", lines={"zero-shot": 0.6})
    small = check_png(tmp_path / "ranking.png")
    # In the order of the plot, from the top: the first group's best, then what it lacks.
    assert read_csv(tmp_path / "ranking.csv") == [
        ["group", "name", "mean", "spread"],
        ["LoRA", "Iso-C", "0.8", "0.01"],
        ["LoRA", "TIES", "0.7", "0.02"],
        ["full", "TIES", "0.75", "0.0"],
        ["full", "only here", "0.9", "0.0"],
    ]
    many = {"LoRA": {f"method {i}": (i / 30, 0.0) for i in range(30)}}
    plot_ranking(many, tmp_path / "many.png")
    assert check_png(tmp_path / "many.png")[1] > 2 * small[1]
    with pytest.raises(ValueError, match="nothing to rank"):
        plot_ranking({}, tmp_path / "bad.png")
    with pytest.raises(ValueError, match="nothing to rank in the group 'full'; leave it out"):
        plot_ranking({"LoRA": {"TIES": (0.7, 0.0)}, "full": {}}, tmp_path / "bad.png")


def test_no_global_state_and_no_leftovers(tmp_path):
    plot_curves(ONE, tmp_path / "one.png", x="x")
    from matplotlib import pyplot

    assert pyplot.get_fignums() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.csv", "one.png"]
    with pytest.raises(ValueError, match=r"end it with \.png"):
        plot_curves(ONE, tmp_path / "one.pdf", x="x")
