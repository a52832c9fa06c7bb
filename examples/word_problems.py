"""Arithmetic word problems for a small model: demonstrations from ASDiv and SVAMP, problems from MAWPS.

    python examples/word_problems.py FOLDER OUT

FOLDER: asdiv.jsonl, svamp.jsonl, mawps_singleop.jsonl, mawps_addsub.jsonl and mawps_singleeq.jsonl, as the evaluation
set of Qwen2.5-Math has them. OUT receives sft.jsonl (question, solution: one equation and the number), train.jsonl and
test.jsonl (question, answer), for `ipvrm run smollm2_mawps`. A problem of MAWPS is in none of the demonstrations and in
one of train and test. Whole numbers alone: many of the others are thirds, rounded somewhere.
"""

import json
import random
import re
import sys
from pathlib import Path

TEST = 300


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def whole(text: str | float) -> bool:
    return float(text).is_integer()


def number(text: str | float) -> str:
    return str(int(float(text)) if whole(text) else float(text))


def problem(text: str) -> str:
    """Without the blanks that MAWPS has before punctuation."""
    return re.sub(r"\s+([.,?!])", r"\1", " ".join(text.split()))


def key(question: str) -> str:
    return re.sub(r"[^a-z0-9]", "", question.lower())


def equations(folder: Path) -> list[tuple[str, str, str]]:
    """(question, left side, answer) of ASDiv's and SVAMP's one-equation problems whose answer is a number."""
    found = []
    for row in rows(folder / "asdiv.jsonl"):
        answer, formula = re.match(r"[\d.]+", row["answer"]), row["formula"].replace(" ", "")
        if answer and re.fullmatch(r"[-+*/().\d]+=[\d.]+", formula):
            left, right = formula.split("=")
            if number(right) == number(answer.group()):
                found.append((f"{row['body']} {row['question']}", left, right))
    for row in rows(folder / "svamp.jsonl"):
        left = re.sub(r"\d+\.\d+", lambda match: number(match.group()), row["Equation"]).replace(" ", "")
        found.append((f"{row['Body'].rstrip('. ')}. {row['Question']}", left, row["Answer"]))
    return [(problem(question), outermost(left), number(answer)) for question, left, answer in found]


def outermost(left: str) -> str:
    """(a+b) -> a+b."""
    return left[1:-1] if left.count("(") == 1 and left.startswith("(") and left.endswith(")") else left


def main(folder: Path, out: Path) -> None:
    mawps: dict[str, dict] = {}
    for name in ("singleop", "addsub", "singleeq"):
        for row in rows(folder / f"mawps_{name}.jsonl"):
            question = problem(row["input"])
            mawps.setdefault(key(question), {"question": question, "answer": number(row["target"])})
    problems = [row for row in mawps.values() if whole(row["answer"])]
    demonstrations = [
        {"question": question, "answer": answer, "solution": f"{left}={answer}\n#### {answer}"}
        for question, left, answer in equations(folder)
        if key(question) not in mawps and whole(answer)
    ]
    shuffle = random.Random(0).shuffle
    shuffle(problems)
    shuffle(demonstrations)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in (("sft", demonstrations), ("train", problems[TEST:]), ("test", problems[:TEST])):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        print(f"{name}.jsonl: {len(content)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
