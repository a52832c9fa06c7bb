"""A reward function: whether an answer is right, by one's own rule. Here: the last number is the gold one.

As "examples.own_reward:last_number" it serves in a configuration; it is imported by worker processes with limits of
time and memory, and may return a bool, 0 or 1:

    ipvrm run my.toml --run runs/mine verifier.kind="examples.own_reward:last_number"
"""

import re


def last_number(response: str, gold: str) -> bool:
    found = re.findall(r"-?\d+(?:\.\d+)?", response.replace(",", ""))
    return bool(found) and float(found[-1]) == float(gold)
