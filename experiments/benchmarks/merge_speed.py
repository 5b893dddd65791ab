"""How long fusing takes: our methods on low-rank pairs beside their dense route, and beside peft and fusion_bench.

    python experiments/benchmarks/merge_speed.py --part cores                     # d = 4096, r = 16, T = 8
    python experiments/benchmarks/merge_speed.py --part peers --fusion-bench-python PATH
    python experiments/benchmarks/merge_speed.py --quick                          # both, at small sizes

Part ``cores``: one d x d parameter changed by T adapters of rank r. The spectral methods fuse the pairs through their cores;
the dense route is the same method on the multiplied-out matrices. Both are compiled beforehand; the pairs' time is a median of
warm runs, the dense route runs once, and the difference between both results is measured. A method whose dense route has
several d x d SVDs can be left to ``--time-one``: then one SVD is timed, and its time is multiplied by their number: a lower
bound, which leaves no result to compare.

Part ``peers``: pairs of rank 16 on q, k, v and out of 24 layers of width 1024 (ViT-L/14), eight tasks, random and the same for
all. Ours: ``pf.fuse``. peft: ``add_weighted_adapter``, which fuses pairs into a pair of rank 16. fusion_bench (0.2.33, in an
environment of its own, on tensors from a file): its functions for state dicts, which are dense. Peers' methods that take many
SVDs are timed on ``--peer-layers`` layers and their time is multiplied up to all of them, and so is fusion_bench's TIES from a
quarter of the layers: all of them at once take more than 20 GB.

A name stands for one method, though the peers differ in what they return: a dense change, a pair of rank 16 ("to rank 16"), or
a pair whose factors were fused apart ("of A and B"). On a machine that is not ours alone set ``OPENBLAS_NUM_THREADS=1``: the
threads of JAX's LAPACK wait actively for each other and take a hundred times as long when they have to share a core.
Writes ``merge_speed.json`` beside this file (with ``--quick``: nothing).
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import pefusion_jax as pf
from pefusion_jax import fusion
from pefusion_jax.compression import compress
from pefusion_jax.deltas import Delta, LowRank
from pefusion_jax.files import write_atomically
from pefusion_jax.interop.safetensors import save_safetensors

DENSITY, RANK, MODULES = 0.2, 16, ("q", "k", "v", "out")

# What fusion_bench does, in a process of its own: FILE with "TASK/NAME.a|b" -> seconds by method.
PEER = """
import contextlib, io, json, sys, time, torch
from safetensors.torch import load_file
from fusion_bench.method.dare.utils import module_random_drop_
from fusion_bench.method.isotropic_merging.iso_utils import iso_c
from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction
from fusion_bench.method.ties_merging.ties_merging_utils import state_dict_to_vector, ties_merging, vector_to_state_dict
from fusion_bench.utils.state_dict_arithmetic import state_dict_avg, state_dict_mul, state_dict_sum
stored, (tasks, layers, few), density = load_file(sys.argv[1]), map(int, sys.argv[2:5]), float(sys.argv[5])
names = sorted({key.split("/", 1)[1][:-2] for key in stored})
dense = [{n: stored[f"{t}/{n}.a"] @ stored[f"{t}/{n}.b"] for n in names} for t in range(tasks)]
def of_layers(count):
    return [{n: x for n, x in tree.items() if int(n.split(".")[1]) < count} for tree in dense]
