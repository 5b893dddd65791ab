"""Merges four Llama-shaped bfloat16 models file to file, beside a plain copy and beside mergekit in the same run.

    python experiments/benchmarks/merge_files.py --gigabytes 2 --mergekit-python PATH    # a Python that has mergekit 0.1.5

Makes a base and four random models in a temporary folder (checked for room, removed at the end) and times, in alternating
rounds, each from a cold page cache where the system lets us drop it, and each until its last byte is on the disk:

- ``copy``: the four models copied file by file (``cp``, then ``fsync``);
- ``pefusion``: ``pefusion merge`` of the recipes ``linear`` (four models) and ``ties`` (base and four models, density 0.5), as
  processes of their own, with imports, digests of what is written, manifest and card;
- ``mergekit``: ``mergekit-yaml`` with the same recipes, and an ``fsync``.

The speed of a copy is (bytes read + bytes written) / second; a merge's is counted alike (it writes a fourth or fifth of what it
reads). Peak memory is the process's ``VmHWM`` less that of a process which has only merged a tiny model. Tensors of both
tools are compared. Writes ``merge_files.json`` beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from pefusion_jax.files import write_atomically
from pefusion_jax.interop.safetensors import load_safetensors, read_header, write_safetensors

WIDTH, FFN, VOCAB = 2048, 5632, 32000  # TinyLlama's; the number of layers makes the size
TASKS = ("one", "two", "three", "four")
OURS = """
import sys
from pefusion_jax.cli import main
code = main(["merge", sys.argv[1], sys.argv[2], "--overwrite"])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
raise SystemExit(code)
"""
THEIRS = """
import sys
from mergekit.scripts.run_yaml import main
try:
    main([sys.argv[1], sys.argv[2], "--no-copy-tokenizer", "--quiet"], standalone_mode=False)
