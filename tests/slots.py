"""Policy batches written branch by branch, as the formulae have them: the sampled token, then its candidates."""

import torch

from ipvrm_core import PolicyBatch

SLOTS = {  # of a PolicyBatch: (of the sampled token, of the candidates)
    "ids_NS": ("sampled_ids_N", "candidate_ids_NK"),
    "old_logprobs_NS": ("old_logprobs_N", "candidate_old_logprobs_NK"),
    "advantages_NS": ("advantages_N", "candidate_advantages_NK"),
}


def from_branches(**fields) -> PolicyBatch:
    """The fields of the two branches, and the others of PolicyBatch under their own names."""
    slots = {
        name: torch.cat([fields.pop(one)[:, None], fields.pop(more)], dim=1) for name, (one, more) in SLOTS.items()
    }
    return PolicyBatch(**slots, **fields)


def branches(batch: PolicyBatch) -> dict:
    """The arguments of `from_branches`."""
    fields = {name: getattr(batch, name) for name in batch.__dataclass_fields__ if name not in SLOTS}
    for name, (one, more) in SLOTS.items():
        fields[one], fields[more] = getattr(batch, name)[:, 0], getattr(batch, name)[:, 1:]
    return fields


def change(batch: PolicyBatch, **fields) -> PolicyBatch:
    """With other values for some of the arguments of `from_branches`."""
    return from_branches(**{**branches(batch), **fields})
