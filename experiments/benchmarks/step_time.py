"""Times forward, LoRA and linearized-LoRA steps of a ViT-B/16 beside PyTorch, in one run on one machine.

    python experiments/benchmarks/step_time.py                                # minutes on two quiet cores
    python experiments/benchmarks/step_time.py --layers 2 --rounds 1 --out quick

Both sides hold the same random weights. Before anything is timed, outputs, losses and gradients are compared in float32, at
adapters that are not at their start. Rows, ours against theirs:

- ``forward``: the model without adapters, against transformers' ``ViTModel``;
- ``LoRA step``: value and gradient of a cross entropy and an AdamW update, against PEFT and ``torch.optim.AdamW``;
- ``L-LoRA step, layer``: against the authors' way, ``torch.func.jvp`` over *all* parameters of each adapted layer;
- ``L-LoRA step, network``: against one ``torch.func.jvp`` of the whole PEFT model over its LoRA parameters;
- ``L-LoRA step, weight``: ours alone.

PyTorch gets its best: fused attention wherever nothing needs a forward derivative through it, fused AdamW, all cores. The
two sides take turns (ours, theirs, ours, theirs, ...) so that a busy machine slows both. Where both frameworks see a GPU, a
second table is measured there in bfloat16, also with ``torch.compile``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU's memory is shared with PyTorch

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import torch
import tyro
from transformers import ViTConfig, ViTModel

import pefusion_jax as pf
from pefusion_jax import trees
from pefusion_jax.files import write_atomically

RANK, ALPHA, CLASSES, LEARNING_RATE = 16, 32, 100, 1e-4
MODES = ("layer", "network", "weight")
GOALS = {"forward": 0.51, "LoRA step": 0.55, "L-LoRA step, network": 0.39}  # ours over PyTorch, on two quiet cores


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
      batch: images a step on the CPU.
      dtype: precision of base weights and activations on the CPU; adapters and their optimizer state stay float32 in ours.
      device: ``auto`` is the CPU, then the GPU where JAX and PyTorch both see one.
      gpu_batch: images a step on the GPU, where the precision is bfloat16.
      rounds: timed calls of each contender; the median is reported.
      layers: transformer layers.
      width: model width; heads are 64 wide, the feed-forward network is four times as wide.
      image: image side in pixels; patches are 16 x 16, so 224 gives 197 tokens.
      scan: run our layers as one ``nn.scan`` (smaller program; no FLOP counts, which see a loop's body once).
      compile: on the CPU, time ``torch.compile`` too.
      out: path without suffix; ``.json`` and ``.md`` are written.
    """

    batch: int = 4
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "gpu"] = "auto"
    gpu_batch: int = 64
    rounds: int = 7
    layers: int = 12
    width: int = 768
    image: int = 224
    scan: bool = False
    compile: bool = False
    out: Path = Path("experiments/benchmarks/step_time")


# ---------------------------------------------------------------------------------------------------------- our model


