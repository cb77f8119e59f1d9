"""What the model will see of a run's data: samples on the training path, packs as they fill, and figures of a source.

Everything goes the way of training: the task phrases the facts, the chat template fits them into the stage's budget,
the preprocess makes encoder input. Phrasing and dropout are those of the sample's first epoch. What is made here is for
inspect_page.py and the terminal to show.
"""

from __future__ import annotations

import copy
import itertools
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from mmchat.batch import IGNORE
from mmchat.config import RunConfig, SourceConfig, StageConfig
from mmchat.conversation import MODALITIES, Conversation, MediaRef, Modality, Record, Region, Turn
from mmchat.data.chat_template import ChatTemplate, PlannedMedia, Sample
from mmchat.data.lanes import SampleId
from mmchat.data.mixture import Mixture
from mmchat.data.pack import LanePacker
from mmchat.data.shards import expand_shards
from mmchat.errors import SampleError
from mmchat.modalities import MediaPlan
from mmchat.modalities.audio import SAMPLE_RATE_HZ, AudioPreprocess
from mmchat.modalities.image import FORMATS, ImagePreprocess, square_geometry, to_rgb
from mmchat.modalities.image_encoders import ImageSpec
from mmchat.modalities.video import VideoPreprocess
from mmchat.regions import check_region
from mmchat.tasks.facts import region_of

# Bounds of what is kept for display; the model gets everything.
ORIGINAL_SIDE = 640  # pixels of an original picture's longer side
ORIGINAL_FRAME_SIDE = 320
MAX_FRAMES = 16  # of a video
MAX_SOUND_S = 15.0
MAX_TOKENS = 20_000
STOPS = "stops the run"  # a reason of Refused: what training does not catch


@dataclass(frozen=True)
class Refused:
    """A sample that the run leaves out, and why."""

    key: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Planned:
    """A sample before its media is decoded; `whole` is what it would be without the budget."""

    number: SampleId
    shard: str
    record: Record
    conversation: Conversation
    sample: Sample
    whole: Sample


@dataclass(frozen=True)
class Token:
    """One or more ids that only together make text: a character may take several."""

    text: str
    ids: tuple[int, ...]
    position: int
    is_learned: bool
    is_special: bool
    gates: tuple[Modality, ...]


@dataclass(frozen=True)
class Placeholder:
    """The tokens of media item `media`; num_tokens 0 under late fusion."""

    media: int
    modality: Modality
    position: int
    num_tokens: int


@dataclass(frozen=True)
class Picture:
    """A picture or frame as the encoder gets it, and its original, which may be smaller than it was."""

    encoder: Image.Image
    original: Image.Image
    time_s: float | None = None


@dataclass(frozen=True)
class Sound:
    """mels: [mels, frames] log-mel spectrogram of all windows; num_kept: frames whose features the model gets.

    samples: [n] float32 at SAMPLE_RATE_HZ, at most MAX_SOUND_S of it.
    """

    mels: np.ndarray
    num_kept: int
    samples: np.ndarray
    duration_s: float


@dataclass(frozen=True)
class Item:
    """One media item of a conversation. `plan` is None where the model gets nothing of it; `note` says why."""

    media: int
    modality: Modality
    note: str = ""
    plan: MediaPlan | None = None
    num_tokens: int = 0
    pictures: tuple[Picture, ...] = ()
    num_frames: int = 0
    sound: Sound | None = None


@dataclass(frozen=True)
class Mark:
    """A region to draw. `text` is how the conversation says it; objects of the facts are not said."""

    region: Region
    text: str = ""
    is_said: bool = True

    @property
    def shape(self) -> str:
        return "box" if self.region.box is not None else "point" if self.region.point is not None else "tube"


@dataclass(frozen=True)
class View:
    """A sample as it is shown."""

    planned: Planned
    pieces: tuple[Token | Placeholder, ...]
    items: tuple[Item, ...]
    marks: tuple[Mark, ...]
    notes: tuple[str, ...]

    @property
    def num_learned(self) -> int:
        return num_learned(self.planned.sample)


