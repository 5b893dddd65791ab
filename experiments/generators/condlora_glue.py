"""CondLoRA beside LoRA of the same rank: scores, trained parameters and speed, task by task.

    python experiments/generators/condlora_glue.py --data /folder/with/glue --out experiments/condlora_glue

Resumable. Rates are chosen for each method on the validation splits of some tasks and then fixed. Every seed draws other
training examples, and the heads are fitted to these. Speed: steps of both methods take turns on warm programs in one process;
the ratio is that of the medians.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a run as a script

import pefusion_jax as pf
from experiments.rates import best_rate
from experiments.rows import Rows, clock, markdown, write_tables
from experiments.suites import data
from pefusion_jax import generators, trees
from pefusion_jax import tasks as task_tools
from pefusion_jax.training import parallel
from pefusion_jax.training.step import default_optimizer, init_state, rate_of, with_rate

TARGETS = r".*/(query|value|q|v)"
RATES = (3e-4, 1e-3, 3e-3)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Compares CondLoRA with LoRA on GLUE.

    Example:  python experiments/generators/condlora_glue.py --data ~/data --out experiments/condlora_glue --tasks rte mrpc
    """

    data: Path
    """Folder that holds glue/."""
    out: Path
    """Folder of scores and the table."""
    model: str = "sentence-transformers/all-mpnet-base-v2"
    """The encoder."""
    tasks: tuple[str, ...] = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte")
    """Which sets; without any, the speed alone is measured."""
    rate_tasks: tuple[str, ...] = ("mrpc", "stsb")
    """The sets that rates are chosen on, by their mean score."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the start and of the order."""
    rank: int = 8
    """Rank, and alpha: both methods are scaled by 1."""
    steps: int = 100
    """Updates of each run."""
    batch_size: int = 16
    """Examples of an update."""
    train_examples: int = 1000
    """Training examples of each set."""
    validation_examples: int = 150
    """Validation examples of each set that rates are chosen on."""
    test_examples: int = 200
    """Test examples of each set."""
    max_length: int = 48
    """Tokens of every batch."""
    rounds: int = 12
    """Timed steps of each method."""


def main(settings: Settings) -> None:
    say = clock()
    settings.out.mkdir(parents=True, exist_ok=True)
    asked = {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("data", "out", "tasks", "seeds", "rounds")}
    rows = Rows(settings.out / "rows.json", asked)
    model, params = pf.load_pretrained(settings.model)
    tokenizer = pf.load_tokenizer(settings.model)
    plain = pf.adapt(model, pf.LoRA(rank=settings.rank, alpha=settings.rank, targets=TARGETS))
    kinds = {"LoRA": plain, "CondLoRA": pf.generate(plain, generators.CondLoRA())}

    def rate_of(kind: str) -> str:
        return f"rate/{kind}/{settings.seeds[0]}"

    def made(name: str, seed: int) -> Any:
        sizes = {"train_size": settings.train_examples, "test_size": settings.test_examples, "train_seed": seed}
        (task,) = data.glue_tasks(
            model, params, tokenizer, settings.data, names=(name,), max_length=settings.max_length, **sizes
        )
        task = dataclasses.replace(task, validation=task.validation[: settings.validation_examples])
        data.require_same(rows, [task], f"tasks/{name}/{seed}")
        return task

    def train(adapted: pf.Adapted, task: Any, rate: float, seed: int) -> Any:
        how: dict[str, Any] = {"steps": settings.steps, "batch_size": settings.batch_size, "schedule": "linear"}
        return pf.finetune(
            adapted, params, task, learning_rate=rate, seed=seed, devices=jax.devices()[:1], progress=False, **how
        )

    if "speed" not in rows:
        rows.put(
            "speed", rounds=settings.rounds, **speed(kinds, params, made(settings.rate_tasks[0], settings.seeds[0]), settings)
        )
        say(f"speed: {rows['speed']}")
    for kind, adapted in kinds.items():
        if settings.tasks and rate_of(kind) not in rows:
            trials = [made(name, settings.seeds[0]) for name in settings.rate_tasks]

            def validated(rate: float, adapted: Any = adapted, trials: Any = trials) -> float:
                trained = [(task, train(adapted, task, rate, settings.seeds[0])) for task in trials]
                scores = [pf.evaluate(adapted, params, tree, [task], split="validation").mean for task, tree in trained]
                return float(np.mean(scores))

            chosen = best_rate(validated, RATES, lambda text, kind=kind: say(f"{kind}, {text}"))  # type: ignore[misc]
            rows.put(rate_of(kind), **chosen)
    for name in settings.tasks:
        for seed in settings.seeds:
            task = None
            for kind, adapted in kinds.items():
                key = f"{kind}/{name}/{seed}"
                if key in rows:
                    continue
                task = task or made(name, seed)
                tree = train(adapted, task, rows[rate_of(kind)]["rate"], seed)
                scores = pf.evaluate(adapted, params, tree, [task])
                count = sum(leaf.size for leaf in jax.tree.leaves(adapted.trainable(tree)))
                row = {"kind": kind, "task": name, "seed": seed, "trained": int(count)}
                rows.put(key, **row, score=scores[name], stderr=scores.stderr[name])
                say(f"{name}, seed {seed}, {kind}: {scores[name]:.3f}")
    write(rows.found, settings.out)


