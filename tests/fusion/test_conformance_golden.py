"""mergekit and FusionBench themselves, through the goldens that tests/golden/make_fusion.py wrote with them."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import pefusion_jax as pf
from pefusion_jax import fusion, trees
from pefusion_jax.fusion import parts, tool_parts

GOLDEN = Path(__file__).parents[1] / "golden"
PATHS = ("kernel", "bias", "embedding")


@functools.cache
def golden(tool: str) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, dict]]:
    """Case or kind of input -> path -> array in our layout; case -> what the tool was called with."""
    found: dict[str, dict[str, np.ndarray]] = {}
    with safe_open(GOLDEN / f"fusion_{tool}.safetensors", "numpy") as file:
        cases = json.loads(file.metadata()["cases"])
        for name in file.keys():
            path = next(path for path in PATHS if name.endswith(path))
            array = file.get_tensor(name)
            found.setdefault(name.removesuffix("/" + path), {})[path] = array.T if path.endswith("kernel") else array
    return found, cases


def tasks(tool: str, names=("t0", "t1", "t2"), base: bool = False) -> dict[str, dict[str, jax.Array]]:
    found, _ = golden(tool)
    start = found["base"] if base else dict.fromkeys(PATHS, np.float32(0))
    return {name: {path: jnp.asarray(found[name][path] + start[path]) for path in PATHS} for name in names}


@pytest.fixture
def their_draws(monkeypatch):
    """Puts the golden's uniform draws in the place of ours."""

    def draws(path: str, leaf: jax.Array) -> jax.Array:
        found, _ = golden("mergekit")
        return jnp.stack([jnp.asarray(found[f"uniform/t{task}"][path]) for task in range(len(leaf))])

    def drop(density, key):
        def one(path: str, leaf: jax.Array) -> jax.Array:
            return jnp.where(draws(path, leaf) < density, leaf / density, jnp.zeros_like(leaf))

        return lambda stacked: trees.map_paths(one, stacked)

    monkeypatch.setattr(parts, "drop", drop)
    monkeypatch.setattr(tool_parts, "uniform", lambda path, leaf, key: draws(path, leaf))


def same(got, tool: str, case: str, bound: float = 1e-6) -> None:
    """Equal to rounding: ``bound`` of the largest entry of a tensor."""
    for path, want in golden(tool)[0][case].items():
        np.testing.assert_allclose(got[path], want, atol=bound * np.abs(want).max(), rtol=0, err_msg=f"{case}: {path}")


def mergekit_method(name: str, arguments: dict) -> fusion.Fusion:
    """Our method for mergekit's name and parameters."""
    given = dict(arguments)
    scale, weights = given.pop("lambda", 1.0), given.pop("weight", None)
    normalize, density = given.pop("normalize", None), given.pop("density", None)
    then = "ties" if name in ("dare_ties", "della", "breadcrumbs_ties") else "task_arithmetic"
    shared = {"weights": weights, "normalize": normalize, "conform": "mergekit"}
    if name in ("linear", "task_arithmetic"):
        divided = (name == "linear") if normalize is None else normalize
        return fusion.weighted_average([scale * weight for weight in weights], normalize=divided)
    if name == "ties":
        return fusion.ties(density, scale, **shared)
    if name.startswith("dare"):
        return fusion.dare(density, scale, then=then, rescale=given.pop("rescale", None), **shared)
    if name.startswith("della"):
        window, rescale = 2 * given.pop("epsilon"), given.pop("rescale", True)
        return fusion.della(density, window, scale, then=then, rescale=rescale, **shared)
    if name.startswith("breadcrumbs"):
        return fusion.breadcrumbs(density, given.pop("gamma"), scale, then=then, **shared)
    if name == "slerp":
        return fusion.slerp(given.pop("t"), conform="mergekit")
    if name == "nuslerp":
        return fusion.slerp(weights[1] / sum(weights), conform="mergekit")
    return fusion.model_stock(conform="mergekit")


@pytest.mark.parametrize("case", golden("mergekit")[1])
def test_mergekit(case, their_draws):
    called = golden("mergekit")[1][case]
    names, whole = ("t0", "t1") if "slerp" in case else ("t0", "t1", "t2"), called["method"] in ("slerp", "linear")
    method = mergekit_method(called["method"], called["parameters"])
    same(jax.jit(functools.partial(pf.fuse, method))(tasks("mergekit", names, base=whole)), "mergekit", case)


def fusion_bench_method(case: str, arguments: dict) -> fusion.Fusion:
    name, _, rest = case.partition("_")
    conform = {"conform": "fusion_bench"}
    if name == "ties":
        return fusion.ties(arguments["threshold"] / 100, reduce=arguments["merge_func"], **conform)
    if name in ("emr", "tall"):
        return fusion.emr(rest or None, **conform) if name == "emr" else fusion.tall_masks(rest, arguments["lambda"])
    if name == "svc":
        return fusion.svc(fusion.task_arithmetic(arguments["scaling_factor"]), arguments["alpha"])
    return {
        "task_arithmetic": lambda: fusion.task_arithmetic(arguments["scaling_factor"]),
        "dare": lambda: fusion.dare(1 - arguments["sparsity_ratio"], **conform),
        "magmax": lambda: fusion.magmax(arguments["scaling_factor"], **conform),
        "model_stock": lambda: fusion.model_stock(**conform),
        "slerp": lambda: fusion.slerp(arguments["t"], **conform),
        "tsv_m": fusion.tsv_m,
        "iso_c": fusion.iso_c,
        "iso_cts": lambda: fusion.iso_cts(common=arguments["common_space_fraction"]),
        "wudi": lambda: fusion.wudi(arguments["iter_num"], moments="entry"),
    }[case]()


@pytest.mark.parametrize("case", golden("fusionbench")[1])
def test_fusion_bench(case, their_draws):
    arguments = golden("fusionbench")[1][case]["parameters"]
    given = tasks("fusionbench", ("t0", "t1") if case == "slerp" else ("t0", "t1", "t2"), base=case == "slerp")
    turned = case.startswith(("svc", "wudi"))  # It takes the rows of an embedding for outputs, as those of other weights.
    if turned:
        given = {name: tree | {"embedding": tree["embedding"].T} for name, tree in given.items()}
    got = jax.jit(functools.partial(pf.fuse, fusion_bench_method(case, arguments)))(given)
    same(got | {"embedding": got["embedding"].T} if turned else got, "fusionbench", case, bound=5e-6)


@pytest.mark.parametrize(
    ("case", "paper"),
    [
        ("mergekit ties", fusion.ties(0.4, 0.7)),
        ("mergekit breadcrumbs", fusion.breadcrumbs(0.5, 0.2, 0.7)),
        ("fusionbench ties", fusion.ties(0.2, reduce="sum")),
        ("fusionbench emr_t1", fusion.emr("t1")),
    ],
)
def test_the_papers_are_something_else(case, paper):
    """Otherwise a mode that did nothing would pass above."""
    tool, name = case.split()
    got, want = jax.jit(functools.partial(pf.fuse, paper))(tasks(tool)), golden(tool)[0][name]
    assert max(np.abs(np.asarray(got[path]) - want[path]).max() for path in PATHS) > 1e-3
