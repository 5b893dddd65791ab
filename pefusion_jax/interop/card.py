"""Model cards: a README.md that the Hub understands and that says exactly how a model was made."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from pefusion_jax.interop import manifest


def model_card(
    title: str,
    *,
    base_model: str,
    relation: str = "merge",
    models: Sequence[str] = (),
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
    command: Sequence[str] | None = None,
    results: Mapping[str, Mapping[str, float]] | None = None,
    inputs: Mapping[str, Any] | None = None,
    library: str = "transformers",
) -> str:
    """Writes a card in the form that mergekit made customary: front matter, method, models, configuration, results.

    Args:
      title: heading.
      base_model: Hub id or folder of the base model.
      relation: ``merge``, ``adapter``, ``finetune`` or ``quantized``: the Hub's ``base_model_relation``.
      models: what was merged, in words: Hub ids or folders.
      method: the fusion method, in words.
      settings: resolved configuration, printed as YAML.
      command: the command line that made it.
      results: ``{model or row: {task: score}}``, printed as one table.
      inputs: as in the manifest; the digests are listed.
      library: the Hub's ``library_name``.

    Returns:
      The text of a README.md.
    """
    import yaml  # transformers brings it

    tags = ["pefusion_jax", *(["merge"] if relation == "merge" else [])]
    front = {"library_name": library, "base_model": [base_model], "base_model_relation": relation, "tags": tags}
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", f"# {_line(title)}", ""]
    kind = {"merge": "a merge of models", "adapter": "an adapter", "finetune": "a fine-tuned model"}.get(relation, "a model")
    lines += [f"This is {kind} made with pefusion_jax from `{_line(base_model)}`.", ""]
    if method:
        lines += ["## Merge method", "", _line(method), ""]
    if models:
        lines += ["## Models merged", "", *(f"- `{_line(name)}`" for name in models), ""]
    if results:
        lines += ["## Results", "", *_table(results), ""]
    if settings:
        lines += ["## Configuration", "", "```yaml", yaml.safe_dump(_plain(settings), sort_keys=True).strip(), "```", ""]
    if command:
        lines += ["```bash", shlex.join(command), "```", ""]
    lines += ["## Made from", ""]
    for name, entry in (inputs or {}).items():
        lines += [f"- `{_line(name)}` ({_line(str(entry['source']))})"]
        lines += [f"  - `{_line(file)}` sha256 `{digest}`" for file, digest in entry["sha256"].items()]
    lines += ["- " + ", ".join(f"{package} {version}" for package, version in manifest.versions().items()), ""]
    return "\n".join(lines)


def _table(results: Mapping[str, Mapping[str, float]]) -> list[str]:
    tasks = list(dict.fromkeys(task for row in results.values() for task in row))
    out = ["| model | " + " | ".join(_line(task) for task in tasks) + " |", "|---|" + "---:|" * len(tasks)]
    for name, row in results.items():
        cells = (f"{row[task]:.4g}" if task in row else "" for task in tasks)
        out.append(f"| {_line(name)} | " + " | ".join(cells) + " |")
    return out


def _plain(value: Any) -> Any:
    """What YAML can write without tags: mappings, lists, numbers, strings; all else as its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _line(text: str) -> str:
    """One line that cannot close what it stands in."""
    return " ".join(str(text).replace("`", "'").replace("|", "/").split())
