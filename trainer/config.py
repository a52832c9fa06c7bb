"""The typed configuration: what a TOML file may contain, checked as a whole before anything runs.

Unknown keys, wrong types and impossible combinations are refused with the key's full name. The defaults are meant for a
real model on one device; `configs/` holds complete files.
"""

import tomllib
from dataclasses import asdict, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from ipvrm_core import objectives
from ipvrm_core.presets import PRESETS, Preset
from ipvrm_core.reference.candidates import candidate_slots
from ipvrm_core.trainer.data.tasks import make_task

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key, what came and what was expected."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )


def _dataclass(cls: type, values: dict, table: str):
    """An instance of a plain dataclass with checked keys and types; `table` is the key that holds `values`."""
    known = [field.name for field in fields(cls)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{table} has no setting {', '.join(unknown)}; expected some of {', '.join(known)}")
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        located = [
            {"type": item["type"], "loc": (table, *item["loc"]), "input": item["input"], "ctx": item.get("ctx", {})}
            for item in error.errors()
        ]
        raise ValidationError.from_exception_data(cls.__name__, located) from None


class Scratch(Section):
    """A small decoder with random weights and a tokenizer of single characters (for the built-in tasks)."""

    architecture: Literal["qwen3", "llama"] = "qwen3"
    hidden_size: Positive = 128
    layers: Positive = 2
    heads: Positive = 4
    kv_heads: Positive = 4
    intermediate_size: Positive = 384
    context: Positive = 256


class Lora(Section):
    """Low-rank adapters on the attention and MLP projections; the base, embedding and head stay frozen."""

    rank: Positive = 128
    alpha: PositiveFloat = 256.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] = "all-linear"


class Model(Section):
    """The start of policy and reward model: exactly one of `path` and `scratch`."""

    path: str | None = Field(None, description="Hugging Face name or local folder")
    gguf_file: str | None = Field(None, description="file inside `path`, for models that come as GGUF")
    scratch: Scratch | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: Lora | None = None
    system_prompt: str | None = Field(None, description="first message, where the tokenizer has a chat template")

    @model_validator(mode="after")
    def _one_source(self):
        if (self.path is None) == (self.scratch is None):
            raise ValueError(
                f"exactly one of path and scratch must be set; got path={self.path!r}, scratch={self.scratch}"
            )
        if self.gguf_file and not self.path:
            raise ValueError("gguf_file needs path")
        if self.dtype == "bfloat16" and self.lora is None:
            raise ValueError(
                "dtype='bfloat16' trains all weights in bfloat16, where steps below 1/256 of a weight vanish: "
                "use dtype='float32', or LoRA (its adapters are float32)"
            )
        return self


class Source(Section):
    """Prompts and answers: a built-in `task`, or a `path` (jsonl, json, parquet, or a Hugging Face data set)."""

    task: str | None = Field(None, description="chain | let_graph")
    task_args: dict[str, int] = Field({}, description="difficulty, e.g. {min_ops = 4, max_ops = 8}")
    path: str | None = None
    config: str | None = Field(None, description="which configuration, for a data set by name")
    split: str | None = Field(None, description="which split, for a data set by name")
    prompt_column: str | list[str] = Field("prompt", description="one column, or several to be joined")
    answer_column: str = "answer"
    solution_column: str | None = None
    prompt_template: str = "{prompt}"
    answer_pattern: str | None = Field(None, description="regular expression; group 1 is the answer")
    limit: Positive | None = None

    @model_validator(mode="after")
    def _one_kind(self):
        if (self.task is None) == (self.path is None):
            raise ValueError(f"exactly one of task and path must be set; got task={self.task!r}, path={self.path!r}")
        if self.task:
            make_task(self.task, **self.task_args)  # raises for an unknown task or difficulty
        return self


class Optim(Section):
    """AdamW with linear warm-up, then constant, linear or cosine decay to zero."""

    lr: PositiveFloat = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.999)
    grad_clip: PositiveFloat | None = 1.0


class Sft(Section):
    """Next-token training on the demonstrations (`solution`) of its own data, or else of the training data."""

    data: Source | None = None
    steps: Positive = 200
    batch: Positive = Field(64, description="sequences a step")
    stop_accuracy: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="stop early once sampled answers to training problems are right this often"
    )
    optim: Optim = Optim(lr=5e-5, warmup=2)


class Rollout(Section):
    """Answers sampled from the starting policy: the reward model's training data."""

    prompts: Positive = 1024
    samples: Positive = Field(8, description="answers per prompt")
    held_out: Annotated[int, Field(ge=0)] = Field(128, description="of these prompts, kept for validation")
    batch: Positive = Field(64, description="prompts sampled at once; also the unit of resuming")


