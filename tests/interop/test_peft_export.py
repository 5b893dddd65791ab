"""Writing PEFT adapters: linearized models, fused ones, odd ranks and scales, and what has no such form."""

import json

import flax
import jax
import numpy as np
import peft
import pytest
from peft_cases import assert_same, base, distance, load_back, outputs, quiet

import pefusion_jax as pf
from pefusion_jax.interop import manifest


@pytest.fixture(scope="module")
def llora():
    """An adapted model, a point of expansion away from zero, and a displacement."""
    home = base("bert")
    methods = [pf.LoRA(rank=2, alpha=3, targets=r".*/(query|value)"), pf.FullFineTuning(targets=r"pooler/.*")]
    adapted = pf.adapt(home.model, methods)
    start = adapted.init(jax.random.key(0), home.params, **home.inputs)
    rng = np.random.default_rng(0)
    away = jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape, scale=0.2).astype(np.float32), start)
    tau = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.2).astype(np.float32), start)
    return home, adapted, start, away, tau


@pytest.mark.parametrize("at_zero", [True, False])
def test_layer_linearization_is_an_ordinary_lora(llora, at_zero, tmp_path):
    home, adapted, start, away, tau = llora
    linear = pf.linearize(adapted, start if at_zero else away, "layer")
    done = pf.save_peft(tmp_path / "out", linear, tau, params=home.params, base=str(home.folder))
    assert done.config["r"] == (2 if at_zero else 4) and done.config["modules_to_save"] == ["pooler.dense"]
    want = home.ours(linear, tau)
    assert distance(home.theirs(load_back(tmp_path / "out", home)), want) <= 1e-5
    delta = linear.deltas(home.params, tau)  # relative to the point of expansion; the pooler's is dense
    with pytest.raises(ValueError, match="is a dense matrix, and a LoRA stores pairs"):
        pf.save_peft(tmp_path / "dense", linear, delta, params=home.params, base="x")


@pytest.mark.parametrize("at_zero", [True, False])
def test_a_change_relative_to_the_point_of_expansion_is_written_relative_to_the_base(at_zero, tmp_path):
    home = base("bert")
    adapted = pf.adapt(home.model, pf.LoRA(rank=2, alpha=3, targets=r".*/0/.*/(query|value)"))
    start = adapted.init(jax.random.key(0), home.params, **home.inputs)
    if not at_zero:
        start = jax.tree.map(lambda leaf: leaf + 0.1, start)
    linear = pf.linearize(adapted, start, "layer")
    tau = jax.tree.map(lambda leaf: leaf * 0.0 + 0.2, start)
    done = pf.save_peft(tmp_path / "out", linear, linear.deltas(home.params, tau), params=home.params, base="x")
    assert done.config["r"] == (2 if at_zero else 6)
    loaded, adapters = pf.load_peft(tmp_path / "out", home.model, home.params)
    want = pf.fold(pf.fold(home.params, adapted.deltas(home.params, start)), linear.deltas(home.params, tau))
    assert_same(pf.fold(home.params, loaded.deltas(home.params, adapters)), want, atol=1e-6)


@pytest.mark.parametrize("mode", ["network", "weight"])
def test_other_linearizations_are_written_as_their_layer_counterpart_on_request_only(llora, mode, tmp_path):
    home, adapted, start, away, tau = llora
    linear = pf.linearize(adapted, away, mode)
    with pytest.raises(ValueError, match=f"mode='{mode}' is not a change of the weights.*as_layer=True"):
        pf.save_peft(tmp_path / "out", linear, tau, params=home.params, base="x")
    assert not (tmp_path / "out").exists()
    done = pf.save_peft(
        tmp_path / "out", linear, tau, params=home.params, base=str(home.folder), as_layer=True, inputs=home.inputs
    )
    said = max(
        float(np.abs(x - y).max())
        for x, y in zip(home.ours(linear, tau), home.theirs(load_back(tmp_path / "out", home)), strict=False)
    )
    assert said > 1e-3
    pooled = done.difference  # over all outputs, of which the hidden states are one
    assert pooled >= said - 1e-5 and "largest difference" in (tmp_path / "out/README.md").read_text()


def test_an_adapter_of_theirs_and_one_of_ours_are_fused_and_written_for_peft(tmp_path):
    home = base("bert")
    with quiet():
        home.adapted(r=3, lora_alpha=6, target_modules=["query", "value"]).save_pretrained(tmp_path / "theirs")
    adapted, theirs = pf.load_peft(tmp_path / "theirs", home.model, home.params)
    mine = pf.adapt(home.model, pf.LoRA(rank=2, alpha=5, targets=r".*/(query|output/dense)"))
    tree = jax.tree.map(lambda leaf: leaf + 0.1, mine.init(jax.random.key(1), home.params, **home.inputs))
    fused = pf.fuse(
        pf.fusion.task_arithmetic(scale=0.5),
        {"theirs": adapted.deltas(home.params, theirs), "mine": mine.deltas(home.params, tree)},
    )
    done = pf.save_peft(
        tmp_path / "fused", adapted, fused, params=home.params, base=str(home.folder), task_type="FEATURE_EXTRACTION"
    )
    assert done.config["rank_pattern"] and done.config["task_type"] == "FEATURE_EXTRACTION"
    want = outputs(jax.jit(lambda p, i: adapted.base(p, **i))(pf.fold(home.params, fused), home.inputs))
    assert distance(home.theirs(load_back(tmp_path / "fused", home)), want) <= 1e-5
    with pytest.raises(ValueError, match=r"dense matrix.*save_pretrained\(FOLDER, model, pf.fold\(params, delta\)\)"):
        pf.save_peft(tmp_path / "dense", adapted, fused.dense(), params=home.params, base="x")
    with pytest.raises(FileExistsError, match="not empty"):
        pf.save_peft(tmp_path / "fused", adapted, fused, params=home.params, base="x")
    with pytest.raises(ValueError, match="NaN or infinite"):
        pf.save_peft(tmp_path / "nan", adapted, jax.tree.map(lambda leaf: leaf * np.nan, theirs), params=home.params, base="x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fused", "theirs"]


