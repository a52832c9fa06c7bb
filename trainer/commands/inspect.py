"""`ipvrm inspect`: pages of answers under a reward model, one, two side by side, or all of a file with an index."""

from pathlib import Path

from ipvrm_core.trainer.commands.options import (
    BETA,
    beta_of,
    form_of,
    format_options,
    layout_of,
    load_scorer_of,
    newlines,
    problem_options,
    scorer_options,
)


def add(commands) -> None:
    help = "Show answers token by token: TD advantages, values, step scores, candidates; writes HTML pages."
    parser = commands.add_parser("inspect", help=help, description=help)
    scorer_options(parser, required=True)
    format_options(parser)
    text = parser.add_argument_group("the text: either --problem and --answer, or --data")
    text.add_argument("--problem", help="text of the problem, or @FILE")
    text.add_argument("--answer", help="text of the answer, or @FILE; --joiner cuts it into steps")
    text.add_argument("--data", type=Path, help="a ProcessBench file or folder")
    text.add_argument("--id", help="which of its problems; without it all, and --out is a folder with an index")
    text.add_argument("--limit", type=int, help="without --id: so many problems of each subset, evenly spread")
    problem_options(text)
    other = parser.add_argument_group("a second view beside it: either another model or another answer")
    other.add_argument("--other-model", help="the same answer under this reward model")
    other.add_argument("--other-reference", help="its reference")
    other.add_argument("--other-threshold", type=float, help="its threshold")
    other.add_argument("--other-answer", help="another answer to --problem, or @FILE")
    other.add_argument("--other-id", help="another problem of --data")
    parser.add_argument("--out", type=Path, required=True, help="the page, FILE.html, or a folder for many")
    parser.add_argument("--beta", type=float, help=BETA)
    parser.add_argument("--p-min", type=float, default=0.05, help="least probability of a candidate")
    parser.add_argument("--sigma", type=float, help="sigma_V of training (default: spread of this answer's values)")
    parser.add_argument("--threshold", type=float, help="mark the first step whose process score is below it")
    parser.set_defaults(function=run)


def run(options) -> None:
    _check(options)
    texts = _texts(options)
    viewers = [_viewer(options, options.model, options.reference, options.threshold)]
    if options.other_model:
        viewers.append(_viewer(options, options.other_model, options.other_reference, options.other_threshold))
    if options.data and not options.id:
        _folder(options, texts, viewers)
        return
    from ipvrm_core.trainer.report.inspect_page import write_page

    title = " | ".join(dict.fromkeys(_title(options, problem) for problem in texts))
    write_page(options.out, [view(problem) for problem in texts for view in viewers], title)
    print(options.out)


def _check(options) -> None:
    typed = bool(options.problem and options.answer)
    if bool(options.data) == typed or (options.id and not options.data):
        raise ValueError("pass either --problem and --answer, or --data, with --id for one of its problems")
    if options.other_model and (options.other_answer or options.other_id):
        raise ValueError("two views are of two models or of two answers; got --other-model and another answer")
    for name, needs in (
        ("other_reference", "other_model"),
        ("other_threshold", "other_model"),
        ("other_answer", "answer"),
        ("other_id", "id"),
    ):
        if getattr(options, name) is not None and getattr(options, needs) is None:
            raise ValueError(f"--{name} needs --{needs}".replace("_", "-"))
    many = bool(options.data and not options.id)
    if many == (options.out.suffix.lower() in (".html", ".htm")):
        asked = "a folder, for many problems (--id shows one)" if many else "a page, FILE.html"
        raise ValueError(f"--out must be {asked}; got {options.out}")
    if options.limit is not None and not many:
        raise ValueError("--limit is of many problems: --data without --id")


def _texts(options) -> list:
    """The problems to show. Typed ones have no label; the -1 here stands for none."""
    from ipvrm_core.trainer.data.processbench import Problem, load_processbench

    if options.data:
        found = load_processbench(options.data, options.limit, layout_of(options))
        wanted = [id for id in (options.id, options.other_id) if id]
        return [_named(options, found, id) for id in wanted] or found
    made = []
    for answer in filter(None, (options.answer, options.other_answer)):
        steps = [step for step in _read(answer).strip().split(newlines(options.joiner)) if step.strip()]
        made.append(Problem("", "", "", _read(options.problem), tuple(steps), -1, None))
    return made


def _read(text: str) -> str:
    return Path(text[1:]).read_text(encoding="utf-8") if text.startswith("@") else text


def _named(options, problems: list, id: str):
    found = [problem for problem in problems if problem.id == id]
    if len(found) != 1:
        several = f"problems with id {id!r} in {', '.join(problem.subset for problem in found)}; pass one file"
        raise ValueError(f"{options.data} has " + (several if found else f"no problem with id {id!r}"))
    return found[0]


def _title(options, problem) -> str:
    return f"{problem.id} · {problem.generator}" if options.data else options.model


def _viewer(options, model: str, reference: str | None, threshold: float | None):
    """problem -> what the page shows of it under these models."""
    from argparse import Namespace

    from ipvrm_core.trainer.evaluation.reward_model.inspection import inspect

    scorer = load_scorer_of(Namespace(**vars(options) | {"model": model, "reference": reference}))
    settings = {"p_min": options.p_min, "sigma": options.sigma, "beta": beta_of(options, scorer)}
    settings |= {"threshold": threshold, "names": (model, reference)}

    def view(problem) -> dict:
        label = problem.label if options.data else None
        return inspect(scorer, problem.problem, problem.steps, form_of(options), label=label, **settings)

    return view


def _folder(options, problems: list, viewers: list) -> None:
    from ipvrm_core.trainer.progress import progress
    from ipvrm_core.trainer.report.inspect_page import write_index, write_page

    rows = []
    for number, problem in enumerate(progress(problems, "inspect", "problem"), 1):
        views, name = [view(problem) for view in viewers], f"{number:05}.html"
        write_page(options.out / name, views, _title(options, problem), back="index.html")
        rows.append((name, problem, views))
    write_index(options.out / "index.html", rows, f"{options.data.name}: {len(rows)} problems")
    print(options.out / "index.html")