some, part = of_layers(few), max(1, layers // 4)
def ties(trees):
    flat = torch.stack([state_dict_to_vector(tree) for tree in trees])
    return vector_to_state_dict(ties_merging(flat, reset_thresh=100 * density, merge_func="mean"), trees[0])
def dare(trees):
    trees = [dict(tree) for tree in trees]
    for tree in trees:
        for n in tree:
            tree[n] = torch.nn.Parameter(tree[n].clone(), requires_grad=False)
        module_random_drop_(tree, 1 - density, rescale=True)
    return state_dict_sum(trees)
out = {}
def timed(name, call, trees, factor=1.0):
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        fused = call(trees)
    out[name] = {"seconds": factor * (time.perf_counter() - start), "norm": float(fused[names[0]].float().norm())}
timed("average", state_dict_avg, dense)
timed("task_arithmetic", lambda trees: state_dict_mul(state_dict_sum(trees), 0.3), dense)
timed("ties", ties, of_layers(part), layers / part)
timed("dare", dare, dense)
timed("tsv_m", lambda trees: compute_and_sum_svd_mem_reduction(trees, accelerator="cpu"), some, layers / few)
timed("iso_c", lambda trees: iso_c(trees, accelerator="cpu"), some, layers / few)
print(json.dumps(out))
"""


def median(call, repetitions):
    """Median seconds of warm calls."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def once(compiled, *args):
    """Seconds of the only call of a program compiled before, and its result."""
    start = time.perf_counter()
    result = jax.block_until_ready(compiled(*args))
    return time.perf_counter() - start, result


def random_pairs(rng, names, tasks, width):
    """Task -> Delta of pairs of rank 16, the tasks of different sizes."""

    def pair(size):
        a, b = rng.normal(size=(width, RANK)), rng.normal(size=(RANK, width))
        return LowRank(jnp.asarray(a, jnp.float32), jnp.asarray(b * size / width, jnp.float32), (width, width))

    return {f"t{t}": Delta({name: pair(1 + t / tasks) for name in names}) for t in range(tasks)}


def cores(width, tasks, chosen, time_one, repetitions):
    """Method -> seconds through the cores and densely, their ratio, and the relative difference of the results."""
    given = random_pairs(np.random.default_rng(0), ["w"], tasks, width)
    stacked = {"w": jnp.stack([delta.leaves["w"].dense() for delta in given.values()])}
    # The number of SVDs of the parameter's size that the dense route takes.
    methods = {
        "iso_c": (fusion.iso_c(), 1),
        "knots": (fusion.knots(fusion.task_arithmetic(1.0)), 1),
        "core_space": (fusion.core_space(isotropize=True), 3),
        "tsv_m": (fusion.tsv_m(), tasks + 2),
        "iso_cts": (fusion.iso_cts(), tasks + 3),
    }
    svd_seconds = None
    if set(time_one) & set(chosen):
        program = jax.jit(lambda x: jnp.linalg.svd(x, full_matrices=False)).lower(stacked["w"][0]).compile()
        svd_seconds = once(program, stacked["w"][0])[0]
    out = {}
    for name in chosen:
        method, svds = methods[name]
        low = jax.jit(lambda trees, method=method: pf.fuse(method, trees))
        row = {"pairs_seconds": median(lambda low=low: low(given), repetitions), "svds": svds}
        if name in time_one:
            row |= {"dense_seconds": svds * svd_seconds, "dense": f"one SVD took {svd_seconds:.1f} s, times {svds}"}
        else:
            program = jax.jit(method.apply).lower(stacked).compile()
            row["dense_seconds"], dense = once(program, stacked)
            error = jnp.linalg.norm(low(given).leaves["w"].dense() - dense["w"]) / jnp.linalg.norm(dense["w"])
            row |= {"dense": "run once", "relative_difference": float(error)}
        row["speedup"] = row["dense_seconds"] / row["pairs_seconds"]
        out[name] = row
        print(
            f"{name:12} pairs {row['pairs_seconds'] * 1000:9.1f} ms   dense {row['dense_seconds']:8.2f} s   "
            f"{row['speedup']:8.0f} x   difference {row.get('relative_difference', float('nan')):.1e}   ({row['dense']})",
            flush=True,
        )
    return out


def ours(given, repetitions):
    """Method -> seconds."""

    def linear_rank(method):
        return lambda trees: compress(pf.fuse(method, trees), RANK).delta

    ties, dare = fusion.ties(DENSITY, trim="per_tensor"), fusion.dare(DENSITY)
    calls = {
        "average": lambda trees: pf.fuse(fusion.average(), trees),
        "task_arithmetic": lambda trees: pf.fuse(fusion.task_arithmetic(0.3), trees),
        "svd": lambda trees: pf.fuse(fusion.svd(RANK), trees),
        "tsv_m": lambda trees: pf.fuse(fusion.tsv_m(), trees),
        "iso_c": lambda trees: pf.fuse(fusion.iso_c(), trees),
        "ties": lambda trees: pf.fuse(fusion.ties(DENSITY), trees),
        "dare": lambda trees: pf.fuse(dare, trees),
        "ties to rank 16": linear_rank(ties),
        "dare to rank 16": linear_rank(dare),
        "ties of cores": lambda trees: pf.fuse(fusion.core_space(ties), trees),
    }
    out = {}
    for name, call in calls.items():
        program = jax.jit(call)
        few = 1 if name.endswith("rank 16") else repetitions
        out[name] = {"seconds": median(lambda program=program: program(given), few)}
        print(f"pefusion_jax  {name:20} {out[name]['seconds']:9.3f} s", flush=True)
    return out


def of_peft(arrays, names, layers, tasks, width, few):
    """peft's combination type -> seconds; None where peft is not installed."""
    import peft
    import torch

    def model(layers):
        blocks = (torch.nn.ModuleDict({name: torch.nn.Linear(width, width) for name in MODULES}) for _ in range(layers))
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(MODULES))
        wrapped = peft.get_peft_model(torch.nn.Sequential(*blocks), config, adapter_name="t0")
        for t in range(1, tasks):
            wrapped.add_adapter(f"t{t}", config)
        state = wrapped.state_dict()
        with torch.no_grad():
            for t in range(tasks):
                for name in names:
                    layer = name.split(".", 1)[1]
                    for factor, key in (("a", "lora_A"), ("b", "lora_B")):
                        target = state.get(f"base_model.model.{layer}.{key}.t{t}.weight")
                        if target is not None:
                            target.copy_(torch.from_numpy(arrays[f"{t}/{name}.{factor}"].T.copy()))
        return wrapped

    whole, part, out = model(layers), model(few), {}
    for name, kind, slow, options in (
        ("average", "cat", False, {}),
        ("task_arithmetic", "cat", False, {}),
        ("ties of A and B", "ties", False, {"density": DENSITY}),
        ("dare of A and B", "dare_linear", False, {"density": DENSITY}),
        ("svd", "svd", True, {"svd_rank": RANK}),
        ("ties to rank 16", "ties_svd", True, {"svd_rank": RANK, "density": DENSITY}),
        ("dare to rank 16", "dare_linear_svd", True, {"svd_rank": RANK, "density": DENSITY}),
    ):
        on = part if slow else whole
        weight = 1 / tasks if name == "average" else 0.3 if name == "task_arithmetic" else 1.0
        start = time.perf_counter()
        on.add_weighted_adapter([f"t{t}" for t in range(tasks)], [weight] * tasks, "fused", combination_type=kind, **options)
        seconds = (time.perf_counter() - start) * (layers / few if slow else 1)
        on.delete_adapter("fused")
        out[name] = {"seconds": seconds, "combination_type": kind, "timed_on_layers": few if slow else layers}
        print(f"peft          {name:20} {seconds:9.3f} s   ({kind})", flush=True)
    return out


