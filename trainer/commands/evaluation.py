"""The commands that need no run folder: any model, any data."""

from pathlib import Path

from ipvrm_core.trainer.commands import accuracy, inspect, processbench
from ipvrm_core.trainer.commands.options import (
    BETA,
    MODEL,
    beta_of,
    form_of,
    format_options,
    length_options,
    load_scorer_of,
    max_length_of,
    model_options,
    origin_of,
    quiet,
    said,
    scorer_options,
)


def add(commands) -> None:
    """Add every command of this file to the parser's subcommands."""
    processbench.add(commands)
    accuracy.add(commands)
    inspect.add(commands)
    _best_of_n(commands)
    _candidates(commands)


def _best_of_n(commands) -> None:
    help = "Best of N by any score, votes and pass@N, from stored answers (jsonl, json, parquet)."
    parser = commands.add_parser("best-of-n", help=help, description=help)
    parser.add_argument("answers", type=Path, help="one answer a row, or one problem a row with lists")
    parser.add_argument("--n", type=int, nargs="+", default=[4, 16, 64], help="sizes N (default: 4 16 64)")
    parser.add_argument("--problem", default="problem", help="column that names the problem")
    parser.add_argument("--answer", default="answer", help="column of final answers, for the votes")
    parser.add_argument("--correct", default="correct", help="column of verdicts")
    parser.add_argument(
        "--equal",
        choices=("math", "text"),
        default="math",
        help=r"answers that vote as one: 0.5 and \frac12, or equal texts",
    )
    parser.add_argument("--score", nargs="*", default=[], help="columns of scores: numbers, or lists of step scores")
    parser.add_argument("--prompt", help="column of the prompt; with --model, to score the answers here")
    parser.add_argument("--text", help="column of the answer's text; with --model")
    parser.add_argument("--beta", type=float, help=BETA)
    scorer_options(parser, required=False)
    format_options(parser)
    length_options(parser)
    parser.add_argument("--out", type=Path, help="JSON file for the result, with the scores made here")
    parser.add_argument("--resamples", type=int, default=1000, help="bootstrap resamples; 0: no intervals")
    parser.add_argument("--seed", type=int, default=0, help="of bootstrap and sampled votes")
    parser.set_defaults(function=run_best_of_n)


def run_best_of_n(options) -> None:
    from ipvrm_core.trainer.evaluation.policy import stored_answers
    from ipvrm_core.trainer.evaluation.policy.equal_answers import math_equality, merge_equal
    from ipvrm_core.trainer.files import write_json

    together = {f"--{name}": getattr(options, name) for name in ("model", "prompt", "text")}
    given = [name for name, value in together.items() if value]
    if given and len(given) < len(together):
        raise ValueError(f"scoring here needs {', '.join(together)}; got only {', '.join(given)}")
    for name in ("reference", "decay", "beta", "max_length"):
        if getattr(options, name) is not None and not options.model:
            raise ValueError(f"--{name.replace('_', '-')} is of scores made here, with --model; got none")
    columns = {name: getattr(options, name) for name in ("problem", "answer", "correct", "prompt", "text")}
    stored = stored_answers.read_stored(options.answers, **columns, scores=options.score)
    made = _scores_made_here(options, stored) if options.model else {"scores": None}
    voting = stored
    if options.equal == "math":
        with math_equality() as equal:
            voting = merge_equal(stored, equal)
    result = stored_answers.evaluate(voting, options.n, resamples=options.resamples, seed=options.seed)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, {"sizes": result, "equal": options.equal, **made})
    print(stored_answers.markdown(result))


def _scores_made_here(options, stored) -> dict:
    """The scores of every answer, what became of it, and where they come from; says the last two."""
    from collections import Counter

    from ipvrm_core.trainer.evaluation.reward_model.score_answers import score_stored

    scorer = load_scorer_of(options)
    beta, limit, form = beta_of(options, scorer), max_length_of(options, scorer), form_of(options)
    status = score_stored(scorer, stored, form, beta, options.micro_batch_tokens, limit, options.too_long)
    origin = {**origin_of(options, scorer), "beta": beta, "max_length": limit, "too_long": options.too_long}
    counts = Counter(state.replace("_", " ") for states in status.values() for state in states)
    print(said(origin), "Answers: " + ", ".join(f"{count} {state}" for state, count in counts.items()), "", sep="\n")
    return {"origin": origin, "status": status, "scores": {name: item.scores for name, item in stored.items()}}


def _candidates(commands) -> None:
    help = "How many candidates a P_min leaves on given answers, and what probability they hold."
    parser = commands.add_parser("candidates", help=help, description=help)
    parser.add_argument("data", type=Path, help="answers (jsonl, json, parquet), one a row")
    parser.add_argument("--model", required=True, help=f"the policy: {MODEL}")
    parser.add_argument("--prompt", default="prompt", help="column of the prompt")
    parser.add_argument("--text", default="response", help="column of the answer: a text, or a list of texts or steps")
    parser.add_argument("--limit", type=int, help="the first so many rows")
    parser.add_argument("--p-min", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--temperature", type=float, default=1.0)
    model_options(parser)
    format_options(parser)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.set_defaults(function=run_candidates)


def run_candidates(options) -> None:
    from ipvrm_core.trainer.batching import Answer
    from ipvrm_core.trainer.data.files import cell, read_rows
    from ipvrm_core.trainer.evaluation.lengths import refuse_long
    from ipvrm_core.trainer.evaluation.policy.candidate_statistics import candidate_statistics
    from ipvrm_core.trainer.evaluation.token_scores import length_limit, load_language_model
    from ipvrm_core.trainer.files import write_json
    from ipvrm_core.trainer.text.steps import render

    quiet()
    tokenizer, model = load_language_model(options.model, options.dtype, options.device)
    model.temperature, model.max_tokens = options.temperature, options.micro_batch_tokens
    answers = []
    for index, row in enumerate(read_rows(options.data, limit=options.limit)):
        where = f"{options.data}, row {index}"
        text = cell(row, options.text, where)
        steps = text if isinstance(text, list) else [text]
        made = render(tokenizer, cell(row, options.prompt, where), steps, form_of(options), where)
        refuse_long(where, made.end, length_limit(model))
        answers.append(Answer(made.ids[: made.start], made.ids[made.start : made.end]))
    if not answers:
        raise ValueError(f"{options.data} has no rows")
    found = candidate_statistics(model, answers, options.p_min)
    tokens = sum(len(answer.response_ids) for answer in answers)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, {"answers": len(answers), "tokens": tokens, "p_min": found})
    print("| P_min | mean size | mass (%) | several (%) | none (%) |\n| --- | --- | --- | --- | --- |")
    for p_min, row in found.items():
        shares = " | ".join(f"{100 * row[name]:.2f}" for name in ("mass", "several", "empty"))
        print(f"| {p_min} | {row['size']:.3f} | {shares} |")
    print(f"\n{len(answers)} answers, {tokens} tokens, temperature {options.temperature:g}")
