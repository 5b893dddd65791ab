"""A run that a test kills: ``run(folder, steps)`` starts it or goes on with it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import jax
import optax
import toy

from pefusion_jax.training import finetune, save_adapters


def setup(cache: str) -> None:
    """Imports what a run needs before it is forked, without starting a device."""
    import orbax.checkpoint.experimental.v1  # noqa: F401
    import tqdm  # noqa: F401

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def run(folder: str, steps: int) -> None:
    signal.alarm(120)  # never outlives its test
    adapted, params = toy.make_model(dropout=0.2)
    tree = finetune(
        adapted,
        params,
        toy.make_task(),
        steps=steps,
        batch_size=8,
        accumulate=2,
        # Its state holds a random key of its own.
        optimizer=optax.chain(optax.add_noise(1e-3, 0.5, jax.random.key(11)), optax.adam(3e-3)),
        seed=4,
        checkpoint_dir=f"{folder}/state",
        checkpoint_every=4,
        log_file=f"{folder}/log.jsonl",
        log_every=1,
        validate_every=16,
    )
    save_adapters(f"{folder}/adapters.safetensors", tree)


def serve() -> None:
    """Forks a run for each line ``FOLDER STEPS`` of standard input and answers with its process number; reaps on ``wait``.

    The imports are paid for once. No device has been started when it forks.
    """
    import sys

    for line in sys.stdin:
        folder, steps = line.split()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with Path(folder, "output").open("a") as output:
                    os.dup2(output.fileno(), 1)
                    os.dup2(output.fileno(), 2)
                    run(folder, int(steps))
                    code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    import sys

    setup(sys.argv[1])
    serve()
