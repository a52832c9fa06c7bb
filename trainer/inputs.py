"""What the phases of a run read, by digests in RUN/inputs: it must be what the earlier ones read or made.

One file for a key of the configuration or a model of a phase, since phases start side by side.
"""

from pathlib import Path
from urllib.parse import quote

from ipvrm_core.trainer.config import Config, ConfigError
from ipvrm_core.trainer.files import read_json, write_json
from ipvrm_core.trainer.identity import Digests, code_digests, data_digests, differing


def data_inputs(config: Config) -> dict[str, Digests]:
    """Of every file and data set that is trained or evaluated on, by key."""
    sources = {"data": config.data, "test": config.test, "sft.data": config.sft and config.sft.data}
    sources |= {f"eval.benchmarks.{name}": source for name, source in config.eval.benchmarks.items()}
    sources |= {f"leakage.benchmarks.{index}": source for index, source in enumerate(config.leakage.benchmarks)}
    for name, rm in config.rm.items():
        sources[f"rm.{name}.data"] = rm.data
        if rm.data and rm.data.validation_path:
            sources[f"rm.{name}.data.validation_path"] = rm.data.of_validation()
    return {
        key: data_digests(source.path, source.split, source.config)
        for key, source in sources.items()
        if source and source.path
    }


def code_inputs(config: Config) -> dict[str, Digests]:
    """Of the user's own code that the configuration names, by key."""
    named = {"verifier.kind": config.verifier.kind}
    named |= {f"rm.{name}.objective": rm.objective for name, rm in config.rm.items()}
    named |= {f"rl.{name}.method.estimator": rl.resolved().estimator for name, rl in config.rl.items()}
    return {key: code_digests(spec) for key, spec in named.items() if ":" in spec}


def keep(run: Path, inputs: dict[str, Digests]) -> None:
    """Keep the digests that are new to the run; ConfigError names the files that are not what they were."""
    changed = []
    for key, now in inputs.items():
        path = _path(run, key)
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_json(path, now)
        elif names := differing(read_json(path), now):
            changed.append(f"{key} ({', '.join(names)})")
    if changed:
        raise ConfigError(
            f"{run} was made with other contents of {', '.join(changed)}; put them back, or take a new --run folder"
        )


def forget(run: Path, key: str) -> None:
    """Let an input change: a judge that stopped its phase, a model that a phase makes again."""
    _path(run, key).unlink(missing_ok=True)


def _path(run: Path, key: str) -> Path:
    return run / "inputs" / f"{quote(key, safe='')}.json"
