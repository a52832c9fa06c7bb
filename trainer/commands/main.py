"""The command `ipvrm`: one subcommand a phase, and `run` for the whole chain."""

import argparse
import os
import re
import select
import signal
import sys
from pathlib import Path

from ipvrm_core.trainer import config as configuration
from ipvrm_core.trainer import ending
from ipvrm_core.trainer.commands import evaluation as cli_evaluation
from ipvrm_core.trainer.commands import plan as cli_plan
from ipvrm_core.trainer.config import Config, ConfigError
from ipvrm_core.trainer.files import read_json

EPILOG = """\
A configuration is a TOML file; `ipvrm config` lists every key with its type, default and meaning.
Overrides follow the file, in TOML syntax:  ipvrm run my.toml rl.distrl.steps=50 model.path=Qwen/Qwen3-0.6B

The chain:   sft -> rollout -> train-rm -> rl -> eval -> report
Every phase may be killed at any moment; the same command with --resume goes on and gives the same numbers.
"""


TRAINING = ("sft", "rollout", "train-rm", "rl")  # commands that look for evaluation problems in their data first


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if "" not in sys.path:
        sys.path.append("")  # own judges and objectives in the current folder, as `python -m` finds them
    try:
        with ending.signals():
            if options.with_parent:
                ending.end_with_parent()
            options.function(options)
            sys.stdout.flush()  # here, where a reader that is gone can be told from other failures
    except KeyboardInterrupt as error:
        number = getattr(error, "signal", signal.SIGINT)
        print(f"ipvrm {options.command}: ended by {number.name}", file=sys.stderr)
        return 128 + number
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return 128 + signal.SIGPIPE
        if options.traceback or not _expected(error):
            raise
        print(f"ipvrm {options.command}: {error}", file=sys.stderr)
        return 2
    return 0


EXPECTED = (RuntimeError, ValueError, OSError, FloatingPointError, ImportError, MemoryError, re.error)
LIBRARIES = ("datasets", "huggingface_hub", "jinja2", "pyarrow", "safetensors", "tokenizers")


def _expected(error: Exception) -> bool:
    """Whether the user's data, files or machine are at fault; anything else is a mistake of ours and shows its trace.

    Libraries raise classes of their own, and those written in Rust a bare Exception.
    """
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, EXPECTED) or type(error) is Exception or library in LIBRARIES


def _reader_is_gone() -> bool:
    """Whether stdout is a pipe that nobody reads any more, as behind `| head`; then what is left to print goes."""
    poll = select.poll()
    poll.register(sys.stdout, 0)  # errors and hang-ups are told unasked
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """Overrides may stand anywhere; argparse alone takes them only right behind the file."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    strange = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(options, "overrides")]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="ipvrm", description="Prefix-value reward models (IPVRM) and DistRL.", epilog=EPILOG, formatter_class=raw
    )
    parser.add_argument("--with-parent", action="store_true", help=argparse.SUPPRESS)  # end when stdin does
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def phase(name: str, help: str, function, named: str | None = None) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, epilog=EPILOG, formatter_class=raw)
        sub.add_argument("config", help="TOML file, the bare name of a shipped one, or a run's config.json")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
        sub.add_argument("--run", type=Path, required=True, help="folder of this experiment; made if it does not exist")
        sub.add_argument("--resume", action="store_true", help="go on where a killed or finished phase stopped")
        if named:
            sub.add_argument("--name", help=f"which entry of the [{named}] table (default: all, one after the other)")
        sub.set_defaults(function=function)
        return sub

    phase("sft", "Supervised fine-tuning on demonstrations.", _sft)
    phase("rollout", "Sample and verify answers of the starting policy.", _rollout)
    phase("train-rm", "Train implicit reward models on the rollouts.", _train_rm, named="rm")
    phase("rl", "Train the policy: GRPO, GRPO with a process reward, or DistRL.", _rl, named="rl")
    phase("eval", "Evaluate every model of the run.", _eval)
    whole = phase("run", "All phases of the configuration, then the report.", _run)
    whole.add_argument("--jobs", type=int, default=1, help="phases side by side, where they do not need each other")
    phase("report", "Write RUN/report/index.html and its pictures.", _report)

    seeds = commands.add_parser(
        "compare", help="Several runs (seeds) as Markdown: policies in pairs, mean and spread of every evaluation."
    )
    seeds.add_argument("runs", nargs="+", type=Path, help="run folders")
    seeds.add_argument("--against", metavar="NAME", help="policy run that the others are paired with (the first)")
    seeds.add_argument("--plot", type=Path, help="also draw the reward models: FILE.png, .svg or .pdf")
    seeds.set_defaults(function=_compare)

    cli_evaluation.add(commands)
    cli_plan.add(commands, raw)

    listing = commands.add_parser("config", help="List every configuration key.")
    listing.set_defaults(function=lambda _: print("\n".join(configuration.describe())))
    return parser


def _load(options) -> Config:
    path = Path(options.config)
    if path.suffix == ".json":
        if options.overrides:
            raise ConfigError("a resolved config.json takes no overrides")
        return configuration.check(read_json(path), str(path))
    return configuration.load(path, options.overrides)


def _quiet() -> None:
    """Silence transformers' own bars and notices: the phases print what matters."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _with_experiment(options, function) -> None:
    config = _load(options)
    _quiet()
    from ipvrm_core.trainer import inputs
    from ipvrm_core.trainer.experiment import Experiment
    from ipvrm_core.trainer.leakage import guard
    from ipvrm_core.trainer.preflight import preflight
    from ipvrm_core.trainer.verify.pool import BrokenJudgeError

    preflight(config, options.run)  # before anything is kept of a run that cannot be
    experiment = Experiment(config, options.run)
    try:
        if options.command in TRAINING:
            guard(config, options.run)
        function(experiment)
    except BrokenJudgeError:  # none of its verdicts is kept, so it may be repaired
        inputs.forget(options.run, "verifier.kind")
        raise
    finally:
        experiment.close()


