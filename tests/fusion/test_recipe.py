"""Recipes: what they mean, what they refuse, and that no text makes the parser do anything else."""

import random
import time

import pytest

from pefusion_jax.fusion import named
from pefusion_jax.fusion.recipe import MAX_BYTES, lookup, parse_recipe

TIES = """\
merge_method: ties
base_model: base
models:
  - model: one
    parameters:
      density: 0.5
      weight: [0.2, 0.8]
  - model: two
    parameters:
      density: [1, 0.5, 0]
      weight:
        - filter: mlp
          value: [0, 1e-1]
        - value: 0.3
parameters:
  normalize: true
  lambda: 1
out_dtype: bfloat16
tokenizer_source: base
"""
SLICES = """\
merge_method: slerp
base_model: one
slices:
- sources:
  - {model: one, layer_range: [0, 2]}
  - {model: two, layer_range: [2, 4]}
  parameters: {t: 0.25}
parameters: {t: [{filter: norm, value: 1}, {value: [0, 1]}]}
dtype: float16
"""
OURS = """\
method: weighted_average
models:
- model: one
  parameters: {weight: 0.25}
- model: two
  parameters: {weight: [0, 1]}
parameters: {normalize: true}
"""


def test_ties_as_in_mergekit():
    recipe = parse_recipe(TIES)
    assert (recipe.method, recipe.ours, recipe.base, recipe.dtype) == ("ties", False, "base", "bfloat16")
    assert recipe.models == ("base", "one", "two")
    [part] = recipe.slices
    one, two = (source.parameters for source in part.sources)
    scopes = [recipe.parameters]
    assert [lookup([one, *scopes], "weight", "x", depth) for depth in (0, 0.5, 1)] == pytest.approx([0.2, 0.5, 0.8])
    assert [lookup([two, *scopes], "density", "x", depth) for depth in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(
        [1, 0.75, 0.5, 0.25, 0]
    )
    assert lookup([two], "weight", "model.layers.1.mlp.up", 0.5) == pytest.approx(0.05), "YAML 1.1 reads 1e-1 as a word"
    assert lookup([two], "weight", "model.layers.1.self_attn.q", 0.5) == 0.3
    assert lookup([one, *scopes], "normalize", "x", 0) is True and lookup([one, *scopes], "epsilon", "x", 0) is None


def test_slices_and_the_order_of_lookup():
    recipe = parse_recipe(SLICES)
    [part] = recipe.slices
    assert [source.layers for source in part.sources] == [(0, 2), (2, 4)] and recipe.dtype == "float16"
    assert lookup([part.parameters, recipe.parameters], "t", "a.norm", 0.5) == 0.25, "the slice comes before the global one"
    assert lookup([recipe.parameters], "t", "a.norm", 0.5) == 1 and lookup([recipe.parameters], "t", "a.mlp", 0.5) == 0.5


def test_words_and_flags_select_where_numbers_interpolate():
    recipe = parse_recipe(
        "method: ties\nbase_model: b\nmodels: [{model: a}]\nparameters: {elect: [sum, count], scale: [0, 1, 4]}\n"
    )
    values = [(lookup([recipe.parameters], "elect", "", t), lookup([recipe.parameters], "scale", "", t)) for t in (0, 0.75, 1)]
    assert values == [("sum", 0), ("sum", 2.5), ("count", 4)]


def test_every_method_of_mergekit_that_is_promised_is_there():
    assert set(named.MERGEKIT) >= {
        "linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs",
        "breadcrumbs_ties", "model_stock", "passthrough",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("merge_method: ties", "merge_method: tiez", r"line 1: merge_method: 'tiez' is not .* did you mean ties"),
        ("merge_method: ties", "method: tiez", r"line 1: method: no fusion method 'tiez'; did you mean .*ties"),
        ("merge_method: ties", "method: ties\nmerge_method: ties", "give one of merge_method .* or method"),
        (
            "density: 0.5\n",
            "densty: 0.5\n",
            r"line 6: models\[0\].parameters.densty: unknown key 'densty'; did you mean density",
        ),
        ("base_model: base", "base_modl: base", "line 2: base_modl: unknown key 'base_modl'; did you mean base_model"),
        ("density: 0.5\n", "lambda: 0.5\n", r"models\[0\].parameters.lambda: lambda is for the whole merge"),
        ("density: 0.5\n", "density: .inf\n", "line 6: .*must be a finite number"),
        ("density: 0.5\n", "density: {a: 1}\n", "unknown key 'a'"),
        ("density: 0.5\n", "density: []\n", "a gradient needs values"),
        (
            "density: 0.5\n",
            "density: !!python/object/apply:os.system [ls]\n",
            "line 6: .*python/object/apply.* is not a number",
        ),
        ("density: 0.5\n", "density: 2020-01-01\n", "is not a number"),
        ("density: 0.5\n", "density: 0.5\n      density: 1\n", "line 7: .*this key stands twice"),
        ("tokenizer_source: base", "tokenizer_source: union", "line 19: tokenizer_source: 'union' is not supported"),
        ("tokenizer_source: base", "modules: {}", "'modules' is not supported"),
        ("out_dtype: bfloat16", "out_dtype: int8", "line 18: out_dtype: must be one of float32, bfloat16, float16"),
        ("  - model: one\n", "  - {}\n", "this is not YAML"),
        ("model: one", "modle: one", r"models\[0\].modle: unknown key 'modle'; did you mean model"),
        ("models:", "slices:", r"slices\[0\].model: unknown key 'model'"),
        ("merge_method: ties", "- 1", "this is not YAML"),
    ],
)
def test_refusals_say_where_and_what(old, new, message):
    assert TIES.count(old) >= 1
    with pytest.raises(ValueError, match=f"(?s)^mine.yml.*{message}"):
        parse_recipe(TIES.replace(old, new, 1), "mine.yml")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe\x00",
        "models: " + "[" * 5000,
        "a: &a [1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\n" + "".join(
            f"c{i}: &c{i} [{','.join([f'*c{i - 1}' if i else '*b'] * 9)}]\n" for i in range(12)
        ),
        "merge_method: &m [*m]",
        "x" * (MAX_BYTES + 1),
        "merge_method: linear\nmodels:\n" + "- {model: a}\n" * 1000,
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: " + "9" * 5000 + "}}]",
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1" + ":1" * 400_000 + "}}]",
        "a: &a\n  ? " + "k" * 900_000 + "\n  : 1\nb: [" + "*a," * 9_000 + "]",
    ],
)  # fmt: skip
def test_bombs_are_refused_at_once(text):
    start = time.process_time()
    with pytest.raises(ValueError):
        parse_recipe(text)
    assert time.process_time() - start < 2


def test_mutated_recipes_parse_or_are_refused():
    """Thousands of small edits: the answer is a recipe or a ValueError."""
    rng = random.Random(0)
    bits = [
        "-",
        ":",
        "[",
        "]",
        "{",
        "}",
        "!",
        "&a",
        "*a",
        "\n",
        "  ",
        "null",
        "1e999",
        ".nan",
        "~",
        "'",
        "#",
        "|",
        "\t",
        "é",
        "\0",
        "!!bool x",
    ]
    accepted = 0
    for number in range(2000):
        text = (TIES, SLICES, OURS)[number % 3]
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(text))
            cut = rng.choice([0, 0, 1, 1, 5, 20])
            text = text[:place] + rng.choice([*bits, "", text[rng.randrange(len(text)) :][:15]]) + text[place + cut :]
        try:
            parse_recipe(text)
            accepted += 1
        except ValueError:
            pass
    assert 30 < accepted < 2400
