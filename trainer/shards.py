"""The rollouts on disk: files of rows, each named in manifest.json with its digest."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from ipvrm_core.trainer.files import read_json, write_json
from ipvrm_core.trainer.identity import file_digest


class Shards:
    """folder/shards/<number>.json and folder/manifest.json. A shard counts once the manifest has it."""

    def __init__(self, folder: Path):
        self.folder, self.manifest = folder / "shards", folder / "manifest.json"

    def add(self, number: int, rows: list[dict]) -> None:
        """Write shard `number`, which follows the others or takes the place of one; those behind it go."""
        path = self.folder / f"{number:05d}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, rows)
        entry = {"file": path.name, "sha256": file_digest(path), "answers": len(rows)}
        write_json(self.manifest, [*self._entries()[:number], entry])

    def whole(self) -> int:
        """How many shards, from the first, are as they were written; the first that is not is told."""
        entries = self._entries()
        for number, entry in enumerate(entries):
            try:
                self._bytes(entry)
            except (OSError, ValueError) as error:
                tqdm.write(f"{error}; sampled again, with the {len(entries) - number - 1} shards behind it")
                return number
        return len(entries)

    def rows(self) -> Iterator[dict]:
        """All rows in order. FileNotFoundError or ValueError names a shard that is missing or not what was written."""
        if not self.manifest.exists():
            raise FileNotFoundError(f"{self.manifest} is missing")
        for entry in self._entries():
            yield from json.loads(self._bytes(entry))

    def _entries(self) -> list[dict]:
        return read_json(self.manifest) if self.manifest.exists() else []

    def _bytes(self, entry: dict) -> bytes:
        path = self.folder / entry["file"]
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise ValueError(f"{path} is not what was written (SHA-256)")
        return data
