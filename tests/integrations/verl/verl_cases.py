"""A model, a batch in verl's own form, and an engine on a CPU. (verl installs a package `tests`.)"""

import os

os.environ |= {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "verl_cpu"}

from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDict
from transformers import Qwen3Config, Qwen3ForCausalLM
from verl.utils import tensordict_utils as tu
from verl.workers.engine.base import EngineRegistry

from ipvrm_core.integrations.verl.engine import register_engine

register_engine("cpu")
SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
V, B, T = SIZES["vocab_size"], 8, 0.8
RESPONSES = (3, 5, 2, 6, 4, 1, 5, 3)
PROMPTS = (2, 2, 3, 3, 4, 4, 2, 2)


def save_models(folder: Path) -> dict[str, str]:
    paths = {}
    for seed, name in enumerate(("policy", "reward")):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(6)
        model.save_pretrained(folder / name)
        paths[name] = str(folder / name)
    return paths


def jagged(rows) -> torch.Tensor:
    return torch.nested.as_nested_tensor([torch.as_tensor(row) for row in rows], layout=torch.jagged)


def batch(own: slice = slice(0, B)) -> TensorDict:
    """Answers without padding, with holes in the response mask, of four prompts; some of them of this process."""
    generator = torch.Generator().manual_seed(0)

    def draw(length):
        return torch.randint(3, V, (length,), generator=generator)

    prompts = [draw(length) for length in PROMPTS]
    responses = [draw(length) for length in RESPONSES]
    masks = [torch.ones(length, dtype=torch.long) for length in RESPONSES]
    masks[3][2:4] = 0
    masks[6][1] = 0
    old = [-3 - torch.rand(length, generator=generator) for length in RESPONSES]
    outcome = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.7, -0.7, -1.0, 1.0])
    rows = range(B)[own]
    fields = {
        "input_ids": jagged([torch.cat([prompts[b], responses[b]]) for b in rows]),
        "position_ids": jagged([torch.arange(PROMPTS[b] + RESPONSES[b]) for b in rows]),
        "prompts": jagged([prompts[b] for b in rows]),
        "responses": jagged([responses[b] for b in rows]),
        "response_mask": jagged([masks[b] for b in rows]),
        "loss_mask": jagged([masks[b] for b in rows]),
        "attention_mask": jagged([torch.ones(PROMPTS[b] + RESPONSES[b], dtype=torch.long) for b in rows]),
        "old_log_probs": jagged([old[b] for b in rows]),
        "advantages": jagged([outcome[b] * masks[b] for b in rows]),
    }
    data = TensorDict(fields, batch_size=len(rows))
    settings = {"use_remove_padding": False, "use_dynamic_bsz": False, "use_fused_kernels": False}
    sizes = {"micro_batch_size_per_gpu": 2, "max_token_len_per_gpu": 512, "global_batch_size": B}
    tu.assign_non_tensor(data, **settings, **sizes, temperature=T, calculate_entropy=False)
    return data


def engine(path: str, world: int = 1):
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

    full = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    made = EngineRegistry.new(
        model_type="language_model",
        backend="fsdp2",
        model_config=HFModelConfig(
            path=path,
            use_remove_padding=False,
            override_config={"attn_implementation": "sdpa"},
            enable_gradient_checkpointing=False,
            load_tokenizer=False,
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            fsdp_size=world,
            param_offload=False,
            optimizer_offload=False,
            use_dynamic_bsz=False,
            micro_batch_size_per_gpu=2,
            infer_micro_batch_size_per_gpu=2,
            use_remove_padding=False,
            use_torch_compile=False,
            model_dtype="fp32",
            mixed_precision=full,
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3),
        checkpoint_config=CheckpointConfig(),
    )
    made.initialize()
    return made


def uids() -> list[str]:
    return [f"prompt {b // 2}" for b in range(B)]


REWARDS = np.array([1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0])
