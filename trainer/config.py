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
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the weights; bfloat16 ones are trained through float32 master copies"
    )
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
    group_column: str | None = Field(None, description="evaluate each value of this column apart (eval.benchmarks)")
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


class Chats(Section):
    """Labelled or paired chats that a reward model trains on instead of the rollouts."""

    path: str = Field(description="jsonl, json, parquet, or a Hugging Face data set")
    kind: Literal["pointwise", "pairwise"] = Field(
        description="a row is one answer and its label, or a chosen and a rejected answer to one prompt"
    )
    config: str | None = Field(None, description="which configuration, for a data set by name")
    split: str | None = Field(None, description="which split, for a data set by name")
    conversation_column: str = Field("conversation", description="pointwise: messages, the answer last")
    label_column: str = Field("label", description="pointwise: 0 or 1")
    chosen_column: str = Field("chosen", description="pairwise: messages, the better answer last")
    rejected_column: str = Field("rejected", description="pairwise: the same messages, the worse answer last")
    limit: Positive | None = Field(None, description="read at most so many rows, from the first")
    max_tokens: Positive = Field(4096, description="of prompt and answer together")
    on_long: Literal["error", "drop", "truncate"] = Field(
        "error", description="what becomes of longer rows; those dropped or cut are counted in rm/<name>/data.json"
    )
    validation: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="share of the prompts whose answers are kept for validation, the same for every seed"
    )
    reference: str | None = Field(
        None, description="name or folder of another reference than the starting policy, of the same vocabulary"
    )
    cache: str | None = Field(None, description="folder for the reference's log-probs; None: RUN/cache")


class RewardModel(Section):
    """One reward model, trained offline on the rollouts, or on chats of its own."""

    objective: str = Field("ipvrm", description="a file of ipvrm_core/objectives, or package.module:Class")
    args: dict[str, float | str] = Field({}, description="settings of the objective, e.g. {margin = 5.0}")
    steps: Positive = 500
    batch: Positive = Field(64, description="sequences a step: pairs of a right and a wrong answer to one prompt")
    data: Chats | None = Field(None, description="chats to train on; None: the rollouts")
    pairing: Literal["disjoint", "covering", "none"] = Field(
        "covering",
        description="each answer of a mixed prompt in at most one pair, or in at least one (the rarer repeat); "
        "none: single answers, those of unmixed prompts too. Pairwise data bring their own pairs",
    )
    pairs_per_prompt: Positive | None = Field(None, description="pairs drawn from one prompt; None: as many as it has")
    experts: Annotated[int, Field(ge=0)] = Field(
        0, description="demonstrations that join each step's pairs as right answers"
    )
    optim: Optim = Optim(lr=5e-7)
    validate_every: Positive = 100
    stop_metric: (
        Literal[
            "held_out_auc",
            "held_out_auc_sum",
            "held_out_accuracy",
            "held_out_pair_accuracy",
            "held_out_ece_25",
            "held_out_ece_50",
            "held_out_ece_75",
            "held_out_ece_100",
        ]
        | None
    ) = Field(None, description="keep the model that is best in it, and stop when it no longer gets better")
    patience: Positive = Field(3, description="validations in a row without a new best before the stop")

    @model_validator(mode="after")
    def _objective_exists(self):
        objective = self.build()
        self.__dict__["args"] = asdict(objective)  # resolved: what config.json shows is what runs
        if not objective.trains:
            self.__dict__["steps"] = 1  # to measure it
        if self.experts and (objective.pairwise or not objective.trains):
            kind = "pairwise" if objective.pairwise else "training-free"
            raise ValueError(f"experts must be 0 for the {kind} objective {self.objective!r}; got {self.experts}")
        if self.batch % 2:
            raise ValueError(f"batch must be even, for it holds pairs; got {self.batch}")
        self._check_data(objective)
        return self

    def _check_data(self, objective: objectives.Objective) -> None:
        if self.pairing == "none" and objective.pairwise:
            raise ValueError(f"pairing must be 'disjoint' or 'covering' for the pairwise objective {self.objective!r}")
        if self.stop_metric and self.data and not self.data.validation:
            raise ValueError(f"stop_metric = {self.stop_metric!r} needs held-out prompts: data.validation must be > 0")
        log_ratios = objective.head == "vocabulary" and objective.reference
        if self.stop_metric and self.stop_metric.startswith(("held_out_ece", "held_out_accuracy")) and not log_ratios:
            raise ValueError(
                f"stop_metric must be another for the objective {self.objective!r}, whose scores are no log-ratios: "
                f"sigma(vbar_t) is no probability; got {self.stop_metric!r}"
            )
        if self.stop_metric and not objective.trains:
            raise ValueError(f"stop_metric must be left out for the training-free objective {self.objective!r}")

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
        self._check_estimator(preset)
        preset.loss_config()
        candidate_slots(preset.p_min, top_k=preset.top_k)  # raises for a rule that cannot be
        self.__dict__["method"] = asdict(preset)  # resolved: what config.json shows is what runs
        return self

    def _check_estimator(self, preset: Preset) -> None:
        """ValueError for settings that the estimator could not follow."""
        estimator = preset.estimator
        if estimator in ("td", "mc", "prime") and self.reward_model is None:
            raise ValueError(
                f"method.estimator = {estimator!r} needs a reward_model: it works on token rewards; got None"
            )
        if estimator == "prime" and preset.outcome != "rloo":
            raise ValueError(f"method.outcome must be 'rloo' for method.estimator = 'prime'; got {preset.outcome!r}")
        fixed = {"gae": (), "mc": ("lam",)}.get(estimator, ("gamma", "lam"))
        for name in fixed:
            if getattr(preset, name) != 1:
                raise ValueError(
                    f"method.{name} must be 1 for method.estimator = {estimator!r}, which does not use it; "
                    f"got {getattr(preset, name)}"
                )

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
    benchmarks: dict[str, Source] = Field({}, description="further test data by name (paths), each evaluated whole")
    rank_prompts: Annotated[int, Field(ge=0)] = Field(
        0, description="answers that are cut and continued, to rank reward models by the outcomes; 0: none"
    )
    traces: Annotated[int, Field(ge=0)] = Field(1000, description="labelled traces per format, built-in tasks only")

    @model_validator(mode="after")
    def _benchmarks_are_files(self):
        tasks = [name for name, source in self.benchmarks.items() if source.task]
        if tasks:
            raise ValueError(f"benchmarks must have a path; got a task for {', '.join(tasks)}")
        return self


