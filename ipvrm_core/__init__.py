"""Vocabulary-wide TD advantages (IPVRM) and the clipped DistRL loss, without [tokens, vocabulary] tensors.

Names are loaded on first use: `import ipvrm_core` brings in neither torch nor triton nor transformers.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# In a checkout the sibling folders kernels/, trainer/ and bench/ are parts of this package (see setup.py).
_here = Path(__file__).parent
if not (_here / "kernels").is_dir() and (_here.parent / "setup.py").is_file():
    __path__.append(str(_here.parent))

if TYPE_CHECKING:  # what type checkers and editors read; _EXPORTS says the same at run time, and a test that both agree
    from ipvrm_core.credit import distrl_advantages as distrl_advantages
    from ipvrm_core.fused.shard import VocabularyShard as VocabularyShard
    from ipvrm_core.heads import Head as Head
    from ipvrm_core.heads import at_forward as at_forward
    from ipvrm_core.heads import attach as attach
    from ipvrm_core.heads import head_of as head_of
    from ipvrm_core.heads import with_lora as with_lora
    from ipvrm_core.method import METHODS as METHODS
    from ipvrm_core.method import Method as Method
    from ipvrm_core.ops.checks import checked_values as checked_values
    from ipvrm_core.ops.distrl_loss import distrl_loss as distrl_loss
    from ipvrm_core.ops.distrl_loss import distrl_loss_from_logits as distrl_loss_from_logits
    from ipvrm_core.ops.linear_logprobs import linear_logprobs as linear_logprobs
    from ipvrm_core.ops.linear_logprobs import logprobs_from_logits as logprobs_from_logits
    from ipvrm_core.ops.on_policy import OnPolicyOutput as OnPolicyOutput
    from ipvrm_core.ops.on_policy import on_policy_distrl_loss as on_policy_distrl_loss
    from ipvrm_core.ops.row_loss import row_loss as row_loss
    from ipvrm_core.ops.row_loss import row_loss_from_logits as row_loss_from_logits
    from ipvrm_core.ops.select_candidates import select_candidates as select_candidates
    from ipvrm_core.ops.select_candidates import select_candidates_from_logits as select_candidates_from_logits
    from ipvrm_core.ops.td_errors import linear_td_errors as linear_td_errors
    from ipvrm_core.ops.td_errors import td_errors_from_logits as td_errors_from_logits
    from ipvrm_core.packing import cu_seqlens_from_lengths as cu_seqlens_from_lengths
    from ipvrm_core.packing import pack as pack
    from ipvrm_core.packing import unpack as unpack
    from ipvrm_core.sequences.advantages import agreement_advantages as agreement_advantages
    from ipvrm_core.sequences.advantages import candidate_advantages as candidate_advantages
    from ipvrm_core.sequences.advantages import center_on_candidates as center_on_candidates
    from ipvrm_core.sequences.advantages import gae as gae
    from ipvrm_core.sequences.advantages import group_normalize as group_normalize
    from ipvrm_core.sequences.advantages import masked_step_advantages as masked_step_advantages
    from ipvrm_core.sequences.advantages import outcome_advantages as outcome_advantages
    from ipvrm_core.sequences.advantages import prime_advantages as prime_advantages
    from ipvrm_core.sequences.advantages import process_advantages as process_advantages
    from ipvrm_core.sequences.advantages import rloo_advantages as rloo_advantages
    from ipvrm_core.sequences.advantages import sigma_v as sigma_v
    from ipvrm_core.sequences.advantages import td_advantages as td_advantages
    from ipvrm_core.sequences.advantages import td_errors as td_errors
    from ipvrm_core.sequences.advantages import value_moments as value_moments
    from ipvrm_core.sequences.advantages import whiten as whiten
    from ipvrm_core.sequences.aggregation import Normalizers as Normalizers
    from ipvrm_core.sequences.aggregation import branch_weights as branch_weights
    from ipvrm_core.sequences.aggregation import candidate_mass as candidate_mass
    from ipvrm_core.sequences.aggregation import normalizers as normalizers
    from ipvrm_core.sequences.reward_losses import difficulty_boundary as difficulty_boundary
    from ipvrm_core.sequences.reward_losses import dpo_reward_loss as dpo_reward_loss
    from ipvrm_core.sequences.reward_losses import dynamic_loss_weights as dynamic_loss_weights
    from ipvrm_core.sequences.reward_losses import implicit_prm_loss as implicit_prm_loss
    from ipvrm_core.sequences.reward_losses import ipvrm_loss as ipvrm_loss
    from ipvrm_core.sequences.reward_losses import qrm_loss as qrm_loss
    from ipvrm_core.sequences.reward_losses import repirl_loss as repirl_loss
    from ipvrm_core.sequences.reward_losses import repirl_weights as repirl_weights
    from ipvrm_core.sequences.values import mean_prefix_values as mean_prefix_values
    from ipvrm_core.sequences.values import prefix_values as prefix_values
    from ipvrm_core.types import Candidates as Candidates
    from ipvrm_core.types import LogProbs as LogProbs
    from ipvrm_core.types import PolicyBatch as PolicyBatch
    from ipvrm_core.types import PolicyLossConfig as PolicyLossConfig
    from ipvrm_core.types import PolicyLossOutput as PolicyLossOutput
    from ipvrm_core.types import Truncation as Truncation

_EXPORTS = {
    "credit": ("distrl_advantages",),
    "heads": ("Head", "at_forward", "attach", "head_of", "with_lora"),
    "method": ("METHODS", "Method"),
    "ops.checks": ("checked_values",),
    "ops.distrl_loss": ("distrl_loss", "distrl_loss_from_logits"),
    "ops.linear_logprobs": ("linear_logprobs", "logprobs_from_logits"),
    "ops.on_policy": ("OnPolicyOutput", "on_policy_distrl_loss"),
    "ops.row_loss": ("row_loss", "row_loss_from_logits"),
    "ops.select_candidates": ("select_candidates", "select_candidates_from_logits"),
    "ops.td_errors": ("linear_td_errors", "td_errors_from_logits"),
    "packing": ("cu_seqlens_from_lengths", "pack", "unpack"),
    "sequences.advantages": (
        "agreement_advantages",
        "candidate_advantages",
        "center_on_candidates",
        "gae",
        "group_normalize",
        "masked_step_advantages",
        "outcome_advantages",
        "prime_advantages",
        "process_advantages",
        "rloo_advantages",
        "sigma_v",
        "td_advantages",
        "td_errors",
        "value_moments",
        "whiten",
    ),
    "sequences.aggregation": ("Normalizers", "branch_weights", "candidate_mass", "normalizers"),
    "sequences.reward_losses": (
        "difficulty_boundary",
        "dpo_reward_loss",
        "dynamic_loss_weights",
        "implicit_prm_loss",
        "ipvrm_loss",
        "qrm_loss",
        "repirl_loss",
        "repirl_weights",
    ),
    "sequences.values": ("mean_prefix_values", "prefix_values"),
    "fused.shard": ("VocabularyShard",),
    "types": ("Candidates", "LogProbs", "PolicyBatch", "PolicyLossConfig", "PolicyLossOutput", "Truncation"),
}
_HOMES = {name: home for home, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'ipvrm_core' has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
