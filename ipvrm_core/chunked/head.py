"""z = (h W^T + b) / T, a few rows at a time, and the way back from dLoss/dz.

Shape letters: N rows, n rows of one chunk, D hidden size, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Bytes for the private [n, V] buffers of one call. CPU: where the sweep of bench/cpu.py turns flat. CUDA: 1024 or more
# rows of a 150k vocabulary, where a matrix product is bound by arithmetic; derived, not yet measured.
DEFAULT_BUFFER_BYTES = {"cpu": 128 << 20, "cuda": 2 << 30}
_ROW_MULTIPLE = 64
# Row statistics go over a scratch of this size: in cache on a CPU, few launches on a GPU.
_SCRATCH_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}


def default_buffer_bytes(device: torch.device) -> int:
    """The budget used where `max_buffer_bytes` is None."""
    return DEFAULT_BUFFER_BYTES.get(device.type, DEFAULT_BUFFER_BYTES["cuda"])


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The accumulation type: float32, or float64 as soon as one tensor has it."""
    doubles = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if doubles else torch.float32


def rows_per_chunk(n_rows: int, vocabulary: int, bytes_per_logit: int, buffer_bytes: int) -> int:
    """How many rows fit: at least 1, at most N, a multiple of 64 when there are that many."""
    rows = buffer_bytes // (vocabulary * bytes_per_logit)
    if rows > _ROW_MULTIPLE:
        rows -= rows % _ROW_MULTIPLE
    return max(1, min(n_rows, rows))


class Head:
    """Logits in chunks of rows. With weight=None `hidden` already is the logits [N, V], and only 1/T is applied.

    Every chunk has the same shape, except that the last may be shorter. A row's logits depend on no other row's
    values; BLAS may pick another kernel for another chunk shape, so the last bits may change with the budget and N.

    bfloat16 on CUDA multiplies in tensor cores into float32. Any other half-precision weight is upcast once a call
    (V * D * 4 bytes): CPU products have no float32 output, and float16 gradients underflow at weights of 1/tokens.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, temperature: float, max_buffer_bytes: int
    ) -> None:
        self.N, self.V = hidden.shape[0], (hidden if weight is None else weight).shape[-1 if weight is None else 0]
        self.wide = wide_dtype(hidden, weight, bias)
        self.tensor_cores = weight is not None and hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16
        self.hidden = hidden
        self.weight = weight if weight is None or self.tensor_cores else weight.to(self.wide)
        self.bias = None if bias is None else bias.to(self.wide)
        self.temperature = temperature
        bytes_per_logit = self.wide.itemsize + 2 * self.tensor_cores
        scratch_bytes = min(_SCRATCH_BYTES.get(hidden.device.type, 256 << 20), max_buffer_bytes // 4)
        n = rows_per_chunk(self.N, self.V, bytes_per_logit, max_buffer_bytes - scratch_bytes)
        self._chunks = [slice(a, min(a + n, self.N)) for a in range(0, self.N, n)]
        self._logits = hidden.new_empty(n, self.V, dtype=self.wide)
        b = rows_per_chunk(n, self.V, self.wide.itemsize, scratch_bytes)
        self.scratch = hidden.new_empty(b, self.V, dtype=self.wide)

    def hidden_rows(self, rows: slice) -> Tensor:
        """h[rows] as the operand of a product with W or dz."""
        return self.hidden[rows] if self.tensor_cores else self.hidden[rows].to(self.wide)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, z [n, V]); z is the caller's to overwrite until the next chunk, and so is `scratch` at any time."""
        for rows in self._chunks:
            yield rows, self._fill(rows, self._logits[: rows.stop - rows.start])

    def _fill(self, rows: slice, z_nV: Tensor) -> Tensor:
        if self.weight is None:
            return z_nV.copy_(self.hidden[rows]).div_(self.temperature)
        scale = 1 / self.temperature
        kind = {"out_dtype": self.wide} if self.tensor_cores else {}
        addend, beta = (z_nV, 0) if self.bias is None else (self.bias, scale)
        return torch.addmm(addend, self.hidden_rows(rows), self.weight.t(), beta=beta, alpha=scale, out=z_nV, **kind)


class HeadGradients:
    """dh, dW and db from dLoss/d(h W^T + b), chunk by chunk. dW and db add up in the wide type.

    Products use `out=` or in-place forms only: autocast leaves those alone.
    """

    def __init__(self, head: Head, need_hidden: bool, need_weight: bool, need_bias: bool) -> None:
        self.head = head
        new, wide = head.hidden.new_empty, head.wide
        self.hidden = new(head.hidden.shape) if need_hidden else None
        self.weight = head.weight.new_zeros(head.weight.shape, dtype=wide) if need_weight else None
        self.bias = new(head.V, dtype=wide).zero_() if need_bias else None

    def add(self, rows: slice, dz_nV: Tensor) -> None:
        """Account for dz of these rows; dz is read only."""
        head = self.head
        if self.bias is not None:
            self.bias.add_(dz_nV.sum(0))
        if head.weight is None:
            if self.hidden is not None:
                self.hidden[rows] = dz_nV
            return
        dz_nV = dz_nV.to(torch.bfloat16) if head.tensor_cores else dz_nV
        if self.hidden is not None:
            target_nD = self.hidden[rows]
            same = target_nD.dtype == dz_nV.dtype
            product_nD = torch.mm(dz_nV, head.weight, out=target_nD if same else dz_nV.new_empty(target_nD.shape))
            if not same:
                target_nD.copy_(product_nD)
        if self.weight is not None:
            kind = {"out_dtype": head.wide} if head.tensor_cores else {}
            torch.addmm(self.weight, dz_nV.t(), head.hidden_rows(rows), out=self.weight, **kind)

    def result(self, hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(dh, dW, db) in the dtypes of the given inputs; an empty tensor for each one that was not asked for."""
        pairs = ((self.hidden, hidden), (self.weight, weight), (self.bias, bias))
        return tuple(hidden.new_empty(0) if grad is None else grad.to(like.dtype) for grad, like in pairs)


def empty_gradients(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None, need: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """What `HeadGradients.result` returns, without values: for the fake (shape-only) kernels. need = (h, W, b)."""
    inputs = (hidden, weight, bias)
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if wanted else hidden.new_empty(0)
        for tensor, wanted in zip(inputs, need, strict=True)
    )
