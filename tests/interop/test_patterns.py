"""Patterns from files: the same answers as re where re answers, and an answer where it would not."""

import re
import time

import hypothesis
import hypothesis.strategies as st
import pytest

from pefusion_jax.interop.patterns import Budget, Pattern

REAL = [
    r".*\.layer\.\d+\..*\.(query|value)",
    r"^(?!.*visual).*(?:q_proj|k_proj|v_proj|o_proj).*",
    r"encoder\.layer\.[0-3]\.attention\.self\.(query|value)",
    r"(?=.*self).*(?P<part>query|key)$",
    r".*(decoder|encoder).*(SelfAttention|EncDecAttention).*(q|k|v|o)$",
    r"model.layers.(1[0-9]|2[0-3]).mlp.(up|down)_proj",
    r"[^.]+\.layer\.\d{1,2}\.[\w.]+\.dense",
    r"encoder.layer.0.output.dense",
    r"(?:.*?)\.0\.(?:.+)query",
    r"",
]
NAMES = [
    "encoder.layer.0.attention.self.query",
    "encoder.layer.11.attention.self.value",
    "encoder.layer.0.output.dense",
    "model.layers.12.mlp.up_proj",
    "visual.blocks.0.attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "decoder.block.0.layer.1.EncDecAttention.q",
    "encoder_layer.0.output.dense",
    "pooler",
    "",
]


@pytest.mark.parametrize("pattern", REAL)
def test_real_patterns_match_what_they_match_in_python(pattern):
    ours = Pattern(pattern, "target_modules", Budget())
    for name in NAMES:
        assert ours.fullmatch(name) == (re.fullmatch(pattern, name) is not None), name
        assert ours.matches_tail(name) == (re.match(rf"(.*\.)?({pattern})$", name) is not None), name


pieces = st.sampled_from(["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", "[a-b.]", "(?=a)", "(?!b)", "^", "$", "a{1}"])
expressions = st.recursive(
    pieces,
    lambda inner: st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("({}|{})".format, inner, inner),
        st.builds("(?:{}){}".format, inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{,2}", "{2,}", "*?", "+?"])),
    ),
    max_leaves=6,
)


@hypothesis.given(expressions, st.text("ab.1", max_size=7))
@hypothesis.settings(max_examples=400, deadline=None, derandomize=True)
def test_agrees_with_python(pattern, name):
    ours = Pattern(pattern, "x", Budget())
    assert ours.fullmatch(name) == (re.fullmatch(pattern, name) is not None)
    assert ours.matches_tail(name) == (re.match(rf"(.*\.)?({pattern})$", name) is not None)


@pytest.mark.parametrize(
    "pattern",
    ["(a|a)*b", "(a+)+b", "(.*)*x", "(.*.*.*.*.*.*.*)*x", "(a?){60}a{60}", "((((a*)*)*)*)*b", "(a|aa)+$x", "(a{1,50}){1,50}b"],
)
def test_patterns_that_python_never_finishes(pattern):
    begin = time.monotonic()
    assert Pattern(pattern, "x", Budget()).fullmatch("a" * 60) == (pattern == "(a?){60}a{60}")
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        (r"(a)\1", r"'\\1', which is not supported"),
        (r"(?<=a)b", "look-behind"),
        (r"(?i)a", "flag"),
        (r"(?>a)b", "atomic"),
        (r"a*+b", "possessive"),
        (r"a{2}{3}", "possessive or doubled"),
        (r"\bquery", "not supported"),
        (r"*a", "nothing to repeat"),
        (r"^*a", "repeated anchor"),
        (r"a)", "closes nothing"),
        (r"(a", "not closed"),
        (r"[a", "class of characters"),
        (r"[z-a]", "class of characters"),
        ("a\\", "not supported"),
        (r"a{3,2}", "minimum is above"),
        ("(" * 40 + "a" + ")" * 40, "nested groups"),
        ("a" * 5000, "5000 characters"),
    ],
)
def test_what_is_refused_is_named(pattern, problem):
    with pytest.raises(ValueError, match=problem):
        Pattern(pattern, "target_modules", Budget())


def test_work_is_counted():
    budget = Budget(1000)
    with pytest.raises(ValueError, match="takes more work"):
        for _ in range(100):
            Pattern(".*a.*a.*", "x", budget).fullmatch("b" * 50)
