"""Input checks of the public functions: ValueError with name, expectation and what was given.

Values are looked at on CPU only, where looking waits for no device, and not while torch.compile traces.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from ipvrm_core.fused.head import default_buffer_bytes
from ipvrm_core.fused.shard import VocabularyShard
from ipvrm_core.fused.transform import LogitTransform

_check_values: ContextVar[bool] = ContextVar("ipvrm_check_values", default=False)


def local_parts(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None, shard: VocabularyShard | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """DTensors as this rank's own: whole on every rank, or with a shard split by its rows. ValueError for others."""
    return (
        _local("hidden", hidden, None),
        None if weight is None else _local("weight", weight, shard),
        None if bias is None else _local("bias", bias, shard),
    )


def _local(name: str, x: Tensor, shard: VocabularyShard | None) -> Tensor:
    if not hasattr(x, "to_local"):
        return x
    split = shard is not None and len(x.placements) == 1 and x.placements[0].is_shard(0)
    if not split and not all(placement.is_replicate() for placement in x.placements):
        raise ValueError(
            f"{name} must be whole on every rank, or split by its rows with shard=VocabularyShard.of(weight) where all "
            f"ranks have the same rows of hidden; got a DTensor placed as {x.placements}: gather it with full_tensor()"
        )
    return x.to_local()


def check_head(hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[int, int]:
    """(N, V). With weight=None `hidden` is the logits [N, V]."""
    name, letters = ("logits", "[N, V]") if weight is None else ("hidden", "[N, D]")
    _check_matrix(name, letters, hidden)
    if weight is None:
        V = hidden.shape[1]
    else:
        _check_matrix("weight", "[V, D]", weight)
        if weight.shape[1] != hidden.shape[1]:
            raise ValueError(f"weight must be [V, D] with D = {hidden.shape[1]}; got shape {tuple(weight.shape)}")
        _check_device("weight", weight, hidden)
        V = weight.shape[0]
    if V < 1:
        raise ValueError("the vocabulary must have at least one token; got V = 0")
    if bias is not None:
        if bias.shape != (V,) or not bias.is_floating_point():
            raise ValueError(f"bias must be floating point [V] = ({V},); got {bias.dtype}, shape {tuple(bias.shape)}")
        _check_device("bias", bias, hidden)
    return hidden.shape[0], V


def checked_shard(shard: VocabularyShard | None, backend: str, V: int) -> tuple[int, str]:
    """(V of the whole head, the shard as operators take it)."""
    if shard is None:
        return V, ""
    if backend == "reference":
        raise ValueError("a vocabulary shard needs backend 'triton' or 'chunked'; got 'reference'")
    if not (0 <= shard.first <= shard.vocabulary - V and shard.widest >= V):
        raise ValueError(f"weight must be the shard's [V_r, D], {shard}; got V_r = {V}")
    return shard.vocabulary, shard.packed()


def check_ids(name: str, ids: Tensor, shape: tuple[int | None, ...], V: int, like: Tensor) -> None:
    """int64 of the given shape (None: any size) with values below V; negative values are padding."""
    fits = ids.dim() == len(shape) and all(want in (None, got) for want, got in zip(shape, ids.shape, strict=True))
    if not fits or ids.dtype != torch.int64:
        letters = ", ".join("K" if size is None else f"N = {size}" for size in shape)
        raise ValueError(f"{name} must be int64 [{letters}]; got {ids.dtype}, shape {tuple(ids.shape)}")
    _check_device(name, ids, like)
    if readable(ids) and ids.max() >= V:
        raise ValueError(f"{name} must be below V = {V}; got {int(ids.max())}")


def checked_transform(temperature: float | Tensor, softcap: float | None, N: int, like: Tensor) -> LogitTransform:
    """A positive number, or a tensor [N] of them, divides the logits; a positive soft cap bounds them before."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0 or None; got {softcap}")
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0; got {temperature}")
        return LogitTransform(float(temperature), None, softcap)
    if temperature.shape != (N,) or not temperature.is_floating_point():
        given = f"{temperature.dtype}, shape {tuple(temperature.shape)}"
        raise ValueError(f"temperature must be a number or floating point [N = {N}]; got {given}")
    _check_device("temperature", temperature, like)
    if readable(temperature) and not (temperature > 0).all():
        raise ValueError(f"temperature must be > 0; got {temperature.min().item()}")
    return LogitTransform(1.0, temperature, softcap)


def check_near(near: Tensor | None, N: int, like: Tensor) -> None:
    """None, or floating point [N]; any values will do."""
    if near is not None:
        if near.shape != (N,) or not near.is_floating_point():
            raise ValueError(f"near must be floating point [N = {N}]; got {near.dtype}, shape {tuple(near.shape)}")
        _check_device("near", near, like)


def check_rule(rule: dict, N: int, like: Tensor) -> None:
    """The arguments of the candidate rule that have a range."""
    p_min, top_k, exclude = rule["p_min"], rule["top_k"], rule["exclude"]
    if not 0 < p_min <= 1:
        raise ValueError(f"p_min must be in (0, 1]; got {p_min}")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k must be >= 0 or None; got {top_k}")
    if exclude is not None:
        if exclude.shape != (N,) or exclude.dtype != torch.bool:
            raise ValueError(f"exclude must be bool [N = {N}]; got {exclude.dtype}, shape {tuple(exclude.shape)}")
        _check_device("exclude", exclude, like)


def check_bfloat16_logits(
    asked: bool, backend: str, hidden: Tensor, weight: Tensor | None, shard: VocabularyShard | None
) -> None:
    """Only the Triton kernels read logits in bfloat16, and only bfloat16 products write them. backend: resolved."""
    if not asked:
        return
    if shard is not None:
        raise ValueError(f"bfloat16_logits is for a whole head; got {shard}")
    if backend != "triton":
        raise ValueError(f"bfloat16_logits needs backend 'triton'; got {backend!r}")
    for name, x in (("hidden", hidden), ("weight", weight)):
        if x is not None and x.dtype != torch.bfloat16:
            raise ValueError(f"bfloat16_logits needs {name} in torch.bfloat16; got {x.dtype}")


def checked_budget(max_buffer_bytes: int | None, hidden: Tensor, weight: Tensor | None = None) -> int:
    """The budget in bytes; None is the default of the device. weight: where its gradient may be made."""
    if max_buffer_bytes is None:
        trained = weight is not None and weight.requires_grad and torch.is_grad_enabled()
        return default_buffer_bytes(hidden.device, trained)
    if max_buffer_bytes < 1:
        raise ValueError(f"max_buffer_bytes must be >= 1 or None; got {max_buffer_bytes}")
    return max_buffer_bytes


def readable(x: Tensor) -> bool:
    """Whether looking at values is free, or asked for: on CPU, or anywhere inside `checked_values`.

    A fake tensor, of which torch knows the shape alone, says that it is on the CPU; its memory does not.
    """
    if not x.numel() or torch.compiler.is_compiling():
        return False
    return (x.device.type == "cpu" and x.untyped_storage().device.type == "cpu") or _check_values.get()


@contextmanager
def checked_values() -> Iterator[None]:
    """Inside this context the values of GPU tensors (ids, temperatures) are checked too; every check waits for the GPU.

    Outside it an id >= V on a GPU is not reported: its log-probability, and with it the loss, comes out as NaN.
    """
    token = _check_values.set(True)
    try:
        yield
    finally:
        _check_values.reset(token)


def _check_matrix(name: str, letters: str, x: Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"{name} must be {letters}; got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point; got {x.dtype}")


def _check_device(name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}; got {x.device}")
