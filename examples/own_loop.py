"""DistRL in a training loop of one's own: sampled answers in, a better policy out. Here the task is to count on.

There is no reward model: what a perfect one would say of every candidate stands for it, so that the effect can be seen
in seconds. Run: python examples/own_loop.py
"""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import ipvrm_core as ic

VOCABULARY, PROMPT, ANSWER, PROMPTS, SAMPLES = 12, 2, 4, 16, 8
CONFIG = ic.PolicyLossConfig(alpha=1.0)


def make_policy() -> torch.nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ic.attach(LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)))


@torch.no_grad()
def sample(policy) -> Tensor:
    """SAMPLES answers to each of PROMPTS prompts: [B, PROMPT + ANSWER]."""
    ids = torch.randint(VOCABULARY, (PROMPTS, PROMPT)).repeat_interleave(SAMPLES, 0)
    for _ in range(ANSWER):
        ids = torch.cat([ids, torch.multinomial(policy(ids).logits[:, -1].softmax(-1), 1)], dim=1)
    return ids


def rows(hidden_BLD: Tensor) -> Tensor:
    """The states that predict the answers' tokens: [B, L, D] -> [N, D]."""
    return hidden_BLD[:, PROMPT - 1 : -1].flatten(0, 1)


def boundaries(sequences: int) -> Tensor:
    """cu_seqlens of answers of ANSWER tokens."""
    return torch.arange(0, sequences * ANSWER + 1, ANSWER)


@torch.no_grad()
def credit(policy, ids: Tensor, right_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, old log-probs, advantages) of the sampled tokens and the candidates: [N, 1 + K] each."""
    tokens_N = ids[:, PROMPT:].flatten()
    old = policy(ids, at_head=lambda h, head: ic.select_candidates(rows(h), head.weight, tokens_N, p_min=0.05))
    delta = torch.where(old.ids_NS == right_N[:, None], 1.0, -1.0).masked_fill(old.ids_NS < 0, 0.0)
    rewards = (tokens_N == right_N).view(-1, ANSWER).float().mean(1)
    prompts = torch.arange(PROMPTS).repeat_interleave(SAMPLES)
    slots = old.ids_NS, old.logprobs_NS
    return *slots, ic.distrl_advantages(delta, *slots, rewards, boundaries(len(ids)), prompts)


def train(steps: int = 20, minibatch: int = 64, micro_batch: int = 32) -> list[float]:
    """Share of right tokens, step by step."""
    torch.manual_seed(0)
    policy = make_policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    history = []
    for _ in range(steps):
        ids = sample(policy)
        right_N = ((ids[:, PROMPT - 1 : -1] + 1) % VOCABULARY).flatten()
        history.append((ids[:, PROMPT:].flatten() == right_N).float().mean().item())
        slots = credit(policy, ids, right_N)
        for start in range(0, len(ids), minibatch):  # the sequences of a minibatch share their normalisers
            own = slice(start * ANSWER, (start + minibatch) * ANSWER)
            batch = ic.PolicyBatch.of(*(x[own] for x in slots), boundaries(minibatch))
            for first in range(0, minibatch, micro_batch):  # its pieces add up to it
                part = batch.rows(slice(first * ANSWER, (first + micro_batch) * ANSWER))
                backward(policy, ids[start + first :][:micro_batch], part)
            optimizer.step()
            optimizer.zero_grad()
    return history


def backward(policy, ids: Tensor, batch: ic.PolicyBatch) -> None:
    policy(ids, at_head=lambda h, head: ic.distrl_loss(rows(h), head.weight, batch, CONFIG)).loss.backward()


if __name__ == "__main__":
    shares = train()
    print(f"right tokens: {shares[0]:.2f} at the start, {shares[-1]:.2f} after {len(shares)} steps")
