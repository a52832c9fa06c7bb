"""Scores of ProcessBench on disk: a parquet a finished subset, and the parts of an unfinished one."""

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ipvrm_core.trainer.data.processbench import SUBSETS
from ipvrm_core.trainer.files import write_file
from ipvrm_core.trainer.identity import differing

COLUMNS = ("subset", "id", "generator", "label", "status", "sums", "tokens")


def write_scores(path: Path, rows: Sequence[dict], origin: dict, source: dict | None = None) -> None:
    """`origin` and `source` are kept in the file: what the scores were made with, and from which data.

    origin: score, models and the digests of their files, format, limits; scores of different origins are never mixed.
    """
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema(
        [
            *((name, pyarrow.string()) for name in ("subset", "id", "generator")),
            ("label", pyarrow.int32()),
            ("final_answer_correct", pyarrow.bool_()),
            ("status", pyarrow.string()),
            ("answer_tokens", pyarrow.int32()),
            ("sums", pyarrow.list_(pyarrow.float64())),
            ("tokens", pyarrow.list_(pyarrow.int32())),
            ("official_rewards", pyarrow.list_(pyarrow.float32())),
            ("official_lengths", pyarrow.list_(pyarrow.int32())),
        ],
        metadata={"ipvrm": json.dumps(origin), "source": json.dumps(source or {})},
    )
    table = pyarrow.Table.from_pylist(list(rows), schema=schema)
    write_file(path, lambda temporary: pyarrow.parquet.write_table(table, temporary))


def read_scores(paths: Iterable[Path]) -> tuple[list[dict], dict]:
    """(rows, origin) of score files and of folders of them, the published subsets first and in their order."""
    import pyarrow.parquet

    files = _files(paths)
    if not files:
        raise FileNotFoundError(f"no score files (*.parquet) at {', '.join(map(str, paths))}")
    rows, origins = [], []
    for file in files:
        table = pyarrow.parquet.read_table(file)
        missing = [name for name in COLUMNS if name not in table.column_names]
        if missing:
            raise ValueError(f"{file} is no file of step scores: no column {', '.join(missing)}")
        origins.append(_metadata(file, "ipvrm"))
        if origins[-1] != origins[0]:
            raise ValueError(f"{files[0]} and {file} were scored differently: {_differing(origins[0], origins[-1])}")
        rows += table.to_pylist()
    seen = {(row["subset"], row["id"]) for row in rows}
    if len(seen) < len(rows):
        raise ValueError(f"the score files hold {len(rows) - len(seen)} problems twice")
    order = {name: number for number, name in enumerate(SUBSETS)}
    return sorted(rows, key=lambda row: order.get(row["subset"], len(order))), origins[0]


def _files(paths: Iterable[Path]) -> list[Path]:
    return [file for path in paths for file in ([path] if path.is_file() else sorted(path.glob("*.parquet")))]


def _metadata(file: Path, key: str) -> dict:
    import pyarrow.parquet

    return json.loads((pyarrow.parquet.read_schema(file).metadata or {}).get(key.encode(), b"{}"))


def read_sources(paths: Iterable[Path]) -> dict[str, dict]:
    """{subset: what `write_scores` was told of its data} of score files and of folders of them."""
    return {file.stem: _metadata(file, "source") for file in _files(paths)}


def check_origin(path: Path, expected: dict) -> None:
    """ValueError for scores (a file or a folder of parts) that were made in another way than those to come."""
    for file in _files([path]):
        found = _metadata(file, "ipvrm")
        if found != expected:
            differing = _differing(found, expected)
            raise ValueError(f"{path} holds scores made in another way ({differing}); take another --out folder")


def check_source(path: Path, expected: dict) -> None:
    """ValueError for scores of other data."""
    found = _metadata(path, "source")
    if found != expected:
        raise ValueError(
            f"{path} holds scores of other data ({_differing(found, expected)}); take another --out folder"
        )


def _differing(one: dict, other: dict) -> str:
    """The settings, or where these are the same, the files whose contents are not."""
    keys = [key for key in one | other if one.get(key) != other.get(key)]
    if keys == ["files"]:
        return f"contents of {', '.join(differing(one.get('files', {}), other.get('files', {})))}"
    return ", ".join(key for key in keys if key != "files")


@dataclass(frozen=True)
class Parts:
    """The scores of an unfinished subset, a file a micro-batch: a kill loses one micro-batch."""

    folder: Path
    origin: dict

    def of(self, texts: str) -> "Parts":
        """The same, of these texts alone; a digest."""
        return replace(self, origin=self.origin | {"problems": texts})

    def read(self) -> dict[str, dict]:
        """{id: row}. ValueError for parts of another origin."""
        check_origin(self.folder, self.origin)
        rows = read_scores([self.folder])[0] if _files([self.folder]) else []
        return {row["id"]: row for row in rows}

    def add(self, rows: Sequence[dict]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        number = len(list(self.folder.glob("*.parquet")))
        write_scores(self.folder / f"{number:05}.parquet", rows, self.origin)

    def remove(self) -> None:
        """Once the subset's own file is there."""
        shutil.rmtree(self.folder, ignore_errors=True)
