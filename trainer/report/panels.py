"""Which quantities are drawn, in which order, under which names."""

from collections.abc import Iterable

from ipvrm_core.trainer.report.plots import Panel

SFT = (Panel("nll", "Negative log-likelihood of demonstrations", "nats per token"),)

REWARD_MODEL = (
    Panel("loss", "Training loss", "loss / first loss", relative=True),
    Panel("held_out_auc", "Held-out AUC, mean score per token", "AUC (0.5 = chance)"),
    Panel("held_out_auc_sum", "Held-out AUC, summed score", "AUC (0.5 = chance)"),
    Panel("held_out_accuracy", "Held-out accuracy of σ(v̄) > 1/2", "% of answers", 100, optional=True),
    Panel("held_out_pair_accuracy", "Held-out pairs in the right order", "% of pairs", 100, optional=True),
    *(
        Panel(f"held_out_ece_{p}", f"Held-out ECE of σ(v̄) after {p} % of the answer", "share of answers", optional=True)
        for p in (25, 50, 75, 100)
    ),
)

POLICY = {
    "Answers": (
        Panel("accuracy", "Accuracy on training prompts", "% of sampled answers", 100),
        Panel("mixed_prompts", "Prompts with right and wrong answers", "% of prompts", 100),
        Panel("response_length", "Response length", "tokens per answer"),
        Panel("entropy", "Entropy of the policy", "nats per token"),
        Panel("finished", "Answers that end in time", "% of sampled answers", 100),
        Panel("kept_prompts", "Prompts trained on", "prompts per step"),
    ),
    "Policy update": (
        Panel("kl_old", "KL from the sampling policy", "nats per 1000 tokens", 1000),
        Panel("clip_fraction", "Clipped sampled tokens", "% of token weight", 100),
        Panel("candidate_clip_fraction", "Clipped candidates", "% of candidate weight", 100, optional=True),
        Panel("loss_sampled", "Loss on sampled tokens", "loss (dimensionless)"),
        Panel("loss_candidates", "Loss on candidates, before α", "loss (dimensionless)", optional=True),
        Panel("grad_norm", "Gradient norm before clipping", "L2 norm"),
        Panel("ratio", "Mean ratio π / π_old", "ratio (1 = unchanged)"),
        Panel("kl_ref", "KL to the reference", "nats per 1000 tokens", 1000, optional=True),
    ),
    "Candidates": (
        Panel("candidates", "Candidates per position, mean |C|", "tokens per position"),
        Panel("candidate_mass", "Probability held by the candidates", "% of probability", 100),
        Panel("several_candidates", "Positions with several candidates", "% of positions", 100),
        Panel("credit", "Open positions where the due token has the largest TD error", "%", 100, optional=True),
        Panel("credit_gain", "Of perfect credit's step, what the credit's has", "%", 100, optional=True),
        Panel("credit_policy", "Open positions where the due token is the policy's own", "%", 100, optional=True),
        Panel("credit_open", "Open positions with a due token", "% of positions", 100, optional=True),
    ),
    "Reward model and advantages": (
        Panel("rm_auc", "Reward model AUC on the batch", "AUC (0.5 = chance)"),
        Panel("rm_accuracy", "Reward model accuracy on the batch", "% of answers", 100),
        Panel("sigma_v", "σ_V, spread of prefix values", "value units (β × nats)"),
        Panel("rm_loss", "Online reward-model loss", "loss (dimensionless)"),
        Panel("rm_grad_norm", "Reward-model gradient norm", "L2 norm"),
        Panel("rm_score_per_token", "Mean TD error of sampled tokens", "value units per token"),
        Panel("process_std", "Std of the process advantage", "advantage (dimensionless)", optional=True),
        Panel("candidate_td_std", "Std of candidate TD advantages", "advantage (dimensionless)", optional=True),
    ),
    "Seconds of a step": (
        Panel("seconds_sampling", "Sampling and judging, or waiting for it", "seconds"),
        Panel("seconds_log_probs", "Log-probs of the old policy and the reference, candidates", "seconds"),
        Panel("seconds_reward_model", "Online updates of the reward model", "seconds"),
        Panel("seconds_credit", "TD errors and advantages", "seconds"),
        Panel("seconds_policy", "Update of the policy", "seconds"),
        Panel("seconds_sync", "The sampler's new weights, and waiting for it", "seconds"),
    ),
}


def with_others(names: Iterable[str]) -> dict[str, tuple[Panel, ...]]:
    """POLICY and, so that no quantity of a new objective goes unseen, a group of the names it does not know."""
    known = {panel.name for group in POLICY.values() for panel in group} | {"seconds", "peak_memory_mb"}
    others = tuple(Panel(name, name, "value", optional=True) for name in dict.fromkeys(names) if name not in known)
    return {**POLICY, "Other": others}
