"""SIGTERM, which machines send before they take a job away: noticed between steps, by all processes at the same one."""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax


class Preempted(Exception):
    """The run was asked to end (SIGTERM) and has saved its state; the same call goes on from there.

    A program that does not catch it ends with a traceback and exit code 1; to report the signal, catch it and
    ``sys.exit(143)``.
    """


@contextmanager
def sigterm(enabled: bool) -> Iterator[Callable[[], bool]]:
    """Turns SIGTERM into a flag while the body runs. Only the main thread may do that; elsewhere the flag stays down.

    With several processes JAX itself listens for the signal, see :func:`agreed`.
    """
    received = False

    def receive(number: int, frame: Any) -> None:
        nonlocal received
        received = True

    if not enabled or jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGTERM, receive)
    try:
        yield lambda: received
    except Preempted:
        received = False
        raise
    finally:
        # None: the handler was not installed from Python and cannot be put back.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)
        if received:
            signal.raise_signal(signal.SIGTERM)  # it came too late to be acted on here


# Several processes agree on a step by number. Counting over all runs of the process keeps the numbers of two runs apart.
_CALLS = itertools.count()


def agreed(asked: Callable[[], bool]) -> bool:
    """Whether to stop after this step, the same answer in every process. All of them call this after every step."""
    if jax.process_count() == 1:
        return asked()
    from jax.experimental.multihost_utils import reached_preemption_sync_point

    return reached_preemption_sync_point(next(_CALLS))
