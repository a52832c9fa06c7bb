"""`ipvrm processbench`: score once, evaluate as often as wanted."""

import sys
from pathlib import Path

from ipvrm_core.trainer.commands.options import (
    form_of,
    format_options,
    layout_of,
    length_options,
    load_scorer_of,
    max_length_of,
    model_files,
    origin_of,
    problem_options,
    said,
    scorer_options,
)


def add(commands) -> None:
    help = "Find the first wrong step: score a ProcessBench file or folder, or evaluate kept scores."
    parser = commands.add_parser("processbench", help=help, description=help)
    scorer_options(parser, required=False)
    format_options(parser)
    parser.add_argument("--data", type=Path, help="file or folder of problems (json, jsonl, parquet); needs --out")
    problem_options(parser)
    parser.add_argument("--out", type=Path, help="folder for the scores (one parquet a subset) and results.json")
    parser.add_argument("--rescore", type=Path, nargs="+", help="score files or folders: evaluate, without any model")
    parser.add_argument("--resume", action="store_true", help="keep what --out already has, and score the rest")
    parser.add_argument("--limit", type=int, help="so many problems of each subset, evenly spread")
    length_options(parser)
    parser.add_argument(
        "--official",
        action="store_true",
        help="log-ratios only: steps as 'Step 1: ...', and the authors' boundaries and grid too",
    )
    parser.add_argument("--tune-on", default="gsm8k", help="subset whose threshold is transferred (default: gsm8k)")
    parser.add_argument("--resamples", type=int, default=1000, help="bootstrap resamples; 0: no intervals")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.set_defaults(function=run)


def run(options) -> None:
    from ipvrm_core.trainer.evaluation.processbench.files import read_scores, read_sources
    from ipvrm_core.trainer.evaluation.processbench.results import evaluate
    from ipvrm_core.trainer.evaluation.processbench.tables import markdown
    from ipvrm_core.trainer.files import locked, write_json

    _check(options)
    if not options.rescore:
        with locked(options.out):
            _score(options)
    rows, origin = read_scores(options.rescore or [options.out])
    sources = read_sources(options.rescore or [options.out])
    result = {
        "origin": origin,
        "sources": sources,
        **evaluate(rows, options.tune_on, options.resamples, options.seed),
    }
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "results.json", result)
    skipped = [
        f"{name}: {source['skipped']} rows left out" for name, source in sources.items() if source.get("skipped")
    ]
    print(said(origin), *skipped, "", markdown(result), sep="\n")


def _check(options) -> None:
    scoring = {name: getattr(options, name) for name in ("model", "data")}
    both = {**scoring, "reference": options.reference, "decay": options.decay}
    given = [f"--{name}" for name, value in both.items() if value is not None]
    if options.rescore and given:
        raise ValueError(f"--rescore evaluates kept scores and takes no {', '.join(given)}")
    missing = [f"--{name}" for name, value in {**scoring, "out": options.out}.items() if not value]
    if not options.rescore and missing:
        raise ValueError(f"scoring needs {', '.join(missing)}; or pass --rescore with kept scores")
    if options.official and not (options.reference or options.rescore):
        raise ValueError("--official repeats a script that scores log-ratios: it needs --reference")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be >= 1; got {options.limit}")
    if options.resamples < 0:
        raise ValueError(f"--resamples must be >= 0; got {options.resamples}")


def _score(options) -> None:
    from ipvrm_core.trainer.data.processbench import read_subsets
    from ipvrm_core.trainer.evaluation.processbench.files import Parts, check_origin, check_source, write_scores
    from ipvrm_core.trainer.evaluation.processbench.scores import score

    form = _form(options)
    subsets = read_subsets(options.data, options.limit, layout_of(options))
    sources = {subset.name: _source(options, subset) for subset in subsets}
    finished, begun = (sorted(options.out.glob(pattern)) for pattern in ("*.parquet", "*.parts/*.parquet"))
    if (finished or begun) and not options.resume:
        name = [*finished, *begun][0].relative_to(options.out)
        raise ValueError(f"{options.out} already has scores ({name}); pass --resume, or take another --out folder")
    for path in finished:
        if path.stem in sources:
            check_source(path, sources[path.stem])
    scorer = load_scorer_of(options)
    limit = max_length_of(options, scorer)
    origin = _origin(options, scorer, form, limit)
    for path in finished:
        check_origin(path, origin)
    for subset in subsets:
        path, parts = options.out / f"{subset.name}.parquet", Parts(options.out / f"{subset.name}.parts", origin)
        if not path.exists():
            rows = score(
                scorer,
                subset.problems,
                form,
                max_tokens=options.micro_batch_tokens,
                max_length=limit,
                too_long=options.too_long,
                with_official=options.official,
                parts=parts,
            )
            write_scores(path, rows, origin, sources[subset.name])
        parts.remove()


def _source(options, subset) -> dict:
    """What is kept of a subset's data; says which rows are left out."""
    from ipvrm_core.trainer.data.processbench import skipped_lines
    from ipvrm_core.trainer.identity import file_digest

    for line in skipped_lines(subset):
        print(f"left out: {line}", file=sys.stderr)
    digests = {subset.file.name: file_digest(subset.file)}
    layout = layout_of(options)
    return {
        "files": digests,
        "columns": layout.columns,
        "first_step": layout.first_step,
        "skipped": len(subset.skipped),
    }


def _form(options):
    from dataclasses import replace

    from ipvrm_core.trainer.evaluation.processbench import official

    if not options.official:
        return form_of(options)
    form, step, joiner = form_of(options), official.FORMAT.step, official.FORMAT.joiner
    if form.step not in ("{step}", step) or form.joiner != joiner:
        raise ValueError(
            f"--official writes steps as {step!r} with {joiner!r} between them; "
            f"got --step-format {form.step!r}, --joiner {form.joiner!r}"
        )
    return replace(form, step=step)


def _origin(options, scorer, form, limit: int | None) -> dict:
    from dataclasses import asdict

    files = model_files(model=options.model, reference=options.reference)
    rules = {"limit": options.limit, "max_length": limit, "too_long": options.too_long, "official": options.official}
    return {**origin_of(options, scorer), "format": asdict(form), **rules, "files": files}
