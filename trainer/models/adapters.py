"""LoRA adapters: put on, several by name on one frozen base, saved apart, merged into a copy of the weights."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ipvrm_core.trainer.config import Lora
from ipvrm_core.trainer.files import read_tensors, write_folder
from ipvrm_core.trainer.models.head import VALUE_HEAD, make_value_head, value_head_of, without_value_head

WEIGHTS = "adapter_model.safetensors"  # PEFT's name, beside its adapter_config.json


def add_lora(model: nn.Module, lora: Lora, name: str = "default") -> nn.Module:
    """Adapters on all but the head: the fused loss reads the head's weight, so an adapter there would be lost."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    with without_value_head(model):  # PEFT would freeze it, and put adapters on it
        wrapped = get_peft_model(model, config, adapter_name=name)
    if any("lora_" in key for key, _ in wrapped.get_output_embeddings().named_parameters()):
        raise ValueError(f"lora.target_modules must not reach the output head; got {lora.target_modules!r}")
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


class OneBase:
    """A frozen model that several roles share, each with an adapter of its own or with none.

    Switching moves no weight. Adapters keep their `requires_grad` while another one is on, which PEFT alone does not
    do: a backward pass may come after the switch, and would lose its gradients.
    """

    def __init__(self, model: nn.Module, lora: Lora, name: str):
        """The first adapter, a new one."""
        self.model = add_lora(model, lora, name)
        self.state: tuple[str | None, bool] | None = None  # (adapter, training): what is on now
        self.frozen: set[str] = set()  # adapters that are not trained

    def load(self, folder: Path, name: str, trained: bool) -> "Role":
        """A saved adapter under a new name. ValueError for one of another base."""
        from peft import PeftConfig, set_peft_model_state_dict

        weights = read_tensors(folder / WEIGHTS)
        role = self.add(name, trained, config=PeftConfig.from_pretrained(folder))
        found = set_peft_model_state_dict(self.model, weights, adapter_name=name)
        wrong = sorted([*filter(lambda key: _of(key, name), found.missing_keys), *found.unexpected_keys])
        if wrong:
            raise ValueError(f"{folder} does not fit its base: {', '.join(wrong[:3])}")
        if (folder / VALUE_HEAD).exists():
            role.value_head = make_value_head(role).requires_grad_(trained)
            role.value_head.load_state_dict(read_tensors(folder / VALUE_HEAD))
        return role

    def add(self, name: str, trained: bool, config=None) -> "Role":
        """A new adapter, like the first one unless PEFT's `config` says otherwise."""
        self.model.add_adapter(name, config or deepcopy(next(iter(self.model.peft_config.values()))))
        if not trained:
            self.frozen.add(name)
        self.state = None  # PEFT has changed modes and gradients
        return Role(self, name)

    def enter(self, adapter: str | None, training: bool) -> None:
        """Put this adapter on, None for none, and the layers in this mode."""
        if self.state == (adapter, training):
            return
        if self.state is None or adapter != self.state[0]:
            if adapter is None:
                self.model.base_model.disable_adapter_layers()
            else:
                self.model.base_model.enable_adapter_layers()
                self.model.set_adapter(adapter)
            for key, parameter in self.model.named_parameters():
                parameter.requires_grad_(".lora_" in key and not any(_of(key, name) for name in self.frozen))
        self.model.train(training)
        self.state = adapter, training

    def recomputation(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """For activation checkpointing: (forward, recomputation), which is made under the forward's adapter."""
        return nullcontext(), self._again(self.state)

    @contextmanager
    def _again(self, state: tuple[str | None, bool]) -> Iterator[None]:
        now = self.state
        self.enter(*state)
        yield
        self.enter(*now)


class Role(nn.Module):
    """The shared base with one adapter on, or none: a model like any other.

    Calling it, or taking its base, puts its adapter and its mode on. Its parameters are the base's, its adapter's and
    its value head's.
    """

    def __init__(self, one: OneBase, adapter: str | None):
        super().__init__()
        self.one, self.adapter = one, adapter
        self.shared = one.model
        self.training = False

    @property
    def config(self):
        return self.shared.config

    @property
    def peft_config(self) -> dict:
        """Of its own adapter alone."""
        return {name: config for name, config in self.shared.peft_config.items() if name == self.adapter}

    def forward(self, *args, **kwargs):
        self.one.enter(self.adapter, self.training)
        return self.shared(*args, **kwargs)

    def get_base_model(self) -> nn.Module:
        self.one.enter(self.adapter, self.training)
        return self.shared.get_base_model()

    def train(self, mode: bool = True) -> "Role":
        """Of this role alone: the shared layers take it on when the role is entered."""
        self.training = mode
        return self

    def named_parameters(self, *args, **kwargs) -> Iterator[tuple[str, nn.Parameter]]:
        others = self.shared.peft_config.keys() - {self.adapter}
        for key, parameter in super().named_parameters(*args, **kwargs):
            if not any(_of(key, name) for name in others):
                yield key, parameter


def _of(key: str, adapter: str) -> bool:
    """Whether the parameter `key` is one of this adapter's."""
    return ".lora_" in key and f".{adapter}." in f"{key}."


def has_adapter(model: nn.Module) -> bool:
    return model.adapter is not None if isinstance(model, Role) else hasattr(model, "peft_config")


def save_adapter(model: nn.Module, path: Path) -> None:
    """The adapter alone as PEFT's folder, and the value head beside it: whole or not at all."""
    from peft import get_peft_model_state_dict

    shared, name = (model.shared, model.adapter) if isinstance(model, Role) else (model, model.active_adapter)
    weights = get_peft_model_state_dict(shared, adapter_name=name, save_embedding_layers=False)

    def fill(target: Path) -> None:
        save_file({key: weight.contiguous() for key, weight in weights.items()}, target / WEIGHTS)
        shared.peft_config[name].save_pretrained(target)
        if (head := value_head_of(model)) is not None:
            save_file(head.state_dict(), target / VALUE_HEAD)

    write_folder(path, fill)


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """The base model's weights by their own names, with the adapters in them; the model stays as it is."""
    base = model.get_base_model()
    layers = {name: module for name, module in base.named_modules() if hasattr(module, "get_delta_weight")}
    merged = {}
    for name, weight in base.state_dict().items():
        layer, _, leaf = name.rpartition(".base_layer.")
        if layer not in layers:
            if ".lora_" not in name:
                merged[name] = weight
            continue
        if leaf == "weight" and not layers[layer].disable_adapters:
            for adapter in layers[layer].active_adapters:
                weight = (weight.float() + layers[layer].get_delta_weight(adapter).float()).to(weight.dtype)
        merged[f"{layer}.{leaf}"] = weight
    return merged
