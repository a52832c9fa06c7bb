"""TRL's loss is TRL's; what is added to it is the candidates' loss of full logits; what replaces it is equal to it."""

import math

import pytest
import torch
from trl import GRPOTrainer

from ipvrm_core.integrations.trl.loss import token_weights
from ipvrm_core.integrations.trl.passes import Batch
from ipvrm_core.reference.logprobs import log_softmax
from ipvrm_core.reference.policy_loss import ppo_terms
from tests.integrations.trl import cases

ROLLOUTS = {"rollout_func": cases.rollouts}  # answers with tool outputs inside


def inputs_of(trainer) -> dict:
    """One micro-batch: ragged answers, masks with holes, an old policy a little way off, a reference further off."""
    full = cases.generated(trainer)
    size = trainer.args.per_device_train_batch_size
    inputs = {k: v[:size] if not torch.is_tensor(v) or v.dim() else v for k, v in full.items()}
    generator = torch.Generator().manual_seed(3)
    batch = Batch.of(inputs)
    with torch.no_grad():
        new = trainer.model(batch.ids_BL, attention_mask=batch.attention_BL).logits
    shape = batch.mask_BT.shape
    rows = log_softmax(new[:, -shape[1] - 1 : -1].flatten(0, 1), trainer.temperature)
    new_BT = rows.gather(1, inputs["completion_ids"].flatten()[:, None]).view(shape).float()
    inputs["old_per_token_logps"] = new_BT + 0.3 * torch.randn(shape, generator=generator)
    inputs["ref_per_token_logps"] = new_BT + 0.3 * torch.randn(shape, generator=generator)
    inputs["distrl"] = [
        (ids, old + 0.3 * torch.randn(old.shape, generator=generator) * (old != 0), advantages)
        for ids, old, advantages in inputs["distrl"]
    ]
    return inputs


def loss_and_gradient(trainer, compute) -> tuple[float, torch.Tensor]:
    trainer.model.zero_grad()
    loss = compute()
    loss.backward()
    grads = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(grads).clone()


def assert_same(one, other, tolerance=1e-6):
    (loss, gradient), (expected, expected_gradient) = one, other
    assert expected_gradient.norm() > 1e-3
    assert math.isclose(loss, expected, rel_tol=tolerance, abs_tol=tolerance)
    assert (gradient - expected_gradient).norm() <= tolerance * expected_gradient.norm()


def candidates_of_full_logits(trainer, inputs) -> torch.Tensor:
    """alpha sum_t w_t sum_v pi_old(v) l(rho(v), A_TD(v)) by autograd, token by token."""
    batch, d = Batch.of(inputs), trainer.distrl
    logits = trainer.model(batch.ids_BL, attention_mask=batch.attention_BL).logits
    weights, total, T = token_weights(trainer, inputs, batch.mask_BT), 0.0, batch.mask_BT.shape[1]
    for b, (ids, old, advantages) in enumerate(inputs["distrl"]):
        places = batch.mask_BT[b].nonzero()[:, 0]
        assert len(places) == len(ids)
        for row, t in enumerate(places.tolist()):
            logp = (logits[b, -T - 1 + t] / trainer.temperature).log_softmax(-1)
            for slot in range(1, ids.shape[1]):
                if ids[row, slot] >= 0:
                    ratio = logp[ids[row, slot]] - old[row, slot]
                    clips = d.candidate_clip_low, d.candidate_clip_high, d.candidate_dual_clip
                    loss, _ = ppo_terms(ratio, advantages[row, slot], *clips)
                    total = total + weights[b, t] * old[row, slot].exp() * loss
    return d.alpha * total


