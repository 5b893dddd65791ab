"""Training: one step, mapped over devices, in a loop that can be killed at any moment."""

from pefusion_jax.training.checkpoint import load_adapters as load_adapters
from pefusion_jax.training.checkpoint import save_adapters as save_adapters
from pefusion_jax.training.loop import finetune as finetune
from pefusion_jax.training.multitask import finetune_together as finetune_together
from pefusion_jax.training.preemption import Preempted as Preempted
from pefusion_jax.training.step import NonFiniteError as NonFiniteError
