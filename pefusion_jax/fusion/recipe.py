"""Recipes of merges: mergekit's YAML, and the same with our methods.

::

    merge_method: ties            # a method of mergekit's, with its defaults and its arithmetic
    base_model: path/of/base
    models:
      - model: path/of/first
        parameters: {density: 0.5, weight: [0.2, 0.8]}       # a list is a gradient over the layers
      - model: path/of/second
        parameters:
          density: 0.5
          weight: [{filter: mlp, value: 0.7}, {value: 0.3}]    # the first filter that the tensor's name there contains
    parameters: {normalize: true}
    out_dtype: bfloat16

``method: NAME`` in place of ``merge_method`` is ``pefusion_jax.fusion.NAME(**parameters)``; a parameter that stands at the
models is handed over as a list in their order. In place of ``models``, ``slices`` name ranges of layers.

A value is looked up at the model (or the slice's source) first, then at the slice, then in the global ``parameters``.
A recipe is data: it is parsed with bounds on size and depth, tags are refused, nothing in it is ever executed.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Scalar = bool | int | float | str
MAX_BYTES, MAX_NODES, MAX_DEPTH, MAX_MODELS, MAX_LAYERS = 2**20, 20_000, 16, 64, 4096
_LONGEST_KEY, _LONGEST_WORD = 100, 4096
DTYPES = ("float32", "bfloat16", "float16")
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null")}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_KEYS = (
    "merge_method", "method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
)  # fmt: skip
_REFUSED = {
    "modules": "models of several modules are not supported; merge each module's folder by itself",
    "tokenizer": "a new vocabulary is not built; give models of one vocabulary, whose tokenizer is copied",
    "chat_template": "the chat template is copied with the tokenizer; edit it in the folder that is written",
}


class Rule(NamedTuple):
    """A value for the tensors whose names contain ``filter`` (``None``: for all); several values are a gradient."""

    filter: str | None
    values: tuple[Scalar, ...]


Setting = tuple[Rule, ...]
Settings = Mapping[str, Setting]


class Source(NamedTuple):
    """A model, its own parameters, for slices the layers ``[first, last)`` that are taken from it, and where it stands."""

    model: str
    parameters: Settings
    layers: tuple[int, int] | None = None
    where: str = ""


class Slice(NamedTuple):
    """Layers of the result: sources with equally many layers, and parameters for all of them."""

    sources: tuple[Source, ...]
    parameters: Settings


class Recipe(NamedTuple):
    """What to merge and how.

    Attributes:
      method: name of the method.
      ours: whether it is ``pefusion_jax.fusion.NAME``, rather than mergekit's method of that name.
      slices: one without layers where ``models`` were given.
      base: the model that task vectors are relative to.
      parameters: the global ones.
      dtype: of the file; ``None`` for that of the base (or first) model.
      content: the recipe as plain data, for the card.
    """

    method: str
    ours: bool
    slices: tuple[Slice, ...]
    base: str | None
    parameters: Settings
    dtype: str | None
    content: dict[str, Any]

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that is named, the base first."""
        named = [source.model for part in self.slices for source in part.sources]
        return tuple(dict.fromkeys(([self.base] if self.base is not None else []) + named))


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Reads a recipe from a YAML file.

    Raises:
      ValueError: naming the file, the line, the entry and what is allowed there.
      OSError: if it cannot be read.
    """
    with open(path, "rb") as file:
        text = file.read(MAX_BYTES + 1)
    return parse_recipe(text, os.fspath(Path(path)))


def parse_recipe(text: str | bytes, name: str = "recipe") -> Recipe:
    """Parses the text of a recipe.

    Args:
      text: YAML.
      name: of the file, for messages.

    Raises:
      ValueError: as :func:`read_recipe`.
    """
    return _Parser(text, name).recipe()


def lookup(scopes: Iterable[Settings], key: str, tensor: str, depth: float) -> Scalar | None:
    """The value of a parameter for a tensor: that of the first scope that has one; ``None`` if none has.

    Args:
      scopes: from the most specific to the global one.
      key: the parameter.
      tensor: name of the tensor.
      depth: of its layer, from 0 (first) to 1 (last); 0 outside of the layers.
    """
    for scope in scopes:
        for rule in scope.get(key, ()):
            if rule.filter is None or rule.filter == "*" or rule.filter in tensor:
                return _at(rule.values, depth)
    return None


def _at(values: tuple[Scalar, ...], depth: float) -> Scalar:
    """A gradient's value: interpolated if it is of numbers, else the one that the depth falls on."""
    place = depth * (len(values) - 1)
    left = int(place)
    if len(values) == 1 or any(isinstance(value, (bool, str)) for value in values):
        return values[left]
    right = min(left + 1, len(values) - 1)
    return (1 - (place - left)) * values[left] + (place - left) * values[right]  # type: ignore[operator]


