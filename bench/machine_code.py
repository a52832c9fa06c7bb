"""What a loop over a row costs, counted in the machine code: instructions, bytes of memory and barriers a logit.

A loop is what lies between a backward branch and its target, if no other loop lies in it and it moves blocks of logits
(128-bit loads). Counted for NVIDIA targets, whose code `cuobjdump` of Triton disassembles.
"""

import re
import subprocess
from typing import NamedTuple

import triton

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_BRANCH = re.compile(r"\bBRA (?:`\(\S+\)|0x([0-9a-f]+))")
_ACCESS = re.compile(r"\b(LDG|STG)\.E(?:\.\w+)*?\.128\b")


class Loop(NamedTuple):
    """One innermost loop over blocks of a row. Bytes are those a thread moves for each of its logits."""

    instructions: float  # a logit
    loaded: float
    stored: float
    barriers: int  # an iteration

    def __str__(self) -> str:
        waits = f", {self.barriers} barriers" if self.barriers else ""
        return f"{self.instructions:.1f} instr, {self.loaded:g}+{self.stored:g} B{waits}"


def disassembled(cubin_path: str) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", cubin_path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def loops(sass: str, logits_of_a_thread: int, bytes_of_a_logit: int) -> list[Loop]:
    """In the order of the code: the sweeps of a row kernel. logits_of_a_thread: of one iteration before unrolling.

    A body that loads a multiple of these logits was unrolled so many times.
    """
    code = [(int(address, 16), text) for address, text in _LINE.findall(sass)]
    ranges = []
    for address, text in code:
        target = _BRANCH.search(text)
        if target and target[1] and int(target[1], 16) < address:
            ranges.append((int(target[1], 16), address))
    innermost = [
        (start, end)
        for start, end in ranges
        if not any(start <= other and last <= end and (start, end) != (other, last) for other, last in ranges)
    ]
    found = []
    for start, end in sorted(innermost):
        body = [text for address, text in code if start <= address <= end]
        moved = {"LDG": 0, "STG": 0}
        for text in body:
            if access := _ACCESS.search(text):
                moved[access[1]] += 16
        if moved["LDG"]:
            unrolled = max(1, moved["LDG"] // (logits_of_a_thread * bytes_of_a_logit))
            counts = (len(body), moved["LDG"], moved["STG"])
            barriers = sum("BAR.SYNC" in text for text in body) // unrolled
            found.append(Loop(*(count / (logits_of_a_thread * unrolled) for count in counts), barriers))
    return found