@dataclass
class Figures:
    """Figures over the planned samples of a source. Sizes and durations are of the originals."""

    tokens: list[int] = field(default_factory=list)
    learned: list[float] = field(default_factory=list)  # share of a sample's tokens
    patches: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    regions: list[int] = field(default_factory=list)
    sizes: dict[Modality, list[tuple[int, int]]] = field(default_factory=dict)
    durations_s: dict[Modality, list[float]] = field(default_factory=dict)
    prompts: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    refused: list[Refused] = field(default_factory=list)

    def add(self, planned: Planned) -> None:
        sample, conversation = planned.sample, planned.conversation
        self.tokens.append(len(sample))
        self.learned.append(num_learned(sample) / len(sample))
        self.patches.append(sample.num_patches)
        self.turns.append(sum(turn.role != "system" for turn in conversation.turns))
        self.regions.append(len(regions(conversation)))
        for item in sample.media:
            geometry, header = item.plan.geometry, item.ref.header
            if geometry is not None:
                self.sizes.setdefault(item.modality, []).append((geometry.width, geometry.height))
            if header is not None and header.duration_s is not None:
                self.durations_s.setdefault(item.modality, []).append(header.duration_s)
        for turn in conversation.turns:
            if turn.is_learned:
                self.answers[said(turn)] += 1
            elif turn.role == "user":
                self.prompts[said(turn)] += 1

    @property
    def num_drawn(self) -> int:
        return len(self.tokens) + len(self.refused)


@dataclass(frozen=True)
class SourceReport:
    """One source of one stage; `also` names the later stages that show the same."""

    stage: StageConfig
    source: SourceConfig
    also: tuple[str, ...]
    num_samples: int
    num_shards: int
    figures: Figures
    views: tuple[View, ...]


@dataclass(frozen=True)
class PackReport:
    """The first packs of lane 0 of a stage; `problem` says why there are fewer than asked for."""

    stage: StageConfig
    packs: tuple[tuple[tuple[str, Sample], ...], ...]  # source and sample
    num_refused: int
    problem: str = ""


# ---- what is looked at ----------------------------------------------------------------------------------------------


def chosen_stages(
    config: RunConfig, shards: Sequence[str], task: str | None, stage_name: str | None
) -> list[StageConfig]:
    """The stages to show: the run's own, or one whose only source is `shards`.

    Raises ValueError for a stage that is not there, for shards that are missing, and where no source of the
    configuration has these shards and so nothing says what their task is.
    """
    stages = [stage for stage in config.stages if stage_name in (None, stage.name)]
    if not stages:
        raise ValueError(f"no stage {stage_name!r}, the configuration has {[s.name for s in config.stages]}")
    if not shards:
        if task is not None:
            raise ValueError("--task goes with SHARDS: the sources of a configuration name their own")
        return stages
    wanted = _paths(list(shards))
    for stage in stages:
        for source in stage.data:
            try:
                has_them = _paths(source.shards) >= wanted
            except ValueError:  # a source that is not here need not be, to look at another one
                continue
            if has_them and task in (None, source.task):
                return [stage.model_copy(update={"data": [source.model_copy(update={"shards": list(shards)})]})]
    if task is None:
        raise ValueError(f"no source of the configuration has {' '.join(shards)}; say how to phrase them with --task")
    source = SourceConfig(name=task, task=task, shards=list(shards))
    return [stages[0].model_copy(update={"data": [source]})]


def _paths(shards: str | list[str]) -> set[str]:
    return {os.path.abspath(path) for path in expand_shards(shards)}


