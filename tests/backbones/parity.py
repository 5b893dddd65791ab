"""What the tests of every backbone share: random transformers models, and distances to what they compute."""

import functools

import jax
import numpy as np
import torch

from pefusion_jax import trees
from pefusion_jax.backbones import stack_layers
from pefusion_jax.backbones.family import canonical, params_from_hf, params_to_hf
from pefusion_jax.interop import load_safetensors


def randomize(model, seed):
    """Gives every parameter a random value, norms around one and biases too: trivial ones would hide mistakes."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_((1.0 if is_scale else 0.0) + torch.randn_like(parameter) * 0.2)
    return model.eval()


def theirs(model, **inputs):
    """The outputs of a transformers model with all hidden states."""
    tensors = {name: None if array is None else torch.tensor(np.asarray(array)) for name, array in inputs.items()}
    with torch.no_grad():
        return model(**tensors, output_hidden_states=True)


def furthest(ours, reference):
    """The largest absolute difference; shapes must agree."""
    ours, reference = np.asarray(ours, np.float64), reference.detach().double().numpy()
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.abs(ours - reference).max())


def assert_hidden_states(ours, reference, bound=1e-5):
    """Every hidden state within the bound, and as many of them."""
    assert len(ours) == len(reference)
    for layer, (mine, other) in enumerate(zip(ours, reference, strict=True)):
        assert furthest(mine, other) <= bound, layer


def run(model, params, *args, **kwargs):
    """One compiled forward pass with all hidden states."""
    return jax.jit(functools.partial(model.apply, output_hidden_states=True))({"params": params}, *args, **kwargs)


def assert_round_trip(family, folder, raw):
    """HF -> ours -> HF, from the loop and from the scan layout, bit for bit."""
    tensors = load_safetensors(folder / "model.safetensors")
    config = family.read_config(raw, canonical(family, tensors))
    params = params_from_hf(family, tensors, config)
    assert trees.size(params) > 0
    for tree in (params, stack_layers(params)):
        back = params_to_hf(family, tree, config)
        assert back.keys() == tensors.keys()
        for name, array in tensors.items():
            assert back[name].dtype == array.dtype and back[name].shape == array.shape, name
            assert back[name].tobytes() == array.tobytes(), name
