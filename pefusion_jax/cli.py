"""The command line: ``pefusion quickstart | finetune | fuse | evaluate | convert | inspect | merge | verify | report``."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

from pefusion_jax import cli_files, cli_fuse, cli_runs
from pefusion_jax.quickstart import Settings


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """Trains one adapter for each embedded task as LoRA and as linearized LoRA, fuses them, and prints a table.

    Example:  pefusion quickstart --out runs/quickstart
    """

    out: cli_runs.Out
    settings: Annotated[Settings, tyro.conf.arg(name="")] = Settings()
    overwrite: bool = False
    """Replace a folder that is not empty."""
    json: bool = False
    """Print the results as JSON in place of a table."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Turns a folder of results, and the folders in it, into one HTML page that needs nothing else.

    Example:  pefusion report runs/quickstart --out quickstart.html
    """

    folder: tyro.conf.Positional[str]
    """Folder with results, tables (.csv), settings (.json), notes (.md, .txt) and figures (.png)."""
    out: str | None = None
    """Page to write, replaced if it exists; report.html in the folder if not given."""
    title: str | None = None
    """Title of the page; the folder's name if not given."""
    max_mb: int = 32
    """Largest content in megabytes; what comes after is listed, not shown."""
    json: bool = False
    """Print what is in the page, and what is not and why, as JSON."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; errors of the user's input are one line on standard error and exit status 1."""
    # transformers remarks on the absence of PyTorch, which is not needed here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    commands: dict[type, Callable[[Any], None]] = {
        Quickstart: _quickstart,
        cli_runs.Finetune: cli_runs.finetune,
        cli_fuse.Fuse: cli_fuse.fuse,
        cli_runs.Evaluate: cli_runs.evaluate,
        Report: _report,
        cli_files.Convert: cli_files.convert,
        cli_files.Inspect: cli_files.inspect,
        cli_files.Merge: cli_files.merge,
        cli_files.Verify: cli_files.verify,
    }
    command = tyro.cli(
        Annotated[Quickstart, tyro.conf.subcommand("quickstart", prefix_name=False)]
        | Annotated[cli_runs.Finetune, tyro.conf.subcommand("finetune", prefix_name=False)]
        | Annotated[cli_fuse.Fuse, tyro.conf.subcommand("fuse", prefix_name=False)]
        | Annotated[cli_runs.Evaluate, tyro.conf.subcommand("evaluate", prefix_name=False)]
        | Annotated[Report, tyro.conf.subcommand("report", prefix_name=False)]
        | Annotated[cli_files.Convert, tyro.conf.subcommand("convert", prefix_name=False)]
        | Annotated[cli_files.Inspect, tyro.conf.subcommand("inspect", prefix_name=False)]
        | Annotated[cli_files.Merge, tyro.conf.subcommand("merge", prefix_name=False)]
        | Annotated[cli_files.Verify, tyro.conf.subcommand("verify", prefix_name=False)],
        prog="pefusion",
        description="Parameter-efficient fine-tuning, partial linearization and multi-task fusion in JAX.",
        args=argv,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    try:
        commands[type(command)](command)
    except (ValueError, OSError, ImportError) as error:
        print(f"pefusion: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pefusion: interrupted; no results were written", file=sys.stderr)
        return 130
    return 0


def _quickstart(given: Quickstart) -> None:
    from pefusion_jax.quickstart import quickstart

    with cli_runs.only_json(given.json):
        comparison = quickstart(given.out, given.settings, overwrite=given.overwrite)
        print(f"\n{comparison}\n\nTables, plots and adapters: {given.out}")
    if given.json:
        print(comparison.json(), end="")


def _report(given: Report) -> None:
    from pefusion_jax.evaluation import write_page

    page = write_page(given.folder, given.out, title=given.title, max_bytes=given.max_mb * 10**6)
    if given.json:
        print(json.dumps({"path": str(page.path), "shown": page.shown, "omitted": page.omitted}, indent=2))
    else:
        omitted = f"; {len(page.omitted)} not shown, and why, at its end" if page.omitted else ""
        print(f"{len(page.shown)} files in {page.path}{omitted}")


if __name__ == "__main__":
    sys.exit(main())
