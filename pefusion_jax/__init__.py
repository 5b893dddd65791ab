"""Parameter-efficient fine-tuning, partial linearization and multi-task fusion in JAX.

model, params = pf.load_pretrained("sentence-transformers/all-MiniLM-L6-v2")
lora = pf.adapt(model, pf.LoRA(rank=16, alpha=32, targets=r".*/(query|value)"))
phi0 = lora.init(jax.random.key(0), params, batch)
llora = pf.linearize(lora, phi0)
"""

# Sub-packages that are used by name.
from pefusion_jax import deltas, evaluation, fusion, tasks, training, trees

# One noun and its verbs.
from pefusion_jax.adapt import Adapted, adapt
from pefusion_jax.deltas import Delta, LowRank, fold

# Everything else takes an Adapted and trees.
from pefusion_jax.evaluation import evaluate
from pefusion_jax.fusion import fuse
from pefusion_jax.generation import generate_tokens, score_labels

# Weights, tokenizers and image preprocessing, from Hugging Face's files.
from pefusion_jax.interop import load_image_processor, load_peft, load_pretrained, load_tokenizer, save_peft, save_pretrained
from pefusion_jax.linearize import linearize

# Adapter methods.
from pefusion_jax.methods import FullFineTuning, LoRA
from pefusion_jax.runs import load_run, save_run
from pefusion_jax.training import finetune

__all__ = [
    "Adapted",
    "Delta",
    "FullFineTuning",
    "LoRA",
    "LowRank",
    "adapt",
    "deltas",
    "evaluate",
    "evaluation",
    "finetune",
    "fold",
    "fuse",
    "fusion",
    "generate_tokens",
    "linearize",
    "load_image_processor",
    "load_peft",
    "load_pretrained",
    "load_run",
    "load_tokenizer",
    "save_peft",
    "save_pretrained",
    "save_run",
    "score_labels",
    "tasks",
    "training",
    "trees",
]
