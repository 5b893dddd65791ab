"""The commands on one run: ``pefusion finetune | evaluate``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pefusion_jax.quickstart import Settings
from pefusion_jax.runs import STATISTICS

Out = Annotated[str, tyro.conf.arg(help="Folder to write. It must be empty or not exist.", metavar="DIR")]


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Trains an adapter on one task and writes it with all that is needed to use it.

    Example:  pefusion finetune --task spam --mode network --out runs/spam

    Your data:  pefusion finetune --task path/of/a/folder --head linear --out runs/mine
    """

    task: str
    """An embedded task (spam, supersense, genre, intents, wic, bible), or a folder with train, validation and test files
    (.jsonl, .jsonl.gz, .csv, .parquet) whose rows have a text and a label."""
    out: Out
    model: str = Settings.model
    """Hub id or folder of the base model."""
    method: Literal["lora", "full"] = "lora"
    """Low-rank adapters, or full fine-tuning of the targets."""
    mode: Literal["plain", "network", "layer", "weight"] = "plain"
    """Whether and how the adapted model is linearized."""
    rank: int = 16
    """Rank of low-rank adapters."""
    alpha: float = 32.0
    """Scale numerator of low-rank adapters."""
    dropout: float = 0.0
    """Dropout of the adapters' input."""
    targets: str | None = None
    """Regular expression for whole paths: of layers (default query and value), or of parameters for --method full."""
    head: Literal["zero_shot", "linear"] = "zero_shot"
    """Frozen head made from class descriptions, or fitted to the base model's features."""
    steps: int = 200
    """Training steps."""
    batch_size: int = 16
    """Examples of a step, over all devices."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    accumulate: int = 1
    """Micro-batches of a step."""
    max_length: int = 64
    """Longest text, in tokens."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the base model; adapters are float32."""
    validate_every: int = 0
    """Steps between validations; the best adapters are kept. 0 keeps the last."""
    checkpoint_dir: str | None = None
    """Folder for the training state: the same command goes on from there after an interruption."""
    checkpoint_every: int = 100
    """Steps between two states."""
    statistics: int = 0
    """Training examples whose second moments are stored with the adapter, for 'fuse --method gram' and its like; no labels."""
    split: Literal["train", "validation", "test"] = "test"
    """Split to score before and after."""
    seed: int = 0
    """Seed of adapters, data order and dropout."""
    overwrite: bool = False
    """Replace a folder that is not empty."""
    json: bool = False
    """Print the scores as JSON."""


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Scores a run on tasks.

    Example:  pefusion evaluate runs/fused --tasks spam intents
    """

    run: tyro.conf.Positional[str]
    """Folder that 'pefusion finetune', 'fuse' or 'quickstart' wrote."""
    tasks: tuple[str, ...] = ()
    """Embedded tasks or folders; the run's own tasks if none is named."""
    split: Literal["train", "validation", "test"] = "test"
    """Split to score."""
    head: Literal["zero_shot", "linear"] | None = None
    """Head of the tasks; the run's own if not given."""
    max_length: int | None = None
    """Longest text, in tokens; the run's own if not given."""
    batch_size: int = 64
    """Examples of a forward pass."""
    json: bool = False
    """Print the scores as JSON."""


