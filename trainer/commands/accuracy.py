"""`ipvrm accuracy`: a policy on a test set, without a run folder."""

import json
from pathlib import Path

from ipvrm_core.trainer.commands.options import MODEL, model_files, quiet
from ipvrm_core.trainer.data.known_sets import KNOWN_SETS


def add(commands) -> None:
    help = "Accuracy of any policy on a test set: greedy, avg@k, pass@k; keeps the answers for best-of-n."
    parser = commands.add_parser("accuracy", help=help, description=help)
    parser.add_argument("--model", required=True, help=f"the policy: {MODEL}")
    parser.add_argument("--data", required=True, help="jsonl, json, parquet, or a Hugging Face data set")
    parser.add_argument("--preset", help=f"columns and prompt of a known set: {', '.join(KNOWN_SETS)}")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings of the data, as in eval.benchmarks (`ipvrm config`)"
    )
    parser.add_argument("--limit", type=int, help="so many problems, of each group where the data have groups")
    parser.add_argument("--samples", type=int, default=8, help="drawn answers a problem: k of avg@k (default: 8)")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64, help="sequences at once, and problems a resumable part")
    parser.add_argument(
        "--sampler",
        choices=("generate", "vllm"),
        default="generate",
        help="who answers: transformers' generate, or vLLM (the extra vllm), which holds the weights a second time",
    )
    parser.add_argument(
        "--cache-gib", type=float, default=4.0, help="vLLM's memory for keys and values (generation.vllm.cache_gib)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--system-prompt", help="first message, where the tokenizer has a chat template")
    parser.add_argument(
        "--verifier",
        default="math",
        help=r"exact | math | boxed (math on the last \boxed{} alone) | package.module:function, which is imported "
        "(default: math)",
    )
    parser.add_argument(
        "--max-errors",
        type=float,
        default=0.05,
        help="share of answers that may stay without a verdict (default: 0.05)",
    )
    parser.add_argument(
        "--unfinished",
        choices=("judge", "wrong"),
        default="judge",
        help="answers cut at --max-new-tokens: judge them as they are, or count them wrong unseen",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    parser.add_argument("--answers", type=Path, help="jsonl file for the drawn answers, as best-of-n reads them")
    parser.add_argument("--resume", action="store_true", help="go on where a killed command stopped")
    parser.set_defaults(function=run)


def run(options) -> None:
    from contextlib import closing
    from dataclasses import asdict

    from ipvrm_core.trainer.data.sources import by_group, read_source
    from ipvrm_core.trainer.evaluation.policy import sampled_answers
    from ipvrm_core.trainer.evaluation.token_scores import length_limit, load_language_model
    from ipvrm_core.trainer.files import remove_folder, write_json, write_text
    from ipvrm_core.trainer.sampling.verified import Asker
    from ipvrm_core.trainer.text import Text
    from ipvrm_core.trainer.verify import make_verifier

    source = _source(options)
    names = ("samples", "temperature", "top_p", "max_new_tokens", "batch", "seed")
    sampling = sampled_answers.Sampling(**{name: getattr(options, name) for name in names})
    told = ("model", "dtype", "sampler", "system_prompt", "verifier", "unfinished")
    origin = {name: getattr(options, name) for name in told}
    origin |= {"data": source.model_dump(exclude_defaults=True), "sampling": asdict(sampling)}
    origin["files"] = {**_data_files(source), **model_files(model=options.model)}
    parts = options.out.with_name(f"{options.out.name}.parts")
    _check_old(options, parts, origin["files"])
    engine = _engine(options)

    groups = by_group(source, options.preset or Path(options.data).stem, read_source(source))
    if options.answers:
        _check_readable(groups)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    quiet()
    tokenizer, model = load_language_model(options.model, options.dtype, options.device)
    with make_verifier(options.verifier, max_errors=options.max_errors) as verifier:
        asker = Asker(Text(tokenizer, options.system_prompt), verifier, options.unfinished)
        with closing(_sampler(engine, model, tokenizer, sampling.batch, options.dtype)) as sampler:
            made = sampled_answers.sample_parts(parts, asker, sampler, groups, sampling, origin, length_limit(model))
    result = {"origin": origin, **sampled_answers.summarise(made, sampling.samples)}
    if options.answers:
        options.answers.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row) + "\n" for row in sampled_answers.stored_rows(made)]
        write_text(options.answers, "".join(lines))
    write_json(options.out, result)
    remove_folder(parts)
    print(sampled_answers.markdown(result))


def _engine(options):
    """The settings of vLLM's engine, None without one; ConfigError where there could be none."""
    from ipvrm_core.trainer.config import Vllm, check
    from ipvrm_core.trainer.sampling.engine import check_installed

    if options.sampler != "vllm":
        return None
    check_installed("--sampler vllm")
    return check({"cache_gib": options.cache_gib}, "--cache-gib", Vllm)


def _sampler(engine, model, tokenizer, batch: int, dtype: str):
    from ipvrm_core.trainer.sampling.generate import Generate

    if engine is None:
        return Generate(model, tokenizer, batch)
    from ipvrm_core.trainer.sampling.vllm import VllmSampler

    return VllmSampler(model, tokenizer, engine, batch=batch, dtype=dtype)


def _source(options):
    from ipvrm_core.trainer.config import ConfigError, Source, check
    from ipvrm_core.trainer.config.loading import apply_override

    raw: dict = {"path": options.data}
    raw |= {name: value for name in ("preset", "limit") if (value := getattr(options, name)) is not None}
    for override in options.overrides:
        if override.partition("=")[0] in ("path", "preset", "limit", "task"):
            raise ConfigError(f"{override!r}: take --data, --preset and --limit")
        apply_override(raw, override)
    return check(raw, options.data, Source)


def _data_files(source) -> dict[str, str]:
    from ipvrm_core.trainer.identity import data_digests

    found = data_digests(source.path, source.split, source.config)
    return {f"data/{name}": digest for name, digest in found.items()}


def _check_old(options, parts: Path, files: dict[str, str]) -> None:
    """ValueError rather than writing over a result, or going on with old answers unasked or from other files."""
    from ipvrm_core.trainer.identity import differing

    if options.out.exists():
        raise ValueError(f"{options.out} exists already; take another --out")
    if parts.exists() and not options.resume:
        raise ValueError(f"{parts} holds the answers of a stopped command; pass --resume to go on, or remove it")
    kept = parts / "origin.json"
    changed = differing(json.loads(kept.read_text()).get("files", {}), files) if kept.exists() else []
    if changed:
        raise ValueError(f"{parts} holds answers made before {', '.join(changed)} changed; remove it to begin anew")


def _check_readable(groups) -> None:
    """ValueError for prompts that best-of-n could not read: it knows one message of the user."""
    from ipvrm_core.trainer.evaluation.policy.sampled_answers import prompt_text

    long = [
        example.id for examples in groups.values() for example in examples if not isinstance(prompt_text(example), str)
    ]
    if long:
        raise ValueError(f"--answers holds prompts of one user message; {long[0]} has more, or another first role")
