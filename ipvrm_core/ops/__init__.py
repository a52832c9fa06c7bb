"""The public fused functions: input checks, choice of a backend, gradients. One function a file."""
