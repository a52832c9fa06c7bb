"""x = h W^T + b, a few rows at a time, and the way back from dLoss/dx.

Shape letters: N rows, n rows of one chunk, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ipvrm_core.fused.shard import VocabularyShard

# Bytes for the private [n, V] buffers of one call (frozen head, with dW besides). CPU: 512 and 320 rows of a 150k
# vocabulary, both within a tenth of plain PyTorch's memory (docs/results/cpu.md). CUDA: 384 rows of it with their
# gradient, 640 without, which with dh stays under 0.5 GB at N = 8192, D = 4096. From 256 rows on a product with W is
# bound by arithmetic on an H100 or H200 whatever D is (n flops a byte of W against 167 to 240). The product that is
# added to a float32 dW does n / 4 flops a byte, so it wants 1024 rows; beside dW their 0.9 GB are little. Derived, not
# yet measured (docs/kernels.md, section 8).
DEFAULT_BUFFER_BYTES = {"cpu": (320 << 20, 200 << 20), "cuda": (416 << 20, 896 << 20)}
_TILE_ROWS = 128  # of a product on a GPU
_CPU_ROWS = 64
_MOST_ROWS = 4096
_ALIGNMENT = 64  # logits: rows begin at multiples of 128 bytes, whatever V is
# Row statistics in torch go over a scratch of this size: in cache on a CPU, few launches on a GPU.
_SCRATCH_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}


def default_buffer_bytes(device: torch.device, trained: bool = False) -> int:
    """The budget used where `max_buffer_bytes` is None. trained: the gradient of the weight is made too."""
    return DEFAULT_BUFFER_BYTES.get(device.type, DEFAULT_BUFFER_BYTES["cuda"])[trained]


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The accumulation type: float32, or float64 as soon as one tensor has it."""
    doubles = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if doubles else torch.float32


def rows_per_chunk(
    n_rows: int, vocabulary: int, bytes_per_logit: int, buffer_bytes: int, multiple: int = _TILE_ROWS
) -> int:
    """How many rows fit: at least 1, at most N, a multiple of the given number when there are that many."""
    rows = buffer_bytes // (vocabulary * bytes_per_logit)
    if rows > multiple:
        rows -= rows % multiple
    return max(1, min(n_rows, rows))


class RowGradient(NamedTuple):
    """dLoss/dx = scale_n1 * values_nV of the rows of a chunk; None: the values themselves."""

    values_nV: Tensor
    scale_n1: Tensor | None = None