class RewardModel(Section):
    """One implicit reward model, trained offline on the rollouts."""

    objective: str = "ipvrm"
    args: dict[str, float | str] = Field({}, description="settings of the objective, e.g. {margin = 5.0}")
    steps: Positive = 500
    batch: Positive = Field(64, description="sequences a step: pairs of a right and a wrong answer to one prompt")
    pairing: Literal["disjoint", "covering"] = Field(
        "covering",
        description="each answer of a mixed prompt in at most one pair, or in at least one (the rarer repeat)",
    )
    pairs_per_prompt: Positive | None = Field(None, description="pairs drawn from one prompt; None: as many as it has")
    optim: Optim = Optim(lr=5e-7)
    validate_every: Positive = 100

    @model_validator(mode="after")
    def _objective_exists(self):
        self.__dict__["args"] = asdict(self.build())  # resolved: what config.json shows is what runs
        if self.batch % 2:
            raise ValueError(f"batch must be even, for it holds pairs; got {self.batch}")
        return self

    def build(self, **override) -> objectives.Objective:
        return _dataclass(objectives.find(self.objective), {**self.args, **override}, "args")


class RlRewardModel(Section):
    """How an RL run uses a reward model."""

    name: str = Field(description="a key of the `rm` table")
    update: Literal["none", "before", "after"] = Field("before", description="relative to scoring the batch")
    optim: Optim = Optim(lr=1e-4)
    batch: Positive = Field(64, description="sequences per reward-model step")


class Rl(Section):
    """One policy run. Without `reward_model` it is plain GRPO; with alpha = 0 it is GRPO with a process reward."""

    reward_model: RlRewardModel | None = None
    preset: Literal["paper", "official"] = "paper"
    method: dict[str, Any] = Field({}, description="fields of the preset to override, e.g. {alpha = 1.0}")
    steps: Positive = 100
    epochs: Positive = Field(1, description="passes over a batch of rollouts")
    minibatch: Positive = Field(256, description="sequences per policy step")
    max_rounds: Positive = Field(4, description="sampling rounds at most, when too few prompts are mixed")
    kl_coef: Annotated[float, Field(ge=0)] = 0.0
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    optim: Optim = Optim(lr=1e-6)

    @model_validator(mode="after")
    def _method_is_possible(self):
        preset = self.resolved()
        if not 1 <= preset.keep_prompts <= preset.prompts:
            raise ValueError(f"keep_prompts must be in 1 .. prompts = {preset.prompts}; got {preset.keep_prompts}")
        if preset.rollouts < 2:
            raise ValueError(f"rollouts must be >= 2 for a group to have a spread; got {preset.rollouts}")
        for name in ("beta", "offline_margin"):
            if getattr(preset, name) != getattr(PRESETS[self.preset], name):
                raise ValueError(f"method.{name} belongs to the reward model: set it in rm.<name>.args")
        preset.loss_config()
        candidate_slots(preset.p_min, top_k=preset.top_k)  # raises for a rule that cannot be
        self.__dict__["method"] = asdict(preset)  # resolved: what config.json shows is what runs
        return self

    def resolved(self) -> Preset:
        """The preset with `method` applied."""
        return _dataclass(Preset, {**asdict(PRESETS[self.preset]), **self.method}, "method")


class Generation(Section):
    """Sampling of training rollouts. The method needs the full distribution, so there is no top-p or top-k here."""

    temperature: PositiveFloat = 1.0
    max_new_tokens: Positive = 1024
    batch: Positive = Field(256, description="sequences generated at once")


class Eval(Section):
    """What `ipvrm eval` measures."""

    prompts: Positive = 256
    samples: Positive = Field(8, description="k of avg@k and pass@k")
    temperature: PositiveFloat = 0.6
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    traces: Annotated[int, Field(ge=0)] = Field(1000, description="labelled traces per format, built-in tasks only")


class Verifier(Section):
    """Who decides whether an answer is right."""

    kind: str = Field(
        "math", pattern=r"^(exact|math|[\w.]+:\w+)$", description="exact | math | package.module:function"
    )
    timeout_s: PositiveFloat = 5.0
    workers: Positive = 2


