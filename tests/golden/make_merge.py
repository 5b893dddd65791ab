"""Writes what mergekit makes of tiny Llama models by a few recipes, for tests/test_merging.py.

    pip install mergekit==0.1.5 torch==2.13.0
    python tests/golden/make_merge.py

``merge.safetensors`` holds the outputs only, for each case one vector: all tensors by sorted name. The inputs are drawn again,
from a seed, by ``models``, which needs NumPy alone. Its metadata has the versions.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

LAYERS, WIDTH, FFN, VOCAB = 4, 8, 8, 8
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": FFN,
    "vocab_size": VOCAB, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4,
    "hidden_act": "silu", "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip
MODELS = ("base", "one", "two", "three")
_EACH = ", ".join(f"{{model: {m}, parameters: {{weight: {w}}}}}" for m, w in (("one", 0.6), ("two", 1.25), ("three", -0.3)))
RECIPES = {
    "linear": f"merge_method: linear\nmodels: [{_EACH}]",
    "linear_unnormalized": f"merge_method: linear\nmodels: [{_EACH}]\nparameters: {{normalize: false}}",
    "slerp": "merge_method: slerp\nbase_model: base\nmodels: [{model: base}, {model: one}]\n"
    "parameters: {t: [{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}, {filter: mlp, value: [1, 0.2]}, {value: 0.4}]}",
    "task_arithmetic": f"merge_method: task_arithmetic\nbase_model: base\nmodels: [{_EACH}]\nparameters: {{lambda: 0.7}}",
    "ties": f"merge_method: ties\nbase_model: base\nmodels: [{_EACH}]\nparameters: {{density: 0.4, lambda: 0.8}}",
    "ties_gradient": "merge_method: ties\nbase_model: base\nmodels:\n"
    "  - {model: one, parameters: {weight: [0, 0.3, 0.7, 1], density: [1, 0.2]}}\n"
    "  - {model: two, parameters: {weight: [{filter: mlp, value: 0.5}, {value: 0}], density: 0.3}}\n"
    "parameters: {normalize: false}",
    "breadcrumbs": "merge_method: breadcrumbs\nbase_model: base\nmodels:\n"
    "  - {model: one, parameters: {weight: 1, density: 0.5, gamma: 0.1}}\n"
    "  - {model: two, parameters: {weight: 0.5, density: 0.7, gamma: 0.2}}",
    "model_stock": "merge_method: model_stock\nbase_model: base\nmodels: [{model: one}, {model: two}, {model: three}]",
    "nearswap": "merge_method: nearswap\nbase_model: base\nmodels: [{model: base}, {model: two}]\nparameters: {t: 0.02}",
    "passthrough": "merge_method: passthrough\nslices:\n"
    "  - sources: [{model: one, layer_range: [0, 3]}]\n"
    "  - sources: [{model: two, layer_range: [1, 4], parameters: {scale: [{filter: down_proj, value: 0}, {value: 1}]}}]",
    "slices_linear": "merge_method: linear\nslices:\n"
    "  - sources: [{model: one, layer_range: [0, 2], parameters: {weight: 1}}, "
    "{model: two, layer_range: [2, 4], parameters: {weight: [0, 3]}}]",
}  # fmt: skip


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the model."""
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH)}
    for layer in range(LAYERS):
        node = f"model.layers.{layer}"
        out |= {f"{node}.self_attn.{part}_proj.weight": (WIDTH, WIDTH) for part in "qkvo"}
        out |= {f"{node}.mlp.{part}_proj.weight": (FFN, WIDTH) for part in ("gate", "up")}
        out[f"{node}.mlp.down_proj.weight"] = (WIDTH, FFN)
        out |= {f"{node}.{part}_layernorm.weight": (WIDTH,) for part in ("input", "post_attention")}
    return out | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCAB, WIDTH)}


def models() -> dict[str, dict[str, np.ndarray]]:
    """The tensors of each model; no two changes of a tensor have the same magnitude."""
    rng = np.random.default_rng(7)
    base = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes().items()}
    out = {"base": base}
    for model in MODELS[1:]:
        out[model] = {name: (leaf + 0.1 * rng.normal(size=leaf.shape)).astype(np.float32) for name, leaf in base.items()}
    return out


def resolved(recipe: str, folder: Path) -> str:
    """The recipe with the folders of the models."""
    for model in MODELS:
        for key in ("model: ", "base_model: "):
            for end in ("}", ",", "\n"):
                recipe = (recipe + "\n").replace(f"{key}{model}{end}", f"{key}{folder / model}{end}")
    return recipe.strip() + "\ndtype: float32\n"


def main() -> None:
    from importlib.metadata import version

    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from safetensors.numpy import load_file, save_file

    out = {}
    with tempfile.TemporaryDirectory() as scratch:
        for model, tensors in models().items():
            (Path(scratch) / model).mkdir()
            save_file(tensors, Path(scratch) / model / "model.safetensors", {"format": "pt"})
            (Path(scratch) / model / "config.json").write_text(json.dumps(CONFIG))
        for case, recipe in RECIPES.items():
            config = MergeConfiguration.model_validate(yaml.safe_load(resolved(recipe, Path(scratch))))
            target = Path(scratch) / "out" / case
            run_merge(config, str(target), MergeOptions(copy_tokenizer=False, write_model_card=False))
            made = {name: leaf for file in target.glob("*.safetensors") for name, leaf in load_file(file).items()}
            out[case] = np.concatenate([made[name].reshape(-1) for name in sorted(made)])
    versions = {name: version(name) for name in ("mergekit", "torch")}
    save_file(out, Path(__file__).with_name("merge.safetensors"), versions)


if __name__ == "__main__":
    main()
