"""Models and tokenizers: load or make them, reach hidden states and head, save them as Hugging Face folders."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ipvrm_core import linear_logprobs
from ipvrm_core.trainer.config import Lora, Model, Scratch
from ipvrm_core.trainer.files import read_tensors, write_folder


def character_tokenizer(alphabet: str):
    """One token per character of `alphabet`, and <pad> and <eos>; any other character is an error, not an unknown."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *sorted(set(alphabet))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()  # without it, decoding puts spaces between the characters
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def load_tokenizer(model: Model, alphabet: str | None):
    """The tokenizer of `model.path`, or the character tokenizer of the built-in tasks."""
    if model.scratch:
        if alphabet is None:
            raise ValueError("model.scratch needs data.task (its tokenizer has the task's characters); got data.path")
        return character_tokenizer(alphabet)
    from transformers import AutoTokenizer

    _check_gguf(model.gguf_file)
    extra = {"gguf_file": model.gguf_file} if model.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(model.path, **extra)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {model.path} has no EOS token; answers could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_gguf(file: str | None) -> None:
    """ValueError for a GGUF file without the package that reads it."""
    if file and find_spec("gguf") is None:
        raise ValueError(f"{file} needs the package gguf, which is not installed: pip install 'ipvrm-core[gguf]'")


def build_scratch(scratch: Scratch, tokenizer) -> nn.Module:
    """Random weights; the caller seeds."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config_class, model_class = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[scratch.architecture]
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=scratch.hidden_size,
        num_hidden_layers=scratch.layers,
        num_attention_heads=scratch.heads,
        num_key_value_heads=scratch.kv_heads,
        head_dim=scratch.hidden_size // scratch.heads,
        intermediate_size=scratch.intermediate_size,
        max_position_embeddings=scratch.context,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return model_class(config)


def load_pretrained(path: str | Path, dtype: str = "float32", gguf_file: str | None = None) -> nn.Module:
    """A causal language model; a GGUF file is dequantised into dense weights that can be trained and saved.

    ValueError names a model whose weights are damaged.
    """
    try:
        return _load_pretrained(path, dtype, gguf_file)
    except SafetensorError as error:
        raise ValueError(f"{path}: its weights are damaged: {error}") from error


def _load_pretrained(path: str | Path, dtype: str, gguf_file: str | None) -> nn.Module:
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils import cached_file

    settings = {"dtype": getattr(torch, dtype)}
    if not gguf_file:
        model = AutoModelForCausalLM.from_pretrained(path, **settings)
        saved = cached_file(path, VALUE_HEAD, _raise_exceptions_for_missing_entries=False)  # folder or hub name
        if saved:
            add_value_head(model).load_state_dict(read_tensors(Path(saved)))
        return model
    _check_gguf(gguf_file)
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        path, gguf_file=gguf_file, quantization_config=quantization, **settings
    )
    # The weights are dense now, but the model still calls itself quantised and would refuse to be saved.
    model.hf_quantizer, model.is_quantized = None, False
    return model


def positions(model: Model) -> int | None:
    """Tokens that the model has positions for, without loading its weights; None where it does not say."""
    if model.scratch:
        return model.scratch.context
    from transformers import AutoConfig

    extra = {"gguf_file": model.gguf_file} if model.gguf_file else {}
    return getattr(AutoConfig.from_pretrained(model.path, **extra).get_text_config(), "max_position_embeddings", None)


def start_model(model: Model, tokenizer) -> nn.Module:
    """The base model of an experiment, before any phase. The caller seeds."""
    if model.scratch:
        return build_scratch(model.scratch, tokenizer)
    return load_pretrained(model.path, model.dtype, model.gguf_file)


def add_lora(model: nn.Module, lora: Lora) -> nn.Module:
    """Adapters on all but the head: the fused loss reads the head's weight, so an adapter there would be lost."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    with _without_value_head(model):  # PEFT would freeze it, and put adapters on it
        wrapped = get_peft_model(model, config)
    if any("lora_" in name for name, _ in wrapped.get_output_embeddings().named_parameters()):
        raise ValueError(f"lora.target_modules must not reach the output head; got {lora.target_modules!r}")
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


VALUE_HEAD = "value_head.safetensors"  # beside the weights of a model that has one


def add_value_head(model: nn.Module) -> nn.Linear:
    """A trainable scalar on the last hidden state, float32, zero at the start: an explicit score of each token."""
    weight = head_of(model).weight
    head = nn.Linear(weight.shape[1], 1, device=weight.device, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    causal_lm(model).value_head = head
    return head


def value_scores(model: nn.Module, hidden_ND: Tensor) -> Tensor:
    """The value head's scores [N], from hidden states [N, D]."""
    head = causal_lm(model).value_head
    return (hidden_ND.to(head.weight.dtype) @ head.weight.T + head.bias)[:, 0]


@contextmanager
def _without_value_head(model: nn.Module) -> Iterator[nn.Linear | None]:
    """The model as its own class knows it; the head is back afterwards."""
    head = model._modules.pop("value_head", None)
    try:
        yield head
    finally:
        if head is not None:
            model.value_head = head


def causal_lm(model: nn.Module) -> nn.Module:
    """Without the PEFT wrapper, whose adapters stay active inside the layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class OutputHead(NamedTuple):
    """logits = h W^T + b, then softcap * tanh(logits / softcap) where the model has a soft cap (Gemma 2)."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None

    @property
    def options(self) -> dict:
        """The arguments of `linear_logprobs` and its like, besides the weight."""
        return {"bias": self.bias, "softcap": self.softcap}


def head_of(model: nn.Module) -> OutputHead:
    """The output head of a causal language model."""
    model = causal_lm(model)
    head = model.get_output_embeddings()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return OutputHead(head.weight, getattr(head, "bias", None), softcap)


def hidden_states(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states, after the final norm: ids, mask [B, L] -> [B, L, D]. The [B, L, V] logits are never made."""
    backbone = causal_lm(model).get_decoder()
    return backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """ValueError unless the logits are those of `head_of`: some architectures scale them, which would be lost."""
    device = next(model.parameters()).device
    ids = torch.arange(4, device=device)[None]
    was_training = model.training
    model.eval()
    expected = causal_lm(model)(input_ids=ids).logits[0].float().log_softmax(-1)[:, :8]
    hidden = hidden_states(model, ids, torch.ones_like(ids))[0]
    head = head_of(model)
    columns = torch.arange(8, device=device).expand(4, 8)
    ours = linear_logprobs(hidden, head.weight, columns, **head.options).logprobs_NK
    model.train(was_training)
    tolerance = 1e-3 if expected.dtype == head.weight.dtype else 0.1  # the model's own logits are rounded to bfloat16
    worst = (ours - expected).abs().max().item()
    if worst > tolerance:
        raise ValueError(
            f"{type(causal_lm(model)).__name__} does more in its head than hidden @ weight.T + bias and a soft cap "
            f"(log-probs differ by {worst:.3g}): logit scaling is not supported"
        )


def save_model(model: nn.Module, tokenizer, path: Path) -> None:
    """A normal Hugging Face folder, whole or not at all; adapters are merged into the weights."""
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()

    def fill(target: Path) -> None:
        with _without_value_head(model) as value_head:
            model.save_pretrained(target)
        if value_head is not None:
            save_file(value_head.state_dict(), target / VALUE_HEAD)
        tokenizer.save_pretrained(target)

    write_folder(path, fill)
