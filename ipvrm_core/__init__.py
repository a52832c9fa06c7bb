"""Vocabulary-wide TD advantages (IPVRM) and the clipped DistRL loss, without [tokens, vocabulary] tensors.

Names are loaded on first use: `import ipvrm_core` brings in neither triton nor transformers.
"""

from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

# In a checkout the sibling folders kernels/, trainer/ and bench/ are parts of this package (see setup.py).
_here = Path(__file__).parent
if not (_here / "kernels").is_dir() and (_here.parent / "setup.py").is_file():
    __path__.append(str(_here.parent))

_EXPORTS = {
    # policy side: the fused functions (ops: dispatch over backends)
    "linear_logprobs": "ops.linear_logprobs",
    "logprobs_from_logits": "ops.linear_logprobs",
    "select_candidates": "ops.select_candidates",
    "select_candidates_from_logits": "ops.select_candidates",
    "linear_td_errors": "ops.td_errors",
    "distrl_loss": "ops.distrl_loss",
    "distrl_loss_from_logits": "ops.distrl_loss",
    "checked_values": "ops.checks",
    # plain data
    "Candidates": "types",
    "LogProbs": "types",
    "Normalizers": "types",
    "PolicyBatch": "types",
    "PolicyLossConfig": "types",
    "PolicyLossOutput": "types",
    # packed mathematics on [N] token vectors
    "pack": "packing",
    "unpack": "packing",
    "cu_seqlens_from_lengths": "packing",
    "prefix_values": "ops.sequences",
    "mean_prefix_values": "ops.sequences",
    "ipvrm_loss": "ops.sequences",
    "implicit_prm_loss": "ops.sequences",
    "dpo_reward_loss": "ops.sequences",
    "qrm_loss": "ops.sequences",
    "repirl_loss": "ops.sequences",
    "repirl_weights": "ops.sequences",
    "difficulty_boundary": "reference.reward_losses",
    "dynamic_loss_weights": "reference.reward_losses",
    "td_errors": "reference.advantages",
    "td_advantages": "reference.advantages",
    "center_on_candidates": "reference.advantages",
    "value_moments": "reference.advantages",
    "sigma_v": "reference.advantages",
    "outcome_advantages": "reference.advantages",
    "rloo_advantages": "reference.advantages",
    "group_normalize": "ops.sequences",
    "gae": "ops.sequences",
    "whiten": "reference.advantages",
    "process_advantages": "ops.sequences",
    "prime_advantages": "ops.sequences",
    "masked_step_advantages": "ops.sequences",
    "normalizers": "reference.aggregation",
    "branch_weights": "reference.aggregation",
    "Preset": "presets",
    "PRESETS": "presets",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'ipvrm_core' has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