class Config(Section):
    """A whole experiment: one start, any number of reward models and policy runs."""

    name: str = "run"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["no", "bf16"] = Field("no", description="bf16: float32 weights, bfloat16 products in the layers")
    model: Model
    data: Source
    test: Source
    verifier: Verifier = Verifier()
    generation: Generation = Generation()
    sft: Sft | None = None
    rollout: Rollout | None = None
    rm: dict[str, RewardModel] = {}
    rl: dict[str, Rl] = {}
    eval: Eval = Eval()
    micro_batch_tokens: Positive = Field(16384, description="padded tokens per forward/backward pass")
    checkpoint_every: Positive = Field(20, description="steps between checkpoints of a training phase")
    wandb: bool = Field(False, description="also log to Weights & Biases (the package must be installed)")

    @model_validator(mode="after")
    def _phases_fit(self):
        if self.rm and self.rollout is None:
            raise ValueError("rm needs a [rollout] section: reward models train on the policy's own answers")
        if self.rollout and self.rollout.held_out >= self.rollout.prompts:
            raise ValueError(f"rollout.held_out must be < rollout.prompts = {self.rollout.prompts}")
        for name, rl in self.rl.items():
            if rl.reward_model and rl.reward_model.name not in self.rm:
                raise ValueError(
                    f"rl.{name}.reward_model.name must be one of {sorted(self.rm)}; got {rl.reward_model.name!r}"
                )
            if rl.reward_model and rl.reward_model.update != "none" and self.rm[rl.reward_model.name].build().pairwise:
                raise ValueError(
                    f"rl.{name}.reward_model.update must be 'none' for the pairwise objective "
                    f"{self.rm[rl.reward_model.name].objective!r}; got {rl.reward_model.update!r}"
                )
        for name in [*self.rm, *self.rl]:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"names of reward models and policy runs become folders; got {name!r}")
        if "start" in self.rl:
            raise ValueError("rl.start must have another name: the evaluation calls the starting policy so")
        if self.data.task and self.test.task != self.data.task:
            raise ValueError(f"test.task must be data.task = {self.data.task!r}; got {self.test.task!r}")
        source = self.sft and (self.sft.data or self.data)
        if source and not (source.task or source.solution_column):
            raise ValueError("sft needs demonstrations: set solution_column in sft.data, or in data")
        if self.model.scratch and not self.data.task:
            raise ValueError("model.scratch has the characters of a built-in task: set data.task")
        return self


def load(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a TOML file, apply `key.path=value` overrides (TOML syntax, bare words are strings), check it all.

    A bare name such as "demo" is a configuration that ships with the package.
    """
    shipped = {file.stem: file for file in (Path(__file__).parent / "configs").glob("*.toml")}
    path = shipped.get(str(path), Path(path))
    if not path.is_file():
        raise ConfigError(f"configuration must be a TOML file or one of {', '.join(sorted(shipped))}; got {path}")
    try:
        raw = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    for override in overrides:
        _apply(raw, override)
    return check(raw, str(path))


def check(raw: dict, origin: str = "configuration") -> Config:
    """Validate a plain dict; ConfigError lists every offending key."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, item['loc'])) or 'whole file'}: {item['msg']}"
            + ("" if isinstance(item["input"], dict | BaseModel) else f"; got {item['input']!r}")
            for item in error.errors()
        ]
        raise ConfigError(f"{origin} is refused:\n" + "\n".join(lines)) from None


def _apply(raw: dict, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"an override must look like key.path=value; got {override!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.split(".")
    for parent in parents:
        raw = raw.setdefault(parent, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a table")
    raw[last] = value


def describe(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """One line per key: name, type, default, meaning. For `ipvrm config`."""
    lines = []
    for name, field in section.model_fields.items():
        nested = _section_in(field)
        key = f"{prefix}{name}"
        if nested:
            key += ".<name>" if get_origin(field.annotation) is dict else ""
            lines += ["", f"[{key}]  {nested.__doc__.splitlines()[0]}", *describe(nested, f"{key}.")]
            continue
        default = "required" if field.is_required() else f"default {field.default!r}"
        meaning = f" - {field.description}" if field.description else ""
        lines.append(f"{key}: {_type_name(field.annotation)}, {default}{meaning}")
    return lines


def _section_in(field) -> type[Section] | None:
    """The Section that a field holds, alone, as an option, or by name in a dict."""
    kinds = [field.annotation, *get_args(field.annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _type_name(kind) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type_name(inner[0])
    if origin is Literal:
        return " | ".join(map(repr, inner))
    if origin in (Union, UnionType):
        return " | ".join(map(_type_name, inner))
    if origin:
        return f"{origin.__name__}[{', '.join(map(_type_name, inner))}]"
    return "None" if kind is type(None) else getattr(kind, "__name__", str(kind))
