"""Reads examples from JSONL, JSON and Parquet files and from the Hugging Face hub, with named columns."""

import gzip
import json
import logging
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from ipvrm_core.trainer.data.example import Example

_log = logging.getLogger(__name__)

ROLES = ("prompt", "answer", "solution", "id")
SUFFIXES = (".jsonl", ".json", ".parquet")  # of files; anything else is a name for `datasets`
PACKED = ".gz"  # behind the first two; large and small letters are the same


def load_examples(
    path_or_name: str | Path,
    split: str | None = None,
    columns: Mapping[str, str | Sequence[str]] | None = None,
    *,
    config: str | None = None,
    prompt_template: str | None = None,
    answer_pattern: str | None = None,
    meta: Sequence[str] = (),
    drop_unanswered: bool = False,
    limit: int | None = None,
) -> list[Example]:
    """The rows of a data set as examples, in its order.

    path_or_name     a .jsonl, .json (a list of objects) or .parquet file, the first two also as .gz; anything else is
                     what `datasets.load_dataset` takes, a hub name or a folder.
    split, config    split and configuration of a hub data set; the split is required there, and a file takes neither.
    columns          role -> column. Roles: "prompt" (required), "answer" (left out: ""), "solution" (left out: None),
                     "id" (left out: file name and row number). Dots reach into nested columns, as in
                     "reward_model.ground_truth". "prompt" may name several text columns, joined by a space.
                     Default {"prompt": "prompt", "answer": "answer"}.
    prompt_template  text around a text prompt, which replaces "{prompt}" in it; other braces are left alone.
    answer_pattern   regular expression whose group 1, stripped, is the gold answer: "#### (.+)" for GSM8K.
    meta             columns to carry along in Example.meta under the same names.
    drop_unanswered  leave out rows whose answer is null or blank, and log how many; without it they are an error.
    limit            read at most so many rows, from the first.

    Numbers become text, 14.0 as "14". FileNotFoundError for a missing file; ValueError for anything amiss in the
    arguments or the data, with the row number (from 0) and, for a column, those that exist.
    """
    columns = {"prompt": "prompt", "answer": "answer"} if columns is None else dict(columns)
    _check_arguments(columns, prompt_template, limit)
    pattern = compiled(answer_pattern)
    source = data_stem(path_or_name)
    examples, dropped = [], 0
    for index, row in enumerate(read_rows(path_or_name, split, config, limit)):
        where = f"{path_or_name}, row {index}"
        if drop_unanswered and "answer" in columns and _is_blank(cell(row, columns["answer"], where)):
            dropped += 1
            continue
        examples.append(
            Example(
                id=_id(row, columns.get("id"), f"{source}-{index}", where),
                prompt=_prompt(row, columns["prompt"], prompt_template, where),
                answer=_answer(row, columns.get("answer"), pattern, where),
                solution=_solution(row, columns.get("solution"), where),
                meta={name: cell(row, name, where) for name in meta},
            )
        )
    if dropped:
        _log.warning("%s: dropped %d of %d rows without an answer", path_or_name, dropped, dropped + len(examples))
    if not examples:
        raise ValueError(f"{path_or_name} has no rows" + (" with an answer" if dropped else ""))
    return examples


def as_text(value: object, where: str) -> str:
    """A cell as text: strings as they are, integers and finite floats in their shortest spelling."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    raise ValueError(f"{where}: expected text or a number; got {value!r}")


def _check_arguments(columns: Mapping[str, Any], prompt_template: str | None, limit: int | None) -> None:
    unknown = sorted(set(columns) - set(ROLES))
    if unknown or "prompt" not in columns:
        raise ValueError(f"columns must map 'prompt' and may map others of {ROLES}; got {sorted(columns)}")
    if prompt_template is not None and "{prompt}" not in prompt_template:
        raise ValueError(f"prompt_template must contain '{{prompt}}'; got {prompt_template!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1; got {limit}")


def compiled(answer_pattern: str | None) -> re.Pattern[str] | None:
    """ValueError for what is no regular expression, or has no group."""
    if answer_pattern is None:
        return None
    try:
        pattern = re.compile(answer_pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"answer_pattern must be a regular expression: {error}; got {answer_pattern!r}") from None
    if pattern.groups < 1:
        raise ValueError(f"answer_pattern must have a group around the answer; got {answer_pattern!r}")
    return pattern


def data_suffix(path: str | Path) -> str | None:
    """Which of SUFFIXES a name has, None for any other: ".jsonl" of "a.jsonl", "A.JSONL" and "a.jsonl.gz"."""
    name = Path(path).name.lower()
    packed = name.endswith(PACKED)
    suffix = Path(name.removesuffix(PACKED)).suffix
    return suffix if suffix in SUFFIXES[: 2 if packed else 3] else None


def data_stem(path: str | Path) -> str:
    """A data file's name without its suffixes."""
    path = Path(path)
    return Path(path.stem).stem if path.suffix.lower() == PACKED else path.stem


def read_rows(
    path_or_name: str | Path, split: str | None = None, config: str | None = None, limit: int | None = None
) -> list[dict[str, Any]]:
    """The first `limit` rows. All are read before the caller looks at one, so that its errors leave no file open."""
    return list(islice(_rows(path_or_name, split, config), limit))


