"""Every subset of four tasks at 21 coefficients: arithmetic on cached outputs against running the model.

    python experiments/benchmarks/exact_sweep.py

Four network-linearized LoRAs of MiniLM are trained briefly. Then the 15 subsets x 21 coefficients = 315
points are scored on the four validation sets: by ``cache_outputs`` + ``sweep``, and by ``sweep_trees``, which
fuses and runs the model at each point, compiled once. The second way is timed on a random sample of the
points and multiplied up, since every point costs the same. Both ways are timed warm; times of the first run,
with compilation, are given too. Writes ``exact_sweep.json`` beside this file.
"""

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path

import jax
import numpy as np

import pefusion_jax as pf
from pefusion_jax.evaluation import cache_outputs, subset_grid, sweep, sweep_trees
from pefusion_jax.files import write_atomically
from pefusion_jax.tasks import embedded_tasks


def timed(function):
    """Result and seconds."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--tasks", nargs=4, default=["genre", "intents", "spam", "supersense"])
    parser.add_argument("--examples", type=int, default=64, help="validation examples of each task")
    parser.add_argument("--steps", type=int, default=10, help="training steps of each adapter")
    parser.add_argument("--sample", type=int, default=10, help="points that are timed the ordinary way")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()

    model, params = pf.load_pretrained(options.model)
    tokenizer = pf.load_tokenizer(options.model)
    tasks = [
        dataclasses.replace(task, validation=task.validation[: options.examples])
        for task in embedded_tasks(model, params, tokenizer, names=options.tasks)
    ]
    lora = pf.adapt(model, pf.LoRA(rank=16, alpha=32, targets=r".*/(query|value)"))
    inputs = pf.tasks.train_batch(tasks[0], 0, 16, 0)["inputs"]
    linear = pf.linearize(lora, lora.init(jax.random.key(0), params, **inputs))
    taus = {
        task.name: pf.finetune(linear, params, task, steps=options.steps, learning_rate=3e-3, progress=False) for task in tasks
    }

    grid = subset_grid(len(tasks), np.linspace(0.0, 1.0, 21))
    sample = grid[np.sort(np.random.default_rng(0).choice(len(grid), options.sample, replace=False))]

    def exact():
        cached = cache_outputs(linear, params, taus, tasks)
        return cached, sweep(cached, tasks, grid)

    def ordinary(points):
        return sweep_trees(linear, params, lambda c: pf.fuse(pf.fusion.task_arithmetic(c), taus), points, tasks)

    (cached, scores), first_exact = timed(exact)
    _, first_point = timed(lambda: ordinary(sample[:1]))
    # Alternating, so that both see the same machine.
    warm_exact, warm_points = [], []
    for part in np.array_split(sample, min(3, len(sample))):
        warm_exact.append(timed(exact)[1])
        (measured, seconds) = timed(lambda part=part: ordinary(part))
        warm_points.append((len(part), seconds, measured))
    _, arithmetic = timed(lambda: sweep(cached, tasks, grid))

    per_point = sum(seconds for _, seconds, _ in warm_points) / len(sample)
    exact_seconds = float(np.median(warm_exact))
    rows = [int(np.flatnonzero((grid == point).all(axis=1))[0]) for point in sample]
    difference = np.abs(scores[rows] - np.concatenate([measured for _, _, measured in warm_points])).max()
    result = {
        "points": len(grid),
        "tasks": [task.name for task in tasks],
        "examples": {task.name: len(task.validation) for task in tasks},
        "model": options.model,
        "exact_seconds": exact_seconds,
        "exact_seconds_of_which_arithmetic": arithmetic,
        "exact_forwards_over_each_task": cached.forwards // len(tasks),
        "ordinary_seconds_a_point": per_point,
        "ordinary_seconds_extrapolated": per_point * len(grid),
        "ordinary_points_measured": len(sample),
        "ratio": per_point * len(grid) / exact_seconds,
        "first_run_with_compilation": {
            "exact_seconds": first_exact,
            "ordinary_first_point_seconds": first_point,
        },
        "largest_difference_of_scores": float(difference),
        "device": jax.devices()[0].device_kind,
        "cpu_cores": os.cpu_count(),
        "jax": jax.__version__,
    }
    write_atomically(options.out, (json.dumps(result, indent=2) + "\n").encode())

    sizes, passes = ", ".join(str(len(task.validation)) for task in tasks), cached.forwards // len(tasks)
    print(f"{len(grid)} points x {len(tasks)} tasks of {sizes} examples")
    print(f"exact sweep               {exact_seconds:9.2f} s   ({passes} forward passes over each task)")
    print(f"  of which arithmetic     {arithmetic:9.2f} s")
    print(
        f"every point on its own    {per_point * len(grid):9.2f} s   "
        f"(extrapolated from {len(sample)} points at {per_point:.2f} s)"
    )
    print(f"ratio                     {result['ratio']:9.1f}")
    print(f"largest difference of scores on the sample: {difference:.2g}")


if __name__ == "__main__":
    main()
