"""What the border needs to know about a kind of model, as data: its names, its configuration, its Linen module.

Reading, writing, PEFT adapters and the command line are written once over :class:`Family`; a backbone brings one (some
bring several) and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from pefusion_jax.backbones import names
from pefusion_jax.backbones.layers import unstack_layers


class Family(NamedTuple):
    """A kind of model in Hugging Face's files.

    *Canonical* names are the tensor names of the headless model as today's transformers writes them to disk
    (``encoder.layer.0.attention.self.query.weight``). Parameter paths are those with ``/`` for ``.``.

    Attributes:
      name: for people, ``BERT``.
      model_types: values of ``model_type`` in ``config.json``.
      architectures: classes of transformers whose files can be loaded.
      read_config: ``(config.json's dictionary, {canonical name: array or description} or None) -> config``, a frozen
        dataclass; the tensors say which heads there are, without them the architecture does.
      write_config: ``config -> dictionary`` of a ``config.json`` from which transformers builds the same model.
      build: ``(config, dtype=, scan_layers=, remat=) -> nn.Module``.
      table: ``config -> {parameter path: names.Entry}`` in the loop layout, with canonical names.
      prefix: what headed models put in front of a canonical name, such as ``bert.``.
      heads: beginnings of canonical names that belong to heads: they never have the prefix.
      renames: ``(regular expression, replacement)`` pairs that turn names of older files into canonical ones.
      ignored: regular expression of full canonical names that are no parameters (constants that old files store).
      copies: ``config -> {name: original}``: tied tensors that a file may repeat, and that must then be equal.
      modules: ``(regular expression, replacement)`` pairs that turn a canonical module name (dots, no ``.weight``) into
        its name in the memory of transformers 5, which PEFT uses. Empty where the two are the same.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any], Mapping[str, Any] | None], Any]
    write_config: Callable[[Any], dict[str, Any]]
    build: Callable[..., nn.Module]
    table: Callable[[Any], dict[str, names.Entry]]
    prefix: str = ""
    heads: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    ignored: str = r"(?!)"
    copies: Callable[[Any], dict[str, str]] = lambda config: {}
    modules: tuple[tuple[str, str], ...] = ()


def canonical(family: Family, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the tensors of a file to canonical names and leaves out those that are no parameters.

    Args:
      family: of the model.
      tensors: ``{name in the file: anything}``.

    Raises:
      ValueError: if two names of the file mean the same tensor.
    """
    plain: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, value in tensors.items():
        new = name.removeprefix(family.prefix)
        for pattern, replacement in family.renames:
            new = re.sub(pattern, replacement, new)
        if re.fullmatch(family.ignored, new):
            continue
        if new in plain:
            raise ValueError(f"the tensors {origin[new]!r} and {name!r} are both {new!r}: the file is ambiguous")
        plain[new], origin[new] = value, name
    return plain


def on_disk(family: Family, table: names.Table, config: Any = None) -> dict[str, str]:
    """``{canonical name: name in the file}`` for what a model of this table is saved as: the prefix where it has a head.

    A head that is tied has no row in the table; with ``config`` given, the family's ``copies`` tell of it.
    """
    known = [*(entry.name for entry in table.values()), *(() if config is None else family.copies(config))]
    headed = bool(family.heads) and any(name.startswith(family.heads) for name in known)
    prefix = family.prefix if headed else ""
    return {
        entry.name: entry.name if family.heads and entry.name.startswith(family.heads) else prefix + entry.name
        for entry in table.values()
    }


def in_memory(family: Family, module: str) -> str:
    """The name of a module in the memory of transformers 5, from its canonical name; without the prefix of headed models."""
    for pattern, replacement in family.modules:
        module = re.sub(pattern, replacement, module)
    return module


def params_from_hf(family: Family, tensors: Mapping[str, np.ndarray], config: Any) -> dict[str, Any]:
    """Builds parameters (loop layout, dtypes as in the file) from the tensors of a Hugging Face file.

    Raises:
      ValueError: listing every missing, unexpected and wrongly shaped tensor, or naming a tied copy that differs.
    """
    plain = canonical(family, tensors)
    for copy, original in family.copies(config).items():
        if copy in plain and original in plain:
            require_equal(copy, plain.pop(copy), original, plain[original])
    return names.read(plain, family.table(config), f"this {family.name} configuration")


def require_equal(copy: str, array: np.ndarray, original: str, other: np.ndarray) -> None:
    """Raises a ValueError if a stored copy of a tied tensor is not its original."""
    if array.shape != other.shape or not np.array_equal(array, other):
        raise ValueError(
            f"the tensor {copy!r} differs from {original!r}, to which the configuration ties it: an untied copy is not "
            "implemented"
        )


def params_to_hf(family: Family, params: Mapping[str, Any], config: Any) -> dict[str, np.ndarray]:
    """The inverse of :func:`params_from_hf`, from either layout, with the names that transformers writes.

    Raises:
      ValueError: if the parameters are not those of the configuration.
    """
    table = family.table(config)
    plain = names.write(unstack_layers(params), table, f"this {family.name} configuration")
    disk = on_disk(family, table, config)
    return {disk[name]: array for name, array in plain.items()}