def _rows(path_or_name: str | Path, split: str | None, config: str | None) -> Iterable[dict[str, Any]]:
    path = Path(path_or_name)
    reader = dict(zip(SUFFIXES, (_jsonl_rows, _json_rows, _parquet_rows), strict=True)).get(data_suffix(path))
    if reader is None:
        return _hub_rows(str(path_or_name), split, config)
    if split is not None or config is not None:
        raise ValueError(
            f"{path} is a file and has no splits or configurations; got split={split!r}, config={config!r}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no such data file: {path}")
    return reader(path)


def _jsonl_rows(path: Path) -> Iterable[dict[str, Any]]:
    with _open(path) as file:
        for number, line in enumerate(_lines(file, path), start=1):
            where = f"{path}, line {number}"
            text = _decoded(line, where)
            if text.strip():
                yield _as_row(_parsed(text, where), where)


def _json_rows(path: Path) -> Iterable[dict[str, Any]]:
    with _open(path) as file:
        rows = _parsed(_decoded(b"".join(_lines(file, path)), str(path)), str(path))
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of objects; got {type(rows).__name__}")
    return [_as_row(row, f"{path}, row {index}") for index, row in enumerate(rows)]


def _open(path: Path) -> BinaryIO:
    return gzip.open(path) if path.suffix.lower() == PACKED else path.open("rb")


def _lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    try:
        yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not gzip, or cut short: {error}") from error


def _decoded(data: bytes, where: str) -> str:
    """UTF-8, with or without a byte order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = f"byte 0x{data[error.start]:02x} at {error.start}"
        raise ValueError(f"{where}: not UTF-8: {at} ({error.reason}); save the file as UTF-8") from error


def _parsed(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error


def _as_row(row: object, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object; got {type(row).__name__}")
    return row


def _parquet_rows(path: Path) -> Iterable[dict[str, Any]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


def _hub_rows(name: str, split: str | None, config: str | None) -> Iterable[dict[str, Any]]:
    if split is None:
        raise ValueError(f"{name!r} is not a .jsonl, .json or .parquet file; a hub data set needs a split")
    import datasets

    return datasets.load_dataset(name, config, split=split)


def cell(row: Mapping[str, Any], column: str, where: str) -> Any:
    """The value at a column name or, where no column has that name, at a dotted path."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(f"{where}: no column {column!r}; it has {_paths(row)}")
        value = value[part]
    return value


def _paths(row: Mapping[str, Any], prefix: str = "") -> list[str]:
    paths = []
    for name, value in row.items():
        nested = isinstance(value, Mapping) and value
        paths += _paths(value, f"{prefix}{name}.") if nested else [prefix + name]
    return paths


def _id(row: Mapping[str, Any], column: str | None, default: str, where: str) -> str:
    return default if column is None else as_text(cell(row, column, where), f"{where}, column {column!r}")


def _prompt(
    row: Mapping[str, Any], column: str | Sequence[str], template: str | None, where: str
) -> str | tuple[dict[str, str], ...]:
    names = [column] if isinstance(column, str) else list(column)
    values = [cell(row, name, where) for name in names]
    if len(values) == 1 and isinstance(values[0], list):
        if template is not None:
            raise ValueError(f"{where}: prompt_template is for text prompts; column {names[0]!r} holds chat messages")
        return as_messages(values[0], f"{where}, column {names[0]!r}")
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, str):
            raise ValueError(f"{where}, column {name!r}: expected text or chat messages; got {type(value).__name__}")
    prompt = " ".join(values)
    if not prompt.strip():
        raise ValueError(f"{where}, column {', '.join(map(repr, names))}: the prompt is empty; got {prompt!r}")
    return prompt if template is None else template.replace("{prompt}", prompt)


def as_messages(values: list[Any], where: str) -> tuple[dict[str, str], ...]:
    """A cell with chat messages as the messages of an Example."""
    for value in values:
        if not isinstance(value, Mapping) or not all(isinstance(value.get(key), str) for key in ("role", "content")):
            raise ValueError(f"{where}: expected messages with texts 'role' and 'content'; got {value!r}")
    if not any(value["content"].strip() for value in values):
        raise ValueError(f"{where}: expected at least one message with text; got {values!r}")
    return tuple({"role": value["role"], "content": value["content"]} for value in values)


def _answer(row: Mapping[str, Any], column: str | None, pattern: re.Pattern[str] | None, where: str) -> str:
    if column is None:
        return ""
    value = cell(row, column, where)
    if _is_blank(value):
        raise ValueError(f"{where}, column {column!r}: no answer; got {value!r} (drop_unanswered leaves such rows out)")
    text = as_text(value, f"{where}, column {column!r}")
    if pattern is None:
        return text
    match = pattern.search(text)
    if match is None or match[1] is None:
        raise ValueError(f"{where}: answer does not match {pattern.pattern!r}: {text[-200:]!r}")
    return match[1].strip()


def _is_blank(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _solution(row: Mapping[str, Any], column: str | None, where: str) -> str | None:
    if column is None:
        return None
    value = cell(row, column, where)
    if not isinstance(value, str) or not value.strip():
        came = repr(value) if value is None or isinstance(value, str) else type(value).__name__
        raise ValueError(f"{where}, column {column!r}: expected a solution as text; got {came}")
    return value
