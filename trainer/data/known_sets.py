"""Columns and wording of well-known test sets, so that `preset = "gsm8k"` is enough. Another set is one more entry."""

from typing import Any

BOXED = "{prompt}\n\nPresent the answer in LaTex format: \\boxed{Your answer}"  # as the prompts of policy_val end

KNOWN_SETS: dict[str, dict[str, Any]] = {
    "gsm8k": {
        "prompt_column": "question",
        "answer_column": "answer",
        "answer_pattern": "#### (.+)",
        "prompt_template": BOXED,
    },
    "math500": {"prompt_column": "problem", "answer_column": "answer", "prompt_template": BOXED},
    "mawps": {"prompt_column": "input", "answer_column": "target", "prompt_template": BOXED},
    "asdiv": {
        "prompt_column": ["body", "question"],
        "answer_column": "answer",
        "answer_pattern": r"^(.+?)\s*(?:\([^\d()][^()]*\))?$",  # without the unit: "9 (apples)"
        "prompt_template": BOXED,
    },
    "svamp": {"prompt_column": ["Body", "Question"], "answer_column": "Answer", "prompt_template": BOXED},
    # Olympiad, MATH-500, Minerva, AIME and AMC in one file: chats that carry their instruction, each source apart.
    "policy_val": {
        "prompt_column": "prompt",
        "answer_column": "reward_model.ground_truth",
        "group_column": "data_source",
    },
}


def preset_settings(name: object) -> dict[str, Any]:
    """The settings of a Source that a preset stands for. ValueError, which lists the presets, for another name."""
    if not isinstance(name, str) or name not in KNOWN_SETS:
        raise ValueError(f"preset must be one of {', '.join(KNOWN_SETS)}; got {name!r}")
    return dict(KNOWN_SETS[name])