def finetune(given: Finetune) -> None:
    """Runs :class:`Finetune`."""
    import jax

    import pefusion_jax as pf
    from pefusion_jax import files, runs

    embedded = [path.parent.name for path in pf.tasks.embedded_path().glob("*/task.json")]
    read = [path for path in (given.model, given.task) if Path(path).is_dir() and path not in embedded]
    files.require_apart(given.out, *read, *filter(None, [given.checkpoint_dir]))
    with only_json(given.json), files.new_folder(given.out, given.overwrite) as folder:
        model, params = pf.load_pretrained(given.model, dtype=given.dtype)
        task = tasks_of([given.task], given.model, model, params, given.head, given.max_length)[0]
        method = (
            pf.LoRA(rank=given.rank, alpha=given.alpha, dropout=given.dropout, targets=given.targets or Settings.targets)
            if given.method == "lora"
            else pf.FullFineTuning(targets=given.targets or r"encoder/.*/kernel")
        )
        adapted = pf.adapt(model, method)
        inputs = pf.tasks.train_batch(task, 0, given.batch_size, given.seed)["inputs"]
        phi0 = adapted.init(jax.random.key(given.seed), params, **inputs)
        mode = None if given.mode == "plain" else given.mode
        tuned = adapted if mode is None else pf.linearize(adapted, phi0, mode)
        base = pf.evaluate(adapted, params, phi0, [task], split=given.split)  # before training: the split may not be there
        log = Path(given.checkpoint_dir or folder) / "metrics.jsonl"
        try:
            tree = pf.finetune(
                tuned,
                params,
                task,
                adapters=phi0 if mode is None else tuned.init(None, params),
                steps=given.steps,
                batch_size=given.batch_size,
                learning_rate=given.learning_rate,
                accumulate=given.accumulate,
                seed=given.seed,
                validate_every=given.validate_every,
                checkpoint_dir=given.checkpoint_dir,
                checkpoint_every=given.checkpoint_every,
                log_file=log,
                stochastic=given.dropout > 0,
            )
        except pf.training.Preempted as stopped:
            raise ValueError(f"{stopped}; run the same command again to go on") from stopped
        if log.parent != folder:
            shutil.copy(log, folder)
        scores = pf.evaluate(tuned, params, tree, [task], split=given.split)
        result = {"zero_shot": base.to_dict(), "tuned": scores.to_dict()}
        runs.save_run(
            folder,
            tree,
            model=given.model,
            params=params,
            methods=method,
            mode=mode,
            adapters0=phi0,
            tasks=[given.task],
            head=given.head,
            max_length=given.max_length,
            settings=dataclasses.asdict(given),
            scores=result,
        )
        if given.statistics:
            found = pf.statistics(tuned, params, tree, task, examples=given.statistics, kinds=("inputs", "outputs", "fisher"))
            pf.save_statistics(folder / STATISTICS, found)
        trained = pf.trees.size(tuned.trainable(tree))
        print(f"{trained:,} trained parameters; before:\n{base}\nafter:\n{scores}\nwritten to {given.out}")
    if given.json:
        print(json.dumps(result, indent=2))


def evaluate(given: Evaluate) -> None:
    """Runs :class:`Evaluate`."""
    import pefusion_jax as pf
    from pefusion_jax import runs

    with only_json(given.json):
        run = runs.load_run(given.run)
        names = list(given.tasks or run.spec.get("tasks", ()))
        if not names:
            raise ValueError(f"{given.run} does not say which tasks it is for; name them: --tasks spam intents")
        suite = tasks_of(
            names,
            run.spec["model"],
            run.model,
            run.params,
            given.head or run.spec.get("head", "zero_shot"),
            given.max_length or run.spec.get("max_length", Settings.max_length),
        )
        scores = pf.evaluate(run.adapted, run.params, run.tree, suite, split=given.split, batch_size=given.batch_size)
        print(scores)
    if given.json:
        print(json.dumps(scores.to_dict(), indent=2))


def tasks_of(names: Sequence[str], model_id: str, model: Any, params: Any, head: str, max_length: int) -> list[Any]:
    """Embedded tasks by name, and folders by path."""
    from pefusion_jax import load_tokenizer, tasks

    tokenizer = load_tokenizer(model_id)
    known = sorted(tasks.embedded("all"))
    for name in names:
        if name not in known and not Path(name).is_dir():
            raise ValueError(f"{name!r} is neither an embedded task ({', '.join(known)}) nor a folder")
    return [
        tasks.embedded_tasks(model, params, tokenizer, (name,), head=head, max_length=max_length)[0]
        if name in known
        else tasks.folder_task(name, model, params, tokenizer, head=head, max_length=max_length)
        for name in names
    ]


@contextlib.contextmanager
def only_json(active: bool) -> Iterator[None]:
    """Keeps standard output for the JSON: everything else goes to standard error."""
    if active:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    else:
        yield
