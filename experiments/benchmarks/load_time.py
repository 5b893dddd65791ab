"""Loads MPNet-base (438 MB) into JAX arrays, beside transformers and torch in the same run.

    python experiments/fetch_models.py sentence-transformers/all-mpnet-base-v2
    python experiments/benchmarks/load_time.py        # needs torch and transformers

All read the same folder from a warm page cache:

- ``pefusion_jax``: ``pf.load_pretrained``: every header and value checked, linear weights transposed, all in JAX arrays;
- ``transformers``: ``AutoModel.from_pretrained``. It maps the file into memory and reads none of it (the rise of its peak
  memory shows that), so the work is put off to the first use;
- ``transformers, read``: the same, and every parameter added up once;
- ``transformers, to JAX``: the same model with its parameters brought into the very JAX arrays that ``pf.load_pretrained``
  returns, which is how one gets there without us.

Rounds alternate; the figures are ratios of medians. Then one fresh process each measures how far its peak memory rises above
what it held after loading a tiny model (imports, thread pools). Writes ``load_time.json`` beside this file.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import pefusion_jax as pf
from pefusion_jax.backbones import MPNet, MPNetConfig, mpnet
from pefusion_jax.backbones.family import params_from_hf
from pefusion_jax.files import write_atomically
from pefusion_jax.interop import locate
from pefusion_jax.interop.pretrained import open_checkpoint

OURS = """
import jax, pefusion_jax as pf
def load(path):
    return jax.block_until_ready(pf.load_pretrained(path)[1])
"""
THEIRS = """
import transformers
transformers.logging.set_verbosity_error()
def load(path):
    return transformers.AutoModel.from_pretrained(path)
"""
PEAK = """
def read(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
tiny = load({tiny!r})
before = read("VmHWM")
model = load({folder!r})
print(read("VmHWM") - before)
"""


def seconds(load, folder):
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    result = load(folder)
    taken = time.perf_counter() - start
    del result
    return taken


def peak(setup, tiny, folder):
    """Bytes by which the peak of a fresh process rises while it loads ``folder``."""
    code = setup + PEAK.format(tiny=os.fspath(tiny), folder=os.fspath(folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-mpnet-base-v2")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    folder = locate(options.model).path
    config = open_checkpoint(folder).config

    def ours(path):
        return jax.block_until_ready(pf.load_pretrained(path)[1])

    def theirs(path):
        return transformers.AutoModel.from_pretrained(path)

    def read(path):
        model = theirs(path)
        return sum(float(parameter.detach().sum()) for parameter in model.parameters())

    def to_jax(path):
        arrays = {name: tensor.numpy() for name, tensor in theirs(path).state_dict().items()}
        return jax.block_until_ready(jax.tree.map(jax.device_put, params_from_hf(mpnet.FAMILY, arrays, config)))

    loads = {"pefusion_jax": ours, "transformers": theirs, "transformers, read": read, "transformers, to JAX": to_jax}
    for load in loads.values():  # imports, page cache
        load(folder)
    times = {name: [] for name in loads}
    for _ in range(options.rounds):
        for name, load in loads.items():
            times[name].append(seconds(load, folder))
    medians = {name: statistics.median(values) for name, values in times.items()}

    params = pf.load_pretrained(folder)[1]
    jax.tree.map(np.testing.assert_array_equal, to_jax(folder), params)
    leaves = jax.tree.leaves(params)
    model_bytes, largest = sum(leaf.nbytes for leaf in leaves), max(leaf.nbytes for leaf in leaves)
    with tempfile.TemporaryDirectory() as scratch:
        small = MPNet(MPNetConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
        shapes = jax.eval_shape(small.init, jax.random.key(0), np.ones((1, 2), np.int32))["params"]
        tiny = Path(scratch) / "tiny"
        pf.save_pretrained(tiny, small, jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes))
        peaks = {"pefusion_jax": peak(OURS, tiny, folder), "transformers": peak(THEIRS, tiny, folder)}
    result = {
        "model": options.model,
        "model_bytes": model_bytes,
        "largest_tensor_bytes": largest,
        "median_seconds": medians,
        "ratio_to": {name: medians["pefusion_jax"] / median for name, median in medians.items() if name != "pefusion_jax"},
        "all_seconds": times,
        "peak_rise_bytes": peaks,
        "peak_beyond_model_and_largest_tensor_bytes": peaks["pefusion_jax"] - model_bytes - largest,
        "device": jax.devices()[0].device_kind,
        "cpu_cores": os.cpu_count(),
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    write_atomically(options.out, (json.dumps(result, indent=2) + "\n").encode())
    for name, median in medians.items():
        print(f"{name:22} {median * 1000:8.0f} ms   ours takes {medians['pefusion_jax'] / median:.2f} of it")
    for name, rise in peaks.items():
        print(f"{name:22} peak memory rises by {rise / 1e6:.1f} MB")
    beyond = result["peak_beyond_model_and_largest_tensor_bytes"] / 1e6
    print(f"model {model_bytes / 1e6:.1f} MB, largest tensor {largest / 1e6:.1f} MB; our peak beyond both: {beyond:.1f} MB")


if __name__ == "__main__":
    main()
