"""`python -m ipvrm_core.bench.gpu --json out.json --markdown out.md`: correctness on the GPU, then the benchmark.

The JSON and the Markdown are written after every row, so that a timeout loses nothing. The exit status is 1 when a
check failed, the library raised or was wrong, or a section broke; failing peers are recorded and change nothing.
Sections, most important first: rates, correctness, loss, step, logits, largest, tuning, rows, vocabularies, variants,
memcheck. Each has a share of --minutes, what one leaves goes to the next, and what no time is left for is recorded.

--toy: tiny sizes, on a GPU or on the CPU with TRITON_INTERPRET=1, to see that the command runs. Its times say nothing.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ipvrm_core.bench import correctness, largest, memcheck, sections, tuning
from ipvrm_core.bench.compare import OURS, ROOMY, Run
from ipvrm_core.bench.device import ROUNDS, Meter, describe
from ipvrm_core.bench.interpreter import patch_once
from ipvrm_core.bench.machine import ClockLog, environment, package_version
from ipvrm_core.bench.peers import peers
from ipvrm_core.bench.report import markdown
from ipvrm_core.dispatch import why_no_triton

SECTIONS: dict[str, tuple[Callable[[Run], Iterator[dict]], float]] = {  # and the share of the time
    "rates": (sections.rates, 0.02),
    "correctness": (correctness.section, 0.22),
    "loss": (sections.loss, 0.28),
    "step": (sections.step, 0.08),
    "logits": (sections.logits, 0.07),
    "largest": (largest.section, 0.06),
    "tuning": (tuning.section, 0.06),
    "rows": (sections.rows, 0.08),
    "vocabularies": (sections.vocabularies, 0.05),
    "variants": (sections.variants, 0.03),
    "memcheck": (memcheck.section, 0.05),
}
DISTRIBUTIONS = {"liger_kernel": "liger-kernel", "cut_cross_entropy": "cut-cross-entropy", "quack": "quack-kernels"}


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and args.backend == "triton":
        patch_once()
    start = time.monotonic()
    run = Run(
        device,
        args.backend,
        args.toy,
        Meter(device),
        end=start + 60 * args.minutes,
        case_seconds=0.0 if args.toy else 6.0,
        rounds=1 if args.toy else ROUNDS,
        peer_names=args.peers,
    )
    report = {
        "toy": args.toy,
        "device": device.type,
        "backend": args.backend,
        "minutes": args.minutes,
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "environment": environment(device) | ({"commit": args.commit} if args.commit else {}),
        "peers": peer_facts(device),
        "sections": {name: {"status": "skipped", "reason": "not asked for", "rows": []} for name in SECTIONS},
    }
    clocks = ClockLog(device)
    try:
        total, spent = sum(SECTIONS[name][1] for name in args.only), 0.0
        for name in args.only:
            spent += SECTIONS[name][1]
            run.deadline = start + 60 * args.minutes * spent / total
            for section in run_section(name, run, clocks):
                report["sections"][name], report["seconds"] = section, time.monotonic() - start
                save(report, args)
    finally:
        clocks.close()
    print(markdown(report))
    faults = failures(report)
    print(*faults, sep="\n", file=sys.stderr)
    return 1 if faults else 0


def run_section(name: str, run: Run, clocks: ClockLog) -> Iterator[dict]:
    """{"status": running, then done | failed, "seconds", "rows"} after every row; those before a failure are kept."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    begun, result = time.monotonic(), {"status": "running", "reason": "cut off", "rows": []}
    try:
        for row in SECTIONS[name][0](run):
            seen = clocks.summary()
            result["rows"].append(row | ({"clocks": seen} if seen else {}))
            yield result | {"seconds": time.monotonic() - begun}
        result = {"status": "done", "rows": result["rows"]}
    except Exception as error:  # recorded, shown, and in the exit status; the other sections still run
        traceback.print_exc()
        result |= {"status": "failed", "reason": describe(error)}
    run.meter.release()
    yield result | {"seconds": time.monotonic() - begun}


def failures(report: dict) -> list[str]:
    """What makes the exit status 1."""
    found = []
    for name, section in report["sections"].items():
        if section["status"] == "failed":
            found.append(f"{name}: {section['reason']}")
        for row in section["rows"]:
            what = row.get("case") or f"{row.get('check', '')} {row.get('function', row.get('tool', ''))}"
            library = row.get("provider") in (OURS, ROOMY) or name in ("step", "rates", "largest")
            if row.get("passed") is False:
                found.append(f"{name}: {what}: {row['detail']}")
            elif library and "error" in row:
                found.append(f"{name}: {what}: {row['provider']}: {row['error']}")
            elif library and row.get("wrong"):
                found.append(f"{name}: {what}: {row['provider']}: error {row['deviation']}")
    return found


def peer_facts(device: torch.device) -> list[dict]:
    """Every peer, how to install it, the version that is here, and why it cannot run if it cannot."""
    return [
        {
            "name": peer.name,
            "level": level,
            "install": peer.install,
            "version": package_version(DISTRIBUTIONS.get(peer.package, peer.package)),
            "call": peer.call,
            "computes": peer.computes,
            "unavailable": peer.unavailable(device),
        }
        for level in ("linear", "logits")
        for peer in peers(level)
    ]


def save(report: dict, args: argparse.Namespace) -> None:
    """Each file whole or as it was: a timeout may come at any moment."""
    for path, text in ((args.json, json.dumps(report, indent=1)), (args.markdown, markdown(report))):
        if path is not None:
            part = path.with_name(path.name + ".part")
            part.write_text(text + "\n")
            part.replace(path)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the report here, after every section")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--minutes", type=float, default=7.0, help="time for all sections (7)")
    parser.add_argument("--peers", nargs="*", metavar="NAME", help="only these peers, by name; none: the library alone")
    parser.add_argument("--backend", choices=("triton", "chunked"), default="triton")
    parser.add_argument("--commit", help="the commit, where this is no git repository")
    parser.add_argument("--toy", action="store_true", help="tiny sizes; its times are no results")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not args.toy:
        parser.error("no GPU here; --toy runs tiny sizes on the CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = why_no_triton(torch.empty(0, device=device))
    if args.backend == "triton" and reason:
        parser.error(f"backend 'triton' cannot run: {reason}")
    args.only = [name for name in SECTIONS if name in args.only]
    return args


if __name__ == "__main__":
    sys.exit(main())
