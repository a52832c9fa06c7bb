"""The public functions in torch alone, on CPU and GPU, without a [N, V] tensor. The derivations are in README.md."""