def inspect_sources(
    config: RunConfig,
    stages: Sequence[StageConfig],
    template: ChatTemplate,
    seed: int,
    num_views: int,
    num_planned: int,
    with_media: bool,
    progress: Callable[[Iterator[SampleId], int, str], Iterator[SampleId]],
) -> list[SourceReport]:
    """Every source of every stage, once where stages would show the same.

    Args:
        stages: of the run, or made by `chosen_stages`.
        seed: draws which samples are looked at; what is drawn for each of them comes from the run's own seed.
        num_views: samples to show of a source. num_planned: samples for its figures.
        progress: passes on the numbers, knows how many there are and of what.
    Raises:
        ValueError: shards are missing or broken, or a task is unknown.
    """
    seen: dict[str, list[str]] = {}
    for stage in stages:
        for source in stage.data:
            seen.setdefault(_identity(stage, source), []).append(stage.name)
    reports = []
    for stage in stages:
        mixture = Mixture(stage.data, config.cache)
        for source in stage.data:
            names = seen[_identity(stage, source)]
            if names[0] != stage.name:
                continue
            sizes = next(one.shard_sizes for one in mixture.sources if one.name == source.name)
            total = sum(sizes)
            drawn = random.Random(f"{seed}/{source.name}").sample(range(total), min(max(num_planned, num_views), total))
            figures = Figures()
            views: list[View] = []
            numbers = (SampleId(source.name, 0, index) for index in drawn)
            for number in progress(numbers, len(drawn), f"{stage.name}/{source.name}"):
                planned = plan(number, mixture, template, stage, config.seed)
                if isinstance(planned, Planned) and len(views) < num_views:
                    try:
                        views.append(view(planned, template, with_media))
                    except Exception as error:
                        planned = _refused(planned.record.key, error)
                if isinstance(planned, Planned):
                    figures.add(planned)
                else:
                    figures.refused.append(planned)
            reports.append(SourceReport(stage, source, tuple(names[1:]), total, len(sizes), figures, tuple(views)))
    return reports


def inspect_packs(config: RunConfig, stage: StageConfig, template: ChatTemplate, num_packs: int) -> PackReport:
    """The first packs of lane 0, as training plans them."""
    mixture = Mixture(stage.data, config.cache)
    lane = mixture.lane(config.seed, stage.name, 0, stage.batch.lanes)
    packer = LanePacker(lane, mixture, template, stage.batch, config.seed, stage.name)
    packs, problem = [], ""
    try:
        for _ in range(num_packs):
            packs.append(tuple((number.source, sample) for number, sample in packer.next()))
    except Exception as error:  # stops the run too, but the sources are still worth a look
        problem = str(error) if isinstance(error, RuntimeError | ValueError) else f"{type(error).__name__}: {error}"
    return PackReport(stage, tuple(packs), len(packer.take_bad()), problem)


def _identity(stage: StageConfig, source: SourceConfig) -> str:
    """The same for sources that show the same: only the seed of phrasing differs between stages."""
    return f"{source.name} {source.task} {source.shards} {stage.batch.tokens} {stage.batch.patches}"


# ---- one sample -----------------------------------------------------------------------------------------------------


def plan(
    number: SampleId, mixture: Mixture, template: ChatTemplate, stage: StageConfig, run_seed: int
) -> Planned | Refused:
    """The sample as LanePacker plans it."""
    shard, index = mixture.locate(number)
    key = f"{number.source}#{number.index}"
    try:
        record = mixture.record(number)
        key = record.key
        words = f"{run_seed}/{stage.name}/{number.source}/{number.epoch}/{number.index}"
        conversation = mixture.tasks[number.source].conversation(record, random.Random(f"{words}/phrase"))
        name, dropout = f"{number.source}/{key}", f"{words}/dropout"
        sample = template.fit(conversation, name, dropout, stage.batch.tokens, stage.batch.patches)
        whole = template.render(conversation, name, random.Random(dropout))
    except Exception as error:
        return _refused(key, error)
    return Planned(number, f"{shard.path} #{index}", record, conversation, sample, whole)


def _refused(key: str, error: Exception) -> Refused:
    if isinstance(error, SampleError):
        return Refused(key, error.reason, error.detail)
    # Not a fault of this sample alone, but the others are still worth a look.
    return Refused(key, STOPS, f"{type(error).__name__}: {error}")


