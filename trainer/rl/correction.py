"""What the sampler computed otherwise than the trainer: measured in every step, corrected where it is asked for.

    r_t = pi_old(y_t | s_t) / mu(y_t | s_t) of a token,   r = prod_t r_t of an answer
    w = min(r, c)   (cap)      w = r where r <= c, else 0   (mask)

mu: the log-probs that the sampler gave with the answer; pi_old: the trainer's own before the update, which the clipped
ratio is relative to. An engine of other kernels, or of weights that are an update old (rl.<name>.ahead), samples from
mu, and the plain loss takes the answers for samples of pi_old. Truncated importance sampling: Ionides, 2008; for
engines Yao et al., 2025; a pi_old that did not sample: decoupled PPO, Hilton et al., 2021.

Shape letters: N packed response tokens, B answers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ipvrm_core.sequences.segments import expand, segment_sum
from ipvrm_core.trainer.config import Correction
from ipvrm_core.types import LOG_RATIO_LIMIT


class Weights(NamedTuple):
    """Factors of a PolicyBatch's weights, [N]. The candidates' term is an expectation over pi_old's own choices at s_t,
    no sample: a token's ratio has no part in it, an answer's has, for how its prefix was sampled.
    """

    token_N: Tensor
    candidate_N: Tensor


def correct(
    settings: Correction, sampler_logprobs_N: Tensor | None, old_logprobs_N: Tensor, cu_seqlens: Tensor
) -> tuple[Weights | None, dict[str, float]]:
    """The weights of `settings`, None for level "none", and how far sampler and trainer are apart.

    sampler_logprobs_N None: the sampler did not say; then nothing can be corrected (ValueError).
    """
    if sampler_logprobs_N is None:
        if settings.level != "none":
            raise ValueError(f"correction.level = {settings.level!r} needs the sampler's log-probs; got None")
        return None, {}
    log_ratio_N = (old_logprobs_N - sampler_logprobs_N.to(old_logprobs_N)).double()
    log_ratio_B = segment_sum(log_ratio_N, cu_seqlens)
    ratio_N = log_ratio_N.clamp(max=LOG_RATIO_LIMIT).exp()
    numbers = {
        "mismatch": log_ratio_N.abs().mean(),
        "mismatch_max": log_ratio_N.abs().max(),
        "mismatch_ratio": ratio_N.mean(),
        "mismatch_ratio_max": ratio_N.max(),
        "mismatch_ess": effective_share(log_ratio_N),
        "mismatch_answer_ess": effective_share(log_ratio_B),
    }
    weights = None
    if settings.level != "none":
        weights, above = _weights(settings, log_ratio_N, log_ratio_B, cu_seqlens, old_logprobs_N.dtype)
        numbers["corrected"] = above
    return weights, dict(zip(numbers, torch.stack(list(numbers.values())).tolist(), strict=True))


def _weights(
    settings: Correction, log_ratio_N: Tensor, log_ratio_B: Tensor, cu_seqlens: Tensor, dtype: torch.dtype
) -> tuple[Weights, Tensor]:
    """The weights, and the share of ratios above the limit."""
    log_ratio = log_ratio_N if settings.level == "token" else log_ratio_B
    above = log_ratio.exp() > settings.limit
    kept = log_ratio.exp().clamp(max=settings.limit)
    used = (kept.masked_fill(above, 0.0) if settings.mode == "mask" else kept).to(dtype)
    share = above.double().mean()
    if settings.level == "token":
        return Weights(used, torch.ones_like(used)), share
    used_N = expand(used, cu_seqlens, len(log_ratio_N))
    return Weights(used_N, used_N), share


def effective_share(log_ratio: Tensor) -> Tensor:
    """(sum r)^2 / (n sum r^2) in (0, 1]: the effective sample size of n ratios, as a share of n (Kish)."""
    share = log_ratio.softmax(0)
    return 1 / (len(log_ratio) * share.square().sum())