def peers(width, layers, tasks, few, python, repetitions):
    """The same random tensors through all of them."""
    names = [f"layers.{layer}.{module}" for layer in range(layers) for module in MODULES]
    given = random_pairs(np.random.default_rng(1), [name.replace(".", "/") + "/kernel" for name in names], tasks, width)
    arrays = {}
    for t, delta in enumerate(given.values()):
        for name, pair in zip(names, delta.leaves.values(), strict=True):
            arrays |= {f"{t}/{name}.a": np.asarray(pair.a), f"{t}/{name}.b": np.asarray(pair.b)}
    out = {}
    norms = {
        method: float(jnp.linalg.norm(pf.deltas.dense(pf.fuse(made, first).leaves["w"])))
        for first in [{name: Delta({"w": delta.leaves["layers/0/k/kernel"]}) for name, delta in given.items()}]
        for method, made in (
            ("average", fusion.average()),
            ("task_arithmetic", fusion.task_arithmetic(0.3)),
            ("tsv_m", fusion.tsv_m()),
            ("iso_c", fusion.iso_c()),
        )
    }
    if python is not None:  # first, while this process holds little memory
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "pairs.safetensors"
            save_safetensors(file, arrays)
            command = [python, "-c", PEER, file, tasks, layers, few, DENSITY]
            done = subprocess.run(
                [os.fspath(part) if isinstance(part, Path) else str(part) for part in command], capture_output=True
            )
        if done.returncode:
            raise OSError(f"fusion_bench ended with {done.returncode} in {python}:\n{done.stderr.decode()[-2000:]}")
        out["fusion_bench"] = json.loads(done.stdout.decode().splitlines()[-1])
        for name, row in out["fusion_bench"].items():
            row["norm_of_ours"] = norms.get(name)
            row["timed_on_layers"] = few if name in ("tsv_m", "iso_c") else max(1, layers // 4) if name == "ties" else layers
            said = "" if norms.get(name) is None else f"   norm of one matrix {row['norm']:.5f}, ours {norms[name]:.5f}"
            print(f"fusion_bench  {name:20} {row['seconds']:9.3f} s{said}", flush=True)
    out["pefusion_jax"], out["peft"] = ours(given, repetitions), of_peft(arrays, names, layers, tasks, width, few)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("cores", "peers", "both"), default="both")
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing written")
    parser.add_argument("--width", type=int, default=4096, help="of part cores")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--methods", nargs="+", default=["iso_c", "knots", "core_space", "tsv_m", "iso_cts"])
    parser.add_argument("--time-one", nargs="*", default=[], help="methods of part cores whose dense route is not run")
    parser.add_argument("--fusion-bench-python", help="interpreter of an environment with fusion-bench")
    parser.add_argument("--peer-layers", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    result = json.loads(options.out.read_text()) if options.out.exists() and not options.quick else {}
    if options.part != "peers":
        width = 512 if options.quick else options.width
        rows = cores(width, options.tasks, options.methods, options.time_one, options.repetitions)
        known = {"width": width, "rank": RANK, "tasks": options.tasks}
        earlier = result.get("cores", {})
        if {name: earlier.get(name) for name in known} == known:
            rows = earlier["methods"] | rows  # methods may be run one by one
        result["cores"] = known | {"methods": rows}
    if options.part != "cores":
        width, layers = (256, 2) if options.quick else (1024, 24)
        rows = peers(width, layers, options.tasks, options.peer_layers, options.fusion_bench_python, options.repetitions)
        result["peers"] = {"width": width, "layers": layers, "rank": RANK, "tasks": options.tasks, "methods": rows}
    result |= {
        "device": jax.devices()[0].device_kind,
        "cpu_cores": os.cpu_count(),
        "openblas_threads": os.environ.get("OPENBLAS_NUM_THREADS"),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "torch", "peft")},
    }
    if not options.quick:
        write_atomically(options.out, (json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
