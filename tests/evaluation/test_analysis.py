"""Disentanglement, loss planes and interference against the model run point by point, in NumPy and float64."""

import csv
import io

import evaluation_fakes as fakes
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pefusion_jax as pf
from pefusion_jax.evaluation import disentanglement_error, interference, loss_plane
from pefusion_jax.tasks.metrics import pearson

TASKS = [fakes.task("q", 2, size=31), fakes.task("p", 1)]
TAUS = {"q": fakes.tau(0), "p": fakes.tau(1)}
ALPHAS = [-1.0, 0.0, 0.4, 1.0]


def numpy_points(task, points, tangent=True):
    """Logits of the three real classes at each point of (alpha of q, alpha of p)."""
    kernel = np.asarray(fakes.params()["kernel"], np.float64)
    for point in points:
        moved = sum(a * np.asarray(TAUS[name]["kernel"], np.float64) for a, name in zip(point, TAUS, strict=True))
        found = (
            fakes.numpy_logits(task, "validation", kernel, moved)
            if tangent
            else fakes.numpy_logits(task, "validation", kernel + moved)
        )
        yield found[:, :3]


def numpy_error(tangent):
    out = np.zeros((2, len(ALPHAS), len(ALPHAS)))
    for t, task in enumerate(TASKS):
        for i, a in enumerate(ALPHAS):
            for j, b in enumerate(ALPHAS):
                alone = (a, 0.0) if t == 0 else (0.0, b)
                own, both = (z.argmax(1) for z in numpy_points(task, [alone, (a, b)], tangent))
                out[t, i, j] = np.mean(own != both)
    return out


def numpy_loss(logits, labels):
    top = logits.max(1, keepdims=True)
    logsumexp = np.log(np.exp(logits - top).sum(1)) + top[:, 0]
    return float(np.mean(logsumexp - logits[np.arange(len(labels)), labels]))


def test_disentanglement_of_an_affine_model_is_the_models_own():
    model, params = fakes.Model(), fakes.params()
    found = disentanglement_error(model, params, TAUS, ("q", "p"), TASKS, ALPHAS, batch_size=8)
    expected = numpy_error(tangent=True)
    assert expected.max() > 0.2
    np.testing.assert_allclose(found.by_task, expected, atol=1e-12)
    np.testing.assert_allclose(found.error, expected.sum(0), atol=1e-12)
    # Three passes of each split, and no other, whatever the grid.
    assert found.forwards == 6 and found.counts == (31, 23)
    assert model.ran_counts() == {"pushforward": 4 + 3} and model.traces == ["pushforward"]
    # The ordinary way says the same, one pass a point.
    slow = disentanglement_error(model, params, TAUS, ("q", "p"), TASKS, ALPHAS, batch_size=8, space="adapter")
    np.testing.assert_array_equal(slow.by_task, found.by_task)
    assert slow.forwards == 2 * (4 + 16) and model.traces == ["pushforward", "apply"]
    # The pair's order is the axes' order.
    turned = disentanglement_error(model, params, TAUS, ("p", "q"), TASKS, ALPHAS)
    np.testing.assert_array_equal(turned.error, found.error.T)
    assert found.inside == pytest.approx(expected.sum(0)[1:, 1:].mean())
    assert np.isnan(disentanglement_error(model, params, TAUS, ("p", "q"), TASKS, [2.0]).inside)


def test_disentanglement_of_weight_changes_compiles_once(tmp_path):
    model = fakes.Model(affine=False)
    rng = np.random.default_rng(5)
    pairs = {n: (rng.normal(size=(6, 2)), rng.normal(size=(2, 6))) for n in TAUS}
    deltas = {
        n: pf.Delta({"kernel": pf.LowRank(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), (6, 6))})
        for n, (a, b) in pairs.items()
    }
    found = disentanglement_error(model, fakes.params(), deltas, ("q", "p"), TASKS, [0.0, 1.0], batch_size=8)
    kernel = np.asarray(fakes.params()["kernel"], np.float64)
    products = [a @ b for a, b in pairs.values()]
    for t, task in enumerate(TASKS):
        alone = fakes.numpy_logits(task, "validation", kernel + products[t])[:, :3].argmax(1)
        both = fakes.numpy_logits(task, "validation", kernel + products[0] + products[1])[:, :3].argmax(1)
        assert found.by_task[t, 1, 1] == pytest.approx(np.mean(alone != both))
    assert found.by_task[0, 1, 1] > 0 and found.by_task[0, 1, 0] == 0 and found.by_task[1, 0, 1] == 0
    assert model.traces == ["delta"] and found.forwards == 2 * (2 + 4)
    path = found.write(tmp_path / "new")
    rows = list(csv.reader(path.read_text().splitlines()))
    assert path.name == "disentanglement.csv" and rows[0][:3] == ["alpha q", "alpha p", "error"]
    assert [float(cell) for cell in rows[-1]] == [1, 1, found.error[1, 1], *found.by_task[:, 1, 1]]


