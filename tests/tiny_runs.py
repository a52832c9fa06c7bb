"""The configuration of a run that a test can afford from SFT to evaluation, without reward models and policies."""

TASK = {"task": "chain", "task_args": {"min_ops": 1, "max_ops": 2}}
BASE = {
    "device": "cpu",
    "model": {"scratch": {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 2, "intermediate_size": 64}},
    "data": TASK,
    "test": TASK,
    "verifier": {"kind": "exact"},
    "generation": {"max_new_tokens": 16},
    "sft": {"steps": 60, "batch": 32, "optim": {"lr": 1e-2, "warmup": 5}},
    "rollout": {"prompts": 24, "samples": 8, "held_out": 8, "batch": 24},
    "eval": {"prompts": 8, "samples": 2, "traces": 30},
}
BATCH = {"prompts": 12, "keep_prompts": 4, "rollouts": 6}
