"""Making adapters must stay a small part of training them: counted, not timed."""

from experiments.benchmarks.generation_cost import operations
from pefusion_jax.backbones import MPNet, MPNetConfig


def test_making_adapters_takes_at_most_a_twentieth_of_a_gradient():
    """Both parts are proportional to the number of layers, so two of the base model's twelve tell."""
    model = MPNet(MPNetConfig(vocab_size=100, num_hidden_layers=2))
    found = operations(model, batch=16, length=32, blocks=8)
    assert len(found) == 4
    for name, row in found.items():
        assert 1 <= row["ratio"] <= 1.05, name
    assert found["CondLoRA, query and value, r = 8"]["ratio"] > 1.001
