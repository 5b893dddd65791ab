"""LoRA beside PEFT on the same weights, and the parameter counts of the literature."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefusion_jax as pf
from pefusion_jax import trees
from pefusion_jax.backbones.bert import Bert, BertConfig

BASE = dict(
    model_type="bert",
    vocab_size=30,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    max_position_embeddings=16,
    type_vocab_size=2,
    hidden_act="gelu",
    layer_norm_eps=1e-12,
)


@pytest.mark.parametrize(
    ("rank", "targets", "count"),
    [
        (8, r".*/(query|value)", 294_912),  # RoBERTa-base class, query and value: the count CondLoRA compares with
        (16, r".*/query", 294_912),  # q alone at rank 16, as in the released configuration of partial linearization
        (16, r".*/(query|value)", 589_824),
    ],
)
def test_parameter_counts_at_base_size(rank, targets, count):
    model = Bert(BertConfig.from_dict(BASE))
    ids = jnp.ones((1, 4), jnp.int32)
    params = jax.eval_shape(lambda k: model.init(k, ids)["params"], jax.random.key(0))
    lora = pf.adapt(model, pf.LoRA(rank=rank, targets=targets))
    assert trees.size(jax.eval_shape(lora.init, jax.random.key(0), params, ids)) == count


@pytest.mark.parametrize(
    "settings",
    [
        dict(r=4, lora_alpha=8),
        dict(r=4, lora_alpha=8, use_rslora=True),
        dict(r=4, lora_alpha=6, rank_pattern={"query": 2}, alpha_pattern={"value": 3}),
    ],
)
def test_scales_and_patterns_equal_pefts(settings, tmp_path):
    import peft
    import torch
    from transformers import BertConfig as TorchConfig
    from transformers import BertModel

    tiny = {**BASE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        BertModel(TorchConfig(**{k: v for k, v in tiny.items() if k != "model_type"})).save_pretrained(tmp_path)
        theirs = peft.get_peft_model(
            BertModel.from_pretrained(tmp_path), peft.LoraConfig(target_modules=["query", "value"], **settings)
        ).eval()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bert"
    generator = torch.Generator().manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)

    model, params = pf.load_pretrained(tmp_path)
    ours = pf.adapt(
        model,
        pf.LoRA(
            rank=settings["r"],
            alpha=settings["lora_alpha"],
            rank_stabilized=settings.get("use_rslora", False),
            rank_pattern={f".*/{k}": v for k, v in settings.get("rank_pattern", {}).items()},
            alpha_pattern={f".*/{k}": v for k, v in settings.get("alpha_pattern", {}).items()},
            targets=r".*/(query|value)",
        ),
    )
    ids = np.random.default_rng(0).integers(0, 30, (2, 7)).astype(np.int32)
    adapters = ours.init(jax.random.key(0), params, ids)
    given = {name: value.detach().numpy() for name, value in theirs.named_parameters() if "lora_" in name}

    def peft_leaf(path, leaf):
        site, kind = path.rsplit("/", 1)
        factor = given[f"base_model.model.{site.replace('/', '.')}.lora_{kind[-1].upper()}.default.weight"].T
        assert factor.shape == leaf.shape, path
        return jnp.asarray(factor)

    adapters = trees.map_paths(peft_leaf, adapters)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids).long()).last_hidden_state.numpy()
    np.testing.assert_allclose(ours.apply(params, adapters, ids).last_hidden_state, expected, atol=1e-5)


def test_the_start_of_a_is_uniform_in_one_over_the_root_of_the_fan_in():
    from flax import linen as nn

    class One(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8, name="only")(x)

    x = jnp.ones((1, 400))
    params = One().init(jax.random.key(0), x)["params"]
    adapters = pf.adapt(One(), pf.LoRA(rank=32, targets="only")).init(jax.random.key(0), params, x)
    a = adapters["only"]["lora_a"]
    assert 0.0499 < float(jnp.abs(a).max()) <= 0.05 and abs(float(a.std()) - 0.05 / np.sqrt(3)) < 5e-4
    assert not np.any(adapters["only"]["lora_b"])


def test_patterns_and_alphas_that_cannot_work_are_refused():
    from flax import linen as nn

    class One(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8, name="only")(x)

    x = jnp.ones((1, 4))
    params = One().init(jax.random.key(0), x)["params"]
    for patterns in (dict(rank_pattern={"onyl": 4}), dict(alpha_pattern={"onyl": 4.0})):
        with pytest.raises(ValueError, match="the pattern 'onyl' of LoRA matches none of its layers; nearest: 'only'"):
            pf.adapt(One(), pf.LoRA(targets="only", **patterns)).init(jax.random.key(0), params, x)
    with pytest.raises(ValueError, match=r"LoRA: '\(' is not a regular expression"):
        pf.adapt(One(), pf.LoRA(targets="only", rank_pattern={"(": 4}))
    for settings in (dict(alpha=float("nan")), dict(alpha_pattern={"only": float("inf")})):
        with pytest.raises(ValueError, match="alpha must be a finite number"):
            pf.LoRA(targets="only", **settings)