def _sft(options) -> None:
    from ipvrm_core.trainer.phases import sft

    _with_experiment(options, lambda experiment: sft.run(experiment, options.resume))


def _rollout(options) -> None:
    from ipvrm_core.trainer.phases import rollout

    _with_experiment(options, lambda experiment: rollout.run(experiment, options.resume))


def _train_rm(options) -> None:
    from ipvrm_core.trainer.phases import train_rm

    _with_experiment(options, lambda experiment: _each(experiment.config.rm, "rm", options, train_rm.run, experiment))


def _rl(options) -> None:
    from ipvrm_core.trainer.phases import rl

    _with_experiment(options, lambda experiment: _each(experiment.config.rl, "rl", options, rl.run, experiment))


def _each(table: dict, label: str, options, function, experiment) -> None:
    if options.name and options.name not in table:
        raise ConfigError(
            f"--name must be a key of [{label}]: {', '.join(table) or 'it has none'}; got {options.name!r}"
        )
    if not table:
        raise ConfigError(f"the configuration has no [{label}.<name>] section")
    for name in [options.name] if options.name else table:
        function(experiment, name, options.resume)


def _eval(options) -> None:
    from ipvrm_core.trainer.phases import evaluate

    _with_experiment(options, lambda experiment: evaluate.run(experiment, options.resume))


def _run(options) -> None:
    from ipvrm_core.trainer import pipeline
    from ipvrm_core.trainer.experiment import Experiment
    from ipvrm_core.trainer.leakage import guard
    from ipvrm_core.trainer.preflight import preflight

    if options.jobs < 1:
        raise ConfigError(f"--jobs must be >= 1; got {options.jobs}")
    config = _load(options)
    if options.run.exists() and any(options.run.iterdir()) and not options.resume:
        raise ConfigError(f"{options.run} is not empty; pass --resume to go on, or take another --run folder")
    _quiet()
    preflight(config, options.run)
    Experiment(config, options.run)  # keeps config.json
    guard(config, options.run)
    pipeline.run(config, options.run, options.jobs)


def _compare(options) -> None:
    from ipvrm_core.trainer.report.compare import compare

    print(compare(options.runs, options.against))
    if options.plot:
        from ipvrm_core.trainer.report.compare_plot import draw

        draw(options.runs, options.plot)


def _report(options) -> None:
    from ipvrm_core.trainer.report import build

    config = _load(options)
    print(build(config, options.run))


if __name__ == "__main__":
    sys.exit(main())
