"""Answers by vLLM, in this process: the policy's weights are handed over after every update, and a probe compares."""

import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ipvrm_core.heads import causal_lm
from ipvrm_core.trainer.config import Vllm
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.models import save_adapter
from ipvrm_core.trainer.sampling.base import Drawing, Sample, eos_ids
from ipvrm_core.trainer.sampling.engine import Engine
from ipvrm_core.trainer.sampling.probe import probe
from ipvrm_core.trainer.sampling.weights import weights_of

SEEDS = 2**62


def adapter_rank(model: nn.Module, settings: Vllm) -> int:
    """Of the adapter that the engine gets; 0 for whole weights."""
    if causal_lm(model) is model or settings.lora != "adapter":
        return 0
    return max(config.r for config in model.peft_config.values())


class VllmSampler:
    """A sampler with an engine of its own; `batch` sequences at once, `dtype` that of the engine's weights.

    A policy with adapters is served as one: the base is handed over once, an adapter after every update. An adapter
    travels as files in memory, where there is such a folder, since vLLM reads them; whole weights never do.
    """

    def __init__(self, policy: LanguageModel, tokenizer, settings: Vllm, *, batch: int, dtype: str):
        self.tokenizer, self.settings, self.dtype = tokenizer, settings, settings.dtype or dtype
        model, rank = causal_lm(policy.model), adapter_rank(policy.model, settings)
        self.adapted = rank > 0
        self.ends = eos_ids(model, tokenizer)
        self.base: nn.Module | None = None  # whose base weights the engine has
        self.adapter, self.folder = None, None
        self.awake = True
        self.generator: torch.Generator | None = None  # that answers are drawn with; None: torch's own
        self.engine = Engine(model, settings, self.dtype, batch=batch, lora_rank=rank)
        self.context, self.positions = self.engine.context, policy.positions
        try:
            self.sync(policy)
        except BaseException:
            self.close()
            raise

    # ---- the Sampler protocol

    @torch.no_grad()
    def sample(self, prompts: Sequence[list[int]], drawing: Drawing) -> list[Sample]:
        self._wake()
        seed = int(torch.randint(SEEDS, (), generator=self.generator))  # the caller's generator decides, and moves on
        made = self.draw(prompts, drawing, seed)
        return made if drawing.top_p == 1 or drawing.temperature == 0 else self._with_raw_logprobs(made)

    @torch.no_grad()
    def sync(self, policy: LanguageModel) -> None:
        self._wake()
        if not self.adapted or self.base is not policy.model:
            self.engine.load(weights_of(policy.model, adapted=self.adapted))
            self.base = policy.model
        if self.adapted:
            self._hand_adapter(policy.model)
        probe(self, policy)

    def rest(self) -> None:
        if self.awake:
            self.engine.sleep()
        self.awake = False

    def stop(self) -> None:
        """End what another thread samples, with an EngineError there; then there is nothing left but to close."""
        self.engine.stop()

    def close(self) -> None:
        self.engine.close()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None

    # ---- inside

    def _wake(self) -> None:
        if not self.awake:
            self.engine.wake()
        self.awake = True

    def draw(self, prompts: Sequence[list[int]], drawing: Drawing, seed: int, *, ends: bool = True) -> list[Sample]:
        """`sample` with a seed; every answer has one of its own. ends=False: no answer ends before its limit.

        Log-probs are those that were sampled from: after top-p, where there is one.
        """
        from vllm import SamplingParams

        self._check_lengths(max(map(len, prompts)), drawing.max_new_tokens)
        greedy = drawing.temperature == 0
        count = 1 if greedy else drawing.samples
        parameters = [
            SamplingParams(
                n=count,
                temperature=drawing.temperature,
                top_p=1.0 if greedy else drawing.top_p,
                max_tokens=drawing.max_new_tokens,
                logprobs=0,  # of the sampled token alone
                stop_token_ids=sorted(self.ends) if ends else [],
                ignore_eos=True,  # what ends an answer is said above
                detokenize=False,
                # vLLM gives the n answers the seeds seed .. seed + n - 1
                seed=(seed + index * count) % SEEDS,
            )
            for index in range(len(prompts))
        ]
        made = []
        for prompt, request in zip(prompts, self.engine.generate(list(prompts), parameters, self.adapter), strict=True):
            outputs = sorted(request.outputs, key=lambda output: output.index)
            for output in outputs if not greedy else outputs * drawing.samples:
                ids = list(output.token_ids)
                logprobs = [found[token].logprob for token, found in zip(ids, output.logprobs, strict=True)]
                made.append(Sample(list(prompt), ids, logprobs, output.finish_reason == "stop"))
        return made

    def _check_lengths(self, longest: int, new_tokens: int) -> None:
        """ValueError for prompts that leave no position, or fewer than were asked for where the cache is why."""
        if longest >= self.context or (self.context != self.positions and longest + new_tokens > self.context):
            raise ValueError(
                f"the engine has {self.context} positions (generation.vllm.context, or what cache_gib holds); "
                f"got a prompt of {longest} tokens and max_new_tokens = {new_tokens}"
            )

    def _with_raw_logprobs(self, samples: list[Sample]) -> list[Sample]:
        """The same answers with log-probs of the full distribution, by a pass over them as prompts.

        An answer that fills all positions leaves none for the token that a request must make: its last one is nan.
        """
        from vllm import SamplingParams

        whole = [sample.prompt_ids + sample.response_ids for sample in samples]
        fits = [ids[: self.context - 1] for ids in whole]
        parameters = [SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)] * len(fits)
        made = []
        for sample, ids, request in zip(
            samples, fits, self.engine.generate(fits, parameters, self.adapter), strict=True
        ):
            start = len(sample.prompt_ids)
            raw = [found[ids[t]].logprob for t, found in enumerate(request.prompt_logprobs) if t >= start]
            raw += [math.nan] * (len(sample.response_ids) - len(raw))
            made.append(Sample(sample.prompt_ids, sample.response_ids, raw, sample.finished))
        return made

    def _hand_adapter(self, model: nn.Module) -> None:
        from vllm.lora.request import LoRARequest

        number = self.adapter.lora_int_id + 1 if self.adapter else 1  # under an old number it would keep the old one
        folder = tempfile.mkdtemp(prefix="ipvrm-adapter-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        old, self.folder = self.folder, folder
        save_adapter(model, Path(folder))
        if self.adapter:
            self.engine.remove_adapter(self.adapter.lora_int_id)
        self.adapter = LoRARequest(f"policy-{number}", number, folder)
        self.engine.add_adapter(self.adapter)
        if old:
            shutil.rmtree(old)
