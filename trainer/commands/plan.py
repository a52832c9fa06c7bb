"""`ipvrm plan`: memory by part and phase, before anything is loaded."""

import os
import tempfile
from pathlib import Path

GIB, MIB = 2**30, 2**20
GPUS = {  # about what torch says the card has, in GiB
    "A10": 22.1,
    "A100-40": 39.4,
    "A100-80": 79.3,
    "B200": 178.3,
    "H100": 79.1,
    "H200": 139.8,
    "L4": 22.1,
    "L40S": 44.4,
    "RTX3090": 23.7,
    "RTX4090": 23.5,
    "RTX5090": 31.4,
    "T4": 14.6,
    "V100-32": 31.7,
}
ENGINE = (
    "Not counted of vLLM's engine, and not to be measured here: its activations, its CUDA graphs, and what it keeps on "
    "the GPU when it sleeps. Asleep its weights are in the host's memory. --measure makes passes without an engine."
)
CONTEXT = 0.8  # GiB: the CUDA context, cuBLAS's workspace and what the allocator rounds up; assumed, not measured


def add(commands, raw) -> None:
    sub = commands.add_parser(
        "plan",
        help="What memory each phase of a configuration needs, by part, before anything is loaded.",
        description="Runs the largest pass of every phase on tensors that have shapes and no memory.",
        formatter_class=raw,
    )
    sub.add_argument("config", help="TOML file, the bare name of a shipped one, or a run's config.json")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    room = sub.add_mutually_exclusive_group()
    room.add_argument("--gpu", help=f"does it fit on this one: {', '.join(GPUS)}")
    room.add_argument("--memory", type=float, metavar="GIB", help="does it fit in so much memory of a GPU")
    sub.add_argument("--prompt-tokens", type=int, metavar="N", help="of the longest prompt, in place of the data")
    sub.add_argument(
        "--phase", action="append", default=[], metavar="NAME", help="this one alone, e.g. rl.distrl; more: again"
    )
    sub.add_argument("--measure", action="store_true", help="make every pass here too, with random weights")
    sub.add_argument("--json", type=Path, metavar="FILE", help="also write it all there")
    sub.set_defaults(function=run)


def run(options) -> None:
    import torch

    from ipvrm_core.trainer.commands.main import _load
    from ipvrm_core.trainer.commands.options import quiet
    from ipvrm_core.trainer.config import ConfigError
    from ipvrm_core.trainer.files import write_json
    from ipvrm_core.trainer.plan.estimate import estimate
    from ipvrm_core.trainer.plan.measure import measure
    from ipvrm_core.trainer.plan.passes import phases
    from ipvrm_core.trainer.plan.sizes import longest
    from ipvrm_core.trainer.preflight import tokenizer_of

    if options.gpu and options.gpu not in GPUS:
        raise ConfigError(f"--gpu must be one of {', '.join(GPUS)}, or say --memory GIB; got {options.gpu!r}")
    config = _load(options)
    quiet()
    tokenizer = tokenizer_of(config)
    sizes = longest(config, tokenizer, options.prompt_tokens)
    cuda = bool(options.gpu or options.memory) or (torch.cuda.is_available() and config.device != "cpu")
    known = list(phases(config, sizes))
    if strange := [name for name in options.phase if name not in known]:
        raise ConfigError(f"--phase must be some of {', '.join(known)}; got {', '.join(strange)}")
    peaks = estimate(config, tokenizer, sizes, torch.device("cuda" if cuda else "cpu"), options.phase)
    measured = {}
    if options.measure:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "config.json"
            path.write_text(config.model_dump_json())
            for peak in peaks:
                if peak.can_be_made:
                    measured[peak.phase, peak.name] = measure(path, sizes, peak.phase, peak.name)
    print(table(peaks, measured))
    print()
    print(verdict(peaks, options.memory or GPUS.get(options.gpu)))
    if config.generation.sampler == "vllm":
        print(ENGINE)
    if options.json:
        rows = [
            {"phase": peak.phase, "pass": peak.name, "bytes": peak.total, "parts": peak.parts}
            | ({"measured_bytes": found} if (found := measured.get((peak.phase, peak.name))) else {})
            for peak in peaks
        ]
        write_json(options.json, {"config": config.name, "sizes": sizes, "passes": rows})


def table(peaks, measured) -> str:
    """A line for each pass, in MiB."""
    parts = list(peaks[0].parts)
    lines = [[*("phase", "pass"), *parts, "together", *(["measured", "ratio"] if measured else [])]]
    for peak in peaks:
        line = [peak.phase, peak.name, *(f"{size / MIB:,.0f}" for size in (*peak.parts.values(), peak.total))]
        if found := measured.get((peak.phase, peak.name)):
            line += [f"{found / MIB:,.0f}", f"{peak.models / found:.3f}"]
        lines.append(line + [""] * (len(lines[0]) - len(line)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = [str.ljust] * 2 + [str.rjust] * (len(widths) - 2)
    cells = [[side(*cell) for side, *cell in zip(sides, line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in cells)


def verdict(peaks, room: float | None) -> str:
    """Whether it fits, where that was asked, and what is largest."""
    worst = max(peaks, key=lambda peak: peak.total)
    most = f"{worst.total / GIB:.2f} GiB in {worst.phase}, {worst.name}"
    said = f"MiB. The most: {most}; its largest part: {worst.largest}."
    if room is None:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
        return f"{said} This machine has {memory:.1f} GiB; the packages themselves take about half a GiB of it."
    needed = worst.total / GIB + CONTEXT
    fits = "fits" if needed <= room else "does NOT fit"
    return f"{said} With {CONTEXT} for CUDA itself (assumed) that is {needed:.2f} GiB: it {fits} in {room:g}."
