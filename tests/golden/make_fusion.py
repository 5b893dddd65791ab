"""Writes what mergekit and FusionBench make of a few small tensors, for tests/fusion/test_conformance_golden.py.

Run it in an environment that has the tool (they do not go together with each other, nor with ours)::

    pip install mergekit==0.1.5 torch==2.13.0
    python tests/golden/make_fusion.py --tool mergekit
    pip install fusion-bench==0.2.33 torch==2.13.0
    python tests/golden/make_fusion.py --tool fusion_bench

A golden file holds the inputs (``base/PATH``, ``t0/PATH``, ... the changes of three tasks), the draws that took the place of
the tool's random numbers (``uniform/t0/PATH``) and the outputs (``CASE/PATH``: changes again, but whole weights for ``linear``
and ``slerp``, which interpolate whole weights), in PyTorch's layout ``[outputs, inputs]``. Its metadata has the versions, and
for each case the tool's arguments.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file

SHAPES = {"kernel": (6, 5), "bias": (6,), "embedding": (7, 3)}
TASKS = ("t0", "t1", "t2")
WEIGHTS = [0.6, 1.25, -0.375]


def inputs() -> dict[str, dict[str, torch.Tensor]]:
    """Weights of a base model, changes of three tasks, and draws; sums of base and change are exact in float32."""
    rng = np.random.default_rng(2024)

    def grid(values: np.ndarray, step: int) -> torch.Tensor:
        return torch.tensor(np.round(values * step) / step, dtype=torch.float32)

    made = {"base": {path: grid(rng.normal(size=shape), 2**8) for path, shape in SHAPES.items()}}
    for task in TASKS:
        made[task] = {path: grid(rng.normal(size=shape), 2**16) for path, shape in SHAPES.items()}
    for task in TASKS:
        made[f"uniform/{task}"] = {path: torch.tensor(rng.uniform(size=s), dtype=torch.float32) for path, s in SHAPES.items()}
    # Votes that are drawn: two tasks at odds, the third without an opinion.
    made["t1"]["kernel"][0, :3] = -made["t0"]["kernel"][0, :3]
    made["t2"]["kernel"][0, :3] = 0
    for task in TASKS:
        values = torch.cat([leaf.flatten() for leaf in made[task].values()]).abs()
        assert len(values[values > 0].unique()) == (values > 0).sum(), "two entries of one task have the same magnitude"
    return made


def mergekit(made: dict[str, dict[str, torch.Tensor]]) -> tuple[dict, dict]:
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import TensorGroup

    three = {"weight": WEIGHTS}
    equal = {"weight": [1.0, 1.0, 1.0]}
    cases = {
        "linear": ("linear", three),
        "linear_plain": ("linear", {**three, "normalize": False}),
        "task_arithmetic": ("task_arithmetic", {**three, "lambda": 0.7}),
        "task_arithmetic_normalized": ("task_arithmetic", {**three, "normalize": True}),
        "ties": ("ties", {**three, "density": 0.4, "lambda": 0.7}),
        "ties_equal": ("ties", {**equal, "density": 1.0}),
        "dare_linear": ("dare_linear", {**three, "density": 0.6, "lambda": 0.7}),
        "dare_linear_plain": ("dare_linear", {**three, "density": 0.6, "rescale": False, "normalize": True}),
        "dare_ties": ("dare_ties", {**three, "density": 0.6}),
        "della": ("della", {**three, "density": 0.6, "epsilon": 0.2, "lambda": 1.1}),
        "della_linear": ("della_linear", {**three, "density": 0.5, "epsilon": 0.15}),
        "breadcrumbs": ("breadcrumbs", {**three, "density": 0.5, "gamma": 0.2, "lambda": 0.7}),
        "breadcrumbs_crowded": ("breadcrumbs", {**equal, "density": 0.9, "gamma": 0.3}),
        "breadcrumbs_whole": ("breadcrumbs", {**equal, "density": 1.0, "gamma": 0.3}),
        "breadcrumbs_ties": ("breadcrumbs_ties", {**three, "density": 0.6, "gamma": 0.1, "normalize": True}),
        "slerp": ("slerp", {"t": 0.3}),
        "nuslerp": ("nuslerp", {"weight": [0.7, 0.3]}),
        "model_stock": ("model_stock", {}),
    }
    outputs = {}
    for case, (name, arguments) in cases.items():
        tasks = TASKS[:2] if name in ("slerp", "nuslerp") else TASKS
        for path in SHAPES:
            base = made["base"][path]
            models = [base + made[task][path] for task in tasks]
            if name == "slerp":  # between two models, the first of which mergekit calls the base
                given, ids, base_index = models, ["t0", "t1"], 0
            elif name == "linear":
                given, ids, base_index = models, list(tasks), None
            else:
                given, ids, base_index = [base, *models], ["base", *tasks], 0
            draws = iter([made[f"uniform/{task}"][path] for task in tasks])

            def bernoulli(chance: torch.Tensor, draws=draws) -> torch.Tensor:
                return (next(draws).reshape(chance.shape) < chance).to(chance.dtype)

            parameters = {key: value[: len(tasks)] if isinstance(value, list) else value for key, value in arguments.items()}
            with mock.patch.object(torch, "bernoulli", bernoulli):
                group = TensorGroup.from_tensors(given, ids=ids, base_index=base_index, name=path)
                (merged,) = registry.get(name)([group], parameters=parameters)
            outputs[f"{case}/{path}"] = merged if name in ("slerp", "linear") else merged - base
    return outputs, {case: {"method": name, "parameters": arguments} for case, (name, arguments) in cases.items()}


def fusion_bench(made: dict[str, dict[str, torch.Tensor]]) -> tuple[dict, dict]:
    from fusion_bench.method.dare.utils import module_random_drop_
    from fusion_bench.method.emr_merging.utils import emr_merge
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
    from fusion_bench.method.magmax.magmax import _magmax_select
    from fusion_bench.method.model_stock.model_stock import compute_angle, compute_ratio
    from fusion_bench.method.singular_value_calibration.utils import subspace_consistency_spectral_calibration
    from fusion_bench.method.slerp.slerp_utils import slerp
    from fusion_bench.method.tall_mask.utils import generate_task_masks
    from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction
    from fusion_bench.method.ties_merging.ties_merging_utils import state_dict_to_vector, ties_merging, vector_to_state_dict
    from fusion_bench.method.wudi.wudi import wudi_merging

    base = made["base"]

    def changes() -> list[dict[str, torch.Tensor]]:
        return [{path: leaf.clone() for path, leaf in made[task].items()} for task in TASKS]

    def flat(trees: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        return torch.vstack([state_dict_to_vector(tree) for tree in trees])

    def tree(vector: torch.Tensor) -> dict[str, torch.Tensor]:
        # The function writes views of the vector into a copy of the reference.
        return {path: leaf.clone() for path, leaf in vector_to_state_dict(vector.clone(), base).items()}

    def total(trees: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {path: sum(tree[path] for tree in trees) for path in SHAPES}

    def dare() -> list[dict[str, torch.Tensor]]:
        dropped = changes()
        for task, change in zip(TASKS, dropped, strict=True):
            draws = iter([1 - made[f"uniform/{task}"][path] for path in SHAPES])
            with mock.patch.object(torch, "rand_like", lambda leaf, draws=draws: next(draws)):
                module_random_drop_(change, sparsity_level=0.4, rescale=True)
        return dropped

    def model_stock() -> dict[str, torch.Tensor]:
        models = [{path: base[path] + change[path] for path in SHAPES} for change in changes()]
        pairs = [compute_angle(models[i], models[j], base) for i in range(3) for j in range(i + 1, 3)]
        ratio = compute_ratio({path: sum(pair[path] for pair in pairs) / len(pairs) for path in SHAPES}, k=3)
        return {path: total(changes())[path] / 3 * ratio[path] for path in SHAPES}

    def svc(alpha: float) -> dict[str, torch.Tensor]:
        merged = {path: 0.3 * leaf for path, leaf in total(changes()).items()}
        zeros = {path: torch.zeros_like(leaf) for path, leaf in base.items()}
        for path, leaf in merged.items():
            if leaf.ndim == 2:
                own = [change[path] for change in changes()]
                merged[path] = subspace_consistency_spectral_calibration(zeros[path], own, leaf, alpha, torch.device("cpu"))
        return merged

    unified, masks, rescalers = emr_merge(changes())
    flat_base, flat_tasks = state_dict_to_vector(base), flat(changes())
    tall = generate_task_masks(flat_tasks, flat_base + flat_tasks, flat_base, tall_mask_lambda=0.4)
    made_cases = {
        "task_arithmetic": ({"scaling_factor": 0.3}, {path: 0.3 * leaf for path, leaf in total(changes()).items()}),
        "ties": ({"threshold": 20, "merge_func": "sum"}, tree(ties_merging(flat(changes()), 20, "sum"))),
        "ties_mean": ({"threshold": 40, "merge_func": "mean"}, tree(ties_merging(flat(changes()), 40, "mean"))),
        "dare": ({"sparsity_ratio": 0.4}, total(dare())),
        "magmax": ({"scaling_factor": 0.5}, {path: 0.5 * leaf for path, leaf in _magmax_select(changes()).items()}),
        "emr": ({}, unified),
        "model_stock": ({}, model_stock()),
        "tsv_m": ({}, compute_and_sum_svd_mem_reduction(changes(), exclude_keys=[], accelerator="cpu")),
        "iso_c": ({}, iso_c(changes(), accelerator="cpu")),
        "iso_cts": ({"common_space_fraction": 0.4}, iso_cts(changes(), 0.4, accelerator="cpu")),
        "wudi": ({"iter_num": 40}, wudi_merging(changes(), accelerator="cpu", iter_num=40)),
        "svc": ({"alpha": 0.1, "scaling_factor": 0.3}, svc(0.1)),
        "slerp": ({"t": 0.3}, {p: slerp(0.3, base[p] + made["t0"][p], base[p] + made["t1"][p]) for p in SHAPES}),
    }
    for place, task in enumerate(TASKS):
        made_cases[f"emr_{task}"] = ({}, {p: unified[p] * masks[p][place] * rescalers[place] for p in SHAPES})
        made_cases[f"tall_{task}"] = ({"lambda": 0.4}, tree(flat_tasks.sum(0) * tall[place]))
    outputs = {f"{case}/{path}": leaf for case, (_, merged) in made_cases.items() for path, leaf in merged.items()}
    return outputs, {case: {"parameters": arguments} for case, (arguments, _) in made_cases.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tool", choices=("mergekit", "fusion_bench"), required=True)
    tool = parser.parse_args().tool
    torch.manual_seed(0)
    made = inputs()
    outputs, cases = {"mergekit": mergekit, "fusion_bench": fusion_bench}[tool](made)
    tensors = {f"{kind}/{path}": leaf for kind, leaves in inputs().items() for path, leaf in leaves.items()}
    tensors |= {name: leaf.detach().contiguous().float().clone() for name, leaf in outputs.items()}
    package = tool.replace("_", "-")
    versions = {name: importlib.metadata.version(name) for name in (package, "torch", "numpy")}
    target = Path(__file__).with_name(f"fusion_{tool.replace('_', '')}.safetensors")
    save_file(tensors, target, metadata={"versions": json.dumps(versions), "cases": json.dumps(cases)})
    print(f"{target.name}: {len(cases)} cases, {target.stat().st_size} bytes, {versions}")


if __name__ == "__main__":
    main()
