"""The PPO part: epochs over minibatches of whole answers, micro-batches inside, one fused loss.

Shape letters: N packed response tokens of a minibatch, S = 1 + K slots.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ipvrm_core import PolicyBatch
from ipvrm_core.credit import batch_sigma
from ipvrm_core.method import Method
from ipvrm_core.packing import cu_seqlens_from_lengths
from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.config import Rl
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.optim import apply_step
from ipvrm_core.trainer.rl.correction import Weights
from ipvrm_core.trainer.rl.credit import BatchCredit


def update_policy(
    policy: LanguageModel,
    optimizer: torch.optim.Optimizer,
    rl: Rl,
    method: Method,
    answers: Sequence[Answer],
    credit: BatchCredit,
    ref_logprobs_N: Tensor | None,
    step: int,
    correction: Weights | None = None,
) -> dict[str, float]:
    """All PPO steps on one batch; metrics are means over the minibatches."""
    config = method.loss_config(kl_coef=rl.kl_coef, entropy_coef=rl.entropy_coef)
    policy.train()
    sums: dict[str, float] = {}
    count = 0
    for index in _minibatches(len(answers), rl):
        chosen = [answers[b] for b in index]
        batch = make_policy_batch(method, credit, index, ref_logprobs_N, correction)
        numbers = _backward(policy, config, chosen, batch)
        numbers["grad_norm"] = apply_step(optimizer, rl.optim, step, rl.steps)
        sums = {name: sums.get(name, 0.0) + value for name, value in numbers.items()}
        count += 1
    return {name: value / count for name, value in sums.items()}


def _minibatches(size: int, rl: Rl) -> Iterator[list[int]]:
    for _ in range(rl.epochs):
        order = torch.randperm(size).tolist()
        for start in range(0, size, rl.minibatch):
            yield order[start : start + rl.minibatch]


def _backward(policy: LanguageModel, config, answers: Sequence[Answer], batch: PolicyBatch) -> dict[str, float]:
    """Gradient of one minibatch, accumulated over micro-batches that share its normalisers."""
    sums: dict[str, Tensor] = {}
    row = 0
    for part in policy.parts(answers):
        tokens = policy.batch(answers[part])
        rows = slice(row, row + len(tokens.targets_N))
        row = rows.stop
        loss, metrics = policy.policy_loss(tokens, batch.rows(rows), config)
        loss.backward()
        metrics = {"loss": loss.detach(), **metrics}
        sums = {name: sums[name] + value if sums else value for name, value in metrics.items()}
    names = [name for name in sums if name != "entropy"]  # the old-policy pass reports the entropy already
    return dict(zip(names, torch.stack([sums[name] for name in names]).tolist(), strict=True))


def make_policy_batch(
    method: Method,
    credit: BatchCredit,
    index: Sequence[int],
    ref_logprobs_N: Tensor | None,
    correction: Weights | None = None,
) -> PolicyBatch:
    """The rows of the answers `index` with their TD scale, aggregation weights and normalisers.

    correction: factors of the weights. The normalisers are those of the rows without them: what a limit takes away is
    not given to the other rows.
    """
    bounds, device = credit.cu_seqlens.tolist(), credit.ids_NS.device
    rows_N = torch.cat([torch.arange(bounds[b], bounds[b + 1]) for b in index]).to(device)
    lengths_B = torch.tensor([bounds[b + 1] - bounds[b] for b in index], device=device)
    rows, advantages_NS = credit.credit.rows(rows_N), credit.credit.credit_NS[rows_N]
    if rows.values_N is not None:
        scope_N = rows.values_N if method.sigma_scope == "minibatch" else credit.credit.values_N
        advantages_NS = rows.advantages(method, batch_sigma(scope_N, method))
    batch = PolicyBatch.of(
        credit.ids_NS[rows_N],
        credit.old_logprobs_NS[rows_N],
        advantages_NS,
        cu_seqlens_from_lengths(lengths_B),
        aggregation=method.aggregation,
        ref_logprobs_N=None if ref_logprobs_N is None else ref_logprobs_N[rows_N],
    )
    if correction is None:
        return batch
    return replace(
        batch,
        token_weights_N=batch.token_weights_N * correction.token_N[rows_N],
        candidate_weights_N=batch.candidate_weights_N * correction.candidate_N[rows_N],
    )
