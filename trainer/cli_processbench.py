"""`ipvrm processbench`: score once, evaluate as often as wanted."""

import json
from pathlib import Path

from ipvrm_core.trainer.cli_models import form_of, format_options, load_pair_of, pair_options


def add(commands) -> None:
    help = "Find the first wrong step: score a ProcessBench file or folder, or evaluate kept scores."
    parser = commands.add_parser("processbench", help=help, description=help)
    pair_options(parser, required=False)
    format_options(parser)
    parser.add_argument("--data", type=Path, help="file or folder of problems (json, jsonl, parquet); needs --out")
    parser.add_argument("--out", type=Path, help="folder for the scores (one parquet a subset) and results.json")
    parser.add_argument("--rescore", type=Path, nargs="+", help="score files or folders: evaluate, without any model")
    parser.add_argument("--resume", action="store_true", help="keep the subsets that --out already has")
    parser.add_argument("--limit", type=int, help="so many problems of each subset, evenly spread")
    parser.add_argument("--max-length", type=int, help="tokens of a whole text (default: what both models can take)")
    parser.add_argument("--too-long", choices=("refuse", "skip", "truncate"), default="refuse")
    parser.add_argument(
        "--official", action="store_true", help="steps as 'Step 1: ...', and also the authors' boundaries and grid"
    )
    parser.add_argument("--tune-on", default="gsm8k", help="subset whose threshold is transferred (default: gsm8k)")
    parser.add_argument("--resamples", type=int, default=1000, help="bootstrap resamples; 0: no intervals")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.set_defaults(function=run)


def run(options) -> None:
    from ipvrm_core.trainer.evaluation import processbench, processbench_results
    from ipvrm_core.trainer.files import write_json

    _check(options)
    if not options.rescore:
        _score(options)
    rows, origin = processbench.read_scores(options.rescore or [options.out])
    result = {
        "origin": origin,
        **processbench_results.evaluate(rows, options.tune_on, options.resamples, options.seed),
    }
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "results.json", result)
    print(processbench_results.markdown(result))


def _check(options) -> None:
    scoring = {name: getattr(options, name) for name in ("model", "reference", "data")}
    given = [f"--{name}" for name, value in scoring.items() if value]
    if options.rescore and given:
        raise ValueError(f"--rescore evaluates kept scores and takes no {', '.join(given)}")
    missing = [f"--{name}" for name, value in {**scoring, "out": options.out}.items() if not value]
    if not options.rescore and missing:
        raise ValueError(f"scoring needs {', '.join(missing)}; or pass --rescore with kept scores")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be >= 1; got {options.limit}")
    if options.resamples < 0:
        raise ValueError(f"--resamples must be >= 0; got {options.resamples}")


def _score(options) -> None:
    from dataclasses import asdict

    from ipvrm_core.trainer.data.processbench import load_processbench
    from ipvrm_core.trainer.evaluation import official, processbench
    from ipvrm_core.trainer.evaluation.log_ratios import length_limit

    if options.official and options.step_format not in ("{step}", official.FORMAT.step):
        raise ValueError(
            f"--official writes steps as {official.FORMAT.step!r}; got --step-format {options.step_format!r}"
        )
    step = official.FORMAT.step if options.official else options.step_format
    form = form_of(options, step=step)
    problems = load_processbench(options.data, options.limit)
    options.out.mkdir(parents=True, exist_ok=True)
    old = sorted(options.out.glob("*.parquet"))
    if old and not options.resume:
        raise ValueError(
            f"{options.out} already has scores ({old[0].name}); pass --resume, or take another --out folder"
        )
    pair = load_pair_of(options)
    limits = [limit for limit in (options.max_length, length_limit(pair)) if limit]
    origin = {
        "model": options.model,
        "reference": options.reference,
        "dtype": options.dtype,
        "format": asdict(form),
        "limit": options.limit,
        "max_length": min(limits, default=None),
        "too_long": options.too_long,
        "official": options.official,
    }
    if old and processbench.read_scores(old)[1] != json.loads(json.dumps(origin)):
        raise ValueError(f"{options.out} holds scores made in another way; take another --out folder")
    for subset in dict.fromkeys(problem.subset for problem in problems):
        path = options.out / f"{subset}.parquet"
        if path.exists():
            continue
        rows = processbench.score(
            pair,
            [problem for problem in problems if problem.subset == subset],
            form,
            max_tokens=options.micro_batch_tokens,
            max_length=min(limits, default=None),
            too_long=options.too_long,
            with_official=options.official,
        )
        processbench.write_scores(path, rows, origin)
