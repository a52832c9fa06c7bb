"""The typed configuration: what a TOML file may contain, checked as a whole before anything runs.

Unknown keys, wrong types and impossible combinations are refused with the key's full name. The defaults are meant for a
real model on one device; `../configs/` holds complete files.
"""

from ipvrm_core.trainer.config.base import ConfigError, Section
from ipvrm_core.trainer.config.data import Chats, Source
from ipvrm_core.trainer.config.evaluation import Eval, Leakage, Verifier
from ipvrm_core.trainer.config.experiment import Config
from ipvrm_core.trainer.config.listing import describe
from ipvrm_core.trainer.config.loading import check, load
from ipvrm_core.trainer.config.model import Lora, Model, Scratch
from ipvrm_core.trainer.config.policy import Batch, Correction, Rl, RlRewardModel
from ipvrm_core.trainer.config.reward_model import RewardModel
from ipvrm_core.trainer.config.training import Generation, Optim, Rollout, Sft, Vllm

__all__ = [
    "Batch",
    "Chats",
    "Config",
    "ConfigError",
    "Correction",
    "Eval",
    "Generation",
    "Leakage",
    "Lora",
    "Model",
    "Optim",
    "RewardModel",
    "Rl",
    "RlRewardModel",
    "Rollout",
    "Scratch",
    "Section",
    "Sft",
    "Source",
    "Verifier",
    "Vllm",
    "check",
    "describe",
    "load",
]
