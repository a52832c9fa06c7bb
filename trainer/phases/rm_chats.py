"""Chats as the data of a reward model: rendered, cut to length, split by prompt, with their reference log-probs."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ipvrm_core import head_of
from ipvrm_core.objectives import Objective
from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.config import Chats
from ipvrm_core.trainer.data.chats import Chat, by_prompt, held_out, load_chats
from ipvrm_core.trainer.data.example import Example
from ipvrm_core.trainer.evaluation.token_scores import check_vocabulary, load_language_model
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.leakage import left_out
from ipvrm_core.trainer.phases.rm_data import Labelled, RewardData, Unit, make_units
from ipvrm_core.trainer.phases.rollout import Rollouts
from ipvrm_core.trainer.reference_cache import reference_logprobs
from ipvrm_core.trainer.reward import needs_reference


class Rendered(NamedTuple):
    """Chats and their token ids, one for one, and what became of the rows."""

    chats: list[Chat]
    answers: list[Answer]
    counts: dict[str, int]


class ChatData(NamedTuple):
    """training is split by prompt where there is no file for validation."""

    training: Rendered
    validation: Rendered | None


def read_chats(experiment: Experiment, name: str, source: Chats) -> ChatData:
    """The chats of rm.<name>.data within max_tokens, without those that leakage.action leaves out.

    ValueError for rows that cannot be used.
    """
    key = f"rm.{name}.data"
    out = left_out(experiment.config, experiment.run, key)
    chats = [chat for chat in load_chats(source) if chat.id not in out]
    training = fit(encode(experiment, chats), source, key)
    training.counts["left_out_rows"] = len(out)
    if source.validation_path is None:
        return ChatData(training, None)
    given = source.of_validation()
    return ChatData(training, fit(encode(experiment, load_chats(given)), given, key))


def from_chats(
    experiment: Experiment, name: str, data: ChatData, objective: Objective, reference: LanguageModel
) -> RewardData:
    """Units and held-out answers, with the reference's log-probs from the cache."""
    settings = experiment.config.rm[name]
    source = settings.data
    parts = [part for part in data if part]
    chats = [chat for part in parts for chat in part.chats]
    answers = [answer for part in parts for answer in part.answers]
    logprobs = _reference(experiment, name, answers, objective, reference)
    rows = {
        id(chat): Labelled(answer, values, chat.correct)
        for chat, answer, values in zip(chats, answers, logprobs, strict=True)
    }
    prompts = by_prompt(data.training.chats)
    aside = held_out(prompts, source.validation)
    training = [group for index, group in enumerate(prompts) if index not in aside]
    kept = [group for index, group in enumerate(prompts) if index in aside]
    if data.validation:
        kept = by_prompt(data.validation.chats)
    if source.kind == "pairwise" and settings.pairing != "none":
        units = [unit for group in training for unit in _given_pairs(group, rows)[: settings.pairs_per_prompt]]
    else:
        units = make_units(_groups(training, rows), settings, experiment.config.seed)
    counts = data.training.counts | {
        "prompts": len(prompts),
        "training_prompts": len(training),
        "training_answers": sum(map(len, training)),
        "training_answers_used": len({id(row) for unit in units for row in unit}),
        "training_units": len(units),
        "held_out_prompts": len(kept),
        "held_out_answers": sum(map(len, kept)),
    }
    if data.validation:
        counts |= {f"validation_{key}": value for key, value in data.validation.counts.items()}
    return RewardData(units, _groups(kept, rows), counts)


def _reference(
    experiment: Experiment, name: str, answers: Sequence[Answer], objective: Objective, reference: LanguageModel
) -> list[list[float]]:
    """Log-probs of each answer's tokens; zeros for an objective that does not use them."""
    check_positions(answers, reference, f"rm.{name}.data")
    lengths = [len(answer.response_ids) for answer in answers]
    if not (needs_reference(objective) or objective.reweighs):
        return [[0.0] * length for length in lengths]
    cache = experiment.config.rm[name].data.cache
    folder = Path(cache) if cache else experiment.run / "cache"
    return [piece.tolist() for piece in reference_logprobs(experiment, reference, answers, folder).split(lengths)]


