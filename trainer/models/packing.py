"""Answers end to end in one row: attention inside each of them, with neither padding nor a mask.

Such a row carries `bounds` [1, 1, 1, B + 1] in place of a mask: the integers at which its B sequences begin, and its
length. transformers hands a mask of four dimensions on to the attention as it is, through recomputation too.

Shape letters: B sequences, L length, H heads, D width of a head.
"""

import torch
from torch import Tensor, nn

from ipvrm_core.heads import causal_lm

NAME = "ipvrm_sequences"  # of the attention, in transformers' table


def sequence_attention(
    module: nn.Module,
    query_BHLD: Tensor,
    key_BHLD: Tensor,
    value_BHLD: Tensor,
    mask: Tensor | None,
    sliding_window: int | None = None,
    **how,
) -> tuple[Tensor, None]:
    """torch's own attention, once for each sequence of a packed row; with any other mask, as transformers calls it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    given = query_BHLD, key_BHLD, value_BHLD
    if mask is None or mask.dtype == torch.bool or mask.is_floating_point():
        return sdpa_attention_forward(module, *given, mask, sliding_window=sliding_window, **how)
    lengths = mask.flatten().diff().tolist()
    if sliding_window is not None and max(lengths) > sliding_window:
        raise ValueError(f"packing needs full attention: {max(lengths)} tokens, a window of {sliding_window}")
    pieces = zip(*(tensor.split(lengths, dim=2) for tensor in given), strict=True)
    return torch.cat([sdpa_attention_forward(module, *piece, None, **how)[0] for piece in pieces], dim=1), None


def can_pack(model: nn.Module) -> nn.Module:
    """The model with an attention that takes packed rows: flash_attention_2 on a GPU where its package is installed,
    else ours, which takes any other batch as sdpa does. Once or often. ValueError for a model that has another.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    from transformers.utils import is_flash_attn_2_available

    base = causal_lm(model)
    weight = next(base.parameters())
    flash = weight.is_cuda and weight.dtype != torch.float32 and is_flash_attn_2_available()
    name = "flash_attention_2" if flash else NAME
    if base.config._attn_implementation == name:
        return model
    if not base._supports_sdpa or base._is_stateful:
        raise ValueError(f"packing = true needs a model of attention alone; {type(base).__name__} is another")
    AttentionInterface.register(NAME, sequence_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    base.set_attn_implementation(name)
    check_packing(model)
    return model


def attention_arguments(model: nn.Module, bounds: Tensor, positions_1L: Tensor) -> dict[str, Tensor | None]:
    """What the forward of a model that `can_pack` is told of a packed row. flash_attention_2 reads the positions."""
    ours = causal_lm(model).config._attn_implementation == NAME
    return {"attention_mask": bounds if ours else None, "position_ids": positions_1L}


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """ValueError unless two sequences in one row have the hidden states that each has alone."""
    base = causal_lm(model)
    weight, was_training = next(base.parameters()), model.training
    first_L, second_L = (torch.arange(1, length + 1, device=weight.device) for length in (5, 3))
    bounds, positions_L = torch.tensor([0, 5, 8])[None, None, None], torch.cat([first_L, second_L]) - 1
    model.eval()
    run = causal_lm(model).base_model  # of a role: with its adapter
    alone = [run(input_ids=ids_L[None], use_cache=False).last_hidden_state for ids_L in (first_L, second_L)]
    row_1L = torch.cat([first_L, second_L])[None]
    packed = run(input_ids=row_1L, use_cache=False, **attention_arguments(model, bounds, positions_L[None]))
    model.train(was_training)
    expected = torch.cat(alone, dim=1).float()
    worst = ((packed.last_hidden_state.float() - expected).abs().max() / expected.abs().max()).item()
    if not worst < (1e-4 if weight.dtype == torch.float32 else 0.05):
        raise ValueError(
            f"packing = true needs a model whose sequences can stand in one row; those of {type(base).__name__} see "
            f"each other there (hidden states differ by {worst:.3g})"
        )
