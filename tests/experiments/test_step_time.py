"""The step-time benchmark: both sides compute the same thing, and its report says what was measured."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import pytest
import torch

from experiments.benchmarks import step_time

# torch.func.jvp itself calls torch.jit.script, once, when it loads its decompositions.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

TINY = step_time.Options(layers=2, width=64, image=32, batch=2, rounds=1, device="cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads cost tiny products more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return step_time.torch_vit(TINY)


KINDS = {"forward"} | {f"{name} {what}" for name in ("LoRA", "layer", "network") for what in ("loss", "gradient")}


def test_both_sides_agree_under_scan(model):
    """Without a scan it is :func:`test_report` that looks."""
    errors = step_time.check(dataclasses.replace(TINY, scan=True), model, jax.devices("cpu")[0], "cpu")

    assert errors.keys() == KINDS
    # Far below the script's limits: a wrong formula of the right size, such as `layer` for `network`, would be near 1e-2.
    assert max(errors.values()) < 2e-5


def test_the_kinds_of_step_differ_where_they_are_compared(model):
    """Otherwise the comparison could not tell one linearization from the other."""
    start, moved = step_time.lora_values(TINY, b=0.0), step_time.lora_values(TINY, b=0.02)
    problem = step_time.Problem(TINY, 2, jax.devices("cpu")[0], "cpu")
    layer = step_time.linearize_layers(step_time.with_lora(model, start, "sdpa"))
    network = step_time.NetworkTaylor(step_time.with_lora(model, start, "eager"))
    outputs = []
    for linear in (layer, network):
        step_time.write_lora(linear, moved)
        with torch.no_grad():
            outputs.append(step_time.hidden(linear(problem.torch[0])))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3 * outputs[0].abs().max()


def test_disagreement_stops_the_run(model, monkeypatch):
    monkeypatch.setitem(step_time.PARTS, "key", "attention.v_proj")
    with pytest.raises(RuntimeError, match="disagree, so nothing was timed: forward"):
        step_time.check(TINY, model, jax.devices("cpu")[0], "cpu")


def test_contenders_take_turns():
    calls = []
    times = step_time.take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert "".join(calls) == "ab" * 5  # two warm-up calls
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step_time.os, "cpu_count", lambda: 1)
    with jax.numpy_dtype_promotion("standard"):  # optax's AdamW raises a float to an integer power
        result = step_time.main(dataclasses.replace(TINY, layers=1, out=tmp_path / "deep" / "times"))

    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["times.json", "times.md"]
    assert json.loads((tmp_path / "deep" / "times.json").read_text()) == result
    text = (tmp_path / "deep" / "times.md").read_text()
    assert text in capsys.readouterr().out
    assert "Not measured" in text
    assert str(Path(tmp_path)) not in text + json.dumps(result)

    (table,) = result["tables"]
    assert table["agreement_float32"].keys() == KINDS
    assert max(table["agreement_float32"].values()) < 2e-5
    rows = {row["row"]: row for row in table["rows"]}
    assert list(rows) == ["forward", "LoRA step", *(f"L-LoRA step, {mode}" for mode in step_time.MODES)]
    for name, row in rows.items():
        median = row["median_ms"]
        assert name in text
        if name.endswith("weight"):
            assert median.keys() == {"ours"} and row["ratio"] == {}
        else:
            assert math.isclose(row["ratio"]["torch"], median["ours"] / median["torch"])
        assert row["flops_limit"] is None or row["flops_in_forwards"] <= row["flops_limit"]
    assert table["linearized_forward"]["flops_in_forwards"] <= 2.15


@pytest.mark.parametrize("wrong", [{"width": 100}, {"image": 20}, {"rounds": 0}])
def test_impossible_options(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}"):
        step_time.main(dataclasses.replace(TINY, **wrong))


def test_gpu_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(step_time.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cpu"):
        step_time.main(dataclasses.replace(TINY, device="gpu"))