class Block(nn.Module):
    """Pre-norm transformer layer ``[batch, seq, width] -> `` the same; the carry of a scan, hence the ``None``."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        batch, seq, width = x.shape
        dense = functools.partial(nn.Dense, dtype=self.dtype, param_dtype=self.dtype)
        norm = functools.partial(nn.LayerNorm, epsilon=1e-12, dtype=self.dtype, param_dtype=self.dtype)

        def by_head(name: str, h: jax.Array) -> jax.Array:
            # Heads are brought to the front once, so that both products below are plain batched matrix products.
            return dense(width, name=name)(h).reshape(batch, seq, self.heads, -1).transpose(0, 2, 1, 3)

        h = norm(name="norm1")(x)
        query, key, value = (by_head(name, h) for name in ("query", "key", "value"))
        scores = (query * (width // self.heads) ** -0.5) @ key.swapaxes(-1, -2)
        mixed = nn.softmax(scores.astype(jnp.float32)).astype(self.dtype) @ value
        x = x + dense(width, name="out")(mixed.transpose(0, 2, 1, 3).reshape(batch, seq, width))
        h = dense(4 * width, name="up")(norm(name="norm2")(x))
        # jax.nn.gelu(approximate=False) goes by erfc, which costs four times erf on a CPU and gains nothing here.
        h = 0.5 * h * (1 + jax.lax.erf(h * 0.5**0.5))
        return x + dense(width, name="down")(h), None


class ViT(nn.Module):
    """Vision transformer: ``[batch, 3, image, image] -> [batch, 1 + patches, width]``, class token first."""

    layers: int
    width: int
    dtype: Any = jnp.float32
    scan: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        batch, channels, side, _ = images.shape
        n = side // 16
        patches = images.reshape(batch, channels, n, 16, n, 16).transpose(0, 2, 4, 1, 3, 5).reshape(batch, n * n, -1)
        x = nn.Dense(self.width, dtype=self.dtype, param_dtype=self.dtype, name="patch")(patches.astype(self.dtype))
        token = self.param("token", nn.initializers.normal(), (1, 1, self.width), self.dtype)
        position = self.param("position", nn.initializers.normal(), (1, 1 + n * n, self.width), self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, self.width)), x], axis=1) + position
        if self.scan:
            stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
            x, _ = stack(self.width // 64, self.dtype, name="layers")(x, None)
        else:
            for i in range(self.layers):
                x, _ = Block(self.width // 64, self.dtype, name=f"layer_{i}")(x)
        return nn.LayerNorm(epsilon=1e-12, dtype=self.dtype, param_dtype=self.dtype, name="norm")(x)


# ------------------------------------------------------------------------------------------------------- PyTorch's model

PARTS = {  # ours -> transformers', inside one layer
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "out": "attention.o_proj",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}


def torch_vit(options: Options) -> ViTModel:
    """transformers' ViT with random weights that are not at special values."""
    torch.manual_seed(0)
    config = ViTConfig(
        num_hidden_layers=options.layers,
        hidden_size=options.width,
        num_attention_heads=options.width // 64,
        intermediate_size=4 * options.width,
        image_size=options.image,
        attn_implementation="eager",
    )
    model = ViTModel(config, add_pooling_layer=False).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))  # biases start at 0 and norms at 1 otherwise
    return model


def linen_params(model: ViTModel, dtype: Any, scan: bool) -> dict[str, Any]:
    """The weights of transformers' ViT in our layout."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    def module(name: str) -> dict[str, np.ndarray]:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        if weight.ndim == 1:
            return {"scale": weight, "bias": bias}
        return {"kernel": np.ascontiguousarray(weight.reshape(weight.shape[0], -1).T), "bias": bias}

    params: dict[str, Any] = {
        "patch": module("embeddings.patch_embeddings.projection"),
        "token": state["embeddings.cls_token"],
        "position": state["embeddings.position_embeddings"],
        "norm": module("layernorm"),
        **{
            f"layer_{i}": {ours: module(f"layers.{i}.{theirs}") for ours, theirs in PARTS.items()}
            for i in range(model.config.num_hidden_layers)
        },
    }
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), _scanned(params) if scan else params)


def _scanned(tree: dict[str, Any]) -> dict[str, Any]:
    """Moves ``layer_0``, ``layer_1``, ... into one ``layers`` with a leading axis."""
    names = sorted((name for name in tree if name.startswith("layer_")), key=lambda name: int(name.split("_")[1]))
    rest = {name: leaf for name, leaf in tree.items() if name not in names}
    return {**rest, "layers": jax.tree.map(lambda *leaves: np.stack(leaves), *(tree[name] for name in names))}


def lora_values(options: Options, *, b: float) -> dict[str, Any]:
    """Random factors in our loop layout; ``b`` is the size of B's elements, 0 as LoRA starts."""
    rng = np.random.default_rng(1)

    def normal(size: float, *shape: int) -> np.ndarray:
        return (size * rng.standard_normal(shape)).astype(np.float32)

    width = options.width
    return {
        f"layer_{i}": {
            name: {"lora_a": normal(width**-0.5, width, RANK), "lora_b": normal(b, RANK, width)} for name in ("query", "value")
        }
        for i in range(options.layers)
    }


