"""Losses of other papers over the fused head: CISPO and distillation, of single tokens; GSPO, of whole answers.

A loss of single tokens goes through `row_loss`: the function sees the log-probs of a chunk of rows, and its gradient is
made on the way. Where rows depend on one another all log-probs must be known first: `linear_logprobs`, which computes
the logits again in the backward. Run: python examples/own_loss.py
"""

import torch
from torch import Tensor

import ipvrm_core as ic

CLIP = 0.2


def cispo(hidden, weight, tokens_N, old_N, advantages_N) -> Tensor:
    """-mean(stopgrad(min(rho, 1 + CLIP)) A log pi): every token keeps a gradient (MiniMax-M1, 2506.13585)."""

    def loss(logprobs: ic.LogProbs, rows: slice) -> Tensor:
        new_n = logprobs.logprobs_NK[:, 0]
        ratio_n = (new_n - old_N[rows]).exp().clamp(max=1 + CLIP).detach()
        return -(ratio_n * advantages_N[rows] * new_n).sum() / len(tokens_N)

    return ic.row_loss(hidden, weight, tokens_N[:, None], loss)


def distill(hidden, weight, top_NK, teacher_NK, kind: str = "reverse") -> Tensor:
    """Mean KL to a teacher over its own top K tokens, renormalised; on the student's tokens it is on-policy.

    reverse: KL(pi || teacher), which a student can fit; forward: KL(teacher || pi). (Agarwal et al., 2306.13649.)
    """
    teacher_NK = teacher_NK.log_softmax(-1)

    def loss(logprobs: ic.LogProbs, rows: slice) -> Tensor:
        student_nK, teacher_nK = logprobs.logprobs_NK.log_softmax(-1), teacher_NK[rows]
        p, q = (student_nK, teacher_nK) if kind == "reverse" else (teacher_nK, student_nK)
        return (p.exp() * (p - q)).sum() / len(top_NK)

    return ic.row_loss(hidden, weight, top_NK, loss)


def gspo(hidden, weight, tokens_N, old_N, advantages_B, lengths_B) -> Tensor:
    """-mean(min(s A, clip(s) A)), s = exp(mean log-ratio of the answer) (Zheng et al., 2507.18071)."""
    new_N = ic.linear_logprobs(hidden, weight, tokens_N[:, None]).logprobs_NK[:, 0]
    answers_N = torch.repeat_interleave(lengths_B)
    sums_B = torch.zeros_like(advantages_B).index_add(0, answers_N, new_N - old_N)
    ratio_B = (sums_B / lengths_B).exp()
    return -torch.minimum(ratio_B * advantages_B, ratio_B.clamp(1 - CLIP, 1 + CLIP) * advantages_B).mean()


def main() -> dict[str, tuple[Tensor, Tensor]]:
    """{name: (loss, its gradient by the hidden states)} of four answers of 3 to 6 tokens."""
    torch.manual_seed(0)
    lengths_B, advantages_B = torch.tensor([3, 5, 4, 6]), torch.tensor([1.0, -1.0, 0.5, -0.5])
    hidden, weight = torch.randn(18, 32, requires_grad=True), torch.randn(1000, 32)
    tokens_N = torch.randint(1000, (18,))
    with torch.no_grad():  # an old policy a little way off
        moved = hidden + 0.05 * torch.randn_like(hidden)
        old_N = ic.linear_logprobs(moved, weight, tokens_N[:, None]).logprobs_NK[:, 0]
        top_NK = (moved @ weight.t()).topk(8).indices
        teacher_NK = ic.linear_logprobs(moved, weight, top_NK).logprobs_NK
    given = hidden, weight, tokens_N, old_N
    losses = {
        "distillation": distill(hidden, weight, top_NK, teacher_NK),
        "CISPO": cispo(*given, advantages_B.repeat_interleave(lengths_B)),
        "GSPO": gspo(*given, advantages_B, lengths_B),
    }
    return {name: (loss.detach(), *torch.autograd.grad(loss, hidden)) for name, loss in losses.items()}


if __name__ == "__main__":
    for name, (loss, gradient) in main().items():
        print(f"{name}: loss {loss:.4f}, gradient norm {gradient.norm():.4f}")
