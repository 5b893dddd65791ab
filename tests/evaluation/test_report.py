"""Comparison tables: what they print is what the scores are, in every format."""

import csv
import io
import json

import pytest

from pefusion_jax.evaluation import Comparison, Row, Scores


def comparison(**kwargs):
    rows = [
        Row("zero-shot", "base", Scores({"p": 0.25, "q": 0.5})),
        Row("TIES", "LoRA", Scores({"p": 0.6, "q": 0.7}, {"p": 0.03, "q": 0.04}, {"p": 100, "q": 50})),
        Row(
            "a|b",
            "LoRA",
            Scores({"q": 0.8, "p": 0.4}, {"p": 0.01, "q": 0.02}),
            reference={"p": 0.4, "q": 0.8},
        ),
    ]
    return Comparison(rows, reference={"p": 0.8, "q": 1.0}, **kwargs)


def test_text():
    assert str(comparison(title="A title")).splitlines() == [
        "A title",
        "",
        "method     kind           p           q        mean  normalized  worst",
        "----------------------------------------------------------------------",
        "zero-shot  base        25.0        50.0        37.5        40.6   25.0",
        "TIES       LoRA  60.0 ± 3.0  70.0 ± 4.0  65.0 ± 2.5        72.5   60.0",
        "a|b        LoRA  40.0 ± 1.0  80.0 ± 2.0  60.0 ± 1.1       100.0   40.0",
    ]


def test_markdown_marks_the_best_of_a_kind():
    lines = comparison().markdown().splitlines()
    assert lines[0] == "| method | kind | p | q | mean | normalized | worst |"
    assert lines[1].count("---:") == 5
    assert lines[2] == "| zero-shot | base | 25.0 | 50.0 | 37.5 | 40.6 | 25.0 |"
    assert lines[3].startswith("| TIES | LoRA | **60.0 ± 3.0** | 70.0 ± 4.0 | **65.0 ± 2.5** | 72.5 |")
    assert lines[4].startswith(r"| a\|b | LoRA | 40.0 ± 1.0 | **80.0 ± 2.0** |")


def test_names_do_not_break_tables():
    table = Comparison(
        [Row("a\nb", "k|\r\n", Scores({"p|q\nr": 0.5})), Row("c", "k", Scores({"p|q\nr": 1.0}))], title="one\ntwo"
    )
    assert table.markdown().splitlines() == [
        "**one two**",
        "",
        r"| method | kind | p\|q r | mean | normalized | worst |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        r"| a b | k\| | 50.0 | 50.0 | – | 50.0 |",
        "| c | k | 100.0 | 100.0 | – | 100.0 |",
    ]
    assert str(table).splitlines()[5:] == [
        "a b     k|     50.0   50.0           –   50.0",
        "c       k     100.0  100.0           –  100.0",
    ]


def test_csv_and_json_round_trip(tmp_path):
    table = comparison()
    paths = table.write(tmp_path / "new", "results")
    assert [path.name for path in paths] == ["results.txt", "results.md", "results.csv", "results.json"]
    rows = list(csv.DictReader(io.StringIO(paths[2].read_text())))
    assert rows[1]["p"] == "0.6" and float(rows[1]["p stderr"]) == 0.03 and rows[0]["p stderr"] == ""
    assert float(rows[2]["normalized"]) == pytest.approx(1.0)
    data = json.loads(paths[3].read_text())
    assert data["schema"] == "pefusion_jax.comparison.v1" and data["tasks"] == ["p", "q"]
    assert data["rows"][1]["scores"] == {"p": 0.6, "q": 0.7} and data["rows"][1]["counts"] == {
        "p": 100,
        "q": 50,
    }
    assert data["rows"][0]["normalized_mean"] == pytest.approx(0.40625)
    assert data["rows"][2]["worst_task"] == "p" and data["rows"][0]["mean_stderr"] is None
    assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted(path.name for path in paths)


def test_without_reference():
    table = Comparison([Row("TIES", "LoRA", Scores({"p": 0.5}))])
    assert "–" in str(table) and json.loads(table.json())["rows"][0]["normalized"] is None


def test_numbers_that_are_not_finite_are_null_in_json():
    table = Comparison([Row("broken", "LoRA", Scores({"p": float("nan")}))])
    assert json.loads(table.json())["rows"][0]["scores"] == {"p": None}


def test_errors():
    with pytest.raises(ValueError, match="at least one row"):
        Comparison([])
    with pytest.raises(ValueError, match="row 'b' has scores for q, but row 'a' for p"):
        Comparison([Row("a", "", Scores({"p": 1.0})), Row("b", "", Scores({"q": 1.0}))])