def encode(experiment: Experiment, chats: Sequence[Chat]) -> list[tuple[Chat, Answer]]:
    """Prompt through the chat template up to the assistant's turn, answer as it stands, then EOS.

    Without a chat template a prompt of one user message is taken as plain text; others are an error.
    """
    plain = not experiment.text.tokenizer.chat_template
    found = []
    for chat in chats:
        alone = plain and len(chat.prompt) == 1
        prompt = chat.prompt[0]["content"] if alone else chat.prompt
        example = Example(chat.id, prompt, "", solution=chat.answer)
        found.append((chat, experiment.text.demonstration(example)))
    return found


def fit(encoded: list[tuple[Chat, Answer]], source: Chats, key: str) -> Rendered:
    """Within max_tokens, by on_long; a pair is dropped as a whole.

    ValueError for rows that are too long and may not be dropped or cut.
    """
    limit = source.max_tokens
    lengths = {id(chat): len(answer.prompt_ids) + len(answer.response_ids) for chat, answer in encoded}
    long = {chat.row for chat, _ in encoded if lengths[id(chat)] > limit}
    rows = {chat.row for chat, _ in encoded}
    longest = max(lengths.values())
    if long and source.on_long == "error":
        raise ValueError(
            f"{source.path}: {len(long)} of {len(rows)} rows are longer than {key}.max_tokens = {limit} (the longest "
            f"has {longest} tokens, the first is row {min(long)}): set it higher, or {key}.on_long to 'drop' or "
            "'truncate'"
        )
    if source.on_long == "drop":
        encoded = [(chat, answer) for chat, answer in encoded if chat.row not in long]
        if not encoded:
            raise ValueError(f"{source.path}: all {len(rows)} rows are longer than {key}.max_tokens = {limit}")
    full = [chat.row for chat, answer in encoded if len(answer.prompt_ids) >= limit]
    if full:
        raise ValueError(
            f"{source.path}: the prompts of {len(set(full))} rows alone fill {key}.max_tokens = {limit} (the first is "
            f"row {full[0]}): truncation would leave no answer. Set it higher, or {key}.on_long to 'drop'"
        )
    cut = [answer._replace(response_ids=answer.response_ids[: limit - len(answer.prompt_ids)]) for _, answer in encoded]
    counts = {
        "rows": len(rows),
        "dropped_rows": len(long) if source.on_long == "drop" else 0,
        "truncated_rows": len(long) if source.on_long == "truncate" else 0,
        "max_tokens": limit,
        "longest_tokens": longest,
        "answers": len(encoded),
    }
    return Rendered([chat for chat, _ in encoded], cut, counts)


def check_positions(answers: Sequence[Answer], model: LanguageModel, key: str) -> None:
    """ValueError for rows that the model has no positions for."""
    limit = model.positions
    longest = max(len(answer.prompt_ids) + len(answer.response_ids) for answer in answers)
    if limit and longest > limit:
        raise ValueError(
            f"{key}: the model has {limit} positions, the longest row needs {longest}; set max_tokens to {limit} or "
            "less, and on_long to 'drop' or 'truncate'"
        )


def _given_pairs(group: Sequence[Chat], rows: dict[int, Labelled]) -> list[Unit]:
    pairs: dict[int, list[Labelled]] = {}
    for chat in group:
        pairs.setdefault(chat.row, []).append(rows[id(chat)])
    return [tuple(pair) for pair in pairs.values()]  # the chosen answer is the first of its row


def _groups(prompts: Sequence[Sequence[Chat]], rows: dict[int, Labelled]) -> list[Rollouts]:
    found = []
    for index, group in enumerate(prompts):
        labelled = [rows[id(chat)] for chat in group]
        found.append(
            Rollouts(
                index,
                [row.answer for row in labelled],
                [row.correct for row in labelled],
                [row.ref_logprobs for row in labelled],
            )
        )
    return found


def other_reference(experiment: Experiment, path: str, model: LanguageModel) -> LanguageModel:
    """A reference that is not the starting policy. ValueError unless its vocabulary is the reward model's."""
    tokenizer, reference = load_language_model(path, experiment.config.model.dtype, experiment.device.type)
    own = experiment.text.tokenizer
    check_vocabulary(own, tokenizer)
    ours, theirs = (head_of(each.model).weight.shape[0] for each in (model, reference))
    if theirs < len(own):
        raise ValueError(
            f"the reference {path} must have a row for each of {len(own)} tokens in its output head, "
            f"as the model has ({ours}); got {theirs}"
        )
    return experiment.language_model(reference.model)
