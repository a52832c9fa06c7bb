"""Reference log-probs on disk, computed once for a model, a temperature and the token ids of the data."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.files import read_tensors, write_file
from ipvrm_core.trainer.language_model import LanguageModel

FORMAT = 1  # goes into the key: a change in what is stored makes old files unused, never wrong


def reference_logprobs(experiment: Experiment, model: LanguageModel, answers: Sequence[Answer], folder: Path) -> Tensor:
    """log p(y_t|s_t) of all response tokens at the sampling temperature, packed [N], float32 on the CPU.

    Read from folder/reference-<key>.safetensors, or computed and written there, whole or not at all. ValueError for a
    file that does not fit the answers.
    """
    path = folder / f"reference-{cache_key(experiment, model, answers)}.safetensors"
    count = sum(len(answer.response_ids) for answer in answers)
    if path.exists():
        logprobs_N = read_tensors(path)["logprobs"]
        if logprobs_N.shape != (count,):
            raise ValueError(f"{path} must hold {count} log-probs; got {tuple(logprobs_N.shape)}. Delete it")
        tqdm.write(f"reference log-probs of {len(answers)} answers read from {path}")
        return logprobs_N
    logprobs_N = model.eval().logprobs(answers, label="reference log-probs").float().cpu()
    if not logprobs_N.isfinite().all():
        raise ValueError("the reference gives a token of the data probability 0: its log-ratio is infinite")
    folder.mkdir(parents=True, exist_ok=True)
    write_file(path, lambda target: save_file({"logprobs": logprobs_N.contiguous()}, target))
    tqdm.write(f"reference log-probs of {len(answers)} answers written to {path}")
    return logprobs_N


def cache_key(experiment: Experiment, model: LanguageModel, answers: Sequence[Answer]) -> str:
    """SHA-256 over the weights themselves, their configuration, the temperature and the token ids.

    Token ids stand for data, tokenizer and chat template: a change in any of them that matters changes an id. The
    same model under another path is the same model.
    """
    settings = {
        "format": FORMAT,
        "temperature": experiment.config.generation.temperature,
        "vocabulary": len(experiment.text.tokenizer),
        "model": {key: value for key, value in model.model.config.to_dict().items() if key != "_name_or_path"},
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for answer in answers:
        digest.update(json.dumps([answer.prompt_ids, answer.response_ids]).encode())
    return digest.hexdigest()[:32]
