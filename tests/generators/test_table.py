"""Adapters of their own for each task: what the generator refuses."""

import types

import pytest

from pefusion_jax.generators import MPT, PerTask


@pytest.mark.parametrize("generator", [PerTask, MPT])
def test_tasks_are_names(generator):
    for tasks, said in (
        ("rte", r"tasks='rte' is one name, whose letters would be taken for names; pass tasks=\('rte',\)"),
        ([types.SimpleNamespace(name="rte")], r"a SimpleNamespace among its names; pass texts, of tasks \[task.name for"),
        (("a", "a"), "must be one or more different names"),
        ((), "must be one or more different names"),
    ):
        with pytest.raises(ValueError, match=said):
            generator(tasks=tasks)


def test_what_is_shared_is_a_regular_expression():
    with pytest.raises(ValueError, match=r"shared='\(' is not a regular expression: missing"):
        PerTask(tasks=("a",), shared="(")