def with_lora(model: ViTModel, values: dict[str, Any], attention: str) -> peft.PeftModel:
    """A copy of the model with PEFT's LoRA, its factors set to ``values``; only these are trained.

    The factors take the model's precision: PEFT would otherwise keep them in float32 and cast around every layer.
    """
    model = copy.deepcopy(model)
    model.set_attn_implementation(attention)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is on its way out
        lora = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    write_lora(lora, values)
    return lora


def write_lora(lora: torch.nn.Module, values: dict[str, Any]) -> None:
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.tensor(_pick(values, name).T.copy()))


def _pick(values: dict[str, Any], name: str) -> np.ndarray:
    """The factor in our loop layout that PEFT calls ``name``."""
    parts = name.split(".")
    layer = parts[parts.index("layers") + 1]
    part = "query" if "q_proj" in parts else "value"
    return values[f"layer_{layer}"][part]["lora_a" if "lora_A" in parts else "lora_b"]


class LayerTaylor(torch.nn.Module):
    """First-order expansion of one module in all of its parameters, as the authors of L-LoRA do it: a frozen copy of each
    parameter is the primal, the difference to it the tangent."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        self.names = [name for name, _ in module.named_parameters()]
        self.frozen = torch.nn.ParameterList(
            torch.nn.Parameter(p.detach().clone(), requires_grad=False) for p in module.parameters()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def of_parameters(*parameters: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(self.module, dict(zip(self.names, parameters, strict=True)), (x,))

        primals = tuple(self.frozen)
        tangents = tuple(now - then for now, then in zip(self.module.parameters(), primals, strict=True))
        value, change = torch.func.jvp(of_parameters, primals, tangents)
        return value + change


def linearize_layers(lora: peft.PeftModel) -> peft.PeftModel:
    """Wraps each LoRA layer in a :class:`LayerTaylor`, at the values that it has now."""
    for name, module in list(lora.named_modules()):
        if isinstance(module, peft.tuners.lora.LoraLayer):
            lora.set_submodule(name, LayerTaylor(module))
    return lora


class NetworkTaylor(torch.nn.Module):
    """First-order expansion of a whole PEFT model in its trained parameters alone."""

    def __init__(self, lora: peft.PeftModel) -> None:
        super().__init__()
        self.lora = lora
        self.primals = {n: p.detach().clone() for n, p in lora.named_parameters() if p.requires_grad}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        def of_adapters(adapters: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.func.functional_call(self.lora, adapters, (images,)).last_hidden_state

        now = {name: p for name, p in self.lora.named_parameters() if name in self.primals}
        tangents = {name: now[name] - then for name, then in self.primals.items()}
        value, change = torch.func.jvp(of_adapters, (self.primals,), (tangents,))
        return value + change


# ----------------------------------------------------------------------------------------------- one step on either side


class Problem:
    """Images, labels and a frozen head, on both sides."""

    def __init__(self, options: Options, batch: int, jax_device: jax.Device, torch_device: str) -> None:
        rng = np.random.default_rng(2)
        images = rng.standard_normal((batch, 3, options.image, options.image)).astype(np.float32)
        labels = rng.integers(0, CLASSES, batch)
        head = (0.1 * rng.standard_normal((options.width, CLASSES))).astype(np.float32)
        self.jax = jax.device_put((images, labels.astype(np.int32), head), jax_device)
        self.torch = tuple(torch.tensor(array, device=torch_device) for array in (images, labels, head))

    def torch_loss(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(hidden[:, 0].float() @ self.torch[2], self.torch[1])


def jax_loss(hidden: jax.Array, labels: jax.Array, head: jax.Array) -> jax.Array:
    logits = hidden[:, 0].astype(jnp.float32) @ head
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _apply_merged(adapted: pf.Adapted, trained: Any, params: Any, held: Any, images: jax.Array) -> jax.Array:
    return adapted.apply(params, trees.merge(trained, held), images)


def value_and_grad(adapted: pf.Adapted) -> Callable[..., Any]:
    """``(trained, params, held, images, labels, head) -> (loss, gradient)``, over the leaves that are trained alone."""

    def loss(trained: Any, params: Any, held: Any, images: jax.Array, labels: jax.Array, head: jax.Array) -> jax.Array:
        return jax_loss(_apply_merged(adapted, trained, params, held, images), labels, head)

    return jax.value_and_grad(loss)


def jax_step(adapted: pf.Adapted, params: Any, tree: Any, problem: Problem) -> tuple[Callable[[], None], float]:
    """One AdamW step with donated state, and the FLOPs of its program."""
    optimizer = optax.adamw(LEARNING_RATE)
    gradient = value_and_grad(adapted)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trained: Any, state: Any, params: Any, held: Any, *data: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, grads = gradient(trained, params, held, *data)
        updates, state = optimizer.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    trained, held = trees.split(tree, adapted.trainable(tree))
    trained = jax.tree.map(jnp.copy, trained)  # donated, and the caller keeps its tree
    carry = (trained, optimizer.init(trained))
    compiled = step.lower(*carry, params, held, *problem.jax).compile()

    def run() -> None:
        nonlocal carry
        *carry, value = compiled(*carry, params, held, *problem.jax)
        jax.block_until_ready((carry, value))

    return run, flops(compiled)


def jax_call(function: Callable[..., Any], *args: Any) -> tuple[Callable[[], None], float]:
    compiled = jax.jit(function).lower(*args).compile()
    return lambda: jax.block_until_ready(compiled(*args)), flops(compiled)


def flops(compiled: Any) -> float:
    return float(compiled.cost_analysis()["flops"])


def torch_step(model: torch.nn.Module, problem: Problem, forward: Callable[..., Any] | None = None) -> Callable[[], None]:
    """One AdamW step over the parameters that require a gradient; ``forward`` stands in for ``model`` when compiled."""
    forward = forward or model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=1e-4, fused=True)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = problem.torch_loss(hidden(forward(problem.torch[0])))
        loss.backward()
        optimizer.step()
        loss.item()  # waits for the device
        if loss.is_cuda:
            torch.cuda.synchronize()

    return run


def torch_forward(model: torch.nn.Module, problem: Problem) -> Callable[[], None]:
    @torch.inference_mode()
    def run() -> None:
        out = hidden(model(problem.torch[0]))
        if out.is_cuda:
            torch.cuda.synchronize()

    return run


def hidden(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state


# ------------------------------------------------------------------------------------------------------------- equality


def check(options: Options, model: ViTModel, jax_device: jax.Device, torch_device: str) -> dict[str, float]:
    """Compares both sides in float32: outputs of the base model, losses and gradients of the three kinds of step.

    Returns:
      Name -> relative error: of outputs the largest difference over the largest value, of gradients that of the norms.

    Raises:
      RuntimeError: naming each figure over its limit.
    """
    problem = Problem(options, 2, jax_device, torch_device)
    vit = ViT(options.layers, options.width, jnp.float32, options.scan)
    params = jax.device_put(linen_params(model, jnp.float32, options.scan), jax_device)
    model = copy.deepcopy(model).to(torch_device)
    shape = _scanned if options.scan else lambda tree: tree
    adapted = pf.adapt(vit, pf.LoRA(rank=RANK, alpha=ALPHA, targets=r".*/(query|value)"))
    start, moved = lora_values(options, b=0.0), lora_values(options, b=0.02)
    # Away from zero in both factors. A's displacement must not matter where B starts at zero, and this sees whether it does.
    moved = jax.tree.map(lambda then, now: now if not then.any() else (1.05 * now).astype(np.float32), start, moved)
    there = jax.tree.map(jnp.asarray, shape(jax.tree.map(np.subtract, moved, start)))
    here, there_lora = (jax.device_put(shape(tree), jax_device) for tree in (start, moved))
    here = jax.tree.map(jnp.asarray, here)
    errors: dict[str, float] = {}

    with jax.default_matmul_precision("highest"):
        ours = np.asarray(jax.jit(adapted.base)(params, problem.jax[0]))
        with torch.inference_mode():
            theirs = hidden(model(problem.torch[0])).cpu().numpy()
        errors["forward"] = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        _require_agreement(errors)
        cases = {
            "LoRA": (adapted, there_lora, with_lora(model, moved, "sdpa")),
            "layer": (pf.linearize(adapted, here, "layer"), there, linearize_layers(with_lora(model, start, "sdpa"))),
            "network": (pf.linearize(adapted, here, "network"), there, NetworkTaylor(with_lora(model, start, "eager"))),
        }
        for name, (ours_adapted, tree, theirs_model) in cases.items():
            trained, held = trees.split(tree, ours_adapted.trainable(tree))
            value, grads = jax.jit(value_and_grad(ours_adapted))(trained, params, held, *problem.jax)
            if name != "LoRA":
                write_lora(theirs_model, moved)
            loss = problem.torch_loss(hidden(theirs_model(problem.torch[0])))
            loss.backward()
            errors[f"{name} loss"] = abs(float(value) - loss.item()) / abs(loss.item())
            errors[f"{name} gradient"] = _gradient_error(theirs_model, grads, options)
    _require_agreement(errors)
    return errors


def _require_agreement(errors: dict[str, float]) -> None:
    limits = {name: 1e-4 if name == "forward" else 1e-3 for name in errors}
    wrong = [f"{name} {error:.1e} > {limits[name]:.0e}" for name, error in errors.items() if not error <= limits[name]]
    if wrong:
        raise RuntimeError(f"ours and PyTorch's disagree, so nothing was timed: {'; '.join(wrong)}")


def _gradient_error(model: torch.nn.Module, grads: Any, options: Options) -> float:
    """Relative distance of the two gradients, a leaf that ours leaves out counting as zero."""
    if options.scan:
        grads = {f"layer_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], grads["layers"]) for i in range(options.layers)}
    ours = {path: np.asarray(leaf) for path, leaf in trees.paths(grads).items()}
    distance = norm = 0.0
    used = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = name.split(".")
            part = "query" if "q_proj" in parts else "value"
            path = f"layer_{parts[parts.index('layers') + 1]}/{part}/{'lora_a' if 'lora_A' in parts else 'lora_b'}"
            theirs = parameter.grad.cpu().numpy().T
            distance += float(np.sum((theirs - ours.get(path, np.zeros_like(theirs))) ** 2))
            norm += float(np.sum(theirs**2))
            used.add(path)
    if ours.keys() - used:
        raise RuntimeError(f"PyTorch has no gradient for {sorted(ours.keys() - used)}")
    return (distance / norm) ** 0.5


# --------------------------------------------------------------------------------------------------------------- timing


def take_turns(contenders: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call, the contenders called in turn after two warm-up calls each."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(2):
        for run in contenders.values():
            run()
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def ceiling(jax_device: jax.Device, torch_device: str, dtype: str, size: int) -> dict[str, float]:
    """Matrix-product rates in GFLOP/s, ``size`` cubed: what no program made of matrix products can exceed by much."""
    ones = np.ones((size, size), np.float32)
    ours = jax.device_put(jnp.asarray(ones, jnp.dtype(dtype)), jax_device)
    theirs = torch.from_numpy(ones).to(torch_device, getattr(torch, dtype))
    product = jax.jit(jnp.matmul)

    def run_theirs() -> None:
        torch.matmul(theirs, theirs)
        if torch_device == "cuda":
            torch.cuda.synchronize()

    times = take_turns({"ours": lambda: jax.block_until_ready(product(ours, ours)), "torch": run_theirs}, 7)
    return {who: 2e-6 * size**3 / min(values) for who, values in times.items()}


def measure(options: Options, kind: str, batch: int, dtype: str, compiled: bool) -> dict[str, Any]:
    """Checks, then times every row on one device."""
    jax_device, torch_device = jax.devices(kind)[0], "cuda" if kind == "gpu" else "cpu"
    base = torch_vit(options)
    errors = check(options, base, jax_device, torch_device)
    for name, error in errors.items():
        print(f"  agree: {name} {error:.1e}", flush=True)

    problem = Problem(options, batch, jax_device, torch_device)
    params = jax.device_put(linen_params(base, jnp.dtype(dtype), options.scan), jax_device)
    vit = ViT(options.layers, options.width, jnp.dtype(dtype), options.scan)
    adapted = pf.adapt(vit, pf.LoRA(rank=RANK, alpha=ALPHA, targets=r".*/(query|value)"))
    start = lora_values(options, b=0.0)
    phi0 = jax.device_put(jax.tree.map(jnp.asarray, _scanned(start) if options.scan else start), jax_device)
    theirs = base.to(torch_device, getattr(torch, dtype))
    plain = copy.deepcopy(theirs)
    plain.set_attn_implementation("sdpa")

    forward, unit = jax_call(adapted.base, params, problem.jax[0])
    rows: list[dict[str, Any]] = []

    def row(name: str, run: Callable[[], None], cost: float, model: torch.nn.Module | None, limit: float | None) -> None:
        contenders = {"ours": run}
        notes = []
        if model is not None:
            step = torch_forward if name == "forward" else torch_step
            contenders["torch"] = step(model, problem)
            if compiled:
                try:
                    if name == "forward":
                        contenders["torch.compile"] = torch_forward(torch.compile(model), problem)
                    else:
                        contenders["torch.compile"] = torch_step(model, problem, torch.compile(model))
                    contenders["torch.compile"]()
                except Exception as error:  # the compiler's limits are its own; the row says so and the others still count
                    contenders.pop("torch.compile", None)
                    notes.append(f"torch.compile failed: {type(error).__name__}")
        times = take_turns(contenders, options.rounds)
        median = {who: statistics.median(values) for who, values in times.items()}
        rivals = [value for who, value in median.items() if who != "ours"]
        rows.append(
            {
                "row": name,
                "median_ms": median,
                "fastest_ms": {who: min(values) for who, values in times.items()},
                "ratio": {who: median["ours"] / value for who, value in median.items() if who != "ours"},
                "ratio_to_best": median["ours"] / min(rivals) if rivals else None,
                "flops_in_forwards": None if options.scan else cost / unit,
                "flops_limit": limit,
                "notes": notes,
            }
        )
        print(f"  {name}: " + ", ".join(f"{who} {value:.0f} ms" for who, value in median.items()), flush=True)

    row("forward", forward, unit, plain, None)
    run, cost = jax_step(adapted, params, phi0, problem)
    row("LoRA step", run, cost, with_lora(theirs, start, "sdpa"), 2.15)
    rivals = {
        "layer": lambda: linearize_layers(with_lora(theirs, start, "sdpa")),
        "network": lambda: NetworkTaylor(with_lora(theirs, start, "eager")),
        "weight": lambda: None,
    }
    for mode in MODES:
        linear = pf.linearize(adapted, phi0, mode)
        tau = jax.device_put(linear.init(None, params), jax_device)
        run, cost = jax_step(linear, params, tau, problem)
        row(f"L-LoRA step, {mode}", run, cost, rivals[mode](), 3.2 if mode == "network" else None)
        if mode == "network" and not options.scan:
            trained, held = trees.split(tau, linear.trainable(tau))
            forward_only = functools.partial(_apply_merged, linear)
            _, cost = jax_call(forward_only, trained, params, held, problem.jax[0])
            linear_forward = {"flops_in_forwards": cost / unit, "flops_limit": 2.15}
    return {
        "device": _cpu() if kind == "cpu" else jax_device.device_kind,
        "kind": kind,
        "batch": batch,
        "dtype": dtype,
        "agreement_float32": errors,
        "rows": rows,
        "forward_gflop": 1e-9 * unit,
        "matmul_gflops": ceiling(jax_device, torch_device, dtype, 2048 if options.width >= 768 else 256),
        "linearized_forward": None if options.scan else linear_forward,
    }


# --------------------------------------------------------------------------------------------------------------- report


def markdown(result: dict[str, Any]) -> str:
    """The tables, with what was measured and on what."""
    o = result["options"]
    tokens = (o["image"] // 16) ** 2 + 1
    whole = (o["layers"], o["width"], o["image"], o["batch"]) == (12, 768, 224, 4)  # the size that the goals are for
    lines = [
        "# Step time beside PyTorch",
        "",
        f"Vision transformer, {o['layers']} layers, {o['width']} wide, {o['width'] // 64} heads, {tokens} tokens; "
        f"LoRA rank {RANK}, alpha {ALPHA}, on query and value. Medians of {o['rounds']} calls, the contenders taking turns; a "
        "ratio is ours over theirs, below 1 where ours is faster. FLOPs are ours, from XLA's cost analysis, in forward passes.",
        "",
        f"{result['threads']} threads for either side; load average {result['load_before']:.1f} before and "
        f"{result['load_after']:.1f} after the run. " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()) + ".",
    ]
    for table in result["tables"]:
        names = [n for n in ("ours", "torch", "torch.compile") if any(n in r["median_ms"] for r in table["rows"])]
        lines += ["", f"## {table['device']}, batch {table['batch']}, {table['dtype']}", ""]
        header = ["", *(f"{n}, ms" for n in names), *(f"ours / {n}" for n in names[1:]), "goal", "FLOPs (limit)", "notes"]
        lines += [_line(header), _line(["---", *["---:"] * (len(header) - 2), "---"])]
        for r in table["rows"]:
            goal = GOALS.get(r["row"]) if whole and table["kind"] == "cpu" and table["dtype"] == "float32" else None
            lines.append(
                _line(
                    [
                        r["row"],
                        *(_figure(r["median_ms"].get(n), ".0f" if table["kind"] == "cpu" else ".2f") for n in names),
                        *(_figure(r["ratio"].get(n), ".2f") for n in names[1:]),
                        f"<= {goal}" if goal else "",
                        _figure(r["flops_in_forwards"], ".2f") + (f" (<= {r['flops_limit']})" if r["flops_limit"] else ""),
                        "; ".join(r["notes"]),
                    ]
                )
            )
        if table["linearized_forward"]:
            cost = table["linearized_forward"]
            lines += ["", f"Linearized forward: {cost['flops_in_forwards']:.2f} forwards (<= {cost['flops_limit']})."]
        rates = table["matmul_gflops"]
        floor = 1e3 * table["forward_gflop"] / max(rates.values())
        lines += [
            "",
            f"Largest matrix-product rates in the same run: ours {rates['ours']:.0f}, torch {rates['torch']:.0f} GFLOP/s. "
            f"The forward pass needs {table['forward_gflop']:.0f} GFLOP, so {floor:.0f} ms is about the least that it can "
            "take on this machine.",
        ]
        worst = max(table["agreement_float32"].items(), key=lambda item: item[1])
        lines += ["", f"Both sides agree in float32 before timing; largest relative error {worst[1]:.1e} ({worst[0]})."]
    if not any(table["kind"] == "gpu" for table in result["tables"]):
        lines += ["", f"## GPU\n\n{result['no_gpu']}"]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _cpu() -> str:
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    except OSError:
        names = []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def main(options: Options) -> dict[str, Any]:
    """Measures, writes both files and prints the tables."""
    if options.width % 64 or options.image % 16 or min(options.batch, options.rounds, options.layers) < 1:
        raise ValueError(
            f"width={options.width} must be a multiple of 64, image={options.image} of 16, and batch, rounds and layers "
            "at least 1"
        )
    gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    if options.device == "gpu" and not gpu:
        raise ValueError("--device gpu: JAX and PyTorch must both see a GPU; install both with CUDA, or use --device cpu")
    torch.set_num_threads(os.cpu_count() or 1)
    load = os.getloadavg()[0]
    tables = []
    if options.device in ("auto", "cpu"):
        print("CPU", flush=True)
        with jax.default_device(jax.devices("cpu")[0]):  # also where a GPU is the default
            tables.append(measure(options, "cpu", options.batch, options.dtype, options.compile))
    if gpu and options.device in ("auto", "gpu"):
        print("GPU", flush=True)
        tables.append(measure(options, "gpu", options.gpu_batch, "bfloat16", True))
    result = {
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(options).items() if k != "out"},
        "versions": {
            "python": platform.python_version(),
            **{p: importlib.metadata.version(p) for p in ("jax", "flax", "optax", "torch", "transformers", "peft")},
        },
        "threads": os.cpu_count(),
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "tables": tables,
        "no_gpu": None if gpu else "Not measured: JAX and PyTorch do not both see a GPU here.",
    }
    if gpu and options.device == "cpu":
        result["no_gpu"] = "Not measured: run with --device cpu."
    text = markdown(result)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out.with_suffix(".json"), (json.dumps(result, indent=1) + "\n").encode())
    write_atomically(options.out.with_suffix(".md"), text.encode())
    print(text)
    return result


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
