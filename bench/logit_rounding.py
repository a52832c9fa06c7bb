"""What `bfloat16_logits` costs in accuracy: python -m ipvrm_core.bench.logit_rounding, on a GPU or in the interpreter.

The row kernel as the fused head runs it on a GPU, logits in float32 or in bfloat16, its gradient by them in bfloat16 in
both cases; truth is the reference in float64 on the float32 logits. The products after it are made in float64, so that
what is left are the two roundings. Rows of N(0, 2) logits, one token of each lifted by 2 peak.
Shape letters: N rows, D hidden size, V vocabulary, S = 1 + K slots.
"""

import os

import torch
from torch import Tensor

from ipvrm_core import PolicyBatch, PolicyLossConfig
from ipvrm_core.reference.policy_loss import distrl_loss_from_logits, ppo_terms

N, D, V, S = 96, 64, 1000, 6
PEAKS = (1.0, 6.0, 12.0)
CONFIG = PolicyLossConfig(alpha=0.5)


def make_rows(peak: float) -> tuple[Tensor, Tensor, PolicyBatch]:
    """(logits [N, V] in float32, W [V, D], batch): old log-probs 0.2 nats away, four of five samples the top."""
    weight_VD = torch.randn(V, D) / D**0.5
    logits_NV = 2 * torch.randn(N, D) @ weight_VD.t()
    top_N = torch.randint(V, (N,))
    logits_NV[torch.arange(N), top_N] += 2 * peak
    ids_NS = torch.randint(V, (N, S))
    ids_NS[:, 0] = torch.where(torch.rand(N) < 0.8, top_N, ids_NS[:, 0])
    ids_NS[:, 1] = top_N
    ids_NS[::3, 4] = -1
    logp_NS = logits_NV.double().log_softmax(-1).gather(1, ids_NS.clamp(min=0))
    old_NS = (logp_NS + 0.2 * torch.randn(N, S)).float().masked_fill(ids_NS < 0, 0.0)
    weights_N = torch.full((N,), 1 / N)
    return logits_NV, weight_VD, PolicyBatch(ids_NS, old_NS, torch.randn(N, S), weights_N, weights_N)


def kernel_gradient(logits_NV: Tensor, batch: PolicyBatch) -> tuple[float, Tensor]:
    """(loss, dLoss/dx [N, V] in float64 of what the kernel left in bfloat16 and of its scale)."""
    from ipvrm_core.kernels.policy_rows import Clip, policy_rows

    out_NV, scale_N = torch.empty_like(logits_NV, dtype=torch.bfloat16), logits_NV.new_empty(N, dtype=torch.float32)
    clip = Clip(CONFIG.clip_low, CONFIG.clip_high, float("inf"))
    slots = (batch.ids_NS, batch.old_logprobs_NS, batch.advantages_NS)
    metrics_NM = policy_rows(
        logits_NV,
        out_NV,
        *slots,
        batch.token_weights_N,
        batch.candidate_weights_N,
        None,
        alpha=CONFIG.alpha,
        clip=clip,
        candidate_clip=clip,
        scale_N=scale_N,
    )
    sampled, candidates = metrics_NM.double().sum(0)[:2].tolist()
    return sampled + CONFIG.alpha * candidates, out_NV.double() * scale_N.double()[:, None]


def clipped_terms(logits_NV: Tensor, batch: PolicyBatch) -> Tensor:
    """[N, S]: the terms without a gradient."""
    logp_NS = logits_NV.double().log_softmax(-1).gather(1, batch.ids_NS.clamp(min=0))
    log_ratio_NS = (logp_NS - batch.old_logprobs_NS).masked_fill(batch.ids_NS < 0, 0.0)
    return ppo_terms(log_ratio_NS, batch.advantages_NS, CONFIG.clip_low, CONFIG.clip_high)[1]


def measure(peak: float) -> list[str]:
    """A line of the table for each type of the logits."""
    logits_NV, weight_VD, batch = make_rows(peak)
    exact_NV = logits_NV.double().requires_grad_()
    truth = distrl_loss_from_logits(exact_NV, batch, CONFIG).loss
    (true_gradient_NV,) = torch.autograd.grad(truth, exact_NV)
    true_ND = true_gradient_NV @ weight_VD.double()
    logp_NV = exact_NV.detach().log_softmax(-1)
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        x_NV = logits_NV.to(dtype)
        off_N = (x_NV.double().log_softmax(-1) - logp_NV).gather(1, batch.ids_NS[:, :1]).abs()
        loss, gradient_NV = kernel_gradient(x_NV.cuda() if torch.cuda.is_available() else x_NV, batch)
        error_ND = gradient_NV @ weight_VD.double() - true_ND
        by_row_N = error_ND.norm(dim=1) / true_ND.norm(dim=1).clamp(min=1e-30)
        cells = (
            f"{logp_NV.amax(-1).exp().median().item():.4f}",
            f"{logits_NV.max().item():.0f}",
            str(dtype).removeprefix("torch."),
            f"{off_N.mean().item():.1e} ({off_N.max().item():.1e})",
            f"{(clipped_terms(x_NV, batch) != clipped_terms(logits_NV, batch)).sum().item()} of {N * S}",
            f"{abs(loss - truth.item()):.1e}",
            f"{(error_ND.norm() / true_ND.norm()).item():.1e}",
            f"{by_row_N[true_ND.norm(dim=1) > 0].median().item():.1e}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        from ipvrm_core.bench.interpreter import patch_once

        patch_once()
    torch.manual_seed(0)
    print("| median p of the top | largest logit | logits | error of log p: mean (largest) | clipped or not |", end="")
    print(" of the loss | of dh, relative | median row |\n|---|---|---|---|---|---|---|---|")
    for peak in PEAKS:
        print("\n".join(measure(peak)))


if __name__ == "__main__":
    main()
