"""What ``generate`` asks of adapters, generators and models, on a model of two layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefusion_jax as pf
from pefusion_jax import generators, trees

X = jnp.ones((4, 6))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="value")(jnp.tanh(nn.Dense(6, name="query")(x)))


@pytest.fixture(scope="module")
def frozen_a():
    params = Net().init(jax.random.key(0), X)["params"]
    return params, pf.adapt(Net(), pf.LoRA(rank=2, targets="query|value", freeze_a=True))


@pytest.mark.parametrize(
    ("generator", "held"),
    [
        (generators.PerTask(tasks=("a", "b"), shared="value/.*"), {"own/query/lora_a", "shared/value/lora_a"}),
        (generators.task_embeddings(("a", "b"), learned=".*/lora_a"), {"learned/query/lora_a", "learned/value/lora_a"}),
    ],
    ids=["table", "learned"],
)
def test_leaves_that_a_method_holds_still_are_held_where_they_are_kept(generator, held, frozen_a):
    params, lora = frozen_a
    made = pf.generate(lora, generator)
    tree = made.init(jax.random.key(1), params, X)
    assert trees.flat(tree).keys() - trees.flat(made.trainable(tree)).keys() == held
    assert trees.flat(made.moving(tree)).keys() == trees.flat(made.trainable(tree)).keys()


@pytest.mark.parametrize("generator", [generators.CondLoRA(), generators.MPT(tasks=("a",)), generators.task_embeddings(("a",))])
def test_what_a_method_holds_still_cannot_be_made(generator, frozen_a):
    params, lora = frozen_a
    with pytest.raises(
        ValueError, match="LoRA holds 'query/lora_a' still, but .*freeze_a has no meaning here. Use LoRA without"
    ):
        pf.generate(lora, generator).init(jax.random.key(1), params, X)


class Pairs(nn.Module):
    """Two inputs, as CLIP has: each with features, and similarities of all with all."""

    similar: bool = True

    @nn.compact
    def __call__(self, x, y):
        x, y = nn.Dense(3, name="x")(x), nn.Dense(3, name="y")(y)
        return {"features": {"x": x, "y": y}} | ({"similar": x @ y.T} if self.similar else {})


def test_blocks_are_joined_only_where_outputs_are_rows():
    def of(similar):
        adapted = pf.adapt(Pairs(similar), pf.LoRA(rank=1, targets="x|y"))
        return pf.generate(adapted, generators.PerTask(tasks=("a", "b")))

    params = Pairs().init(jax.random.key(0), X, X)["params"]
    tree = of(True).init(jax.random.key(1), params, X, X)
    both = np.array([0, 1])
    assert of(False).apply(params, tree, X, X, task=both)["features"]["y"].shape == (4, 3)
    with pytest.raises(
        ValueError, match=r"'similar' is \(2, 2\) for a block of 2 rows and \(4, 4\) for the batch of 4.*one task"
    ):
        of(True).apply(params, tree, X, X, task=both)
    for x, y, named in ((X, X[:2], r"'features/y' is \(2, 3\)"), (X[:2], X, r"'features/y' is \(4, 3\) for a block of 1")):
        with pytest.raises(ValueError, match=named):
            of(False).apply(params, tree, x, y, task=both)
    assert of(True).apply(params, tree, X, X, task=1)["similar"].shape == (4, 4)


@pytest.mark.parametrize("task", [np.zeros(0, np.int32), []])
def test_no_task_at_all_is_refused(task):
    params = Net().init(jax.random.key(0), X)["params"]
    made = pf.generate(pf.adapt(Net(), pf.LoRA(rank=1, targets="query")), generators.PerTask(tasks=("a", "b")))
    with pytest.raises(ValueError, match=r"task=.* must be numbers from 0 to 1"):
        made.apply(params, {}, X, task=task)
