"""Models and tokenizers from a path, or new ones."""

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from ipvrm_core.trainer.config import Model, Scratch
from ipvrm_core.trainer.files import read_tensors
from ipvrm_core.trainer.models.head import VALUE_HEAD, add_value_head


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


GGUF_SINCE = "5.17"  # the first transformers that keeps GGUF weights packed unless told to dequantise


def _gguf_config(file: str):
    """ValueError for a version of transformers that does not know it: it would need other arguments."""
    try:
        from transformers import GgufConfig
    except ImportError:
        raise ValueError(f"{file} needs transformers >= {GGUF_SINCE}; got {version('transformers')}") from None
    return GgufConfig(dequantize=True)


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
    from transformers import AutoModelForCausalLM
    from transformers.utils import cached_file

    settings = {"dtype": getattr(torch, dtype)}
    if not gguf_file:
        model = AutoModelForCausalLM.from_pretrained(path, **settings)
        saved = cached_file(path, VALUE_HEAD, _raise_exceptions_for_missing_entries=False)  # folder or hub name
        if saved:
            add_value_head(model).load_state_dict(read_tensors(Path(saved)))
        return model
    _check_gguf(gguf_file)
    settings["quantization_config"] = _gguf_config(gguf_file)
    model = AutoModelForCausalLM.from_pretrained(path, gguf_file=gguf_file, **settings)
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
