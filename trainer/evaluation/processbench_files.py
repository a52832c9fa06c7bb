"""Scores of ProcessBench on disk: a parquet a finished subset, and the parts of an unfinished one."""

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ipvrm_core.trainer.data.processbench import SUBSETS
from ipvrm_core.trainer.files import write_file

COLUMNS = ("subset", "id", "generator", "label", "status", "sums", "tokens")


def write_scores(path: Path, rows: Sequence[dict], origin: dict) -> None:
    """`origin` (score, models, format, limits) is kept in the file: scores of different origins are never mixed."""
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
        metadata={"ipvrm": json.dumps(origin)},
    )
    table = pyarrow.Table.from_pylist(list(rows), schema=schema)
    write_file(path, lambda temporary: pyarrow.parquet.write_table(table, temporary))


def read_scores(paths: Iterable[Path]) -> tuple[list[dict], dict]:
    """(rows, origin) of score files and of folders of them, the published subsets first and in their order."""
    import pyarrow.parquet

    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.glob("*.parquet")))]
    if not files:
        raise FileNotFoundError(f"no score files (*.parquet) at {', '.join(map(str, paths))}")
    rows, origins = [], []
    for file in files:
        table = pyarrow.parquet.read_table(file)
        missing = [name for name in COLUMNS if name not in table.column_names]
        if missing:
            raise ValueError(f"{file} is no file of step scores: no column {', '.join(missing)}")
        origins.append(json.loads((table.schema.metadata or {}).get(b"ipvrm", b"{}")))
        if origins[-1] != origins[0]:
            raise ValueError(f"{files[0]} and {file} were scored differently: {_differing(origins[0], origins[-1])}")
        rows += table.to_pylist()
    seen = {(row["subset"], row["id"]) for row in rows}
    if len(seen) < len(rows):
        raise ValueError(f"the score files hold {len(rows) - len(seen)} problems twice")
    order = {name: number for number, name in enumerate(SUBSETS)}
    return sorted(rows, key=lambda row: order.get(row["subset"], len(order))), origins[0]


def check_origin(folder: Path, found: dict, expected: dict) -> None:
    """ValueError for scores that were made in another way than those to come."""
    if found != expected:
        raise ValueError(
            f"{folder} holds scores made in another way ({_differing(found, expected)}); take another --out folder"
        )


def _differing(one: dict, other: dict) -> str:
    return ", ".join(key for key in one | other if one.get(key) != other.get(key))


@dataclass(frozen=True)
class Parts:
    """The scores of an unfinished subset, a file a micro-batch: a kill loses one micro-batch."""

    folder: Path
    origin: dict

    def of(self, texts: str) -> "Parts":
        """The same, of these texts alone; a digest."""
        return replace(self, origin=self.origin | {"texts": texts})

    def read(self) -> dict[str, dict]:
        """{id: row}. ValueError for parts of another origin."""
        files = sorted(self.folder.glob("*.parquet"))
        rows, origin = read_scores(files) if files else ([], self.origin)
        check_origin(self.folder, origin, self.origin)
        return {row["id"]: row for row in rows}

    def add(self, rows: Sequence[dict]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        number = len(list(self.folder.glob("*.parquet")))
        write_scores(self.folder / f"{number:05}.parquet", rows, self.origin)

    def remove(self) -> None:
        """Once the subset's own file is there."""
        shutil.rmtree(self.folder, ignore_errors=True)
