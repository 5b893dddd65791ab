"""Writes what AdapterHub's library makes of a tiny BERT with bottleneck adapters, for tests/methods/test_bottleneck.py.

Run it in an environment of its own, because the library needs an older transformers than ours::

    pip install adapters==1.3.0 transformers==4.57.6 torch==2.13.0 safetensors
    python tests/golden/make_adapters.py

``adapters_bert.safetensors`` holds the base weights (``base/NAME``), the inputs (``ids``, ``mask``), and for each case the
adapters' weights (``CASE/NAME``) and the last hidden state (``CASE/output``), all under PyTorch's names. Its metadata has the
versions, the model's configuration, and for each case the adapters' configuration.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from pathlib import Path

import adapters
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

CONFIG = dict(
    vocab_size=29, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, max_position_embeddings=12
)  # fmt: skip
CASES = {
    "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=4),
    "houlsby_norm": adapters.DoubleSeqBnConfig(reduction_factor=4, non_linearity="gelu", ln_after=True),
    "pfeiffer": adapters.SeqBnConfig(reduction_factor=4),
    "pfeiffer_plain": adapters.SeqBnConfig(reduction_factor=4, original_ln_before=False),
    "parallel": adapters.ParBnConfig(reduction_factor=4),
}


def main() -> None:
    generator = torch.Generator().manual_seed(0)

    def randomize(name: str, parameter: torch.nn.Parameter) -> None:
        around = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        parameter.data = around + 0.3 * torch.randn(parameter.shape, generator=generator)

    base = BertModel(BertConfig(**CONFIG)).eval()
    for name, parameter in base.named_parameters():
        randomize(name, parameter)
    start = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    ids = torch.randint(1, CONFIG["vocab_size"], (2, 7), generator=generator)
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    tensors = {"ids": ids, "mask": mask} | {f"base/{name}": parameter for name, parameter in start.items()}
    for case, config in CASES.items():
        model = BertModel(BertConfig(**CONFIG)).eval()
        model.load_state_dict(start, strict=False)
        adapters.init(model)
        model.add_adapter("tested", config=config)
        model.set_active_adapters("tested")
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                randomize(name, parameter)
                tensors[f"{case}/{name}"] = parameter.detach().clone()
        with torch.no_grad():
            tensors[f"{case}/output"] = model(ids, attention_mask=mask).last_hidden_state.clone()
    metadata = {
        "versions": {name: importlib.metadata.version(name) for name in ("adapters", "transformers", "torch")},
        "config": CONFIG | {"model_type": "bert", "architectures": ["BertModel"]},
        "cases": {case: {"type": type(config).__name__, **dataclasses.asdict(config)} for case, config in CASES.items()},
    }
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        Path(__file__).with_name("adapters_bert.safetensors"),
        {name: json.dumps(value) for name, value in metadata.items()},
    )


if __name__ == "__main__":
    main()
