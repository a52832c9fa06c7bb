"""Options that every command shares which takes any model and any text."""

from argparse import ArgumentParser


def pair_options(parser: ArgumentParser, required: bool) -> None:
    say = "name or folder of a Hugging Face model, or FOLDER/FILE.gguf"
    parser.add_argument("--model", required=required, help=f"the reward model: {say}")
    parser.add_argument("--reference", required=required, help="its reference, of the same vocabulary")
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
    parser.add_argument("--step-format", default="{step}", help='text of a step; may use {number}. Default "{step}"')


def newlines(text: str) -> str:
    r"""A shell passes \n as two characters."""
    return text.replace("\\n", "\n")


def form_of(options, **changes):
    from ipvrm_core.trainer.evaluation.rendering import Format

    settings = {"step": options.step_format, "joiner": newlines(getattr(options, "joiner", "\n\n"))}
    settings |= {"plain_joiner": newlines(options.plain_joiner), "system_prompt": options.system_prompt}
    return Format(**(settings | changes))


def quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_pair_of(options):
    from ipvrm_core.trainer.evaluation.log_ratios import load_pair

    quiet()
    return load_pair(options.model, options.reference, options.dtype, options.device)