@pytest.mark.parametrize("tangent", [True, False])
def test_loss_plane(tangent):
    model = fakes.Model(affine=tangent)
    vectors = TAUS if tangent else {name: pf.Delta(dict(tau)) for name, tau in TAUS.items()}
    found = loss_plane(model, fakes.params(), vectors, ("q", "p"), TASKS, [0.0, 0.5, 1.0], batch_size=16)
    grid = [(a, b) for a in (0.0, 0.5, 1.0) for b in (0.0, 0.5, 1.0)]
    for t, task in enumerate(TASKS):
        labels = fakes.labels(task, "validation")
        logits = list(numpy_points(task, grid, tangent))
        np.testing.assert_allclose(found.loss[t].reshape(-1), [numpy_loss(z, labels) for z in logits], rtol=2e-5)
        np.testing.assert_allclose(found.score[t].reshape(-1), [np.mean(z.argmax(1) == labels) for z in logits], atol=1e-12)
    np.testing.assert_allclose(found.surface(), found.loss.mean(0))
    np.testing.assert_array_equal(found.surface("score", "p"), found.score[1])
    assert found.forwards == (6 if tangent else 18)
    assert len(found.csv().splitlines()) == 1 + 2 * 9
    with pytest.raises(ValueError, match="no task 'z', only q, p"):
        found.surface(task="z")
    with pytest.raises(ValueError, match="'loss' and a 'score'"):
        found.surface("accuracy")


def test_interference():
    found = interference(fakes.Model(), fakes.params(), TAUS, TASKS, scale=0.5, batch_size=16)
    expected, base = np.zeros((2, 2)), []
    for i, task in enumerate(TASKS):
        labels = fakes.labels(task, "validation")
        own = np.eye(2)[i]
        points = [own if j == i else own + 0.5 * np.eye(2)[j] for j in range(2)]
        *scores, zero = [np.mean(z.argmax(1) == labels) for z in numpy_points(task, [*points, (0, 0)])]
        expected[i], base = scores, [*base, zero]
    np.testing.assert_allclose(found.score, expected, atol=1e-12)
    np.testing.assert_allclose(found.base_score, base, atol=1e-12)
    np.testing.assert_allclose(found.score_change, expected / np.diagonal(expected)[:, None] - 1, atol=1e-12)
    np.testing.assert_array_equal(np.diagonal(found.loss_change), np.zeros(2))
    assert found.names == ("q", "p") and found.forwards == 6
    rows = list(csv.DictReader(io.StringIO(found.csv())))
    assert rows[1]["task"] == "q" and rows[1]["added"] == "p" and float(rows[1]["score"]) == found.score[0, 1]
    # Relative to nothing there is no change to state.
    none = found._replace(score=np.array([[0.0, 0.1], [0.2, 0.4]]))
    assert np.isnan(none.score_change[0]).all() and none.score_change[1, 0] == -0.5
    assert csv.DictReader(io.StringIO(none.csv())).__next__()["score change"] == ""


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        return {"hidden": x + nn.Dense(fakes.WIDTH, name="down")(jnp.tanh(nn.Dense(4, name="up")(x))) * mask[:, :, None]}


def test_plain_adapters_are_added_up_as_weight_changes_or_as_they_are():
    model, inputs = Encoder(), fakes.encode(TASKS[0].test[:2])
    params = model.init(jax.random.key(0), **inputs)["params"]
    lora = pf.adapt(model, pf.LoRA(rank=2, targets=r"up|down"))
    phi0 = lora.init(jax.random.key(1), params, **inputs)
    rng = np.random.default_rng(0)
    trees = {n: jax.tree.map(lambda leaf: leaf + jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), phi0) for n in TAUS}
    deltas = {name: lora.deltas(params, tree) for name, tree in trees.items()}
    grid = [0.0, 1.0]
    weight = loss_plane(lora, params, trees, ("q", "p"), TASKS, grid, batch_size=32)
    given = loss_plane(lora, params, deltas, ("q", "p"), TASKS, grid, batch_size=32)
    adapter = loss_plane(lora, params, trees, ("q", "p"), TASKS, grid, batch_size=32, space="adapter", init=phi0)
    np.testing.assert_array_equal(weight.loss, given.loss)
    for t, task in enumerate(TASKS):
        # At the corners both spaces mean the tuned models themselves; at (1, 1) they differ by cross terms.
        for point, name in (((1, 0), "q"), ((0, 1), "p")):
            score = pf.evaluate(lora, params, trees[name], [task], split="validation", batch_size=32)[task.name]
            assert weight.score[(t, *point)] == adapter.score[(t, *point)] == score
    np.testing.assert_allclose(weight.loss[:, 1, 0], adapter.loss[:, 1, 0], rtol=1e-5)
    assert np.abs(weight.loss[:, 1, 1] - adapter.loss[:, 1, 1]).max() > 1e-3


def test_errors():
    model, params = fakes.Model(), fakes.params()

    def run(pair=("q", "p"), trees=TAUS, tasks=TASKS, alphas=(0.0, 1.0), **options):
        return disentanglement_error(model, params, trees, pair, tasks, alphas, **options)

    regression = fakes.task("p", 3, metric=pearson, classes=())
    huge = {**TAUS, "p": {"kernel": jnp.full((6, 6), 1e30)}}
    for message, options in {
        "two different names": {"pair": ("q", "q")},
        "pair names 'z', but the trees are 'q', 'p'": {"pair": ("q", "z")},
        "a tree 'p' but no task of this name, only q": {"tasks": TASKS[:1]},
        "'p' is a regression": {"tasks": [TASKS[0], regression]},
        "alphas must be one or more finite": {"alphas": [np.nan]},
        "space must be": {"space": "weights"},
        "init is the common start": {"init": TAUS["q"]},
        "Deltas only": {"trees": {**TAUS, "p": fakes.delta(1)}},
        "'p': 'kernel' holds 36 NaN": {"trees": {**TAUS, "p": {"kernel": jnp.full((6, 6), jnp.nan)}}},
        "outputs are not finite at 1e\\+30 q, 1e\\+30 p": {"trees": huge, "space": "adapter", "alphas": [1e30]},
    }.items():
        with pytest.raises(ValueError, match=message):
            run(**options)
    with pytest.raises(ValueError, match="no task of this name"):
        interference(model, params, TAUS, TASKS[1:])
