"""Parameter-efficient fine-tuning, partial linearization and multi-task fusion in JAX.

model, params = pf.load_pretrained("sentence-transformers/all-MiniLM-L6-v2")
lora = pf.adapt(model, pf.LoRA(rank=16, alpha=32, targets=r".*/(query|value)"))
phi0 = lora.init(jax.random.key(0), params, batch)
llora = pf.linearize(lora, phi0)
"""

# Sub-packages that are used by name.
from pefusion_jax import deltas, evaluation, fusion, generators, moments, tasks, training, trees

# One noun and its verbs.
from pefusion_jax.adapt import Adapted, adapt
from pefusion_jax.compression import compress, lora_of
from pefusion_jax.deltas import Delta, LowRank, fold

# Everything else takes an Adapted and trees.
from pefusion_jax.evaluation import evaluate
from pefusion_jax.fusion import fuse
from pefusion_jax.generation import generate_tokens, score_labels
from pefusion_jax.generators import generate

# Weights, tokenizers and image preprocessing, from Hugging Face's files.
from pefusion_jax.interop import load_image_processor, load_peft, load_pretrained, load_tokenizer, save_peft, save_pretrained
from pefusion_jax.linearize import linearize
from pefusion_jax.merging import merge_files

# Adapter methods.
from pefusion_jax.methods import (
    Bottleneck,
    FullFineTuning,
    LoRA,
    PromptTuning,
    houlsby,
    parallel,
    pfeiffer,
    prompt_from_tokens,
    prompt_similarity,
)

# Second moments of a task's data: for fusion without data, and for training that stays out of other tasks' way.
from pefusion_jax.moment_files import load_statistics, save_statistics
from pefusion_jax.penalty import interference_penalty
from pefusion_jax.runs import load_run, save_run
from pefusion_jax.statistics import statistics
from pefusion_jax.training import finetune, finetune_together

__all__ = [
    "Adapted",
    "Bottleneck",
    "Delta",
    "FullFineTuning",
    "LoRA",
    "LowRank",
    "PromptTuning",
    "adapt",
    "compress",
    "deltas",
    "evaluate",
    "evaluation",
    "finetune",
    "finetune_together",
    "fold",
    "fuse",
    "fusion",
    "generate",
    "generate_tokens",
    "generators",
    "houlsby",
    "interference_penalty",
    "linearize",
    "load_image_processor",
    "load_peft",
    "load_pretrained",
    "load_run",
    "load_statistics",
    "load_tokenizer",
    "lora_of",
    "merge_files",
    "moments",
    "parallel",
    "pfeiffer",
    "prompt_from_tokens",
    "prompt_similarity",
    "save_peft",
    "save_pretrained",
    "save_run",
    "save_statistics",
    "score_labels",
    "statistics",
    "tasks",
    "training",
    "trees",
]
