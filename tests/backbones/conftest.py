"""Folders of the tiny models that each test module makes with transformers."""

import functools

import pytest


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    """``variant -> `` the folder in which the module's ``tiny(variant)`` is saved."""

    @functools.cache
    def save(variant):
        path = tmp_path_factory.mktemp("tiny")
        request.module.tiny(variant).save_pretrained(path)
        return path

    return save
