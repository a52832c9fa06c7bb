"""Judging policies, reward models, and these on ProcessBench; token scores and lengths are shared."""
