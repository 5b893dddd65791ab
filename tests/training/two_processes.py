"""One of two processes of a run: ``two_processes.py PORT FOLDER INDEX``. Is stopped once and goes on."""

import dataclasses
import os
import signal
import sys
import time
import warnings

import jax
import toy

from pefusion_jax.training import Preempted, finetune, save_adapters

warnings.simplefilter("error")


def main(port: str, folder: str, index: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(index))

    adapted, params = toy.make_model()
    task = toy.make_task()
    settings = dict(
        steps=40,
        batch_size=16,
        optimizer=toy.SGD,
        checkpoint_dir=f"{folder}/state",
        checkpoint_every=30,
        log_file=f"{folder}/log{index}.jsonl",
        log_every=1,
    )
    encoded = 0

    def encode(examples):
        """Slow, because JAX looks for the signal once a second."""
        nonlocal encoded
        encoded += 1
        if encoded == 4 and index == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        return toy.encode(examples)

    # Only the second process is asked to end: both must stop, at one step.
    try:
        finetune(adapted, params, dataclasses.replace(task, encode=encode), **settings)
    except Preempted as error:
        with open(f"{folder}/stopped{index}", "w") as file:
            file.write(str(error))
    save_adapters(f"{folder}/pmap{index}.safetensors", finetune(adapted, params, task, **settings))
    settings = dict(steps=40, batch_size=16, optimizer=toy.SGD, mapping="shard_map", validate_every=20)
    save_adapters(f"{folder}/shard_map{index}.safetensors", finetune(adapted, params, task, **settings))


if __name__ == "__main__":
    main(*sys.argv[1:])
