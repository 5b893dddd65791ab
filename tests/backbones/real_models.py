"""Real pretrained models for the tests: fetched once into the cache of this machine, then found there."""

import functools

from experiments import fetch_models


@functools.cache
def fetched(name):
    """Makes sure that a model is in the cache, and returns its name for ``load_pretrained``."""
    fetch_models.fetch(name)
    return name
