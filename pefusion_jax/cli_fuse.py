"""``pefusion fuse``: several runs into one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from pefusion_jax.cli_runs import Out, only_json, tasks_of
from pefusion_jax.quickstart import Settings
from pefusion_jax.runs import STATISTICS


@dataclasses.dataclass(frozen=True)
class Fuse:
    """Fuses the adapters of several runs into one.

    Example:  pefusion fuse runs/spam runs/intents --method ties --set density=0.2 scale=1.0 --out runs/fused

    With a scale chosen on validation examples:  pefusion fuse runs/* --method ties --scales 0.5 1 1.5 2 --out runs/fused

    Without data, from moments stored with 'finetune --statistics 128':  pefusion fuse runs/* --method gram --out runs/fused
    """

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders that 'pefusion finetune' wrote, for one base model and mode, with one method; of plain adapters ranks and targets
    may differ."""
    out: Out
    method: str = "task_arithmetic"
    """Name of a method of pefusion_jax.fusion."""
    set: tuple[str, ...] = ()
    """Arguments of the method, NAME=VALUE; its own defaults for those that are not given. A list goes to the runs in the order
    in which they are named here: weights=[0.9,0.1]. A mapping names them: weights={runs/spam: 0.9, runs/intents: 0.1}, in
    quotes for the shell."""
    match_norm: bool = False
    """Give the fused change the mean length of the runs' changes, in place of the method's own scale."""
    scales: tuple[float, ...] = ()
    """Multiples of the fused change to choose from: the one with the best mean score on the validation split of the runs'
    tasks."""
    rank: int | None = None
    """Bring the fused change to this rank, and say how much of it is lost."""
    space: Literal["weight", "adapter"] = "weight"
    """Combine weight changes, or the adapters' own leaves as the papers did."""
    overwrite: bool = False
    """Replace a folder that is not empty."""
    json: bool = False
    """Print what was written as JSON."""


def fuse(given: Fuse) -> None:
    """Runs :class:`Fuse`."""
    import pefusion_jax as pf
    from pefusion_jax import files, runs

    if len(given.runs) < 2:
        raise ValueError("fuse needs at least two runs: pefusion fuse RUN RUN ... --out DIR")
    seen: dict[Path, str] = {}
    for name in given.runs:
        if (folder := Path(name).resolve()) in seen:
            again = "" if seen[folder] == name else f" ({folder}, as {seen[folder]})"
            raise ValueError(f"{name} is named twice{again}; name each run once")
        seen[folder] = name
    if given.space == "adapter":
        for option, value in (("--match-norm", given.match_norm), ("--scales", given.scales), ("--rank", given.rank)):
            if value:
                raise ValueError(f"{option} is for weight changes; fuse in --space weight")
    files.require_free(given.out, given.overwrite)
    files.require_apart(given.out, *given.runs)
    first = runs.load_run(given.runs[0])
    loaded = {name: runs.load_run(name, base=(first.model, first.params)) for name in given.runs}
    files.require_apart(given.out, *(path for run in loaded.values() if Path(path := run.spec["model"]).is_dir()))
    start = _common_start(loaded, given.space)
    method = _fusion_method(given)
    if given.match_norm:
        method = pf.fusion.match_norm(method)
    given_trees = {name: run.tree for name, run in loaded.items()}
    if given.space == "weight":
        given_trees = {
            name: run.tree if isinstance(run.tree, pf.Delta) else run.adapted.deltas(first.params, run.tree)
            for name, run in loaded.items()
        }
    if method.bind is None and method.tasks is None:
        # Trees of a mapping are taken by sorted name: these names sort as the runs stand on the command line.
        digits = len(str(len(loaded)))
        given_trees = {f"run {n:0{digits}} ({name})": tree for n, (name, tree) in enumerate(given_trees.items(), 1)}
    with _naming(given):
        if given.space == "weight":
            tree = pf.fuse(method, given_trees)
        else:
            tree = pf.fuse(method, given_trees, space="adapter", init=start if first.spec["mode"] is None else None)
    names = list(dict.fromkeys(task for run in loaded.values() for task in run.spec.get("tasks", ())))
    summary: dict[str, Any] = {
        "out": given.out,
        "runs": list(given.runs),
        "method": given.method,
        "space": given.space,
        "tasks": names,
    }
    text = f"fused {len(loaded)} runs by {given.method}; written to {given.out}"
    if given.scales:
        with only_json(given.json):
            tree, summary["scale"], summary["validation"] = _scaled(tree, given.scales, first, names)
        text += f"; times {summary['scale']:g} of {', '.join(summary['validation'])}, with a mean validation score of "
        text += f"{summary['validation'][format(summary['scale'], 'g')]:.3f}"
    if given.rank is not None:
        tree, _, lost = pf.compress(tree, given.rank)
        summary["residual"] = float(lost)
        text += f"; of rank {given.rank}, which leaves out {float(lost):.1%} of the change's norm"
    with files.new_folder(given.out, given.overwrite) as folder:
        runs.save_run(
            folder,
            tree,
            model=first.spec["model"],
            params=first.params,
            methods=runs.methods_of(first.spec),
            generator=runs.generator_of(first.spec),
            mode=first.spec["mode"],
            adapters0=start,
            tasks=names,
            head=first.spec.get("head", "zero_shot"),
            max_length=first.spec.get("max_length", Settings.max_length),
            settings=dataclasses.asdict(given),
            **{key: summary[key] for key in ("scale", "validation") if key in summary},
        )
    print(json.dumps(summary, indent=2) if given.json else text)


def _common_start(loaded: Mapping[str, Any], space: str) -> Any:
    """The adapters that all runs started from; ``None`` for plain adapters that did not, whose weight changes can be fused.

    Raises:
      ValueError: if the runs have no common space, naming two of them.
    """
    import jax

    import pefusion_jax as pf

    name, first = next(iter(loaded.items()))
    plain = first.spec["mode"] is None and space == "weight"
    scored = {"head": "zero_shot", "max_length": Settings.max_length}  # the fused run is scored in one way
    for other, run in loaded.items():
        for entry in ("generator", "mode", "kind") if plain else ("methods", "generator", "mode", "kind"):
            theirs, ours = run.spec.get(entry), first.spec.get(entry)
            if theirs != ours:
                raise ValueError(
                    f"{other} and {name} differ in {entry}: {theirs} and {ours}; only runs that were adapted alike can be fused"
                )
        for entry, default in scored.items():
            theirs, ours = run.spec.get(entry, default), first.spec.get(entry, default)
            if theirs != ours:
                raise ValueError(
                    f"{other} and {name} differ in {entry}: {theirs} and {ours}, and a fused run has one for all tasks; train "
                    f"them with the same --{entry.replace('_', '-')}"
                )
    if plain and any(run.spec["methods"] != first.spec["methods"] for run in loaded.values()):
        return None
    pf.trees.require_same_structure({name: run.adapters0 for name, run in loaded.items()})
    if all(
        bool((a == b).all())
        for run in loaded.values()
        for a, b in zip(jax.tree.leaves(run.adapters0), jax.tree.leaves(first.adapters0), strict=True)
    ):
        return first.adapters0
    if plain:
        return None
    raise ValueError(
        "the runs started from different adapters, so they have no common space to be fused in; train them with the same "
        "--seed, or fuse plain adapters in --space weight"
    )


def _scaled(tree: Any, scales: Sequence[float], first: Any, names: Sequence[str]) -> tuple[Any, float, dict[str, float]]:
    """The multiple of a change with the best mean validation score, of equal ones the smallest; and all scores."""
    import pefusion_jax as pf

    if not names:
        raise ValueError("--scales are chosen on the runs' tasks, but the runs do not say which tasks they are for")
    spec = first.spec
    length = spec.get("max_length", Settings.max_length)
    suite = tasks_of(names, spec["model"], first.model, first.params, spec.get("head", "zero_shot"), length)
    choices = {scale: pf.fuse(pf.fusion.task_arithmetic(scale), [tree]) for scale in sorted(set(scales))}
    scores = pf.evaluation.evaluate_many(first.adapted, first.params, list(choices.values()), suite)
    means = dict(zip(choices, (one.mean for one in scores), strict=True))
    best = max(means, key=lambda scale: means[scale])
    return choices[best], best, {f"{scale:g}": mean for scale, mean in means.items()}


def _fusion_method(given: Fuse) -> Any:
    """The method that a command names, with its arguments, and with the runs' statistics if it takes them."""
    import yaml

    from pefusion_jax import fusion, load_statistics
    from pefusion_jax.fusion.named import our_parameters, require_plain
    from pefusion_jax.fusion.recipe import number_or_word
    from pefusion_jax.trees import did_you_mean

    known = our_parameters(given.method)
    arguments: dict[str, Any] = {}
    for text in given.set:
        name, equals, value = text.partition("=")
        if not equals or name not in known:
            raise ValueError(f"--set {text}: {given.method} has no argument of this form{did_you_mean(name, known)}")
        try:
            arguments[name] = number_or_word(yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise ValueError(f"--set {text}: the value is not a number, a word or a list of them") from error
    require_plain(given.method, arguments)
    if "statistics" in known:
        files = {run: Path(run) / STATISTICS for run in given.runs}
        for run, file in files.items():
            if not file.is_file():
                raise ValueError(f"{given.method} needs {file}; train {run} again with --statistics 128")
        arguments["statistics"] = {run: load_statistics(file) for run, file in files.items()}
    with _naming(given):
        return getattr(fusion, given.method)(**arguments)


@contextlib.contextmanager
def _naming(given: Fuse) -> Iterator[None]:
    """Says of an error which method and arguments it is about."""
    try:
        yield
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{given.method}({', '.join(given.set)}): {error}") from error
