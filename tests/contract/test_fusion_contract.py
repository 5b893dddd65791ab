"""Every fusion method against every guarantee of fusion. The methods are the rows of ``fusions.METHODS``."""

from __future__ import annotations

import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fusions import METHODS, TASKS, changes

import pefusion_jax as pf

METHOD = pytest.mark.parametrize("row", METHODS, ids=[row.name for row in METHODS])


def trees(row, **options):
    return {task: changes(task, **options) for task in TASKS[: row.trees]}


_results: dict = {}


def results(row):
    """What the method makes of the same trees in several forms, and at scale zero; one compiled program for all."""
    if row.name not in _results:
        given = trees(row)
        forms = {
            "pairs": given,
            "dense": {task: change.dense() for task, change in given.items()},
            "scanned": trees(row, stacked=True),
            # The order of names is the order in which trees are stacked.
            "renamed": dict(zip(TASKS, reversed(given.values()), strict=False)),
        }

        def program(scale, forms):
            return {name: pf.fuse(row.make(scale), form).dense().leaves for name, form in forms.items()}

        program = jax.jit(program) if row.traced else program
        _results[row.name] = program(jnp.float32(0.7), forms) | {"zero": program(jnp.float32(0.0), forms)["pairs"]}
    return _results[row.name]


def close(row, found, expected):
    assert found.keys() == expected.keys()
    size = max(float(np.abs(leaf).max()) for leaf in expected.values())
    assert size > 0.01, "a result of zeros would agree with anything"
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, atol=row.tolerance * size, rtol=0, err_msg=path)


@METHOD
def test_one_tree_comes_back_bit_for_bit(row):
    given = changes("b")
    method = row.make(1.0) if row.neutral is None else row.neutral()
    found = pf.fuse(method, {"a": given}).dense().leaves
    expected = given.dense().leaves
    if row.alters:
        assert any(not np.allclose(found[path], leaf, rtol=1e-3) for path, leaf in expected.items()), "this row is no exception"
        return
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


@METHOD
def test_the_order_of_trees_does_not_matter(row):
    if row.ordered:
        assert not np.array_equal(results(row)["renamed"]["head/kernel"], results(row)["pairs"]["head/kernel"])
    else:
        close(row, results(row)["renamed"], results(row)["pairs"])


@METHOD
def test_a_scale_of_zero_is_the_base_model(row):
    if row.scaled:
        for path, leaf in results(row)["zero"].items():
            assert not np.any(leaf), path
    else:
        close(row, results(row)["zero"], results(row)["pairs"])


@METHOD
def test_pairs_give_what_dense_changes_give(row):
    close(row, results(row)["pairs"], results(row)["dense"])


@METHOD
def test_scanned_layers_give_what_unrolled_layers_give(row):
    scanned = dict(results(row)["scanned"])
    for rest in ("query/kernel", "query/bias"):
        layers = scanned.pop(f"layer/{rest}")
        scanned |= {f"layer/{i}/{rest}": layer for i, layer in enumerate(layers)}
    close(row, scanned, results(row)["pairs"])


def test_every_method_is_a_row_here_and_in_the_readme():
    made = {name: getattr(pf.fusion, name) for name in pf.fusion.__all__}
    methods = {
        name for name, made in made.items() if inspect.isfunction(made) and made.__annotations__.get("return") == "Fusion"
    }
    methods -= {"chain", "linear", "per_group"}  # of which methods are made
    # One A for all tasks, and a model to run: their tests are in test_closed_form.py.
    assert methods - {row.name.partition("-")[0] for row in METHODS} == {"regmean_shared", "regmean_pp"}
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    table = readme[readme.index("## Fusion") : readme.index("## What it costs")]
    assert not {name for name in methods if f"`{name}`" not in table}
