"""The peak of every pass, by part: one pass of the trainer's own code on fake tensors, in a second or two.

Shape letters: B answers, L length.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from ipvrm_core.heads import causal_lm
from ipvrm_core.trainer.batching import TokenBatch
from ipvrm_core.trainer.config import Config
from ipvrm_core.trainer.plan.blank import Blank
from ipvrm_core.trainer.plan.engine import CACHE, WEIGHTS
from ipvrm_core.trainer.plan.passes import Pass, Phase, Sizes, moved, phases
from ipvrm_core.trainer.plan.tracker import HEAD, OTHER, Tracker
from ipvrm_core.trainer.sampling.generate import _KeepLogprobs

PARTS = ("weights", "gradients", "optimiser", OTHER, HEAD, "KV cache")
STEP = "step of the optimiser"


@dataclass(frozen=True)
class Peak:
    """Bytes at the moment when a pass needs the most."""

    phase: str
    name: str
    parts: dict[str, int]
    can_be_made: bool = True  # by `measure`, which has no engine

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def models(self) -> int:
        """Without vLLM's engine."""
        return sum(self.parts[part] for part in PARTS)

    @property
    def largest(self) -> str:
        return max(self.parts, key=self.parts.__getitem__)


def estimate(
    config: Config, tokenizer, sizes: dict[str, Sizes], device: torch.device, only: Sequence[str] = ()
) -> list[Peak]:
    """The peaks of all passes of all phases, or of these. device: where they are to run; none need be here."""
    peaks, makers = [], phases(config, sizes)
    for phase_name, make in makers.items():
        if only and phase_name not in only:
            continue
        with FakeTensorMode() as mode, Tracker(device) as tracker, _unmoved():
            phase = make(Blank(config, tokenizer, torch.device("cpu"), fake=True))
            weights = phase.weights()
            tracker.label("weights", weights)
            moments = [
                torch.empty_like(p) for o in phase.optimizers if _at_hand(o, device) for p in (*moved(o), *moved(o))
            ]
            tracker.label("optimiser", [*moments, *_copies(phase)])
            for name, each in phase.passes.items():
                tracker.restart()
                parts = _run(mode, tracker, phase, each) | _beside(config, phase, each.kind == "engine", device)
                peaks.append(Peak(phase_name, name, parts, each.kind != "engine"))
            if phase.optimizers:
                parts = _step(phase, device) | _beside(config, phase, False, device)
                peaks.append(Peak(phase_name, STEP, parts, False))
    return peaks


def _beside(config: Config, phase: Phase, sampling: bool, device: torch.device) -> dict[str, int]:
    """The engine's parts, which all passes of a run with vLLM have."""
    if phase.engine:
        return phase.engine.beside(sampling, device)
    return dict.fromkeys((WEIGHTS, CACHE), 0) if config.generation.sampler == "vllm" else {}


@contextmanager
def _unmoved() -> Iterator[None]:
    """Fake modules are where they are: torch would swap their tensors, and cannot where something refers to them."""
    to = nn.Module.to
    nn.Module.to = lambda self, *_, **__: self
    try:
        yield
    finally:
        nn.Module.to = to


def _run(mode: FakeTensorMode, tracker: Tracker, phase: Phase, each: Pass) -> dict[str, int]:
    each.model.train(each.kind == "train")
    if each.kind == "engine":
        parts: dict[str, int] = tracker.peak
    elif each.kind == "generate":
        cached = _generate(tracker, each)
        parts = {**tracker.peak, "KV cache": cached}
        parts[OTHER] = tracker.most - sum(size for part, size in parts.items() if part != OTHER)
    else:
        with _gradients(tracker, phase, each):
            batch = _fake(mode, each)
            if each.kind == "train":
                each.function(batch).backward()
            else:
                with torch.no_grad():
                    each.function(batch)
        parts = tracker.peak
    return {part: parts.get(part, 0) for part in PARTS}


