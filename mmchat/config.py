"""A run as one YAML file: its schema, dotted overrides, and errors that say what to do."""

from __future__ import annotations

import difflib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from mmchat.conversation import MODALITIES, Modality
from mmchat.models.build import ModelConfig
from mmchat.models.fusion import FLoRAConfig, LateConfig
from mmchat.regions import Dialect, Frame, RegionFormat
from mmchat.schema import Schema
from mmchat.storage import CacheConfig

Parsed = TypeVar("Parsed", bound=BaseModel)
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(gt=0)]


class SourceConfig(Schema):
    """One source of a mixture: shards of facts, the task that phrases them, and its share of the draws."""

    name: str
    task: str
    shards: str | list[str]
    weight: Positive = 1.0


class ChatConfig(Schema):
    """How conversations become text.

    format `auto` takes the tokenizer's own chat template apart; the others are written out in chat_format.py.
    system: said first in every conversation that has no system turn; None leaves the template's own default.
    media_suffix: text after a media item's tokens.
    region_decimals: of coordinates; None writes the dialect's own number. Fewer are fewer tokens to say. Not for `loc`,
        whose numbers are whole.
    time_decimals: of the seconds of regions in videos and of frame times. tube_boxes: of a tube that are written.
    frame_times: `text` writes "@1.5s" before the tokens of each moment of a video, as a region at that time begins.
        (Times in the tokens themselves are the connector's `times`.)
    """

    format: Literal["auto", "chatml", "vicuna", "plain", "llava"] = "auto"
    system: str | None = None
    media_suffix: dict[Modality, str] = Field(default_factory=lambda: dict.fromkeys(MODALITIES, "\n"))
    region_dialect: Dialect = "shikra"
    region_frame: Frame = "padded_square"
    region_decimals: Annotated[int, Field(ge=0, le=6)] | None = None
    time_decimals: Annotated[int, Field(ge=0, le=3)] = 1
    tube_boxes: Annotated[int, Field(ge=2)] = 8
    frame_times: Literal["none", "text"] = "none"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.region_dialect == "loc" and self.region_decimals:
            raise ValueError(
                f"region_dialect loc writes whole numbers, found region_decimals {self.region_decimals}. Leave "
                "region_decimals out, or choose another dialect"
            )
        return self

    @property
    def regions(self) -> RegionFormat:
        return RegionFormat(
            self.region_dialect, self.region_frame, self.region_decimals, self.time_decimals, self.tube_boxes
        )


class BatchConfig(Schema):
    """What one optimizer step sees.

    lanes: packs in a global step, whatever the number of ranks; ranks must divide it. tokens, patches: budgets of one
    pack (LLM tokens; encoder patches or spectrogram positions). packs_per_micro_batch: packs that one forward pass
    joins into one row. lookahead: samples that wait in a lane for a pack they fit.
    """

    lanes: Count
    tokens: Count
    patches: Count = 1_000_000
    packs_per_micro_batch: Count = 1
    lookahead: Count = 16


class Rate(Schema):
    """Learning rate and weight decay of one part of the model."""

    lr: NotNegative
    weight_decay: NotNegative = 0.0


class ScheduleConfig(Schema):
    """Linear warm-up, then a cosine from the full rate to min_ratio of it; min_ratio 1 stays at the full rate."""

    warmup_steps: Annotated[int, Field(ge=0)] = 0
    min_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0

    @property
    def is_constant(self) -> bool:
        return self.min_ratio == 1.0


Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class LossConfig(Schema):
    """What a step minimises: the weighted sum of these, over the number of learned tokens.

    answers: cross-entropy of the answers; 0 does not run the LLM, and the sum is then over the number of boxes.
    regions: cross-entropy of boxes that a linear layer reads from the media tokens which show them; one box counts as
    one token. Needs `read_boxes`. keep: squared distance of media tokens to those that the stage began with, relative
    to their length, so that an LLM that knows them still does; one media token counts as one token.
    """

    answers: Weight = 1.0
    regions: Weight = 0.0
    keep: Weight = 0.0

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.answers or self.regions):
            raise ValueError("answers and regions are both 0; wanted one of them at least")
        return self