def test_what_peft_cannot_store_is_refused_with_the_remedy(tmp_path):
    home = base("vit")

    def save(*methods, model=home.model, params=home.params):
        adapted = pf.adapt(model, methods)
        tree = jax.eval_shape(lambda p: adapted.init(jax.random.key(0), p, **home.inputs), params)
        pf.save_peft(
            tmp_path / "out", adapted, jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), tree), params=params, base="x"
        )

    lora = pf.LoRA(rank=1, targets=r".*/query")
    with pytest.raises(ValueError, match="there is no LoRA to be written.*write the merged model instead"):
        save(pf.FullFineTuning(targets=r".*/bias"))
    with pytest.raises(ValueError, match="cls_token is no module of its own"):
        save(lora, pf.FullFineTuning(targets="embeddings/cls_token"))
    with pytest.raises(ValueError, match="moved beside a LoRA on the same layer"):
        save(lora, pf.FullFineTuning(targets=r".*/query/kernel"))
    with pytest.raises(ValueError, match="these are not the parameters of this ViT model"):
        pf.save_peft(tmp_path / "out", pf.adapt(home.model, lora), {}, params={}, base="x")
    with pytest.raises(ValueError, match="has no table of Hugging Face names"):
        pf.save_peft(tmp_path / "out", pf.adapt(flax.linen.Dense(3), lora), {}, params={}, base="x")
    assert not list(tmp_path.iterdir())


def test_the_folder_has_a_manifest_and_never_replaces_its_base(tmp_path):
    home = base("bert")
    adapted = pf.adapt(home.model, pf.LoRA(rank=2, targets=r".*/query"))
    tree = adapted.init(jax.random.key(0), home.params, **home.inputs)
    pf.save_pretrained(tmp_path / "base", home.model, home.params)
    for out in (tmp_path, tmp_path / "base"):
        with pytest.raises(ValueError, match="base, which is read here and would be replaced"):
            pf.save_peft(out, adapted, tree, params=home.params, base=tmp_path / "base", overwrite=True)
    assert manifest.verify(tmp_path / "base").ok
    pf.save_peft(tmp_path / "out", adapted, tree, params=home.params, base=tmp_path / "base")
    assert manifest.verify(tmp_path / "out").ok
    assert manifest.read_manifest(tmp_path / "out")["settings"]["base"] == str(tmp_path / "base")


def test_any_rank_and_scale_reaches_peft(tmp_path):
    """Scales that alpha can express are in alpha, with paths escaped; others are in B."""
    home = base("bert")
    method = pf.LoRA(
        rank=3, alpha=1.0, targets=r".*/(query|key|intermediate/dense)",
        rank_pattern={r".*/0/.*query": 5}, alpha_pattern={r".*/1/.*key": 0.7, r".*/dense": 6},
    )  # fmt: skip
    adapted = pf.adapt(home.model, method)
    tree = jax.tree.map(lambda leaf: leaf + 0.1, adapted.init(jax.random.key(0), home.params, **home.inputs))
    done = pf.save_peft(tmp_path / "out", adapted, tree, params=home.params, base=str(home.folder), dtype="float32")
    assert done.config["rank_pattern"] == {"encoder\\.layer\\.0\\.attention\\.self\\.query": 5}
    assert set(done.config["alpha_pattern"].values()) == {3, 6} and done.config["lora_alpha"] == 1
    assert done.config["target_modules"] == ["intermediate.dense", "key", "query"]
    want = home.ours(adapted, tree)
    assert distance(home.theirs(load_back(tmp_path / "out", home)), want) <= 1e-5
    written = json.loads((tmp_path / "out/adapter_config.json").read_text())
    with quiet():
        known = json.loads(json.dumps(peft.LoraConfig().to_dict(), default=list))
    assert written.keys() == known.keys() and list(written) == sorted(written)
    chosen = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "base_model_name_or_path", "inference_mode"}
    assert {name: written[name] for name in known if name not in chosen} == {n: v for n, v in known.items() if n not in chosen}


def test_generated_adapters_are_written_as_what_was_made(tmp_path):
    home = base("bert")
    adapted = pf.adapt(home.model, pf.LoRA(rank=2, alpha=3, targets=r".*/(query|value)"))
    cond = pf.generate(adapted, pf.generators.CondLoRA())
    theta = jax.tree.map(lambda leaf: leaf + 0.1, cond.init(jax.random.key(0), home.params, **home.inputs))
    want = home.ours(cond, theta)
    pf.save_peft(tmp_path / "theta", cond, theta, params=home.params, base=str(home.folder))
    made = cond.materialise(home.params, theta)
    pf.save_peft(tmp_path / "made", adapted, made, params=home.params, base=str(home.folder))
    for name in ("theta", "made"):
        assert distance(home.theirs(load_back(tmp_path / name, home)), want) <= 1e-5
    per_task = pf.generate(adapted, pf.generators.PerTask(tasks=("a", "b")))
    tree = per_task.init(jax.random.key(0), home.params, **home.inputs)
    with pytest.raises(ValueError, match=r"materialise\(params, tree, 'a'\)"):
        pf.save_peft(tmp_path / "tasks", per_task, tree, params=home.params, base=str(home.folder))