finally:
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
"""


def recipe(method, folder):
    if method == "linear":
        return {
            "merge_method": "linear",
            "models": [{"model": str(folder / task), "parameters": {"weight": 0.25}} for task in TASKS],
            "dtype": "float32",
            "out_dtype": "bfloat16",
        }
    return {
        "merge_method": "ties",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / task), "parameters": {"weight": 0.5, "density": 0.5}} for task in TASKS],
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }


def make_models(folder, layers, width, ffn, vocab):
    """A base and four models beside it; changes of a quarter of the weights, so that few magnitudes are tied in bfloat16.

    Which of the tied ones are kept is arbitrary in mergekit.
    """
    kinds = {"model.embed_tokens.weight": (vocab, width), "lm_head.weight": (vocab, width), "model.norm.weight": (width,)}
    for layer in range(layers):
        node = f"model.layers.{layer}"
        kinds |= {f"{node}.self_attn.{part}_proj.weight": (width if part in "qo" else width // 8, width) for part in "qkvo"}
        kinds |= {f"{node}.mlp.{part}_proj.weight": (ffn, width) for part in ("gate", "up")}
        kinds[f"{node}.mlp.down_proj.weight"] = (width, ffn)
        kinds |= {f"{node}.{part}_layernorm.weight": (width,) for part in ("input", "post_attention")}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "intermediate_size": ffn,
        "vocab_size": vocab, "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": width // 32, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    for number, model in enumerate(("base", *TASKS)):

        def make(name, number=number):
            place = sorted(kinds).index(name)
            leaf = 0.02 * np.random.default_rng([0, place]).standard_normal(kinds[name], np.float32)
            if number:
                leaf += 0.005 * np.random.default_rng([number, place]).standard_normal(kinds[name], np.float32)
            return leaf.astype(bfloat16)

        (folder / model).mkdir()
        write_safetensors(folder / model / "model.safetensors", {n: (bfloat16, s) for n, s in kinds.items()}, make)
        (folder / model / "config.json").write_text(json.dumps(config))
    return sum(int(np.prod(shape)) * 2 for shape in kinds.values())


def forget(folder):
    """Drops the files below a folder from the page cache."""
    for path in folder.rglob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def settle(folder):
    for path in folder.rglob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def copy(folder, out):
    start = time.perf_counter()
    out.mkdir()
    for task in TASKS:
        subprocess.run(["cp", "-r", str(folder / task), str(out / task)], check=True)
    settle(out)
    return time.perf_counter() - start


def run(python, code, config, out):
    """Seconds, and the peak of a process's memory in bytes."""
    start = time.perf_counter()
    done = subprocess.run([python, "-c", code, str(config), str(out)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    settle(out)
    return time.perf_counter() - start, 1024 * int(done.stderr.split()[-1])


def difference(first, second):
    """How two folders' tensors differ: the share of entries that are not the same bits, and the largest difference."""
    other, entries, unequal, largest = {}, 0, 0, 0.0
    for file in second.glob("*.safetensors"):
        other |= dict.fromkeys(read_header(file), file)
    for file in first.glob("*.safetensors"):
        for name in read_header(file):
            a, b = load_safetensors(file, [name])[name], load_safetensors(other[name], [name])[name]
            entries += a.size
            unequal += int(np.count_nonzero(a.view(np.uint16) != b.view(np.uint16)))
            largest = max(largest, float(np.abs(a.astype(np.float32) - b.astype(np.float32)).max()))
    return {"entries": entries, "unequal_share": unequal / entries, "largest_difference": largest}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of each model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["linear", "ties"], choices=["linear", "ties"])
    parser.add_argument("--mergekit-python", help="a Python interpreter that has mergekit")
    parser.add_argument("--mergekit-rounds", type=int, default=1)
    parser.add_argument("--scratch", type=Path, help="where to make the models; the system's temporary folder if not given")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()
    small = given.gigabytes < 0.5
    width, ffn, vocab = (512, 1408, 8000) if small else (WIDTH, FFN, VOCAB)
    per_layer = 2 * (2 * width**2 + 2 * width * width // 8 + 3 * width * ffn + 2 * width)
    layers = max(1, round((given.gigabytes * 1e9 - 4 * vocab * width) / per_layer))
    free = shutil.disk_usage(given.scratch or tempfile.gettempdir()).free
    if free < 13 * given.gigabytes * 1e9:
        parser.error(f"{free / 1e9:.1f} GB are free, but {13 * given.gigabytes:.1f} GB are needed; name another --scratch")
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        folder = Path(scratch) / "models"
        folder.mkdir()
        size = make_models(folder, layers, width, ffn, vocab)
        tiny = Path(scratch) / "tiny"
        tiny.mkdir()
        make_models(tiny, 1, 64, 96, 128)
        result = {
            "models": len(TASKS), "bytes_of_each": size, "parameters_of_each": size // 2, "cpus": os.cpu_count(),
            "processor": platform.processor() or platform.machine(), "load_before": os.getloadavg()[0], "merges": {},
        }  # fmt: skip
        copies = []
        times: dict[str, dict[str, list[float]]] = {method: {"pefusion": [], "mergekit": []} for method in given.methods}
        peaks: dict[str, dict[str, list[int]]] = {method: {"pefusion": [], "mergekit": []} for method in given.methods}
        pythons = {"pefusion": (sys.executable, OURS), "mergekit": (given.mergekit_python, THEIRS)}
        floors = {}
        for tool, (python, code) in pythons.items():
            if python:
                config = Path(scratch) / "tiny.yml"
                config.write_text(json.dumps(recipe("linear", tiny)))
                floors[tool] = run(python, code, config, Path(scratch) / f"tiny_{tool}")[1]
        for number in range(given.rounds):
            forget(folder)
            copies.append(copy(folder, Path(scratch) / "copy"))
            shutil.rmtree(Path(scratch) / "copy")
            for method in given.methods:
                config = Path(scratch) / f"{method}.yml"
                config.write_text(json.dumps(recipe(method, folder)))
                for tool, (python, code) in pythons.items():
                    if python and (tool == "pefusion" or number < given.mergekit_rounds):
                        out = Path(scratch) / f"{method}_{tool}"
                        shutil.rmtree(out, ignore_errors=True)
                        forget(folder)
                        taken, peak = run(python, code, config, out)
                        times[method][tool].append(taken)
                        peaks[method][tool].append(peak)
                        print(f"round {number}: {method} {tool} {taken:.2f} s, peak {peak / 1e9:.2f} GB", flush=True)
            print(f"round {number}: copy {copies[-1]:.2f} s", flush=True)
        speed = 2 * len(TASKS) * size / statistics.median(copies)
        result["copy"] = {"seconds": copies, "bytes_per_second": speed}
        for method in given.methods:
            moved = (len(TASKS) + 1 + (method == "ties")) * size
            entry = result["merges"][method] = {}
            for tool in pythons:
                if times[method][tool]:
                    seconds = statistics.median(times[method][tool])
                    entry[tool] = {
                        "seconds": times[method][tool],
                        "bytes_per_second": moved / seconds,
                        "share_of_copy_speed": moved / seconds / speed,
                        "peak_bytes_above_a_tiny_merge": max(peaks[method][tool]) - floors[tool],
                        "peak_bytes": max(peaks[method][tool]),
                    }
            if "mergekit" in entry:
                entry["time_ratio"] = statistics.median(times[method]["pefusion"]) / statistics.median(
                    times[method]["mergekit"]
                )
                entry["difference"] = difference(Path(scratch) / f"{method}_pefusion", Path(scratch) / f"{method}_mergekit")
        result["load_after"] = os.getloadavg()[0]
    write_atomically(given.out, (json.dumps(result, indent=2) + "\n").encode())
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
