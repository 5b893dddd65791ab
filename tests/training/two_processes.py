"""One of two processes of a run: ``two_processes.py PORT MAPPING FOLDER INDEX``. Stops at step 4 and goes on to step 6."""

import sys
import warnings

warnings.simplefilter("error")

import jax

port, mapping, folder, index = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(index))

import toy

from pefusion_jax.training import Preempted, finetune, save_adapters
from pefusion_jax.training import loop as loop_module

adapted, params = toy.make_model()
settings = dict(
    steps=6,
    batch_size=16,
    optimizer=toy.SGD,
    mapping=mapping,
    checkpoint_dir=f"{folder}/state",
    checkpoint_every=3,
    log_file=f"{folder}/log{index}.jsonl",
    log_every=1,
)
# Only the second process is asked to end, at step 4: both must stop there.
agreed, calls = loop_module._agreed, 0


def asked_once(asked, due):
    global calls
    calls += 1
    return agreed(lambda: index == "1" and calls == 4, due)


loop_module._agreed = asked_once
stopped = False
try:
    finetune(adapted, params, toy.make_task(), **settings)
except Preempted as error:
    stopped = "after step 4 of 6" in str(error)
assert stopped
loop_module._agreed = agreed
tree = finetune(adapted, params, toy.make_task(), **settings)
save_adapters(f"{folder}/process{index}.safetensors", tree)
