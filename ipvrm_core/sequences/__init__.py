"""The mathematics of packed sequences: values, advantages, reward-model losses, aggregation. All differentiable.

Every formula is written once, over the sums, scans and moments of `segments`, which run in Triton kernels where the
kernels can run and in torch elsewhere.
"""
