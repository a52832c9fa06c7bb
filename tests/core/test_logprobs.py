"""Log-probabilities, LSE and entropy of a softmax head against numbers worked out by hand.

The logits are logarithms of small integers, so that exp(z) = (1, 2, 3, 4), the sum is 10 and p = (.1, .2, .3, .4).
"""

import math

import torch

from ipvrm_core.reference.logprobs import entropy, gather_ids, head_logits, linear_logprobs, logprobs_from_logits

F64 = torch.float64


def close(got, expected, atol=1e-12):
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype), rtol=0, atol=atol)


def ln(*numbers):
    return torch.tensor([[math.log(x) for x in numbers]], dtype=F64)


def test_logprobs_lse_entropy_of_a_row():
    got = logprobs_from_logits(ln(1, 2, 3, 4), torch.tensor([[3, 0]]))
    close(got.logprobs_NK.exp(), [[0.4, 0.1]])
    close(got.lse_N, [2.302585092994046])  # ln(1 + 2 + 3 + 4) = ln 10
    # H = -(.1 ln .1 + .2 ln .2 + .3 ln .3 + .4 ln .4)
    #   = .230258509299405 + .321887582486820 + .361191841297781 + .366516292749662
    close(got.entropy_N, [1.279854225833668])


def test_padding_ids_give_exactly_zero_and_no_gradient():
    logits = ln(1, 2, 3, 4).requires_grad_()
    got = logprobs_from_logits(logits, torch.tensor([[-1, 2, -7]])).logprobs_NK
    assert got[0, 0].item() == 0.0
    assert got[0, 2].item() == 0.0
    got.sum().backward()
    close(logits.grad, [[-0.1, -0.2, 0.7, -0.4]])  # one-hot(2) - p: the padded slots add nothing


def test_repeated_ids_are_both_returned_and_their_gradients_add():
    logits = ln(1, 2, 3, 4).requires_grad_()
    got = logprobs_from_logits(logits, torch.tensor([[2, 2]])).logprobs_NK
    close(got.exp(), [[0.3, 0.3]])
    got.sum().backward()
    close(logits.grad, [[-0.2, -0.4, 1.4, -0.8]])  # 2 (one-hot(2) - p)


def test_temperature_divides_the_logits():
    # T = 1/2 squares the odds: exp(z / T) = (1, 4, 9, 16), sum 30
    got = logprobs_from_logits(ln(1, 2, 3, 4), torch.tensor([[3, 0]]), temperature=0.5)
    close(got.logprobs_NK.exp(), [[16 / 30, 1 / 30]])
    close(got.lse_N, [3.4011973816621555])  # ln 30
    # T = 2 takes roots: exp(z / T) of (1, 4, 9, 16) is (1, 2, 3, 4)
    got = logprobs_from_logits(ln(1, 4, 9, 16), torch.tensor([[3, 0]]), temperature=2.0)
    close(got.logprobs_NK.exp(), [[0.4, 0.1]])
    close(got.entropy_N, [1.279854225833668])


def test_linear_head_with_bias():
    # h = (1, 2); W rows (1, 0), (0, 1), (1, 1); b = (3, 0, -1)  ->  z = (1 + 3, 2 + 0, 3 - 1) = (4, 2, 2)
    hidden, bias = torch.tensor([[1.0, 2.0]], dtype=F64), torch.tensor([3.0, 0.0, -1.0], dtype=F64)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=F64)
    close(head_logits(hidden, weight, bias), [[4.0, 2.0, 2.0]])
    close(head_logits(hidden, weight), [[1.0, 2.0, 3.0]])
    # LSE = 4 + ln(1 + 2 e^-2) = 4 + ln 1.2706705664732254
    got = linear_logprobs(hidden, weight, torch.tensor([[0, 1]]), bias_V=bias)
    close(got.lse_N, [4.239544766221725])
    close(got.logprobs_NK, [[4 - 4.239544766221725, 2 - 4.239544766221725]])
    # the temperature divides z after the bias: z / 2 = (2, 1, 1), LSE = 2 + ln(1 + 2 e^-1)
    got = linear_logprobs(hidden, weight, torch.tensor([[0]]), bias_V=bias, temperature=2.0)
    close(got.lse_N, [2.5514447139320509])


def test_entropy_extremes():
    close(entropy(torch.zeros(1, 8, dtype=F64).log_softmax(-1)), [3 * math.log(2)])  # uniform over 8
    close(entropy(torch.tensor([[0.0, -math.inf]], dtype=F64)), [0.0])  # certain; 0 ln 0 = 0


def test_impossible_tokens_leave_the_gradient_finite():
    logits = torch.tensor([[0.0, math.log(3), -math.inf]], dtype=F64, requires_grad=True)
    entropy(logits.log_softmax(-1)).sum().backward()
    # p = (1/4, 3/4): dH/dz_0 = -p_0 (ln p_0 + H), H = ln 4 - .75 ln 3; so -.25 (-.75 ln 3) = .1875 ln 3
    close(logits.grad, [[0.1875 * math.log(3), -0.1875 * math.log(3), 0.0]])


def test_narrow_inputs_are_computed_in_float32():
    logits = torch.tensor([[10.0, 10.0]], dtype=torch.bfloat16)
    got = logprobs_from_logits(logits, torch.tensor([[0]]))
    assert {x.dtype for x in got} == {torch.float32}
    close(got.lse_N, [10.693147180559945], atol=1e-6)  # 10 + ln 2; bfloat16 would say 10.6875
    assert head_logits(logits, torch.ones(3, 2, dtype=torch.bfloat16)).dtype == torch.float32


def test_gather_ids_keeps_the_slot_order():
    logp = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]])
    close(gather_ids(logp, torch.tensor([[2, 0, -1], [1, -1, 1]])), [[-3.0, -1.0, 0.0], [-5.0, 0.0, -5.0]])
