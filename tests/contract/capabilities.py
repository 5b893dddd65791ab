"""What every family of models can do, as functions that fail where it cannot; the README's table is made from them.

``python tests/contract/capabilities.py`` runs all of them and prints the table.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import jax
import jax.numpy as jnp
import numpy as np
import torch

import pefusion_jax as pf
from pefusion_jax.interop import load_peft, manifest, save_peft

BOUND = 1e-5


def close(ours: Any, theirs: Any, bound: float = BOUND) -> None:
    """Equal within ``bound`` of the largest value."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert np.abs(ours - theirs).max() <= bound * max(1.0, np.abs(theirs).max()), np.abs(ours - theirs).max()


@functools.cache
def lora(name: str) -> tuple[pf.Adapted, Any]:
    """LoRA on a family and adapters away from their start."""
    made = families.family(name)
    adapted = pf.adapt(made.model, pf.LoRA(rank=3, alpha=6, targets=made.row.targets))
    start = adapted.init(jax.random.key(1), made.params, made.row.inputs)
    rng = np.random.default_rng(2)
    return adapted, jax.tree.map(lambda leaf: leaf + jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32), start)


@functools.cache
def compiled(name: str) -> Callable[..., jax.Array]:
    """``(params, adapters) -> `` the compared output, compiled once."""
    made, adapted = families.family(name), lora(name)[0]
    return jax.jit(lambda params, adapters: made.picked(adapted.apply(params, adapters, made.row.inputs)))


@functools.cache
def base(name: str) -> Callable[..., jax.Array]:
    """``params -> `` the compared output of the model alone."""
    made = families.family(name)
    return jax.jit(lambda params: made.picked(made.model.apply({"params": params}, made.row.inputs)))


def load(name: str) -> bool:
    """Outputs of the loaded model are transformers'."""
    made = families.family(name)
    close(base(name)(made.params), families.theirs(made))
    return True


def adapt(name: str) -> bool:
    """Adapters change the outputs as the folded weights do."""
    made, (adapted, adapters) = families.family(name), lora(name)
    ours = compiled(name)(made.params, adapters)
    close(ours, base(name)(pf.fold(made.params, adapted.deltas(made.params, adapters))))
    assert np.abs(ours - base(name)(made.params)).max() > 1e-3
    return True


def linearize(name: str) -> bool:
    """The network linearization is the model at zero, its pushforward the derivative."""
    made, (adapted, adapters) = families.family(name), lora(name)
    linear = pf.linearize(adapted, adapters)
    tau = jax.tree.map(lambda leaf: 0.1 * leaf, adapters)

    def both(params: Any) -> Any:
        zero = jax.tree.map(jnp.zeros_like, tau)
        apply = lambda tree: made.picked(linear.apply(params, tree, made.row.inputs))  # noqa: E731
        return apply(zero), apply(tau), apply(jax.tree.map(lambda leaf: -2 * leaf, tau))

    at_zero, once, minus_twice = jax.jit(both)(made.params)
    close(at_zero, compiled(name)(made.params, adapters))
    close(minus_twice - at_zero, -2 * (once - at_zero), 2e-5)
    assert np.abs(once - at_zero).max() > 1e-4
    return True


def generate(name: str) -> bool:
    """Greedy tokens are transformers', plain and adapted; False for families that do not generate."""
    made = families.family(name)
    if not made.row.generates:
        return False
    inputs = {"input_ids": families.IDS, "attention_mask": families.MASK if name == "T5" else families.LEFT}
    with torch.no_grad():
        tensors = {key: torch.tensor(value) for key, value in inputs.items()}
        want = made.reference.generate(**tensors, max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0).numpy()
    ours = pf.generate_tokens(made.model, made.params, inputs, max_new_tokens=8, eos_token_id=2, pad_token_id=0)
    theirs = want[:, 1:] if name == "T5" else want[:, inputs["input_ids"].shape[1] :]
    np.testing.assert_array_equal(np.asarray(ours)[:, : theirs.shape[1]], theirs)
    return True


def export(name: str) -> bool:
    """A folder that we write with folded adapters is loaded by transformers, without a remark, and computes the same."""
    made, (adapted, adapters) = families.family(name), lora(name)
    folded = pf.fold(made.params, adapted.deltas(made.params, adapters))
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "merged"
        pf.save_pretrained(folder, made.model, folded, max_shard_bytes=20_000)
        assert manifest.verify(folder).ok
        model, report = type(made.reference).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    close(compiled(name)(made.params, adapters), families.theirs(made, model.eval()))
    return True


def peft_in(name: str) -> bool:
    """An adapter that peft made computes here what it computes there."""
    import peft

    made = families.family(name)
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=list(made.row.their_targets), init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for an attribute that it renamed
        wrapped = peft.get_peft_model(type(made.reference).from_pretrained(made.folder), config).eval()
    with tempfile.TemporaryDirectory() as root:
        wrapped.save_pretrained(root)
        adapted, adapters = load_peft(root, made.model, made.params)
        ours = jax.jit(lambda p, a: made.picked(adapted.apply(p, a, made.row.inputs)))(made.params, adapters)
    want = families.theirs(made, wrapped)
    close(ours, want)
    assert np.abs(want - families.theirs(made)).max() > 1e-3
    return True


def peft_out(name: str) -> bool:
    """An adapter of ours is loaded by peft without a remark about names, and computes the same there."""
    import peft

    made, (adapted, adapters) = families.family(name), lora(name)
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        folder = Path(root) / "adapter"
        save_peft(folder, adapted, adapters, base=str(made.folder), params=made.params)
        wrapped = peft.PeftModel.from_pretrained(type(made.reference).from_pretrained(made.folder), folder).eval()
    assert not [str(remark.message) for remark in remarks if "key" in str(remark.message).lower()]
    close(compiled(name)(made.params, adapters), families.theirs(made, wrapped))
    return True


CAPABILITIES: dict[str, Callable[[str], bool]] = {
    "load": load,
    "adapt": adapt,
    "linearize": linearize,
    "generate": generate,
    "export": export,
    "PEFT in": peft_in,
    "PEFT out": peft_out,
}


def table() -> str:
    """Runs everything; Markdown rows of families, columns of capabilities."""
    lines = ["| family | " + " | ".join(CAPABILITIES) + " |", "|---|" + ":---:|" * len(CAPABILITIES)]
    for name in families.NAMES:
        cells = ("yes" if check(name) else "-" for check in CAPABILITIES.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
