import re
import runpy
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]


def test_the_foreign_model_example_learns_and_fuses(capsys):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax and Flax as their users run them
        runpy.run_path(str(ROOT / "experiments" / "foreign_model.py"), run_name="__main__")
    scores = {
        line[:42].strip(): [float(number) for number in re.findall(r"\d\.\d{3}", line[42:])]
        for line in capsys.readouterr().out.splitlines()[1:]
    }
    assert len(scores) == 7
    for kind in ("LoRA", "linearized LoRA"):
        single = scores[f"{kind}, trained on 'even'"][0] + scores[f"{kind}, trained on 'above four'"][1]
        assert single > sum(scores["zero-shot"]) + 0.3
        assert sum(scores[f"{kind}, fused in weight space"]) > sum(scores["zero-shot"])
    assert scores["zero-shot"] == pytest.approx([0.5, 0.5], abs=0.25)
