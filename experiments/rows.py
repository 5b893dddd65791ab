"""Results by key in one JSON file, written after every one: a run that was cut off goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pefusion_jax import files


class Rows:
    """Rows by key, on disk after every one."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Reads what is there.

        Raises:
          ValueError: if it was made with other settings, which would be mixed up with new rows.
        """
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        asked = json.loads(json.dumps(dict(settings)))
        if self.found.setdefault("settings", asked) != asked:
            raise ValueError(f"{path} holds rows of {self.found['settings']}, but asked for is {asked}; name another --out")

    def __contains__(self, key: str) -> bool:
        return key in self.found

    def __getitem__(self, key: str) -> Any:
        return self.found[key]

    def put(self, key: str, **row: Any) -> Any:
        """Adds a row and writes the file."""
        self.found[key] = row
        files.write_json(self.path, self.found)
        return row