def speed(kinds: dict[str, pf.Adapted], params: Any, task: Any, settings: Settings) -> dict[str, Any]:
    """Seconds of a training step of each kind, taken in turns, and their FLOPs by XLA's count."""
    devices = tuple(jax.devices()[:1])
    optimizer = default_optimizer("linear", 0.0)
    batch = task_tools.train_batch(task, 0, settings.batch_size, 0)
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    flops, steps = {}, {}
    for kind, adapted in kinds.items():
        tree = adapted.init(jax.random.key(0), params, **batch["inputs"])
        trained, held = trees.split(tree, adapted.trainable(tree))
        run = parallel.compiled_step(
            adapted,
            optimizer,
            task.head.features,
            task.head.logits,
            task.loss,
            1,
            1.0,
            True,
            rate_of("linear"),
            "pmap",
            devices,
        )
        state = with_rate(init_state(trained, optimizer, 0), 1e-3, 0.1, settings.steps)
        state = parallel.replicate(state, devices, copy=True)
        fixed = parallel.replicate((params, held, task.head.params), devices)
        given = parallel.place_batch(batch, "pmap", devices)
        steps[kind] = [run, state, fixed, given]

        def total(tree: Any, params: Any, inputs: Any, adapted: pf.Adapted = adapted) -> jax.Array:
            return jnp.sum(task.head.features(adapted.apply(params, tree, **inputs), inputs))

        flops[kind] = jax.jit(jax.grad(total)).lower(tree, params, batch["inputs"]).compile().cost_analysis()["flops"]
    for number in range(settings.rounds + 2):
        for kind, step in steps.items():
            run, state, fixed, given = step
            start = time.perf_counter()
            step[1], metrics = run(state, *fixed, given)
            jax.block_until_ready(metrics)
            if number >= 2:  # the first two are warm-up
                seconds[kind].append(time.perf_counter() - start)
    medians = {kind: float(np.median(found)) for kind, found in seconds.items()}
    rate = {kind: settings.batch_size / median for kind, median in medians.items()}
    return {
        "examples per second": rate,
        "throughput ratio": medians["LoRA"] / medians["CondLoRA"],
        "gradient FLOPs": flops,
        "FLOPs ratio": flops["CondLoRA"] / flops["LoRA"],
    }


def write(found: dict[str, Any], out: Path) -> None:
    """``results.md`` and ``results.csv``: a line for each method, and one for what CondLoRA is better by.

    The two standard errors of a mean over tasks: ``over seeds``, of means that have other training examples, and ``over test
    examples``, of a finite test split that both methods share: of the difference the second is an upper bound.
    """
    runs = {(row["kind"], row["task"], row["seed"]): row for row in found.values() if "kind" in row and "task" in row}
    names = list(dict.fromkeys(task for _, task, _ in runs))
    kinds = list(dict.fromkeys(kind for kind, _, _ in runs))
    # Means over tasks need all of them.
    seeds = [s for s in sorted({seed for _, _, seed in runs}) if all((k, n, s) in runs for k in kinds for n in names)]
    if not seeds:
        return
    scores = {k: np.asarray([[runs[k, n, s]["score"] for n in names] for s in seeds]) for k in kinds}
    errors = {k: np.asarray([[runs[k, n, s]["stderr"] for n in names] for s in seeds]) for k in kinds}
    trained = {k: next(f"{row['trained']:,}" for row in runs.values() if row["kind"] == k) for k in kinds}
    if len(kinds) == 2:
        gain = f"{kinds[1]} minus {kinds[0]}"
        scores[gain] = scores[kinds[1]] - scores[kinds[0]]
        errors[gain] = np.hypot(errors[kinds[0]], errors[kinds[1]])
    columns = ("method", "trained", *names, "mean", "error over seeds", "error over test examples")
    lines = []
    for kind, table in scores.items():
        over_seeds = float(np.std(table.mean(axis=1), ddof=1) / len(seeds) ** 0.5) if len(seeds) > 1 else None
        # The test examples are the same for all seeds, so seeds do not make this one smaller.
        over_examples = float(np.sqrt(np.mean(np.square(errors[kind]), axis=0).sum()) / len(names))
        means = [float(score) for score in table.mean(axis=0)]
        lines.append((kind, trained.get(kind), *means, float(table.mean()), over_seeds, over_examples))
    write_tables(out, markdown(columns, lines), columns=columns, lines=lines)


if __name__ == "__main__":
    main(tyro.cli(Settings))
