"""Multitask prompt tuning beside PEFT's, its size, and its starts."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding, MultitaskPromptTuningConfig

from pefusion_jax import trees
from pefusion_jax.generators import MPT
from pefusion_jax.generators.layout import Layout

TASKS = ("rte", "mrpc", "cola")
PATH = "shared/prompt"  # T5's, whose site is named as the tree's first part
LOOP = Layout({}, {}, lambda path: True)


def drawn(generator, leaf, layout=LOOP, path=PATH):
    return generator.init(jax.random.key(1), {path: leaf}, {}, layout)


def test_size_is_that_of_one_prompt_and_two_vectors_for_each_task():
    prompt = jax.ShapeDtypeStruct((100, 768), jnp.float32)
    tree = jax.eval_shape(lambda leaf: drawn(MPT(tasks=TASKS), leaf), prompt)
    assert trees.size(tree["shared"]) == 76_800
    assert trees.size(tree["tasks"]) == len(TASKS) * 868


def test_prompts_equal_pefts():
    config = MultitaskPromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, num_transformer_submodules=1, token_dim=6, num_tasks=3, num_ranks=2
    )
    theirs = MultitaskPromptEmbedding(config, types.SimpleNamespace())
    generator = MPT(tasks=TASKS, rank=2, start="normal")
    tree = drawn(generator, jnp.zeros((4, 6)))
    with torch.no_grad():
        found = {
            f"shared/{PATH}": theirs.embedding.weight,
            f"tasks/{PATH}/columns": theirs.prefix_task_cols,
            f"tasks/{PATH}/rows": theirs.prefix_task_rows,
        }
        filled = {path: jnp.asarray(tensor.numpy().copy()) for path, tensor in found.items()}
        assert {path: leaf.shape for path, leaf in filled.items()} == {p: leaf.shape for p, leaf in trees.flat(tree).items()}
        for task in range(3):
            ours = generator.make(trees.nest(filled), {}, LOOP, jnp.int32(task))[PATH]
            expected = theirs(torch.arange(4)[None], torch.tensor([task]))[0]
            np.testing.assert_allclose(ours, expected.numpy(), atol=1e-7)
    deviation = {
        name: float(np.std(np.asarray(leaf))) for name, leaf in trees.flat(drawn(generator, jnp.zeros((400, 300)))).items()
    }
    assert all(abs(deviation[f"tasks/{PATH}/{name}"] - 0.02) < 2e-3 for name in ("columns", "rows"))


def test_ones_start_at_the_shared_leaf_and_use_their_rank():
    layout = Layout({"encoder/layer": 2}, {}, lambda path: True)
    path = "encoder/layer/query/lora_a"
    leaf, target = np.random.default_rng(0).normal(size=(2, 2, 4, 6)).astype(np.float32)
    generator = MPT(tasks=TASKS, rank=2)
    tree = drawn(generator, jnp.asarray(leaf), layout, path)

    @jax.jit
    def made(tree, task):
        out = generator.make(tree, {}, layout, task)[path]
        return jnp.sum(target * out), out

    for task in range(3):
        np.testing.assert_array_equal(made(tree, task)[1], leaf)
    gradient = jax.device_get(jax.grad(made, has_aux=True)(tree, 1)[0])
    assert not np.any(trees.flat(gradient["tasks"])[f"{path}/rows"][[0, 2]]), "each task has factors of its own"
    stepped = trees.flat(jax.tree.map(lambda leaf, by: np.asarray(leaf) - 0.1 * by, tree, gradient)["tasks"])
    product = stepped[f"{path}/columns"][1] @ stepped[f"{path}/rows"][1]
    assert (np.linalg.matrix_rank(product, rtol=1e-3) == 2).all()


def test_leaves_that_meet_zero_stand_still():
    tree = drawn(MPT(tasks=TASKS), jnp.zeros((4, 6)))
    assert set(trees.paths(MPT(tasks=TASKS).moving(tree))) == {f"shared/{PATH}"}
    full = jax.tree.map(jnp.ones_like, tree)
    assert trees.paths(MPT(tasks=TASKS).moving(full)).keys() == trees.paths(full).keys()


def test_what_cannot_be_is_said():
    for wrong, said in (({"tasks": ("a", "a")}, "different names"), ({"rank": 0}, "rank"), ({"start": "zeros"}, "'normal'")):
        with pytest.raises(ValueError, match=said):
            MPT(**{"tasks": TASKS, **wrong})
    with pytest.raises(ValueError, match=r"'shared/prompt' \(6,\).*PerTask"):
        drawn(MPT(tasks=TASKS), jnp.zeros(6))
    with pytest.raises(ValueError, match=r"'layer/bias' \(2, 6\)"):
        drawn(MPT(tasks=TASKS), jnp.zeros((2, 6)), Layout({"layer": 2}, {}, lambda path: True), "layer/bias")
    with pytest.raises(ValueError, match="has 3 tasks at 'shared/prompt', the generator 2"):
        MPT(tasks=TASKS[:2]).make(drawn(MPT(tasks=TASKS), jnp.zeros((4, 6))), {}, LOOP, jnp.int32(0))