def _fake(mode: FakeTensorMode, each: Pass) -> TokenBatch:
    """Its micro-batch. Packed attention, inside each sequence, is that of rows of equal length without a mask."""
    with _disable_current_modes():
        made = TokenBatch.make(each.micro_batch()[-1:] * each.rows, after=each.after)
    B, L = made.ids_BL.shape
    mask = None if each.model.packed or B == 1 else torch.ones(B, 1, L, L, dtype=torch.bool)
    tensors = (None if tensor is None else mode.from_tensor(tensor) for tensor in made)
    return TokenBatch(*tensors)._replace(mask_BL=mask)


@contextmanager
def _gradients(tracker: Tracker, phase: Phase, each: Pass) -> Iterator[None]:
    """Gradients are told apart as soon as they are there, which is before the pass where one comes before it."""
    copies = {id(p): copy for optimizer in phase.optimizers for p, copy in getattr(optimizer, "pairs", [])}
    trained = [p for p in each.model.model.parameters() if p.requires_grad] if each.kind == "train" else []
    owners: dict[int, nn.Parameter] = {id(p): copies.get(id(p), p) for p in trained}

    def label(parameter: nn.Parameter) -> None:
        tracker.label("gradients", [owners[id(parameter)].grad])

    handles = [parameter.register_post_accumulate_grad_hook(label) for parameter in trained]
    for owner in owners.values():
        if each.accumulates:
            owner.grad = torch.zeros_like(owner)
            tracker.label("gradients", [owner.grad])
    yield
    for handle in handles:
        handle.remove()
    for owner in owners.values():
        owner.grad = None


@torch.no_grad()
def _generate(tracker: Tracker, each: Pass) -> int:
    """The prompts, and the last token with the whole cache; returns the bytes of that cache."""
    base, answers, (P, T) = causal_lm(each.model.model), each.answers, each.sizes
    prompts = -(-answers // each.samples)

    def forward(B: int, new: int, seen: int, cache=None):
        ids_BL = torch.ones(B, new, dtype=torch.int64)
        mask_B1LL = torch.ones(B, 1, new, seen + new, dtype=torch.bool)
        how = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        return base(input_ids=ids_BL, attention_mask=mask_B1LL, **how)

    forward(prompts, P, 0)
    most, peak = tracker.most, tracker.peak
    cache = forward(answers, P + T - 1, 0).past_key_values
    size = sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))
    tracker.restart()
    logits_BV = forward(answers, 1, P + T - 1, cache).logits[:, -1]
    keep, ids_BL = _KeepLogprobs(1.0), torch.ones(answers, 1, dtype=torch.int64)
    for _ in range(2):  # from the second on there are log-probs of the token before
        scores_BV = keep(ids_BL, logits_BV.to(torch.float32, copy=True))
    probs_BV: Tensor = (scores_BV / 1.0).softmax(-1)
    del probs_BV
    if most > tracker.most:  # a long prompt and a short answer
        tracker.most, tracker.peak, size = most, peak, size * P // (P + T) * prompts // answers
    return size


def _step(phase: Phase, device: torch.device) -> dict[str, int]:
    """Of the largest optimiser. AdamW's own need: on a GPU the roots of all second moments at once, elsewhere of one
    weight after the other, twice."""
    steps = max(phase.optimizers, key=lambda optimizer: sum(p.numel() for p in moved(optimizer)))
    present = [optimizer for optimizer in phase.optimizers if optimizer is steps or _at_hand(optimizer, device)]
    sizes = [4 * p.numel() for p in moved(steps)]
    return {
        "weights": sum(p.nbytes for p in phase.weights()),
        "gradients": sum(sizes),
        "optimiser": sum(8 * p.numel() for o in present for p in moved(o)) + sum(p.nbytes for p in _copies(phase)),
        OTHER: sum(sizes) if device.type == "cuda" else 2 * max(sizes),
        HEAD: 0,
        "KV cache": 0,
    }


def _at_hand(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Whether its moments are on the device between steps."""
    return device.type == "cpu" or not hasattr(optimizer, "moments_on")


def _copies(phase: Phase) -> list[Tensor]:
    """The float32 copies of weights with fewer bits."""
    weights = {id(p) for p in phase.weights()}
    return [p for optimizer in phase.optimizers for p in moved(optimizer) if id(p) not in weights]