def view(planned: Planned, template: ChatTemplate, with_media: bool) -> View:
    """The sample decoded and taken apart for display. Raises SampleError where training would leave it out."""
    sample, conversation = planned.sample, planned.conversation
    refs = conversation.media
    numbers = _numbers(sample, refs)
    in_whole = set(_numbers(planned.whole, refs))
    items = []
    for media, ref in enumerate(refs):
        if media in numbers:
            planned_item = sample.media[numbers.index(media)]
            items.append(_item(media, planned_item, template, with_media))
            continue
        note = "absent in the record"
        if media in in_whole:
            note = "left out with its turn, to fit the budget"
        elif ref.data is not None:
            note = "removed by modality dropout"
        items.append(Item(media, ref.modality, note))
    notes = []
    if len(sample) != len(planned.whole):
        notes.append(f"{len(planned.whole):,} tokens shrunk to {len(sample):,} to fit the budget")
    if len(sample) > MAX_TOKENS:
        notes.append(f"the first {MAX_TOKENS:,} of {len(sample):,} tokens are shown")
    pieces = itertools.takewhile(lambda piece: piece.position < MAX_TOKENS, _pieces(sample, numbers, template))
    marks, unreadable = _marks(planned, items, template)
    if unreadable:
        notes.append(f"unreadable region in the facts: {len(unreadable):,} not drawn, the first: {unreadable[0]}")
    return View(planned, tuple(pieces), tuple(items), tuple(marks), tuple(notes))


def regions(conversation: Conversation) -> list[Region]:
    return [part for turn in conversation.turns for part in turn.parts if isinstance(part, Region)]


def said(turn: Turn) -> str:
    """The turn's text, with names for what is not text."""
    names = [
        part if isinstance(part, str) else f"<{part.modality}>" if isinstance(part, MediaRef) else "<region>"
        for part in turn.parts
    ]
    return "".join(names).strip()


def num_learned(sample: Sample) -> int:
    return sum(label != IGNORE for label in sample.labels)


def _numbers(sample: Sample, refs: Sequence[MediaRef]) -> list[int]:
    """Which item of the conversation each item of the sample is: both are in reading order."""
    rest = iter(enumerate(refs))
    return [next(media for media, ref in rest if ref is item.ref) for item in sample.media]


def _marks(planned: Planned, items: Sequence[Item], template: ChatTemplate) -> tuple[list[Mark], list[str]]:
    """The conversation's regions, then objects of the facts where it is plain which picture they are in.

    Also what is wrong with the objects that cannot be drawn: a task that does not say them accepts them.
    """
    marks, unreadable = [], []
    for region in regions(planned.conversation):
        plan, text = items[region.media].plan, ""
        if plan is not None and plan.geometry is not None:
            inside = check_region(region, plan.geometry.width, plan.geometry.height)
            text = template.config.regions.render(inside, plan.geometry)
        marks.append(Mark(region, text))
    objects = planned.record.facts.get("objects")
    if isinstance(objects, list) and len(items) == 1:
        for thing in objects:
            match thing:
                case {"label": str(label), "box": box}:
                    try:
                        region = region_of({"media": 0, "box": box, "label": label})
                    except (TypeError, ValueError) as error:
                        unreadable.append(str(error))
                    else:
                        marks.append(Mark(region, is_said=False))
    return marks, unreadable


# ---- tokens ---------------------------------------------------------------------------------------------------------