@pytest.mark.parametrize("policy", ["tied", "untied"])
@pytest.mark.parametrize("loss_type", cases.LOSS_TYPES)
def test_the_candidates_loss_is_that_of_full_logits(build, loss_type, policy):
    config = {"loss_type": loss_type, "temperature": 0.7, "beta": 0.05, "num_iterations": 2}
    trainer = build(config, {"alpha": 0.5, "candidate_dual_clip": 3.0}, policy=policy, **ROLLOUTS)
    inputs = inputs_of(trainer)
    assert max(ids.shape[1] for ids, *_ in inputs["distrl"]) > 2
    own = GRPOTrainer._compute_loss
    ours = loss_and_gradient(trainer, lambda: trainer._compute_loss(trainer.model, inputs))

    def expected():
        return own(trainer, trainer.model, inputs) + candidates_of_full_logits(trainer, inputs)

    theirs = loss_and_gradient(trainer, expected)
    assert_same(ours, theirs)
    alone = loss_and_gradient(trainer, lambda: own(trainer, trainer.model, inputs))
    assert (ours[1] - alone[1]).norm() > 1e-3 * alone[1].norm()  # the candidates count


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("loss_type", cases.LOSS_TYPES)
def test_the_weights_are_those_of_trls_loss(build, monkeypatch, loss_type, accumulation):
    """With ratio 1 and advantage 1 TRL's loss falls by a token's weight as its log-prob rises."""
    steps = {"steps_per_generation": 2} if cases.VERSION >= (1, 9) else {}
    level = {"importance_sampling_level": "sequence"} if loss_type == "luspo" else {}
    config = {"gradient_accumulation_steps": accumulation, "epsilon_high": 5.0, **steps, **level}
    trainer = build({"loss_type": loss_type, **config}, **ROLLOUTS)
    inputs = inputs_of(trainer)
    batch = Batch.of(inputs)
    logps = torch.full(batch.mask_BT.shape, -1.0, requires_grad=True)
    given = (logps, torch.ones_like(logps), None)[: 3 if cases.VERSION >= (1, 10) else 2]
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: given)
    inputs = {**inputs, "old_per_token_logps": logps.detach(), "advantages": torch.ones_like(logps)}
    GRPOTrainer._compute_loss(trainer, trainer.model, inputs).backward()
    torch.testing.assert_close(token_weights(trainer, inputs, batch.mask_BT), -logps.grad)


FUSED = [
    *({"loss_type": kind} for kind in ("grpo", "bnpo", "dr_grpo", "dapo")),
    {"loss_type": "cispo", "epsilon_high": 1.1},
    {"loss_type": "sapo"},
    {"loss_type": "dapo", "beta": 0.05, "use_bias_correction_kl": True},
    {"loss_type": "grpo", "beta": 0.05, "use_bias_correction_kl": False},
    {"loss_type": "bnpo", "delta": 1.5},
]


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("config", FUSED, ids=lambda config: "-".join(map(str, config.values())))
def test_the_fused_loss_is_trls(build, config, alpha):
    """TRL's own value and gradient on the same inputs, plus the candidates' where alpha > 0."""
    trainer = build(
        {"temperature": 0.7, "epsilon": 0.2, "epsilon_high": 0.28, "num_iterations": 2, **config},
        {"alpha": alpha, "fused": True},
        **ROLLOUTS,
    )
    inputs = inputs_of(trainer)

    def expected():
        loss = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
        return loss + candidates_of_full_logits(trainer, inputs) if alpha else loss

    fused = loss_and_gradient(trainer, lambda: trainer._compute_loss(trainer.model, inputs))
    assert_same(fused, loss_and_gradient(trainer, expected))


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
@pytest.mark.parametrize("fused", [False, True])
def test_the_correction_for_vllm_stays(build, monkeypatch, fused, mode):
    """vLLM's log-probs come through rollout_func; only vLLM itself is not there. Candidates were not sampled."""
    config = {"vllm_importance_sampling_mode": mode, "temperature": 0.7}
    trainer = build(config, {"alpha": 0.5, "fused": fused}, **ROLLOUTS)
    monkeypatch.setattr(trainer, "use_vllm", True)
    monkeypatch.setattr(trainer, "_last_loaded_step", trainer.state.global_step, raising=False)
    inputs = cases.generated(trainer)
    ratio = inputs["importance_sampling_ratio"]
    assert 0 < ratio.max() != 1
    assert ratio.min() != ratio.max()
    ours = loss_and_gradient(trainer, lambda: trainer._compute_loss(trainer.model, inputs))

    def expected():
        own = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
        return own + candidates_of_full_logits(trainer, inputs)

    assert_same(ours, loss_and_gradient(trainer, expected))


@pytest.mark.parametrize("loss_type", cases.LOSS_TYPES)
def test_without_alpha_and_process_reward_it_is_trl(build, loss_type):
    """Two optimizer steps by both trainers from the same seed: the same weights."""
    config = {"loss_type": loss_type, "num_iterations": 2, "max_steps": 2}
    ended = []
    for distrl in ({"alpha": 0.0, "estimator": "none"}, None):
        trainer = build(config, distrl, reward_model=None)
        start = cases.weights(trainer.model)
        trainer.train()
        ended.append(cases.weights(trainer.model))
    assert cases.largest_difference(ended[1], start) > 1e-3
    assert cases.largest_difference(*ended) <= 1e-6
