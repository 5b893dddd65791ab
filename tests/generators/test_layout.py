import jax.numpy as jnp
import numpy as np
import pytest

from pefusion_jax.generators.layout import layout_of


def kernels(*paths, shape=(2, 3)):
    from pefusion_jax import trees

    return trees.nest({path: jnp.zeros(shape) for path in paths})


def everywhere(path):
    return True


def test_looped_and_scanned_models_have_the_same_roles():
    looped = layout_of(kernels(*(f"encoder/layer/{n}/query/kernel" for n in range(3))), everywhere)
    scanned = layout_of(kernels("encoder/layer/query/kernel", shape=(3, 2, 3)), everywhere)
    leaves = {f"encoder/layer/{n}/query/lora_a": jnp.full((2, 1), float(n)) for n in range(3)}
    stacked = {"encoder/layer/query/lora_a": jnp.stack(list(leaves.values()))}
    a, b = looped.gather(leaves), scanned.gather(stacked)
    assert list(a) == list(b) == ["encoder/layer/*/query/lora_a"]
    np.testing.assert_array_equal(*a.values(), *b.values())
    for layout, own in ((looped, leaves), (scanned, stacked)):
        back = layout.spread(a)
        assert back.keys() == own.keys()
        for path in own:
            np.testing.assert_array_equal(back[path], own[path])


def test_the_first_number_is_the_layers_and_leaves_of_no_layer_stay():
    t5 = layout_of(kernels("decoder/block/0/layer/1/q/kernel", "decoder/block/1/layer/1/q/kernel", "head/kernel"), everywhere)
    assert t5.role("decoder/block/1/layer/1/q/kernel") == ("decoder/block/*/layer/1/q/kernel", 1)
    assert t5.role("head/kernel") == ("head/kernel", None) and t5.layers("head/kernel") is None
    named = layout_of(kernels("layer_0/up/kernel", "layer_10/up/kernel"), everywhere)
    assert named.role("layer_10/up/kernel") == ("layer_*/up/kernel", 10) and named.layers("layer_*/up/kernel") == 11


def test_only_adapted_layers_get_leaves():
    layout = layout_of(kernels(*(f"layers/{n}/q/kernel" for n in range(4))), lambda path: "/2/" in path)
    assert list(layout.spread({"layers/*/q/lora_a": jnp.arange(4.0)})) == ["layers/2/q/lora_a"]


def test_errors_name_the_role():
    layout = layout_of(kernels("layers/0/q/kernel", "layers/1/q/kernel"), everywhere)
    with pytest.raises(ValueError, match=r"different shapes at 'layers/\*/q/lora_a': \(2, 1\), \(2, 2\)"):
        layout.gather({"layers/0/q/lora_a": jnp.zeros((2, 1)), "layers/1/q/lora_a": jnp.zeros((2, 2))})
    with pytest.raises(ValueError, match=r"no such layers; they have layers/\*: was it made for another model"):
        layout.layers("encoder/layer/*/q/lora_a")


def test_a_number_without_a_second_is_a_name_unless_it_is_that_of_a_stack():
    layout = layout_of(kernels(*(f"Enc_0/Block_{n}/query/kernel" for n in range(3)), "stem_0/kernel"), everywhere)
    assert layout.role("Enc_0/Block_2/query/lora_a") == ("Enc_0/Block_*/query/lora_a", 2)
    assert layout.role("stem_0/lora_a") == ("stem_0/lora_a", None)
    for stack in ("encoder/layer/", "layers_"):
        alone = layout_of(kernels(f"{stack}0/query/kernel", f"{stack}0/up_0/kernel", f"{stack}0/up_1/kernel"), everywhere)
        assert alone.role(f"{stack}0/query/lora_a") == (f"{stack}*/query/lora_a", 0)
        assert alone.role(f"{stack}0/up_1/lora_a") == (f"{stack}*/up_1/lora_a", 0)


def test_a_foreign_module_of_another_shape_does_not_take_a_stack_apart():
    alike = kernels(*(f"block_{n}/{of}/kernel" for n in range(3) for of in ("query", "up")))
    params = {**alike, "block_2": {"query": alike["block_2"]["query"], "up": {"kernel": jnp.zeros((5, 5))}}}
    layout = layout_of(params, everywhere)
    assert layout.role("block_2/query/lora_a") == ("block_*/query/lora_a", 2)
    assert layout.role("block_1/up/lora_a") == ("block_1/up/lora_a", None)
    # A tap has no parameters, so it is as what it stands in.
    assert layout.role("block_1/query/tap/adapter_up")[1] == 1 and layout.role("block_1/tap/adapter_up")[1] is None


def test_layers_that_lack_a_module_get_no_leaves():
    layout = layout_of(kernels("layers_0/q/kernel", "layers_1/moe/kernel", "layers_2/q/kernel"), everywhere)
    assert list(layout.spread({"layers_*/q/lora_a": jnp.arange(3.0)})) == ["layers_0/q/lora_a", "layers_2/q/lora_a"]
