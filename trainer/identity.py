"""What a result was made from, as SHA-256 digests by name: data, models with their tokenizers, the user's own code.

Nothing is remembered between calls: sizes and dates can stay what they were while the bytes change, and hashing weights
takes less time than loading them.
"""

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path

from ipvrm_core.trainer.data.files import read_rows

Digests = dict[str, str]  # file name -> digest

# What loading a model or a tokenizer may read; a README, an optimiser or a log beside them is no part of the model.
MODEL_FILES = (".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model", ".txt", ".py")


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_digests(path: str | Path, split: str | None = None, config: str | None = None) -> Digests:
    """Of a data file its digest; of what `datasets` loads by a name, that of the rows."""
    if Path(path).is_file():
        return {Path(path).name: file_digest(path)}
    digest = hashlib.sha256()
    for row in read_rows(path, split, config):
        digest.update(json.dumps(row, default=lambda value: type(value).__name__).encode())
    return {str(path): digest.hexdigest()}


def model_digests(path: str | Path, gguf_file: str | None = None) -> Digests:
    """Of each file of a model's folder, weights, configuration and tokenizer; of a Hugging Face name, the commit.

    Of GGUF files, which stand side by side for several precisions, the one named counts.
    """
    folder = Path(path)
    if not folder.is_dir():
        return {str(path): _commit(str(path), gguf_file)}
    files = (file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix in MODEL_FILES)
    return {file.name: file_digest(file) for file in files if file.suffix != ".gguf" or file.name == gguf_file}


def _commit(name: str, gguf_file: str | None) -> str:
    from transformers.utils.hub import cached_file, extract_commit_hash

    found = extract_commit_hash(cached_file(name, gguf_file or "config.json"), None)
    if found is None:
        raise ValueError(f"{name} is neither a folder nor a model with a commit in the cache of the Hugging Face hub")
    return found


def code_digests(spec: str) -> Digests:
    """Of the file that holds "package.module:name"; what it imports in turn is not looked at."""
    module = spec.partition(":")[0]
    found = find_spec(module)
    if found is None or found.origin is None:
        raise ImportError(f"{spec!r}: there is no module {module!r}")
    return {Path(found.origin).name: file_digest(found.origin)}


def differing(kept: Digests, now: Digests) -> list[str]:
    """Names whose digests differ, or that are on one side only."""
    return sorted(name for name in kept.keys() | now.keys() if kept.get(name) != now.get(name))
