"""Random problems for the public functions, and how an answer is judged.

The error criterion, truth being the reference in float64: |truth - ours| <= 2 |truth - torch in the same dtype| + tol.
"torch in the same dtype" is F.linear in that dtype, then log_softmax in float32 and autograd.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import ipvrm_core as ic
from ipvrm_core.bench.inputs import make_inputs
from ipvrm_core.reference import logprobs as ref_logprobs
from ipvrm_core.reference import policy_loss as ref_loss

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float64: 1e-13}  # of the largest entry of the truth
SHAPES = [(37, 13, 101, 10), (1, 7, 129, 10), (5, 1, 1, 1), (4, 3, 2, 0), (9, 32, 1187, 4)]  # N, D, V, K


@dataclass
class Problem:
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    batch: ic.PolicyBatch

    @property
    def inputs(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def to(self, dtype: torch.dtype) -> "Problem":
        cast = [
            None if x is None else x.detach().to(dtype).requires_grad_() for x in (self.hidden, self.weight, self.bias)
        ]
        return Problem(*cast, self.batch)


def make_problem(
    N, D, V, K, *, dtype=torch.float32, bias=True, scale=3.0, shift=0.0, temperature=1.0, softcap=None
) -> Problem:
    """`make_inputs` of bench/: ratios of 0.5 to 2, a quarter of the candidates padding, some rows masked.

    temperature "rows": one a row, from 0.5 to 2, in the batch.
    """
    config = ic.PolicyLossConfig(temperature=1.0 if temperature == "rows" else temperature, softcap=softcap)
    options = {"bias": bias, "scale": scale, "shift": shift, "row_temperatures": temperature == "rows"}
    made = make_inputs(N, D, V, K, torch.get_default_device(), dtype, config=config, **options)
    return Problem(made.hidden, made.weight, made.bias, made.batch)


def assert_no_worse(ours: list[Tensor], torch_same: list[Tensor], truth: list[Tensor], tolerance: float) -> None:
    for i, (got, same, exact) in enumerate(zip(ours, torch_same, truth, strict=True)):
        assert got.shape == exact.shape
        if not exact.numel():
            continue
        error, allowed = (got.double() - exact).abs().max(), (same.double() - exact).abs().max()
        bound = 2 * allowed + tolerance * exact.abs().max().clamp(min=1)
        assert error <= bound, f"output {i}: error {error:.2e} > {bound:.2e} (torch in the same dtype: {allowed:.2e})"


def loss_and_gradients(output: ic.PolicyLossOutput, inputs: list[Tensor], upstream: float) -> list[Tensor]:
    """Gradients first scaled back, so that a lost upstream factor shows as a factor."""
    gradients = torch.autograd.grad(output.loss * upstream, inputs)
    return [output.loss.detach(), *output.metrics.values(), *gradients]


def check_loss(problem: Problem, config: ic.PolicyLossConfig, upstream=3.0, tolerance=None, **options) -> None:
    dtype, wide = problem.hidden.dtype, problem.to(torch.float64)
    naive_logits = F.linear(problem.hidden, problem.weight, problem.bias)
    naive = loss_and_gradients(
        ref_loss.distrl_loss_from_logits(naive_logits, problem.batch, config), problem.inputs, upstream
    )
    truth = loss_and_gradients(
        ref_loss.distrl_loss(wide.hidden, wide.weight, wide.batch, config, bias_V=wide.bias), wide.inputs, upstream
    )
    ours = loss_and_gradients(
        ic.distrl_loss(problem.hidden, problem.weight, problem.batch, config, bias=problem.bias, **options),
        problem.inputs,
        upstream,
    )
    assert [x.dtype for x in ours[-len(problem.inputs) :]] == [dtype] * len(problem.inputs)
    assert_no_worse(ours, naive, truth, tolerance or TOLERANCE[dtype])


CONFIGS = {
    "paper": ic.PolicyLossConfig(),
    "temperature": ic.PolicyLossConfig(temperature=0.6),
    "grpo": ic.PolicyLossConfig(alpha=0.0),
    "asymmetric": ic.PolicyLossConfig(alpha=2.0, clip_low=0.05, clip_high=0.6, candidate_clip_low=0.5),
    "dual_clip": ic.PolicyLossConfig(
        alpha=1.0, clip_high=9.0, dual_clip=1.3, candidate_clip_high=9, candidate_dual_clip=1.2
    ),
    "kl": ic.PolicyLossConfig(kl_coef=0.7),
    "entropy": ic.PolicyLossConfig(entropy_coef=0.5),
    "softcap": ic.PolicyLossConfig(softcap=5.0),
    "softcap_entropy": ic.PolicyLossConfig(softcap=3.0, temperature=0.8, entropy_coef=0.5),
    "everything": ic.PolicyLossConfig(
        1.5, 0.1, 0.3, 1.6, 0.2, 0.1, 1.4, temperature=1.7, kl_coef=0.2, entropy_coef=0.3
    ),
}


def logprobs_and_gradients(output: ic.LogProbs, inputs: list[Tensor], use: str) -> list[Tensor]:
    """Every output with its own weights, or one of them alone, so that absent gradients are met too."""
    total = 0.0
    for name, value in zip(("logprobs", "lse", "entropy"), output, strict=True):
        if use in (name, "all"):
            weights = torch.linspace(-1, 2, max(value.numel(), 1), dtype=torch.float64)[: value.numel()].view(
                value.shape
            )
            total = total + (weights * value).sum()
    return [*(value.detach() for value in output), *torch.autograd.grad(total, inputs)]


def check_logprobs(problem: Problem, temperature, use="all", tolerance=None, softcap=None, **options) -> None:
    wide, ids = problem.to(torch.float64), problem.batch.ids_NS
    transform = {"temperature": temperature, "softcap": softcap}
    naive_logits = F.linear(problem.hidden, problem.weight, problem.bias)
    naive = logprobs_and_gradients(
        ref_logprobs.logprobs_from_logits(naive_logits, ids, **transform), problem.inputs, use
    )
    truth = logprobs_and_gradients(
        ref_logprobs.linear_logprobs(wide.hidden, wide.weight, ids, bias_V=wide.bias, **transform), wide.inputs, use
    )
    got = ic.linear_logprobs(problem.hidden, problem.weight, ids, bias=problem.bias, **transform, **options)
    ours = logprobs_and_gradients(got, problem.inputs, use)
    assert (ours[0] == 0)[ids < 0].all()
    assert_no_worse(ours, naive, truth, tolerance or TOLERANCE[problem.hidden.dtype])