def _pieces(sample: Sample, numbers: Sequence[int], template: ChatTemplate) -> Iterator[Token | Placeholder]:
    """Tokens and placeholders in order."""
    special = {i for i, token in template.tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(template.tokenizer.all_special_ids)
    position = 0
    for media, item in [*zip(numbers, sample.media, strict=True), (None, None)]:
        for start, count in [(len(sample), 0)] if item is None else item.runs:
            yield from _tokens(sample, position, start, special, template)
            if item is not None and media is not None:
                yield Placeholder(media, item.modality, start, count)
                position = start + count


def _tokens(sample: Sample, start: int, end: int, special: set[int], template: ChatTemplate) -> Iterator[Token]:
    def decode(ids: Sequence[int]) -> str:
        return str(template.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    # A token's text is what it adds to the text of the one before: some tokenizers drop the first one's space.
    before: tuple[int, ...] = ()
    group: tuple[int, ...] = ()
    for position in range(start, end):
        token = sample.token_ids[position]
        group += (token,)
        text = decode(before + group).removeprefix(decode(before)) if before else decode(group)
        next_is_text = position + 1 < end and sample.token_ids[position + 1] not in special
        if text.endswith("\ufffd") and token not in special and next_is_text and len(group) < 8:
            continue  # a part of a character
        first = position + 1 - len(group)
        yield Token(
            text=text,
            ids=group,
            position=first,
            # labels are shifted: a token is learned at the position before it.
            is_learned=first > 0 and sample.labels[first - 1] != IGNORE,
            is_special=token in special,
            gates=tuple(m for m, gate in zip(MODALITIES, sample.gates[first], strict=True) if gate),
        )
        before, group = (() if token in special else group), ()


# ---- media ----------------------------------------------------------------------------------------------------------


def _item(media: int, item: PlannedMedia, template: ChatTemplate, with_media: bool) -> Item:
    """Raises SampleError where the item cannot be decoded."""
    shown: dict[str, Any] = {}
    if with_media:
        try:
            data = item.ref.read()
        except OSError as error:
            raise SampleError("unreadable shard", str(error)) from error
        preprocess = template.preprocesses[item.modality]
        if isinstance(preprocess, VideoPreprocess):
            shown = _video(data, item.plan, preprocess)
        elif isinstance(preprocess, AudioPreprocess):
            shown["sound"] = _sound(data, item, preprocess)
        elif isinstance(preprocess, ImagePreprocess):
            squares = unnormalised(preprocess(data, item.plan), preprocess.spec)
            original = _original(data)
            shown["pictures"] = tuple(Picture(square, original) for square in squares)
    return Item(media, item.modality, plan=item.plan, num_tokens=item.num_placeholders, **shown)


def unnormalised(pixels: Tensor, spec: ImageSpec) -> list[Image.Image]:
    """Encoder input [n, 3, height, width] as pictures: the inverse of ImageSpec.normalise."""
    return spec.pictures(pixels)


def _original(data: bytes) -> Image.Image:
    """The picture as it was, upright, within ORIGINAL_SIDE; the preprocess has decoded it before."""
    opened = Image.open(BytesIO(data), formats=FORMATS)
    opened.draft(None, (ORIGINAL_SIDE, ORIGINAL_SIDE))
    image = to_rgb(ImageOps.exif_transpose(opened))
    image.thumbnail((ORIGINAL_SIDE, ORIGINAL_SIDE))
    return image


def _video(data: bytes, plan: MediaPlan, preprocess: VideoPreprocess) -> dict[str, Any]:
    tensor, times_s = preprocess.frames(data, plan)
    assert plan.geometry is not None
    width, height = plan.geometry.width, plan.geometry.height
    # The originals come the same way, as larger squares whose padding is cut off.
    whole = copy.copy(preprocess)
    whole.config = preprocess.config.model_copy(update={"resize": "pad"})
    whole.spec = replace(preprocess.spec, size=min(ORIGINAL_FRAME_SIDE, max(width, height)))
    padded = square_geometry(width, height, whole.spec.size, "pad")
    corners = [round(corner) for corner in (*padded.to_input(0, 0), *padded.to_input(width, height))]
    squares = unnormalised(whole(data, plan), whole.spec)
    originals = [square.crop((corners[0], corners[1], corners[2], corners[3])) for square in squares]
    every = -(-len(originals) // MAX_FRAMES)
    frames = zip(unnormalised(tensor, preprocess.spec), originals, times_s, strict=True)
    pictures = tuple(Picture(*frame) for frame in itertools.islice(frames, 0, None, every))
    return {"pictures": pictures, "num_frames": len(originals)}


def _sound(data: bytes, item: PlannedMedia, preprocess: AudioPreprocess) -> Sound:
    windows = preprocess(data, item.plan).numpy()  # [windows, mels, frames]
    _, samples = preprocess.sandbox.call(
        "audio_samples",
        data,
        sample_rate_hz=SAMPLE_RATE_HZ,
        max_duration_s=MAX_SOUND_S,
        spans_s=item.plan.spans_s,
    )
    num_positions = item.plan.shape[0]
    frames_per_position = windows.shape[2] // preprocess.spec.window_positions
    sound = np.frombuffer(samples, np.float32)[: int(MAX_SOUND_S * SAMPLE_RATE_HZ)]
    header = item.ref.header or preprocess.header(data)
    assert header.duration_s is not None
    mels = np.concatenate(list(windows), axis=1)  # [mels, all frames]
    return Sound(mels, num_positions * frames_per_position, sound, header.duration_s)