class _Parser:
    """Plain data from YAML nodes, with the line of each entry kept for messages."""

    def __init__(self, text: str | bytes, name: str):
        self._name, self._lines, self._nodes = name, {"": 1}, 0
        self._content = self._load(text)

    def fail(self, where: str, problem: str) -> ValueError:
        return ValueError(f"{self.place(where)}: {problem}")

    def place(self, where: str) -> str:
        line = self._lines.get(where)
        return self._name + (f", line {line}" if line else "") + (f": {where}" if where else "")

    def recipe(self) -> Recipe:
        content = self.mapping(self._content, "")
        for key in content:
            if key in _REFUSED:
                raise self.fail(key, f"{key!r} is not supported: {_REFUSED[key]}")
        self.known(content, _KEYS, "")
        if ("method" in content) == ("merge_method" in content):
            raise self.fail("", "give one of merge_method (mergekit's name) or method (a name of pefusion_jax.fusion)")
        if ("models" in content) == ("slices" in content):
            raise self.fail("", "give one of models or slices")
        ours = "method" in content
        method = self.text(content["method" if ours else "merge_method"], "method" if ours else "merge_method")
        base = self.text(content["base_model"], "base_model") if content.get("base_model") is not None else None
        if "models" in content:
            sources = self.sources(content["models"], "models", layers=False)
            slices: tuple[Slice, ...] = (Slice(sources, {}),)
        else:
            slices = self.slices(content["slices"])
        dtype = [self.choice(content[key], key, DTYPES) for key in ("dtype", "out_dtype") if content.get(key) is not None]
        source = content.get("tokenizer_source")
        if source not in (None, "base"):
            raise self.fail(
                "tokenizer_source",
                f"{source!r} is not supported: vocabularies are not joined or permuted; leave it out or write 'base', and give "
                "models of one vocabulary",
            )
        parameters = self.settings(content.get("parameters"), "parameters")
        self.allowed(method, ours, slices, parameters)
        return Recipe(method, ours, slices, base, parameters, dtype[-1] if dtype else None, content)

    def allowed(self, method: str, ours: bool, slices: tuple[Slice, ...], parameters: Settings) -> None:
        """Checks the names of the method and of all parameters."""
        from pefusion_jax.fusion import named

        if not ours and method not in named.MERGEKIT:
            raise self.fail(
                "merge_method",
                f"{method!r} is not one of mergekit's methods that are supported{nearest(method, named.MERGEKIT)}; "
                "a method of pefusion_jax.fusion is named by method: NAME",
            )
        try:
            ones = list(named.our_parameters(method)) if ours else list(named.MERGEKIT[method])
        except ValueError as error:
            raise self.fail("method", str(error)) from None
        own = [*ones, *(key[:-1] for key in ones if key.endswith("s"))] if ours else ones
        self.known(parameters, ones, "parameters")
        for i, part in enumerate(slices):
            where = "models" if part.sources[0].layers is None else f"slices[{i}].sources"
            self.known(part.parameters, ones, f"slices[{i}].parameters")
            for j, source in enumerate(part.sources):
                here = f"{where}[{j}].parameters"
                self.known(source.parameters, own, here)
                for key in source.parameters:
                    if not ours and not named.MERGEKIT[method][key].per_model:
                        raise self.fail(f"{here}.{key}", f"{key} is for the whole merge: write it under the global parameters")

    def slices(self, given: Any) -> tuple[Slice, ...]:
        out = []
        for i, entry in enumerate(self.sequence(given, "slices")):
            where = f"slices[{i}]"
            entry = self.mapping(entry, where)
            self.known(entry, ("sources", "parameters"), where)
            if "sources" not in entry:
                raise self.fail(where, "a slice needs sources")
            sources = self.sources(entry["sources"], f"{where}.sources", layers=True)
            counts = {source.layers[1] - source.layers[0] for source in sources if source.layers}
            if len(counts) > 1:
                raise self.fail(where, f"the sources of a slice must have equally many layers, not {sorted(counts)}")
            out.append(Slice(sources, self.settings(entry.get("parameters"), f"{where}.parameters")))
        return tuple(out)

    def sources(self, given: Any, where: str, *, layers: bool) -> tuple[Source, ...]:
        entries = self.sequence(given, where)
        if len(entries) > MAX_MODELS:
            raise self.fail(where, f"at most {MAX_MODELS} models, not {len(entries)}")
        out = []
        for i, entry in enumerate(entries):
            here = f"{where}[{i}]"
            entry = self.mapping(entry, here)
            self.known(entry, ("model", "parameters", *(("layer_range",) if layers else ())), here)
            if "model" not in entry:
                raise self.fail(here, "an entry needs model: a folder, or a model's name")
            model = self.text(entry["model"], f"{here}.model")
            taken = None
            if layers:
                taken = self.layer_range(entry.get("layer_range"), f"{here}.layer_range")
            out.append(Source(model, self.settings(entry.get("parameters"), f"{here}.parameters"), taken, self.place(here)))
        return tuple(out)

    def layer_range(self, given: Any, where: str) -> tuple[int, int]:
        if isinstance(given, list) and len(given) == 2 and all(type(n) is int and 0 <= n <= MAX_LAYERS for n in given):
            if given[0] < given[1]:
                return given[0], given[1]
        raise self.fail(where, f"must be [first, last], 0 <= first < last <= {MAX_LAYERS}, not {_short(given)}")

    def settings(self, given: Any, where: str) -> dict[str, Setting]:
        if given is None:
            return {}
        return {key: self.setting(value, f"{where}.{key}") for key, value in self.mapping(given, where).items()}

    def setting(self, given: Any, where: str) -> Setting:
        if isinstance(given, dict):
            given = [given]
        if isinstance(given, list) and given and all(isinstance(entry, dict) for entry in given):
            rules = []
            for i, entry in enumerate(given):
                here = f"{where}[{i}]"
                self.known(entry, ("filter", "value"), here)
                if "value" not in entry:
                    raise self.fail(here, "a filter needs a value")
                pattern = entry.get("filter")
                if pattern is not None and (not isinstance(pattern, str) or not pattern):
                    raise self.fail(f"{here}.filter", f"must be a part of tensors' names, not {_short(pattern)}")
                rules.append(Rule(pattern, self.values(entry["value"], f"{here}.value")))
            return tuple(rules)
        return (Rule(None, self.values(given, where)),)

    def values(self, given: Any, where: str) -> tuple[Scalar, ...]:
        entries = given if isinstance(given, list) else [given]
        if not entries:
            raise self.fail(where, "a gradient needs values")
        return tuple(self.scalar(entry, where) for entry in entries)

    def scalar(self, given: Any, where: str) -> Scalar:
        value = number_or_word(given)
        if isinstance(value, int) and abs(value) > 2**53:
            raise self.fail(where, "this number is too large")
        if not isinstance(value, (bool, int, float, str)) or (isinstance(value, float) and not math.isfinite(value)):
            raise self.fail(where, f"must be a finite number, true, false, a word, or a list of them, not {_short(given)}")
        return value

    def mapping(self, given: Any, where: str) -> dict[str, Any]:
        if not isinstance(given, dict):
            raise self.fail(where, f"must be a mapping, not {_short(given)}")
        return given

    def sequence(self, given: Any, where: str) -> list[Any]:
        if not isinstance(given, list) or not given:
            raise self.fail(where, f"must be a list that is not empty, not {_short(given)}")
        return given

    def text(self, given: Any, where: str) -> str:
        if not isinstance(given, str) or not given.strip() or not given.isprintable():
            raise self.fail(where, f"must be a name, not {_short(given)}")
        return given

    def choice(self, given: Any, where: str, allowed: Iterable[str]) -> str:
        if given not in tuple(allowed):
            raise self.fail(where, f"must be one of {', '.join(allowed)}, not {_short(given)}")
        return given

    def known(self, given: Mapping[str, Any], allowed: Iterable[str], where: str) -> None:
        for key in given:
            if key not in allowed:
                path = f"{where}.{key}" if where else key
                raise self.fail(path, f"unknown key {_short(key)}{nearest(key, allowed)}")

    def _load(self, text: str | bytes) -> Any:
        import yaml

        if len(text) > MAX_BYTES:
            raise ValueError(f"{self._name}: a recipe has at most {MAX_BYTES} bytes")
        try:
            loader = yaml.SafeLoader(text)
            try:
                node = loader.get_single_node()
                return self._plain(node, "", 0, loader.construct_object) if node is not None else None
            finally:
                loader.dispose()
        except yaml.YAMLError as error:
            raise ValueError(f"{self._name}: this is not YAML: {' '.join(str(error).split())}") from None
        except RecursionError:
            raise ValueError(f"{self._name}: nested too deeply") from None

    def _plain(self, node: Any, where: str, depth: int, construct: Callable[[Any], Any]) -> Any:
        import yaml

        self._nodes += 1
        self._lines.setdefault(where, node.start_mark.line + 1)
        # Aliases can make a short text stand for an endless one: what they stand for is counted each time.
        if self._nodes > MAX_NODES or depth > MAX_DEPTH:
            raise self.fail(where, f"more than {MAX_NODES} entries, or nested deeper than {MAX_DEPTH}")
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self._plain(entry, f"{where}[{i}]", depth + 1, construct) for i, entry in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            out: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = key_node.value
                plain = isinstance(key_node, yaml.ScalarNode) and isinstance(key, str)
                # Every entry's path is kept, and an alias repeats what it stands for: a long key would be kept many times.
                if not plain or not key.isprintable() or len(key) > _LONGEST_KEY:
                    raise self.fail(where, f"line {key_node.start_mark.line + 1}: a key must be a word")
                path = f"{where}.{key}" if where else key
                self._lines[path] = key_node.start_mark.line + 1
                if key in out:
                    raise self.fail(path, "this key stands twice")
                out[key] = self._plain(value_node, path, depth + 1, construct)
            return out
        if isinstance(node, yaml.ScalarNode) and node.tag in _TAGS:
            if len(node.value) > _LONGEST_WORD:
                raise self.fail(where, f"a value of {len(node.value)} characters; at most {_LONGEST_WORD} are read")
            try:
                return construct(node)
            except (ValueError, KeyError, AttributeError, IndexError, OverflowError):
                pass
        raise self.fail(where, f"{_short(node.tag)} is not a number, a word, a list or a mapping")


def number_or_word(value: Any) -> Any:
    """A value as YAML 1.1 read it, but 1e-3, which it takes for a word, as the number that is meant."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message: which known words are nearest, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else f"; known: {', '.join(known) or 'none'}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