class Head:
    """The head's outputs in chunks of rows. With weight=None `hidden` already is x [N, V].

    apart: the gradient gets a buffer of its own beside x, in the type of the products, and products are padded to
    multiples of 128 rows. Otherwise x becomes its gradient in place.

    masked_N [N] bool: rows that are taken as zeros, whatever they hold (for dW that is 0 * NaN). widest: the columns of
    the rank that has the most, where V are those of one rank: all of them take equally many rows.

    bfloat16 on CUDA multiplies in tensor cores into float32. Any other half-precision weight is upcast once a call
    (V * D * 4 bytes): CPU products have no float32 output, and float16 gradients underflow at weights of 1/tokens.

    bfloat16_logits: x is rounded to bfloat16 as it is stored, with hidden and weight in bfloat16; on CUDA the bias too.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        buffer_bytes: int,
        *,
        extra_bytes_per_logit: int = 0,
        apart: bool = False,
        with_gradient: bool = False,
        masked_N: Tensor | None = None,
        widest: int | None = None,
        bfloat16_logits: bool = False,
    ) -> None:
        self.N, self.V = hidden.shape[0], (hidden if weight is None else weight).shape[-1 if weight is None else 0]
        self.wide = wide_dtype(hidden, weight, bias)
        self.tensor_cores = weight is not None and hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16
        self.hidden, self.masked_N = hidden, masked_N
        self.weight = weight if weight is None or self.tensor_cores else weight.to(self.wide)
        self.logit_dtype = torch.bfloat16 if bfloat16_logits else self.wide
        self.bias = None if bias is None else bias.to(self.logit_dtype if self.tensor_cores else self.wide)
        self.apart = apart and weight is not None
        self.product = torch.bfloat16 if self.tensor_cores else self.wide
        if self.apart and with_gradient:
            extra_bytes_per_logit += self.product.itemsize
        most = min(self.N, _MOST_ROWS) if self.apart else self.N
        bytes_per_logit = self.logit_dtype.itemsize + extra_bytes_per_logit
        multiple = _TILE_ROWS if hidden.is_cuda or self.apart else _CPU_ROWS
        self.n = rows_per_chunk(most, widest or self.V, bytes_per_logit, buffer_bytes, multiple)
        self._x: Tensor | None = None
        self._gradient: Tensor | None = None

    def hidden_rows(self, rows: slice) -> Tensor:
        """h[rows] as the operand of a product with W or dx."""
        hidden_nD = self.hidden[rows] if self.tensor_cores else self.hidden[rows].to(self.wide)
        return hidden_nD if self.masked_N is None else hidden_nD.masked_fill(self.masked_N[rows, None], 0.0)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, x [n, V]) in the type of the logits; x is the caller's to overwrite until the next chunk."""
        for start in range(0, self.N, self.n):
            rows = slice(start, min(start + self.n, self.N))
            yield rows, self.logits(rows)

    def logits(self, rows: slice) -> Tensor:
        """x [n, V] of some rows, at most n of them, in the one buffer."""
        return self._fill(rows, self.buffer)

    @property
    def buffer(self) -> Tensor:
        """The memory of x [n, V]: of the rows that `chunks` gave last."""
        if self._x is None:
            self._x = self._buffer(self.logit_dtype)
        return self._x

    def gradient_rows(self, x_nV: Tensor) -> Tensor:
        """Memory for dLoss/dx of the chunk x: a buffer of its own, or that of x."""
        if not self.apart:
            return x_nV
        if self._gradient is None:
            self._gradient = self._buffer(self.product)
        return self._gradient[: len(x_nV)]

    def padded_rows(self, rows: int) -> int:
        """What a product of so many rows is padded to."""
        return min(-(-rows // _TILE_ROWS) * _TILE_ROWS, self.n) if self.apart else rows

    def _buffer(self, dtype: torch.dtype) -> Tensor:
        if not self.apart:
            return self.hidden.new_empty(self.n, self.V, dtype=dtype)
        stride = -(-self.V // _ALIGNMENT) * _ALIGNMENT
        return self.hidden.new_empty(self.n, stride, dtype=dtype)[:, : self.V]

    def _fill(self, rows: slice, buffer_nV: Tensor) -> Tensor:
        x_nV = buffer_nV[: rows.stop - rows.start]
        if self.weight is None:
            x_nV.copy_(self.hidden[rows])
            return x_nV if self.masked_N is None else x_nV.masked_fill_(self.masked_N[rows, None], 0.0)
        hidden_nD = padded(self.hidden_rows(rows), self.padded_rows(len(x_nV)))
        target_nV = buffer_nV[: len(hidden_nD)]
        if self.logit_dtype != self.wide and not self.tensor_cores:  # float32 products, as in the interpreter
            product_nV = hidden_nD @ self.weight.t()
            target_nV.copy_(product_nV if self.bias is None else product_nV.add_(self.bias))
            return x_nV
        kind = {"out_dtype": self.wide} if self.tensor_cores and self.logit_dtype == self.wide else {}
        if self.bias is None:
            torch.mm(hidden_nD, self.weight.t(), out=target_nV, **kind)
        else:
            torch.addmm(self.bias, hidden_nD, self.weight.t(), out=target_nV, **kind)
        return x_nV


def padded(x_nD: Tensor, rows: int) -> Tensor:
    """x with rows of zeros below, up to the given number."""
    if len(x_nD) == rows:
        return x_nD
    return torch.cat([x_nD, x_nD.new_zeros(rows - len(x_nD), *x_nD.shape[1:])])


class HeadGradients:
    """dh, dW and db from dLoss/dx, chunk by chunk. dW and db add up in the wide type.

    A row's scale never meets [n, V]: it multiplies the row of dh after its product, and of h before that of dW. With
    weight=None, `into` may name the tensor that receives dx; with a shard dh is summed over its ranks. Products use
    `out=` or in-place forms only: autocast leaves those alone.
    """

    def __init__(
        self, head: Head, need: list[bool], into: Tensor | None = None, shard: VocabularyShard | None = None
    ) -> None:
        self.head, self.shard = head, shard
        new, wide = head.hidden.new_empty, head.wide
        need_hidden, need_weight, need_bias = need
        summed = {} if shard is None else {"dtype": wide}
        self.hidden = (new(head.hidden.shape, **summed) if into is None else into) if need_hidden else None
        self.weight = None
        if need_weight:
            assert head.weight is not None
            make = torch.empty_like if head.N else torch.zeros_like  # the first chunk writes, the others add
            self.weight = make(head.weight, dtype=wide, memory_format=torch.contiguous_format)
        self.bias = new(head.V, dtype=wide).zero_() if need_bias else None

    def target(self, rows: slice, x_nV: Tensor) -> Tensor:
        """Where a kernel should write dx of these rows: the result itself, or the head's memory for it."""
        if self.head.weight is not None:
            return self.head.gradient_rows(x_nV)
        assert self.hidden is not None
        # Kernels want rows of stride 1; where the result has others, x is a private copy.
        return self.hidden[rows] if self.hidden.stride(1) == 1 else x_nV

    def add(self, rows: slice, gradient: RowGradient) -> None:
        """Account for dx of these rows. The chunk's x may be overwritten; dx is read only."""
        head, (dx_nV, scale_n1) = self.head, gradient
        if head.weight is None:
            if self.hidden is not None and self.hidden[rows].data_ptr() != dx_nV.data_ptr():
                self.hidden[rows] = dx_nV
            return
        if self.bias is not None:
            scaled_nV = dx_nV if scale_n1 is None else torch.mul(dx_nV, scale_n1, out=head.buffer[: len(dx_nV)])
            self.bias.add_(scaled_nV.sum(0, dtype=head.wide))
        dx_nV = dx_nV.to(head.product)
        if self.hidden is not None:
            self._add_hidden(self.hidden[rows], dx_nV, scale_n1)
        if self.weight is not None:
            kind = {"out_dtype": head.wide} if head.tensor_cores else {}
            hidden_nD = head.hidden_rows(rows)
            if scale_n1 is not None:
                hidden_nD = (hidden_nD * scale_n1).to(hidden_nD.dtype)
            if rows.start == 0:
                torch.mm(dx_nV.t(), hidden_nD, out=self.weight, **kind)
            else:
                torch.addmm(self.weight, dx_nV.t(), hidden_nD, out=self.weight, **kind)

    def _add_hidden(self, target_nD: Tensor, dx_nV: Tensor, scale_n1: Tensor | None) -> None:
        n, head = len(dx_nV), self.head
        if head.padded_rows(n) != n:  # the buffer goes on below the last row; what stands there is not used
            dx_nV = dx_nV.as_strided((head.padded_rows(n), dx_nV.shape[1]), dx_nV.stride())
        direct = scale_n1 is None and len(dx_nV) == n and target_nD.dtype == dx_nV.dtype
        kind = {"out_dtype": head.wide} if head.tensor_cores and scale_n1 is not None else {}
        product_nD = (
            target_nD if direct else dx_nV.new_empty(len(dx_nV), target_nD.shape[1], dtype=kind.get("out_dtype"))
        )
        torch.mm(dx_nV, head.weight, out=product_nD, **kind)
        if scale_n1 is not None:
            torch.mul(product_nD[:n], scale_n1, out=target_nD)
        elif not direct:
            target_nD.copy_(product_nD[:n])

    def result(self, hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(dh, dW, db) in the dtypes of the given inputs; an empty tensor for each one that was not asked for."""
        if self.shard is not None and self.hidden is not None:
            self.shard.sum(self.hidden)
        pairs = ((self.hidden, hidden), (self.weight, weight), (self.bias, bias))
        return tuple(
            hidden.new_empty(0) if grad is None or like is None else grad.to(like.dtype) for grad, like in pairs
        )


def empty_gradients(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None, need: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """What `HeadGradients.result` returns, without values: for the fake (shape-only) kernels. need = (h, W, b)."""
    inputs = (hidden, weight, bias)
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if wanted else hidden.new_empty(0)
        for tensor, wanted in zip(inputs, need, strict=True)
    )
