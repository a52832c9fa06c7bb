"""Made-up chats for the tests of reward models, as rows and as files."""

import json
from pathlib import Path


def conversation(prompt: str, answer: str) -> list[dict]:
    return [{"content": prompt, "role": "user"}, {"content": answer, "role": "assistant"}]


def row(prompt: str, answer: str, label) -> dict:
    return {"conversation": conversation(prompt, answer), "label": label}


def pair(prompt: str, chosen: str, rejected: str) -> dict:
    return {"chosen": conversation(prompt, chosen), "rejected": conversation(prompt, rejected)}


def write(path: Path, rows: list[dict]) -> str:
    """Parquet or jsonl, by the suffix."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(count: int) -> list[tuple[str, str, str]]:
    """(prompt, right answer, wrong answer)"""
    return [(f"{n % 10}+{n // 10}?", f"#{(n % 10 + n // 10) % 10};", f"#{(n + 5) % 10};") for n in range(count)]


def answers(kind: str) -> list[dict]:
    """Right answers end in a semicolon, wrong ones in an equals sign: that is easy to learn."""
    if kind == "pairwise":
        return [pair(p, right, wrong[:-1] + "=") for p, right, wrong in sums(30)]
    return [row(p, a, k) for p, right, wrong in sums(30) for k, a in ((1, right), (0, wrong[:-1] + "="))]
