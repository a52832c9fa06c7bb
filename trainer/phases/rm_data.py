"""What a reward model is trained and validated on: units of one or two labelled answers, and held-out answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import nn

from ipvrm_core.objectives import Objective
from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.config import Chats, RewardModel
from ipvrm_core.trainer.data.chats import Chat, by_prompt, held_out, load_chats
from ipvrm_core.trainer.data.example import Example
from ipvrm_core.trainer.evaluation.token_scores import check_vocabulary, load_language_model
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.models import causal_lm, head_of
from ipvrm_core.trainer.phases import rollout as rollout_phase
from ipvrm_core.trainer.phases.rollout import Rollouts
from ipvrm_core.trainer.reference_cache import reference_logprobs
from ipvrm_core.trainer.reward import needs_reference, sampled_logprobs
from ipvrm_core.trainer.seeds import epoch_slice, stable_seed


class Labelled(NamedTuple):
    """One answer to learn from."""

    answer: Answer
    ref_logprobs: list[float]
    correct: bool


Unit = tuple[Labelled, ...]  # a right and a wrong answer to one prompt, or a single answer


@dataclass(frozen=True)
class RewardData:
    """units: what a step's batch is drawn from; counts: what became of the rows, for people."""

    units: list[Unit]
    held_out: list[Rollouts]
    counts: dict[str, int] = field(default_factory=dict)


def from_rollouts(experiment: Experiment, settings: RewardModel) -> RewardData:
    """The starting policy's own answers, with the log-probs that the rollout phase kept."""
    rollouts = rollout_phase.read(experiment.run / "rollout")
    split = len(rollouts) - experiment.config.rollout.held_out
    return RewardData(make_units(rollouts[:split], settings, experiment.config.seed), rollouts[split:])


def make_units(groups: list[Rollouts], settings: RewardModel, seed: int) -> list[Unit]:
    if settings.pairing != "none":
        return make_pairs(groups, settings, seed)
    return [(Labelled(*row),) for group in groups for row in zip(*_columns(group), strict=True)]


def _columns(group: Rollouts):
    return group.answers, group.ref_logprobs, group.correct


def make_pairs(rollouts: list[Rollouts], settings: RewardModel, seed: int) -> list[tuple[Labelled, Labelled]]:
    """(right, wrong) answers of the same prompt, so that both kinds weigh the same; prompts without both give none.

    disjoint: every answer in at most one pair. covering: in at least one, the rarer kind repeats. Of one prompt at most
    `pairs_per_prompt` pairs.
    """
    pairs = []
    for group in rollouts:
        size = len(group.answers)
        order = epoch_slice(size, 0, size, stable_seed(seed, "pairs", group.prompt))
        rows = [Labelled(group.answers[i], group.ref_logprobs[i], group.correct[i]) for i in order]
        right, wrong = [row for row in rows if row.correct], [row for row in rows if not row.correct]
        if not right or not wrong:
            continue
        count = (min if settings.pairing == "disjoint" else max)(len(right), len(wrong))
        chosen = [(right[i % len(right)], wrong[i % len(wrong)]) for i in range(count)]
        pairs += chosen[: settings.pairs_per_prompt]
    return pairs


def expert_rows(experiment: Experiment, reference, count: int) -> list[Labelled]:
    """`count` demonstrations as right answers, with their log-probs under the reference."""
    examples = experiment.examples("rm experts", 0, count) if count else []
    answers = [experiment.demonstration(example) for example in examples]
    if not answers:
        return []
    logprobs_N = sampled_logprobs(experiment, reference, answers).cpu()
    pieces = logprobs_N.split([len(answer.response_ids) for answer in answers])
    return [Labelled(answer, piece.tolist(), True) for answer, piece in zip(answers, pieces, strict=True)]


# ---- chats


class Rendered(NamedTuple):
    """Chats and their token ids, one for one, and what became of the rows."""

    chats: list[Chat]
    answers: list[Answer]
    counts: dict[str, int]


def read_chats(experiment: Experiment, name: str, source: Chats) -> Rendered:
    """The chats of rm.<name>.data within max_tokens. ValueError for rows that cannot be used."""
    return fit(encode(experiment, load_chats(source)), source, f"rm.{name}.data")


def from_chats(
    experiment: Experiment, name: str, rendered: Rendered, objective: Objective, reference: nn.Module
) -> RewardData:
    """Split by prompt, with the reference's log-probs from the cache."""
    settings, (chats, answers, counts) = experiment.config.rm[name], rendered
    source = settings.data
    check_positions(answers, reference, f"rm.{name}.data")
    if needs_reference(objective) or objective.reweighs:
        cache = Path(source.cache) if source.cache else experiment.run / "cache"
        logprobs_N = reference_logprobs(experiment, reference, answers, cache)
        logprobs = [piece.tolist() for piece in logprobs_N.split([len(answer.response_ids) for answer in answers])]
    else:
        logprobs = [[0.0] * len(answer.response_ids) for answer in answers]
    rows = {
        id(chat): Labelled(answer, values, chat.correct)
        for chat, answer, values in zip(chats, answers, logprobs, strict=True)
    }
    prompts = by_prompt(chats)
    aside = held_out(prompts, source.validation)
    training = [group for index, group in enumerate(prompts) if index not in aside]
    if source.kind == "pairwise" and settings.pairing != "none":
        units = [unit for group in training for unit in _given_pairs(group, rows)[: settings.pairs_per_prompt]]
    else:
        units = make_units(_groups(training, rows), settings, experiment.config.seed)
    kept = _groups([group for index, group in enumerate(prompts) if index in aside], rows)
    counts = counts | {
        "prompts": len(prompts),
        "training_prompts": len(training),
        "training_answers": sum(map(len, training)),
        "training_answers_used": len({id(row) for unit in units for row in unit}),
        "training_units": len(units),
        "held_out_prompts": len(kept),
        "held_out_answers": sum(len(group.answers) for group in kept),
    }
    return RewardData(units, kept, counts)


def encode(experiment: Experiment, chats: Sequence[Chat]) -> list[tuple[Chat, Answer]]:
    """Prompt through the chat template up to the assistant's turn, answer as it stands, then EOS.

    Without a chat template a prompt of one user message is taken as plain text; others are an error.
    """
    plain = not experiment.tokenizer.chat_template
    found = []
    for chat in chats:
        alone = plain and len(chat.prompt) == 1
        prompt = chat.prompt[0]["content"] if alone else chat.prompt
        example = Example(f"row {chat.row}", prompt, "", solution=chat.answer)
        found.append((chat, experiment.demonstration(example)))
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


def check_positions(answers: Sequence[Answer], model: nn.Module, key: str) -> None:
    """ValueError for rows that the model has no positions for."""
    limit = getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None)
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


def other_reference(experiment: Experiment, path: str, model: nn.Module) -> nn.Module:
    """A reference that is not the starting policy. ValueError unless its vocabulary is the reward model's."""
    tokenizer, reference = load_language_model(path, experiment.config.model.dtype, experiment.device.type)
    check_vocabulary(experiment.tokenizer, tokenizer)
    ours, theirs = (head_of(each).weight.shape[0] for each in (model, reference))
    if theirs < len(experiment.tokenizer):
        raise ValueError(
            f"the reference {path} must have a row for each of {len(experiment.tokenizer)} tokens in its output head, "
            f"as the model has ({ours}); got {theirs}"
        )
    return reference
