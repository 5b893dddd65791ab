"""Every subset of seven tasks at 21 coefficients, and the best coefficients of all: cached outputs against running the model.

    python experiments/benchmarks/exact_sweep.py               # MiniLM, the ordinary way on a sample
    python experiments/benchmarks/exact_sweep.py --tiny        # a two-layer model, the ordinary way at every point

Seven network-linearized LoRAs are trained briefly: the six embedded tasks, and one of them once more on other examples. Their
heads are linear, fitted to the base model's features. Then the 120 subsets of two and more x 21 coefficients = 2,520 points are
scored on the seven validation sets: by ``cache_outputs`` + ``sweep``, T + 1 = 8 forward passes over each set, and by
``sweep_trees``, which fuses and runs the model at each point, compiled once. For MiniLM the second way is timed on a random
sample of the points and multiplied up, since every point costs the same.

After that ``best_combination`` finds the best coefficients on the same cache, beside the time of one evaluation pass, and
``solve_subsets`` those of all 120 subsets. Times are of warm programs; those of the first run, with compilation, are given too.
Writes ``exact_sweep.json`` (or ``exact_sweep_tiny.json``) beside this file.
"""

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import pefusion_jax as pf
from pefusion_jax.backbones import Bert, BertConfig
from pefusion_jax.evaluation import best_combination, cache_outputs, evaluate, solve_subsets, subset_grid, sweep, sweep_trees
from pefusion_jax.files import write_atomically
from pefusion_jax.tasks import embedded_tasks

TASKS = ("bible", "genre", "intents", "spam", "supersense", "wic")


def timed(function):
    """Result and seconds."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def median_time(function, count=3):
    return float(np.median([timed(function)[1] for _ in range(count)]))


def tiny_model(tokenizer):
    """A random two-layer BERT with the tokenizer's vocabulary."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        pooler=False,
    )
    model = Bert(config)
    ids = jnp.ones((1, 4), jnp.int32)
    return model, model.init(jax.random.key(0), ids, attention_mask=ids)["params"]