class StageConfig(Schema):
    """One training stage: what learns and how fast, on which mixture, for how many steps, how distributed.

    train: learning rate by part: `connectors`, `connectors.image`, `encoders`, `encoders.audio`, `fusion`, `llm`; the
    longest matching name counts, a part without one is frozen. Under `fusion: {kind: full}`, `fusion` is the LLM.
    bad_samples: share of unreadable samples (of at least 100) beyond which the run stops; a single one never does.
    nan_steps: skipped steps in a row beyond which it stops. deepspeed: merged last into DeepSpeed's own configuration.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")]
    train: dict[str, Rate]
    data: Annotated[list[SourceConfig], Field(min_length=1)]
    steps: Count
    batch: BatchConfig
    losses: LossConfig = LossConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: NotNegative = 1.0
    zero: Literal[0, 1, 2, 3] = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    save_every: Count = 500
    keep: Count = 2
    workers: Annotated[int, Field(ge=0)] = 2
    bad_samples: Annotated[float, Field(ge=0, le=1)] = 0.01
    nan_steps: Count = 3

    @field_validator("train", mode="before")
    @classmethod
    def _bare_rates(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: rate if isinstance(rate, dict) else {"lr": rate} for name, rate in value.items()}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.zero == 0 and self.dtype == "bfloat16":
            raise ValueError(
                "zero: 0 with dtype: bfloat16 has no fp32 master weights in DeepSpeed. Use zero: 1, which on "
                "one rank is the same thing with them"
            )
        if self.batch.lanes % self.batch.packs_per_micro_batch:
            raise ValueError(
                f"batch.packs_per_micro_batch {self.batch.packs_per_micro_batch} must divide "
                f"batch.lanes {self.batch.lanes}"
            )
        names = [source.name for source in self.data]
        if len(set(names)) < len(names):
            raise ValueError(f"data: source names must differ, found {names}")
        return self


class LogConfig(Schema):
    """every: steps between console lines. tensorboard, wandb: writers beside the JSONL log, which is always written."""

    every: Count = 10
    tensorboard: bool = False
    wandb: bool = False


class RunConfig(Schema):
    """A whole run.

    checkpoints: folder under which <run>/<stage>/step-NNNNNN appears. start: checkpoint of another run (its folder, or
    that of its stage or run) whose weights the first stage begins with. start_as: {video: image} has a modality that
    the checkpoint lacks begin with the connector and the fusion of one that it has. cache: of shards behind URLs.
    """

    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    seed: int = 0
    checkpoints: str = "checkpoints"
    start: str | None = None
    start_as: dict[Modality, Modality] = Field(default_factory=dict)
    model: ModelConfig
    chat: ChatConfig = ChatConfig()
    cache: CacheConfig = CacheConfig()
    stages: Annotated[list[StageConfig], Field(min_length=1)]
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages: names must differ, found {names}")
        self._check_start_as()
        image = self.model.modalities.image
        for stage in self.stages:
            if stage.losses.regions and not (image is not None and image.read_boxes):
                raise ValueError(f"stage {stage.name}: losses.regions needs model.modalities.image.read_boxes: true")
        if self.chat.frame_times == "text":
            self._check_frame_times()
        return self

    def _check_start_as(self) -> None:
        """Raises ValueError where a modality cannot begin as the other."""
        if self.start_as and self.start is None:
            raise ValueError("start_as needs `start`, the checkpoint that has the modality to begin as")
        entries = self.model.modalities.entries()
        for new, old in self.start_as.items():
            if new == old or new not in entries or old not in entries:
                raise ValueError(f"start_as {new}: {old}: wanted two of the modalities {', '.join(entries)}")
            one, other = (entries[name].connector.model_dump(exclude={"across_frames"}) for name in (new, old))
            if one != other:
                raise ValueError(f"start_as {new}: {old}: their connectors differ; wanted the same one")
            fusion = self.model.fusion
            if isinstance(fusion, FLoRAConfig) and fusion.rank_of(new) > fusion.rank_of(old):
                raise ValueError(
                    f"start_as {new}: {old}: pairs of rank {fusion.rank_of(new)} cannot begin as those of rank "
                    f"{fusion.rank_of(old)}; wanted that or less"
                )

    def _check_frame_times(self) -> None:
        """Raises ValueError where no text can stand before the tokens of each moment of a video."""
        video = self.model.modalities.video
        if video is None:
            raise ValueError("chat.frame_times: text needs model.modalities.video; leave frame_times out")
        if isinstance(self.model.fusion, LateConfig):
            raise ValueError(
                "chat.frame_times: text needs the tokens of videos among those of the text, where fusion: late does "
                "not put them. Leave frame_times out and set model.modalities.video.connector.times, or choose another "
                "fusion"
            )
        if video.connector.moments((1, 1, 1)) is None:
            raise ValueError(
                "chat.frame_times: text needs tokens that belong to moments; each token of connector "
                f"{video.connector.kind} reads all frames. Leave frame_times out, or choose linear, mlp, pool or "
                "spatio_temporal"
            )

    @property
    def folder(self) -> Path:
        return Path(self.checkpoints) / self.run


class ConfigError(ValueError):
    """Every fault of a configuration, one a line."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run's YAML file and applies `a.b.c=value` overrides; list items are addressed by their name or index.

    Raises:
        ConfigError: lists every fault, with the nearest known key for an unknown one.
    """
    return parse(RunConfig, read_values(path, overrides), str(path))


def read_values(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping of a YAML file with the overrides applied. Raises ConfigError."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: wanted a mapping of keys to values, found {type(values).__name__}")
    return override(values, overrides)


def override(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The mapping itself, changed by `a.b.c=value` texts. Raises ConfigError."""
    for one in overrides:
        _apply(values, one)
    return values


