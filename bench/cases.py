"""What is measured: one optimiser step's worth of head work, forward and backward, by different implementations.

Its inputs are made in bench/problems.py. Shape letters: N rows (response tokens), D hidden size, V vocabulary.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    N: int = 2048
    D: int = 256
    V: int = 151936  # Qwen3


HEADS = {
    "Qwen3-0.6B": Shape(8192, 1024, 151936),
    "Qwen3-8B": Shape(8192, 4096, 151936),
    "Llama-3.2-1B": Shape(8192, 2048, 128256),
    "Gemma-3-270M": Shape(8192, 640, 262144),
}
TOY_HEADS = {
    "Qwen3-0.6B": Shape(2, 16, 141),
    "Qwen3-8B": Shape(2, 32, 141),
    "Llama-3.2-1B": Shape(2, 24, 128),
    "Gemma-3-270M": Shape(2, 8, 200),
}
CANDIDATES = {"0": 0.0, "mean 1.33": 1.33, "10": 10.0}


@dataclass(frozen=True)
class Setting:
    """A head, and the loss on it. A frozen head: the hidden states require a gradient, the weight does not.

    loss: distrl (sampled token and candidates), ppo (sampled token alone). candidates: a key of CANDIDATES. masked: the
    share of rows of weight 0. peaked: rows as a language model has them (bench/problems.py); else almost uniform ones.
    """

    model: str
    shape: Shape
    frozen: bool = True
    loss: str = "distrl"
    candidates: str = "mean 1.33"
    masked: float = 0.0
    peaked: bool = True

    @property
    def products(self) -> int:
        """The fewest products of 2 N D V operations that give loss and gradients."""
        return 2 if self.frozen else 3

    @property
    def name(self) -> str:
        head = f"{self.model}, {'frozen' if self.frozen else 'trained'} head, {self.loss}"
        rows = f"candidates {self.candidates}, masked {self.masked:g}, {'peaked' if self.peaked else 'flat'}"
        return f"{head}, N {self.shape.N}, V {self.shape.V}, {rows}"
