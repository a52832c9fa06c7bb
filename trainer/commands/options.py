"""Options that every command shares which takes any model and any text."""

import sys
from argparse import ArgumentParser
from pathlib import Path

MODEL = "name or folder of a Hugging Face model, or FOLDER/FILE.gguf"
BETA = "factor of every token score (default: 10 for log-ratios, 1 for value heads and log-probs)"


def scorer_options(parser: ArgumentParser, required: bool) -> None:
    parser.add_argument("--model", required=required, help=f"the reward model: {MODEL}")
    parser.add_argument(
        "--reference",
        help="its reference, of the same vocabulary: tokens are scored by the log-ratio of the two. Without one they "
        "are scored by the model's value head where it has one, else by its own log-probs (EndoRM)",
    )
    parser.add_argument("--decay", type=float, help="of log-probs: their factor a token (default: that of EndoRM)")
    model_options(parser)


def model_options(parser: ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--micro-batch-tokens", type=int, default=16384, help="padded tokens per forward pass")


def format_options(parser: ArgumentParser) -> None:
    parser.add_argument("--system-prompt", help="first message, where the tokenizer has a chat template")
    parser.add_argument(
        "--plain-joiner", default="\\n\\n", help=r"between problem and answer without a chat template (default: \n\n)"
    )
    parser.add_argument("--joiner", default="\\n\\n", help=r"what stands between steps (default: \n\n)")
    parser.add_argument("--step-format", default="{step}", help='text of a step; may use {number}. Default "{step}"')


def length_options(parser: ArgumentParser) -> None:
    parser.add_argument("--max-length", type=int, help="tokens of a whole text (default: what the models can take)")
    parser.add_argument(
        "--too-long",
        choices=("refuse", "skip", "truncate"),
        default="refuse",
        help="longer texts: stop before anything is scored (default), score them not at all, or as far as they fit",
    )


def problem_options(parser: ArgumentParser) -> None:
    """How the files of --data say it."""
    from ipvrm_core.trainer.data.processbench import ROLES

    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="ROLE=COLUMN",
        help=f"columns of other names, dots for nested ones; roles: {', '.join(ROLES)}",
    )
    parser.add_argument(
        "--first-step", type=int, choices=(0, 1), default=0, help="the number of the first step in labels (default: 0)"
    )
    parser.add_argument(
        "--bad-rows",
        choices=("refuse", "skip"),
        default="refuse",
        help="list all and stop (default), or leave them out",
    )


def layout_of(options):
    from ipvrm_core.trainer.data.processbench import Layout, parse_columns

    return Layout(parse_columns(options.columns), options.first_step, options.bad_rows)


def newlines(text: str) -> str:
    r"""A shell passes \n as two characters."""
    return text.replace("\\n", "\n")


def form_of(options):
    from ipvrm_core.trainer.text.steps import Format

    return Format(
        step=options.step_format,
        joiner=newlines(options.joiner),
        plain_joiner=newlines(options.plain_joiner),
        system_prompt=options.system_prompt,
    )


def quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_scorer_of(options):
    """Says on stderr what the scores will be, before any time is spent on them."""
    from ipvrm_core.trainer.evaluation.token_scores import load_scorer

    quiet()
    settings = {name: getattr(options, name) for name in ("decay", "dtype", "device")}
    scorer = load_scorer(options.model, options.reference, **settings)
    print(said(origin_of(options, scorer)), file=sys.stderr)
    return scorer


def origin_of(options, scorer) -> dict:
    """What is kept with the scores about the models that made them."""
    decay = scorer.decay if scorer.kind == "log-prob" else None
    models = {name: getattr(options, name) for name in ("model", "reference", "dtype")}
    return {"score": scorer.kind, "decay": decay, **models}


def model_files(**paths: str | None) -> dict[str, str]:
    """{"model/config.json": digest, ...} of the models of these options."""
    from ipvrm_core.trainer.identity import model_digests

    found = {}
    for option, path in paths.items():
        if path:
            gguf = Path(path).name if path.endswith(".gguf") else None
            digests = model_digests(Path(path).parent if gguf else path, gguf)
            found |= {f"{option}/{name}": digest for name, digest in digests.items()}
    return found


def said(origin: dict) -> str:
    """The same in one line."""
    model, reference, decay = (origin.get(name) for name in ("model", "reference", "decay"))
    return {
        "log-ratio": f"Scores: log-ratios of {model} to {reference}.",
        "log-prob": f"Scores: log-probs of {model} itself, without a reference, decay {decay} a token.",
        "value": f"Scores: outputs of the value head of {model}.",
    }.get(origin.get("score"), "Scores: of an unknown kind; the files do not say.")


def max_length_of(options, scorer) -> int | None:
    from ipvrm_core.trainer.evaluation.token_scores import length_limit

    if options.max_length is not None and options.max_length < 1:
        raise ValueError(f"--max-length must be >= 1; got {options.max_length}")
    limits = (options.max_length, length_limit(scorer.model, scorer.reference))
    return min((limit for limit in limits if limit), default=None)


def beta_of(options, scorer) -> float:
    """--beta, or 10 for log-ratios, as IPVRM is trained, and 1 for scores that stand for themselves."""
    if options.beta is not None:
        return options.beta
    return 10.0 if scorer.kind == "log-ratio" else 1.0