def parse_config(values: dict[str, Any], name: str) -> RunConfig:
    """Validates a run's plain values; `name` stands in the error message."""
    return parse(RunConfig, values, name)


def parse(schema: type[Parsed], values: dict[str, Any], name: str) -> Parsed:
    """Validates plain values by any schema; `name` stands in the error message. Raises ConfigError."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        faults = [_fault(fault, schema) for fault in error.errors()]
        raise ConfigError("\n  ".join([f"{name}: {len(faults)} fault(s)", *faults])) from None


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=110)


def _apply(values: dict[str, Any], override: str) -> None:
    path, sign, text = override.partition("=")
    if not sign:
        raise ConfigError(f"override {override!r}: wanted path.to.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: its value is no valid YAML: {error}") from error
    here: Any = values
    *parents, last = path.split(".")
    for depth, key in enumerate([*parents, last]):
        where = ".".join([*parents, last][:depth]) or "the file"
        if isinstance(here, list):
            names = [item.get("name") if isinstance(item, dict) else None for item in here]
            if key in names:
                index = names.index(key)
            elif key.isdigit() and int(key) < len(here):
                index = int(key)
            else:
                raise ConfigError(f"override {override!r}: {where} has no item {key!r}; it has {names}")
            if depth == len(parents):
                here[index] = value
            else:
                here = here[index]
        elif isinstance(here, dict):
            if depth == len(parents):
                here[key] = value
            else:
                here = here.setdefault(key, {})
        else:
            raise ConfigError(f"override {override!r}: {where} is the value {here!r}, it has no keys")


def _fault(fault: Any, schema: type[BaseModel]) -> str:
    """One line for one pydantic fault."""
    here: Any
    loc, here, path = list(fault["loc"]), schema, []
    siblings: list[str] = []
    for step in loc:
        here, shown = _step(here, step)
        if shown:
            path.append(str(step))
        if isinstance(here, tuple):
            siblings = list(here)
    where = ".".join(path) or "configuration"
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(loc[-1]), siblings, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(siblings)}"
        return f"{where}: unknown key; {hint}"
    if fault["type"] == "missing":
        return f"{where}: missing"
    found = f" (found {fault['input']!r})" if isinstance(fault["input"], str | int | float | bool) else ""
    return f"{where}: {fault['msg'].removeprefix('Value error, ')}{found}"


def _step(here: Any, step: str | int) -> tuple[Any, bool]:
    """Follows one element of a fault's location through the schema.

    Returns the annotation there, or the tuple of known keys where the element is unknown; and whether the element is
    part of the path that a person wrote (the tag of a union is not).
    """
    here = _plain(here)
    if isinstance(here, type) and issubclass(here, BaseModel):
        field = here.model_fields.get(str(step))
        return (field.annotation, True) if field is not None else (tuple(here.model_fields), True)
    origin, arguments = get_origin(here), get_args(here)
    if origin in (Union, types.UnionType):
        for member in map(_plain, arguments):
            if isinstance(member, type) and issubclass(member, BaseModel):
                kind = member.model_fields.get("kind")
                if kind is not None and kind.default == step:
                    return member, False
        models = [m for m in map(_plain, arguments) if isinstance(m, type) and issubclass(m, BaseModel)]
        return _step(models[0], step) if len(models) == 1 else (here, isinstance(step, int))
    if origin in (list, tuple):
        return arguments[0], True
    if origin is dict:
        return arguments[1], True
    return here, True


def _plain(annotation: Any) -> Any:
    return _plain(get_args(annotation)[0]) if get_origin(annotation) is Annotated else annotation
