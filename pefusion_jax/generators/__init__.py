"""Hyper-networks that make adapters: ``pf.generate(adapted, generator)``.

Each is a frozen dataclass whose tree is trained in place of the adapters. What they make are ordinary adapter trees.
"""

from pefusion_jax.generators.attempt import Attempt
from pefusion_jax.generators.cond_lora import CondLoRA
from pefusion_jax.generators.contrastive import instance_features, instance_loss, prototype_loss
from pefusion_jax.generators.core import Generator, generate
from pefusion_jax.generators.hypernetwork import HyperNetwork, hyperformer, hyperformer_plus_plus, pha, task_embeddings
from pefusion_jax.generators.instances import HyperDecoder, hyperdecoder
from pefusion_jax.generators.names import number_of
from pefusion_jax.generators.prompts import MPT
from pefusion_jax.generators.table import PerTask
from pefusion_jax.generators.transfer import Retrieval, add_task, instance_codes, mean_adapters, retrieval_table, retrieve

__all__ = [
    "MPT",
    "Attempt",
    "CondLoRA",
    "Generator",
    "HyperDecoder",
    "HyperNetwork",
    "PerTask",
    "Retrieval",
    "add_task",
    "generate",
    "hyperdecoder",
    "hyperformer",
    "hyperformer_plus_plus",
    "instance_codes",
    "instance_features",
    "instance_loss",
    "mean_adapters",
    "number_of",
    "pha",
    "prototype_loss",
    "retrieval_table",
    "retrieve",
    "task_embeddings",
]
