"""For a framework that has logits: credit, loss and gradient from them; nothing else of its code changes.

Run: python examples/logits.py
"""

import torch

import ipvrm_core as ic


def policy_step(logits_NV, old_logits_NV, rm_logits_NV, tokens_N, rewards_B, cu_seqlens, uids, temperature=1.0):
    """(loss, metrics, dloss/dlogits [N, V]) of one optimiser step's rows, one row a response token.

    logits_NV requires a gradient; its memory becomes the gradient. uids: the prompt of each answer, of any kind.
    """
    old = ic.select_candidates_from_logits(old_logits_NV, tokens_N, p_min=0.1, temperature=temperature)
    delta_NS = ic.td_errors_from_logits(rm_logits_NV, old.ids_NS, old.logprobs_NS, beta=10.0, temperature=temperature)
    credit_NS = ic.distrl_advantages(delta_NS, old.ids_NS, old.logprobs_NS, rewards_B, cu_seqlens, uids)
    batch = ic.PolicyBatch.of(old.ids_NS, old.logprobs_NS, credit_NS, cu_seqlens)
    config = ic.PolicyLossConfig(alpha=0.1, temperature=temperature)
    loss, metrics = ic.distrl_loss_from_logits(logits_NV, batch, config, inplace=True)
    (gradient_NV,) = torch.autograd.grad(loss, logits_NV)
    return loss, metrics, gradient_NV


def main() -> tuple[float, dict[str, float], torch.Tensor]:
    torch.manual_seed(0)
    N, V = 64, 500
    tokens_N, cu_seqlens = torch.randint(V, (N,)), torch.arange(0, N + 1, 16)
    old_logits_NV = 3 * torch.randn(N, V)
    rm_logits_NV = old_logits_NV + 0.3 * torch.randn(N, V)
    logits_NV = (old_logits_NV + 0.1 * torch.randn(N, V)).requires_grad_()
    uids = ["prompt 1", "prompt 1", "prompt 2", "prompt 2"]
    given = tokens_N, torch.tensor([1.0, 0.0, 0.0, 1.0]), cu_seqlens, uids
    loss, metrics, gradient_NV = policy_step(logits_NV, old_logits_NV, rm_logits_NV, *given)
    return loss.item(), {name: value.item() for name, value in metrics.items()}, gradient_NV


if __name__ == "__main__":
    loss, metrics, gradient = main()
    print(f"loss {loss:.4f}, gradient norm {gradient.norm():.4f}")
    print({name: round(value, 4) for name, value in metrics.items()})