class Verifier(Section):
    """Who decides whether an answer is right."""

    kind: str = Field(
        "math", pattern=r"^(exact|math|[\w.]+:\w+)$", description="exact | math | package.module:function"
    )
    timeout_s: PositiveFloat = 5.0
    workers: Positive = 2


class Leakage(Section):
    """What to do about evaluation problems in the training data; looked for before training starts."""

    action: Literal["refuse", "allow"] = Field("refuse", description="allow: report it and go on")
    benchmarks: list[Source] = Field([], description="evaluation data besides `test`; only its prompts are read")


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
    leakage: Leakage = Leakage()
    micro_batch_tokens: Positive = Field(16384, description="padded tokens per forward/backward pass")
    checkpoint_every: Positive = Field(20, description="steps between checkpoints of a training phase")
    wandb: bool = Field(False, description="also log to Weights & Biases (the package must be installed)")

    @model_validator(mode="after")
    def _phases_fit(self):
        if self.rollout is None and any(rm.data is None for rm in self.rm.values()):
            raise ValueError(
                "rm needs a [rollout] section: reward models without chats of their own (rm.<name>.data) "
                "train on the policy's own answers"
            )
        for name, rm in self.rm.items():
            self._check_held_out(name, rm)
        if self.rollout and self.rollout.held_out >= self.rollout.prompts:
            raise ValueError(f"rollout.held_out must be < rollout.prompts = {self.rollout.prompts}")
        for name, rl in self.rl.items():
            if rl.reward_model and rl.reward_model.name not in self.rm:
                raise ValueError(
                    f"rl.{name}.reward_model.name must be one of {sorted(self.rm)}; got {rl.reward_model.name!r}"
                )
            if rl.reward_model:
                self._check_use(name, rl)
        for name in [*self.rm, *self.rl]:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"names of reward models and policy runs become folders; got {name!r}")
        if "start" in self.rl:
            raise ValueError("rl.start must have another name: the evaluation calls the starting policy so")
        if self.data.task and self.eval.benchmarks:
            raise ValueError("eval.benchmarks are texts: they need data.path; got a built-in task")
        if self.data.task and self.test.task != self.data.task:
            raise ValueError(f"test.task must be data.task = {self.data.task!r}; got {self.test.task!r}")
        source = self.sft and (self.sft.data or self.data)
        if source and not (source.task or source.solution_column):
            raise ValueError("sft needs demonstrations: set solution_column in sft.data, or in data")
        if any(rm.experts for rm in self.rm.values()) and not (self.data.task or self.data.solution_column):
            raise ValueError("rm.<name>.experts needs demonstrations: set solution_column in data")
        if self.model.scratch and not self.data.task:
            raise ValueError("model.scratch has the characters of a built-in task: set data.task")
        return self

    def _check_held_out(self, name: str, rm: RewardModel) -> None:
        """ValueError for a reward model that could not be validated, or not be evaluated against its reference."""
        if rm.data is None:
            if rm.stop_metric and not self.rollout.held_out:
                raise ValueError(f"rm.{name}.stop_metric needs held-out prompts: rollout.held_out must be > 0; got 0")
            return
        if rm.data.reference is None:
            return
        used = [key for key, rl in self.rl.items() if rl.reward_model and rl.reward_model.name == name]
        if used or self.data.task or self.eval.rank_prompts:
            where = f"rl.{used[0]}" if used else "`ipvrm eval`"
            raise ValueError(
                f"rm.{name}.data.reference must be left out: {where} takes the starting policy as the reference; "
                f"got {rm.data.reference!r}"
            )

    def _check_use(self, name: str, rl: Rl) -> None:
        """ValueError where a policy run asks its reward model for something that the objective does not have."""
        used = self.rm[rl.reward_model.name]
        objective = used.build()
        if rl.reward_model.update != "none" and (objective.pairwise or not objective.trains):
            raise ValueError(
                f"rl.{name}.reward_model.update must be 'none' for the "
                f"{'pairwise' if objective.pairwise else 'training-free'} objective {used.objective!r}; "
                f"got {rl.reward_model.update!r}"
            )
        alpha = rl.resolved().alpha
        if objective.head == "value" and alpha:
            raise ValueError(
                f"rl.{name}.method.alpha must be 0 for rm.{rl.reward_model.name} (objective {used.objective!r}): "
                f"its value head scores sampled tokens only, there is no TD error of other tokens; got {alpha}"
            )


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