def seven_tasks(model, params, tokenizer, examples, twice):
    """The embedded tasks, and one of them with the other half of its training and validation examples."""
    tasks = embedded_tasks(model, params, tokenizer, names=TASKS, head="linear")
    out = [dataclasses.replace(task, validation=task.validation[:examples]) for task in tasks]
    task = tasks[TASKS.index(twice)]
    half = len(task.train) // 2
    other = dataclasses.replace(task, name=f"{twice}-other", train=task.train[half:], validation=task.validation[-examples:])
    return [*out, other]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--tiny", action="store_true", help="a two-layer model with random weights; every point both ways")
    parser.add_argument("--examples", type=int, help="validation examples of each task (default: 64, tiny: 16)")
    parser.add_argument("--steps", type=int, default=10, help="training steps of each adapter")
    parser.add_argument("--sample", type=int, default=6, help="points that are run the ordinary way; tiny runs all of them")
    parser.add_argument("--out", type=Path, help="the JSON file")
    options = parser.parse_args()
    out = options.out or Path(__file__).with_name("exact_sweep_tiny.json" if options.tiny else "exact_sweep.json")

    tokenizer = pf.load_tokenizer(options.model)
    model, params = tiny_model(tokenizer) if options.tiny else pf.load_pretrained(options.model)
    examples = options.examples or (16 if options.tiny else 64)
    batch = min(64, examples)  # no row only fills up a batch
    tasks = seven_tasks(model, params, tokenizer, examples, "genre")
    lora = pf.adapt(
        model, pf.LoRA(rank=4 if options.tiny else 16, alpha=8 if options.tiny else 32, targets=r".*/(query|value)")
    )
    inputs = pf.tasks.train_batch(tasks[0], 0, 16, 0)["inputs"]
    linear = pf.linearize(lora, lora.init(jax.random.key(0), params, **inputs))
    taus = {
        task.name: pf.finetune(linear, params, task, steps=options.steps, learning_rate=3e-3, progress=False) for task in tasks
    }

    values = np.linspace(0.0, 1.0, 21)
    grid = subset_grid(len(tasks), values)[len(tasks) * len(values) :]  # without the single tasks
    rows = np.arange(len(grid))
    if not options.tiny:
        rows = np.sort(np.random.default_rng(0).choice(len(grid), options.sample, replace=False))

    fused_at = jax.jit(lambda c, taus: pf.fuse(pf.fusion.task_arithmetic(c), taus))

    def exact():
        cached = cache_outputs(linear, params, taus, tasks, batch_size=batch)
        return cached, sweep(cached, tasks, grid)

    def ordinary(points):
        # The tiny model's time is all overhead, which several points share.
        return sweep_trees(
            linear, params, lambda c: fused_at(c, taus), points, tasks, batch_size=batch, at_once=20 if options.tiny else 1
        )

    (cached, scores), first_exact = timed(exact)
    _, first_point = timed(lambda: ordinary(grid[rows[:1]]))
    exact_seconds = median_time(exact)
    measured, ordinary_seconds = timed(lambda: ordinary(grid[rows]))
    arithmetic = median_time(lambda: sweep(cached, tasks, grid))

    one_pass = median_time(lambda: evaluate(linear, params, taus[tasks[0].name], tasks, split="validation", batch_size=batch))
    best, first_best = timed(lambda: best_combination(cached, tasks))
    best_seconds = median_time(lambda: best_combination(cached, tasks))
    whole_grid = best_combination(cached, tasks, grid=grid)  # may choose the subset too
    subsets, subsets_seconds = timed(lambda: solve_subsets(cached, tasks, sizes=range(2, 8), over="all"))
    fused = pf.fuse(pf.fusion.task_arithmetic(best.by_name()), taus)

    per_point = ordinary_seconds / len(rows)
    passes = cached.forwards // len(tasks)
    result = {
        "points": len(grid),
        "tasks": [task.name for task in tasks],
        "examples": {task.name: len(task.validation) for task in tasks},
        "model": "two-layer BERT of width 32, random weights" if options.tiny else options.model,
        "exact_forwards_over_each_task": passes,
        "ordinary_forwards_over_each_task": len(grid),
        "ordinary_points_measured": len(rows),
        "largest_difference_of_scores": float(np.abs(scores[rows] - measured).max()),
        "exact_seconds": exact_seconds,
        "exact_seconds_of_which_arithmetic": arithmetic,
        "ordinary_seconds_a_point": per_point,
        "ordinary_seconds_extrapolated": per_point * len(grid),
        "ratio": per_point * len(grid) / exact_seconds,
        "first_run_with_compilation": {
            "exact": first_exact,
            "ordinary_first_point": first_point,
            "best_combination": first_best,
        },
        "best_combination": {
            "seconds": best_seconds,
            "seconds_of_one_evaluation_pass": one_pass,
            "mean_validation_score": best.score,
            "mean_validation_score_of_the_best_of_21": best.grid_score,
            "mean_validation_score_evaluated": evaluate(linear, params, fused, tasks, split="validation").mean,
            "mean_test_score": evaluate(linear, params, fused, tasks).mean,
            "best_of_2520_points_and_solutions": {
                "chosen": whole_grid.source,
                "grid": whole_grid.grid_score,
                "score": whole_grid.score,
            },
            "chosen": best.source,
            "coefficients": best.by_name(),
            "largest_gap": max(solution.gap for solution in best.solutions.values()),
        },
        "every_subset_solved": {
            "subsets": len(subsets.members),
            "seconds": subsets_seconds,
            "largest_gap": max(solution.gap for solution in subsets.solutions),
            "highest_mean_score": float(subsets.scores.mean(axis=1).max()),
        },
        "device": jax.devices()[0].device_kind,
        "cpu_cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "jax": jax.__version__,
    }
    write_atomically(out, (json.dumps(result, indent=2) + "\n").encode())

    print(f"{len(grid)} points x {len(tasks)} tasks of {examples} examples, {result['model']}")
    print(f"exact sweep               {exact_seconds:9.2f} s   {passes} forward passes over each task")
    print(f"  of which arithmetic     {arithmetic:9.2f} s")
    print(f"every point on its own    {per_point * len(grid):9.2f} s   {len(grid)} passes, {len(rows)} of them run")
    print(f"ratio                     {result['ratio']:9.1f}")
    print(f"largest difference of scores: {result['largest_difference_of_scores']:.2g}")
    print(
        f"best combination          {best_seconds:9.3f} s   one evaluation pass: {one_pass:.3f} s; gap at most "
        f"{result['best_combination']['largest_gap']:.1g}; mean score {best.score:.4f}, best of 21 {best.grid_score:.4f}"
    )
    gap = result["every_subset_solved"]["largest_gap"]
    print(f"{len(subsets.members)} subsets solved        {subsets_seconds:9.3f} s   gap at most {gap:.1g}")


if __name__ == "__main__":
    main()
