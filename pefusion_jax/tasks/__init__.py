"""Tasks: labelled examples, how they become batches, frozen heads, losses and metrics."""

from pefusion_jax.tasks.features import base_features, cls_features, features_of, mean_pool_features
from pefusion_jax.tasks.heads import (
    cosine_logits,
    linear_head,
    linear_logits,
    prototype_head,
    whitened_logits,
    zero_shot_head,
)
from pefusion_jax.tasks.metrics import (
    accuracy,
    cross_entropy,
    exact_match,
    macro_f1,
    matthews,
    pearson,
    smoothed_cross_entropy,
    smoothed_token_cross_entropy,
    spearman,
    squared_error,
    token_cross_entropy,
    token_f1,
)
from pefusion_jax.tasks.mixed import mixed_batch
from pefusion_jax.tasks.sources import (
    Examples,
    Labelled,
    csv_source,
    embedded,
    embedded_path,
    folder_task_source,
    jsonl_source,
    parquet_source,
)
from pefusion_jax.tasks.suites import base_apply, embedded_tasks, folder_task, text_task
from pefusion_jax.tasks.targets import target_features
from pefusion_jax.tasks.task import Batch, Head, Task, eval_batches, inputs_for, train_batch
from pefusion_jax.tasks.text import TextEncoder
from pefusion_jax.tasks.text_to_text import text_to_text
from pefusion_jax.tasks.tfds import TfdsExamples, tfds_source

__all__ = [
    "Batch",
    "Examples",
    "Head",
    "Labelled",
    "Task",
    "TextEncoder",
    "TfdsExamples",
    "accuracy",
    "base_apply",
    "base_features",
    "cls_features",
    "cosine_logits",
    "cross_entropy",
    "csv_source",
    "embedded",
    "embedded_path",
    "embedded_tasks",
    "eval_batches",
    "exact_match",
    "features_of",
    "folder_task",
    "folder_task_source",
    "inputs_for",
    "jsonl_source",
    "linear_head",
    "linear_logits",
    "macro_f1",
    "matthews",
    "mean_pool_features",
    "mixed_batch",
    "parquet_source",
    "pearson",
    "prototype_head",
    "smoothed_cross_entropy",
    "smoothed_token_cross_entropy",
    "spearman",
    "squared_error",
    "target_features",
    "text_task",
    "text_to_text",
    "tfds_source",
    "token_cross_entropy",
    "token_f1",
    "train_batch",
    "whitened_logits",
    "zero_shot_head",
]
