"""From the head's products x = h W^T + b to the logits of the softmax: l = y / T, y = x or cap tanh(x / cap)."""

from typing import NamedTuple

from torch import Tensor


class LogitTransform(NamedTuple):
    """temperature T > 0 for all rows, or temperatures_N one a row (then `temperature` is 1); softcap > 0 or None."""

    temperature: float = 1.0
    temperatures_N: Tensor | None = None
    softcap: float | None = None

    def rows(self, rows: slice) -> "LogitTransform":
        """The transform of some rows."""
        return self if self.temperatures_N is None else self._replace(temperatures_N=self.temperatures_N[rows])

    def apply_(self, x_NV: Tensor) -> Tensor | None:
        """x becomes l in place. Returns dy/dx = 1 - (y / cap)^2 where there is a soft cap (one more [N, V])."""
        slope_NV = None
        if self.softcap is not None:
            tanh_NV = x_NV.div_(self.softcap).tanh_()
            slope_NV = 1 - tanh_NV.square()
            x_NV = tanh_NV.mul_(self.softcap)
        if self.temperatures_N is not None or self.temperature != 1:
            x_NV.div_(self.column(x_NV))
        return slope_NV

    def column(self, like: Tensor) -> Tensor | float:
        """T as a divisor of [N, V] or [N, K]."""
        return self.temperature if self.temperatures_N is None else self.temperatures_N[:, None].to(like.dtype)
