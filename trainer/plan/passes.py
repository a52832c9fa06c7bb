"""The passes of each phase that need the most memory: the trainer's own code, on the largest batch that it would make.

Shape letters: B answers, L length, N response tokens, S slots, P prompt, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ipvrm_core import PolicyBatch
from ipvrm_core.reference.candidates import candidate_slots
from ipvrm_core.trainer.batching import Answer, TokenBatch
from ipvrm_core.trainer.config import Config
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.models import add_value_head
from ipvrm_core.trainer.optim import make_optimizer
from ipvrm_core.trainer.phases.rl import make_learner
from ipvrm_core.trainer.phases.sft import CHECK_PROMPTS
from ipvrm_core.trainer.plan.blank import Blank
from ipvrm_core.trainer.plan.engine import Engine


class Sizes(NamedTuple):
    """Tokens of the longest prompt and of the longest answer."""

    prompt: int
    response: int


class Pass(NamedTuple):
    """train: batch -> loss, for forward and backward; score: batch -> anything, without a gradient; generate: None;
    engine: None, what vLLM takes to sample being the phase's `engine`."""

    kind: str
    model: LanguageModel
    sizes: Sizes
    answers: int  # of one step, or sampled at once
    function: Callable[[TokenBatch], Tensor] | None = None
    after: bool = False
    samples: int = 1  # of a prompt, which is computed once for them

    def micro_batch(self) -> list[Answer]:
        """The largest of so many answers. One is a token shorter, so that there is padding to mask."""
        whole = Answer([1] * self.sizes.prompt, [1] * self.sizes.response)
        shorter = Answer(whole.prompt_ids[:-1] or [1], whole.response_ids)
        return [shorter, *[whole] * (self.rows - 1)] if self.rows > 1 else [whole]

    @property
    def rows(self) -> int:
        return max(1, min(self.answers, self.model.max_tokens // sum(self.sizes)))

    @property
    def accumulates(self) -> bool:
        """Whether a step has more than one micro-batch: from the second on gradients are there from the start."""
        return self.answers > self.rows


@dataclass
class Phase:
    """What is in memory throughout, and the passes."""

    models: list[LanguageModel]
    passes: dict[str, Pass]
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    engine: Engine | None = None

    def weights(self) -> list[Tensor]:
        """Each once, however many models share it."""
        return list({id(p): p for model in self.models for p in model.model.parameters()}.values())


def moved(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """What it moves: weights, or the float32 copies of those with fewer bits."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


Makers = dict[str, Callable[[Blank], Phase]]


def phases(config: Config, sizes: dict[str, Sizes]) -> Makers:
    """{phase: a function that makes it}, in the order of a run."""
    makers: Makers = {}
    if config.sft:
        makers["sft"] = partial(_sft, sizes=sizes["sft"])
    if config.rollout:
        makers["rollout"] = partial(_rollout, sizes=sizes["sampled"])
    for name, rm in config.rm.items():
        if rm.build().trains:
            makers[f"rm.{name}"] = partial(_reward_model, name=name, sizes=sizes[f"rm.{name}"])
    for name in config.rl:
        makers[f"rl.{name}"] = partial(_rl, name=name, sizes=sizes["sampled"])
    if config.test:
        makers["eval"] = partial(_eval, sizes=sizes["sampled"])
    return makers


def _sft(blank: Blank, sizes: Sizes) -> Phase:
    model = blank.trainable(blank.base_model(), "sft").train()
    sft = blank.config.sft
    train = Pass("train", model, sizes, sft.batch, lambda batch: model.batch_logprobs(batch).sum())
    optimizer, engine = make_optimizer(model.model, sft.optim), _engine(blank, model) if sft.stop_accuracy else None
    passes = {"forward and backward": train}
    if engine:
        passes["sampling"] = _sampling(blank, model, sizes, CHECK_PROMPTS)
    return Phase([model], passes, [optimizer], engine)


def _rollout(blank: Blank, sizes: Sizes) -> Phase:
    model, rollout = blank.start_policy().eval(), blank.config.rollout
    answers = rollout.batch * rollout.samples
    score = Pass("score", model, sizes, answers, model.batch_logprobs)
    passes = {"sampling": _sampling(blank, model, sizes, answers, rollout.samples), "log-probs": score}
    return Phase([model], passes, engine=_engine(blank, model, rests=False))


def _reward_model(blank: Blank, name: str, sizes: Sizes) -> Phase:
    rm = blank.config.rm[name]
    model = blank.trainable(blank.start_policy(), "rm", name).train()
    values = rm.build().head == "value"
    if values:
        add_value_head(model.model)
    return Phase(
        [model],
        {"forward and backward": _scores_backward(model, sizes, rm.batch + rm.experts, values)},
        [make_optimizer(model.model, rm.optim)],
    )


def _rl(blank: Blank, name: str, sizes: Sizes) -> Phase:
    learner, rl = make_learner(blank, name), blank.config.rl[name]
    present = [model for model in (learner.policy, learner.reward_model, learner.reference) if model is not None]
    sampled = rl.batch.prompts * rl.batch.rollouts
    kept = rl.batch.keep_prompts * rl.batch.rollouts
    passes = {"sampling": _sampling(blank, learner.policy, sizes, sampled, rl.batch.rollouts)}
    if "reward_model" in learner.optimizers:
        batch, values = min(rl.reward_model.batch, kept), learner.objective.head == "value"
        learner.reward_model.train()
        passes["update of the reward model"] = _scores_backward(learner.reward_model, sizes, batch, values)
    method = learner.method
    slots = 1 + candidate_slots(method.p_min, top_k=method.top_k) if method.alpha else 1
    config = method.loss_config(kl_coef=rl.kl_coef, entropy_coef=rl.entropy_coef)

    def loss(batch: TokenBatch) -> Tensor:
        return learner.policy.policy_loss(batch, _policy_rows(batch, slots, bool(rl.kl_coef)), config).loss

    learner.policy.train()
    passes["update of the policy"] = Pass("train", learner.policy, sizes, min(rl.minibatch, kept), loss)
    engine = _engine(blank, learner.policy, rests=not rl.ahead)
    return Phase(present, passes, list(learner.optimizers.values()), engine)


def _eval(blank: Blank, sizes: Sizes) -> Phase:
    """A policy's answers; a reward model with its reference beside the policy whose answers it judges."""
    config = blank.config
    present = [blank.start_policy().eval() for _ in range(3 if config.rm and config.task else 1)]
    answers = config.eval.prompts * config.eval.samples
    passes = {"sampling": _sampling(blank, present[0], sizes, answers)}  # the greedy ones: one of a prompt
    return Phase(present, passes, engine=_engine(blank, present[0], rests=False))


def _sampling(blank: Blank, model: LanguageModel, sizes: Sizes, answers: int, samples: int = 1) -> Pass:
    generation = blank.config.generation
    kind = "engine" if generation.sampler == "vllm" else "generate"
    return Pass(kind, model, sizes, min(answers, generation.batch), samples=samples)


def _engine(blank: Blank, policy: LanguageModel, *, rests: bool = True) -> Engine | None:
    generation = blank.config.generation
    if generation.sampler != "vllm":
        return None
    return Engine.of(policy.model, generation.vllm, blank.engine_dtype, rests=rests)


def _scores_backward(model: LanguageModel, sizes: Sizes, answers: int, values: bool) -> Pass:
    def loss(batch: TokenBatch) -> Tensor:
        return (model.batch_values(batch) if values else model.batch_logprobs(batch)).sum()

    return Pass("train", model, sizes, answers, loss, after=values)


def _policy_rows(batch: TokenBatch, slots: int, reference: bool) -> PolicyBatch:
    """Rows with `slots` tokens each."""
    ids_NS = batch.targets_N[:, None].expand(-1, slots).contiguous()
    logprobs_NS = torch.full(ids_NS.shape, -1.0, device=ids_NS.device)
    weights_N = torch.full_like(logprobs_NS[:, 0], 1 / len(ids_NS))
    return PolicyBatch(
        ids_NS, logprobs_NS, torch.ones_like(logprobs_NS), weights_N, weights_N, weights_N if reference else None
    )
