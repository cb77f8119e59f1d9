"""Conversations to token ids, labels and gates: ids are built part by part, labels come from the parts.

Nothing is tokenised twice and nothing is searched for in a finished string, so a label can never shift, and whatever
a user types (`<image>`, `<|im_end|>`) stays text.
"""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mmchat.batch import IGNORE
from mmchat.config import ChatConfig
from mmchat.conversation import MODALITIES, Box, Conversation, MediaRef, Modality, Part, Region, Turn
from mmchat.data.chat_format import chat_format
from mmchat.errors import SampleError
from mmchat.modalities import MediaPlan, Preprocess
from mmchat.models.connector import AnyConnectorConfig
from mmchat.models.fusion import AnyFusionConfig, FLoRAConfig, LateConfig
from mmchat.regions import Geometry, ParsedRegions, check_region

MAX_SHRINK = 4
# What has places in it: a region names one of these by its number, so sounds do not count.
SEEN: tuple[Modality, ...] = ("image", "video")


@dataclass(frozen=True)
class PlannedMedia:
    """One present item of a sample: what it will become, and where its placeholders stand in the sample.

    Under late fusion there are none, and `start` is the first token that may look at the item.

    Attributes:
        start: position of the first placeholder.
        offsets: of the placeholders from the first one, where text stands between them; () where they are one run.
        boxes: in a picture, all that the conversation speaks of, each once, in shares of the encoder's input.
    """

    modality: Modality
    ref: MediaRef
    plan: MediaPlan
    start: int
    num_placeholders: int
    offsets: tuple[int, ...] = ()
    boxes: tuple[Box, ...] = ()

    @property
    def places(self) -> Sequence[int]:
        """Positions of the placeholders."""
        run = range(self.start, self.start + self.num_placeholders)
        return [self.start + offset for offset in self.offsets] if self.offsets else run

    @property
    def end(self) -> int:
        """The position behind the last placeholder."""
        return self.places[-1] + 1 if self.num_placeholders else self.start

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Position and length of each run of placeholders; an item without any has one of length 0."""
        if not self.offsets:
            return [(self.start, self.num_placeholders)]
        places = self.places
        starts = [i for i, place in enumerate(places) if i == 0 or place != places[i - 1] + 1]
        return [(places[i], end - i) for i, end in zip(starts, [*starts[1:], len(places)], strict=True)]


@dataclass(frozen=True)
class Sample:
    """A conversation as tokens, before its media is decoded.

    labels are shifted: labels[i] is the token to predict at position i. gates: [length, modalities] float32.
    """

    key: str
    token_ids: list[int]
    labels: list[int]
    gates: np.ndarray
    media: tuple[PlannedMedia, ...] = ()

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_patches(self) -> int:
        return sum(item.plan.num_patches for item in self.media)


class ChatTemplate:
    """Renders conversations for one model: its tokenizer, its modalities and its kind of fusion."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: ChatConfig,
        preprocesses: Mapping[Modality, Preprocess],
        connectors: Mapping[Modality, AnyConnectorConfig],
        fusion: AnyFusionConfig,
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.format = chat_format(config.format, tokenizer)
        self.preprocesses = preprocesses
        self.connectors = connectors
        self.fusion = fusion
        self.end_ids = self._special(self.format.assistant[1])
        if not self.end_ids:
            raise ValueError("the chat format has no end of an answer, so that the model could not learn to stop")
        self.num_begin = len(self._special(self.format.begin))
        # Any id does at a placeholder: the embedding there is replaced.
        self.placeholder_id = self.end_ids[0]

    def render(
        self,
        conversation: Conversation,
        key: str = "",
        rng: random.Random | None = None,
        shrink: int = 0,
        skip_turns: int = 0,
        answer: bool = False,
    ) -> Sample:
        """Tokens of a whole conversation.

        Args:
            rng: draws the training-time dropouts; None drops nothing.
            shrink: passed on to the media plans.
            skip_turns: leaves out this many of the oldest turns that are not the system's. Their media moves to the
                first turn that stays, where no other turn has any.
            answer: ends with the opening of an assistant turn, for generation.
        Raises:
            SampleError: an unknown modality, an unreadable header, a region without its picture.
        """
        conversation, closed = self._drop_out(conversation, rng)
        plans = self._plans(conversation, shrink)
        turns = list(conversation.turns)
        system = [turn for turn in turns[:1] if turn.role == "system"]
        writer = _Writer(self, plans, key)
        said = turns[len(system) + skip_turns :]
        left_out = Conversation(tuple(turns[: len(turns) - len(said)])).media
        if left_out and said and not Conversation(tuple(said)).media:
            # What is talked about stays, unless later turns show something else.
            said[0] = replace(said[0], parts=(*left_out, *said[0].parts))
            left_out = ()
        writer.first_media = len(left_out)  # media keeps its number when turns are left out
        numbers = iter(range(len(left_out), len(plans)))
        for turn in writer.begin(system[0] if system else None, said):
            writer.turn(turn, numbers)
        if answer:
            prefix = self.format.assistant[0]
            # A blank at the end belongs to the first word of the answer, where both are tokenised in one piece.
            writer.special(prefix.rstrip(" ") if self.format.joins else prefix)
        return writer.sample(closed)

    def fit(self, conversation: Conversation, key: str, rng_seed: str, max_tokens: int, max_patches: int) -> Sample:
        """Renders within a budget: shrinks media, then drops the oldest turns, then refuses. Media is never cut.

        Raises:
            SampleError: nothing fits, or nothing in it is learned.
        """
        sample = self.render(conversation, key, random.Random(rng_seed))
        if not any(label != IGNORE for label in sample.labels):
            raise SampleError("nothing to learn", f"{key}: no turn of this conversation is learned; wanted an answer")
        shrink = skip = 0
        has_system = bool(conversation.turns) and conversation.turns[0].role == "system"
        droppable = len(conversation.turns) - int(has_system)
        while len(sample) > max_tokens or sample.num_patches > max_patches:
            if shrink < MAX_SHRINK and sample.media:
                shrink += 1
            elif skip + 2 < droppable:
                skip += 2
            else:
                raise SampleError(
                    "does not fit the budget",
                    f"{key}: {len(sample)} tokens and {sample.num_patches} patches after shrinking media and dropping "
                    f"turns; the pack holds {max_tokens} and {max_patches}. Raise batch.tokens or batch.patches, or "
                    "choose a connector with fewer tokens",
                )
            sample = self.render(conversation, key, random.Random(rng_seed), shrink, skip)
        if not any(label != IGNORE for label in sample.labels):
            raise SampleError("nothing to learn", f"{key}: no learned turn is left within the budget")
        return sample

    def read_regions(self, text: str, conversation: Conversation) -> ParsedRegions:
        """The regions of an answer in original pixels; `Region.media` is an item's index in the conversation.

        Args:
            text: of the answer, regions as the model writes them.
            conversation: that was answered. Of an absent item the header must be known, or regions in it fail.
        Raises:
            SampleError: an unknown modality, an unreadable header.
        """
        plans = self._plans(conversation, shrink=0)
        seen = [i for i, (ref, _) in enumerate(plans) if ref.modality in SEEN]
        is_video = [plans[i][0].modality == "video" for i in seen]
        found = self.config.regions.parse(text, [self._geometry(*plans[i]) for i in seen], is_video)
        parts = [replace(part, media=seen[part.media]) if isinstance(part, Region) else part for part in found.parts]
        return ParsedRegions([part for part in parts if isinstance(part, Region)], found.num_failed, parts)

    def without_dropout(self) -> ChatTemplate:
        """The same template with training-time dropouts off."""
        off: dict[str, Any] = {"modality_dropout": {}} | (
            {"adapter_dropout": {}} if isinstance(self.fusion, FLoRAConfig) else {}
        )
        other = copy.copy(self)
        other.fusion = self.fusion.model_copy(update=off)
        return other

    def stub(self, key: str) -> Sample:
        """One token with nothing to learn, in place of a sample that cannot be decoded."""
        gates = np.zeros((1, len(MODALITIES)), np.float32)
        return Sample(key, [self.end_ids[0]], [IGNORE], gates)

    def text_ids(self, text: str) -> list[int]:
        """Ids of what somebody said: special tokens in it are spelled out, not obeyed."""
        encoded: Any = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return list(encoded["input_ids"])

    def answer_ids(self, text: str) -> list[int]:
        """Ids of an answer as it stands behind the opening of its turn, without its end."""
        prefix = self.format.assistant[0]
        if not self.format.joins:
            return self.text_ids(text)
        opening = self.joined_ids([(prefix.rstrip(" "), False)])[0]
        return self.joined_ids([(prefix, False), (text, True)])[0][len(opening) :]

    def joined_ids(self, pieces: Sequence[tuple[str, bool]], is_first: bool = False) -> tuple[list[int], list[bool]]:
        """Ids of pieces of text in one piece, and for each whether the piece of its last character is marked.

        is_first: the conversation begins with it. Otherwise it stands behind a token that is not made of text, where
        some tokenizers leave out the blank that they put before what comes first.
        """
        text = "".join(piece for piece, _ in pieces)
        marks = [mark for piece, mark in pieces for _ in piece]
        lead = "" if is_first or self.has_special(text) else str(self.tokenizer.eos_token)
        encoded: Any = self.tokenizer(
            lead + text, add_special_tokens=False, split_special_tokens=not lead, return_offsets_mapping=True
        )
        skip = int(bool(lead))
        ends = [end - len(lead) for _, end in encoded["offset_mapping"]]
        return list(encoded["input_ids"])[skip:], [marks[max(end - 1, 0)] for end in ends[skip:]]

    def has_special(self, text: str) -> bool:
        """Whether a token of the tokenizer's that is not made of text stands in it."""
        return any(token in text for token in self.tokenizer.get_added_vocab())

    def _special(self, text: str) -> list[int]:
        """Ids of the format's own text, whose special tokens count."""
        encoded: Any = self.tokenizer(text, add_special_tokens=False)
        return list(encoded["input_ids"]) if text else []

    def _drop_out(
        self, conversation: Conversation, rng: random.Random | None
    ) -> tuple[Conversation, frozenset[Modality]]:
        """Draws modality dropout (items become absent) and adapter dropout (returned: modalities with closed gates)."""
        if rng is None:
            return conversation, frozenset()
        adapter = self.fusion.adapter_dropout if isinstance(self.fusion, FLoRAConfig) else {}
        # Both draws happen for every modality, so that a rate does not change the other draws.
        draws = {modality: (rng.random(), rng.random()) for modality in MODALITIES}
        gone = {m for m in MODALITIES if draws[m][0] < self.fusion.modality_dropout.get(m, 0.0)}
        closed = frozenset(m for m in MODALITIES if draws[m][1] < adapter.get(m, 0.0))
        if gone:
            conversation = Conversation(tuple(_without(turn, gone) for turn in conversation.turns))
        return conversation, closed

    def _plans(self, conversation: Conversation, shrink: int) -> list[tuple[MediaRef, MediaPlan | None]]:
        plans: list[tuple[MediaRef, MediaPlan | None]] = []
        for ref in conversation.media:
            if ref.data is None:
                plans.append((ref, None))
                continue
            preprocess = self.preprocesses.get(ref.modality)
            if preprocess is None:
                raise SampleError(
                    "modality not in the model",
                    f"found {ref.modality}, but model.modalities has {', '.join(self.preprocesses) or 'none'}",
                )
            header = ref.header or preprocess.header(ref.read())
            plans.append((ref, preprocess.plan(header, shrink)))
        return plans

    def _token_runs(self, modality: Modality, plan: MediaPlan) -> list[tuple[str, int]]:
        """The placeholders of an item in runs, each with the text before it: under `frame_times: text` when it is.

        There the tokens of each moment are a run; those that belong to none follow the last moment's without a text.
        """
        if isinstance(self.fusion, LateConfig):
            return []
        connector = self.connectors[modality]
        if modality != "video" or self.config.frame_times == "none":
            return [("", connector.num_tokens(plan.shape))]
        moments = connector.moments(plan.shape)
        assert moments is not None, "the configuration refuses frame_times: text for other connectors"
        runs = [(f"@{self.config.regions.time_text(t)}", moments.tokens) for t in moments.times_s(plan.times_s)]
        return [*runs, ("", moments.rest)] if moments.rest else runs

    def _geometry(self, ref: MediaRef, plan: MediaPlan | None) -> Geometry | None:
        """Of an item whose size is known, also where it is absent."""
        if plan is None and ref.header is not None and ref.modality in self.preprocesses:
            plan = self.preprocesses[ref.modality].plan(ref.header)
        return plan.geometry if plan is not None else None


def _without(turn: Turn, gone: set[Modality]) -> Turn:
    parts: tuple[Part, ...] = tuple(
        replace(part, data=None) if isinstance(part, MediaRef) and part.modality in gone else part
        for part in turn.parts
    )
    return replace(turn, parts=parts)


class _Writer:
    """Collects ids, learned marks and media while a conversation is rendered."""

    def __init__(self, template: ChatTemplate, plans: list[tuple[MediaRef, MediaPlan | None]], key: str) -> None:
        self.template = template
        self.plans = plans
        self.key = key
        self.first_media = 0
        self.num_placed = 0  # media items that the turns so far have shown, and those before the first one
        self.ids: list[int] = []
        self.learned: list[bool] = []
        self.media: dict[int, PlannedMedia] = {}  # by number
        # By the number of their picture, each once: as keys, which keep their order.
        self.boxes: dict[int, dict[Box, None]] = defaultdict(dict)
        self.waiting: list[tuple[str, bool]] = []  # text that is tokenised with what follows, and whether it is learned

    def begin(self, system: Turn | None, said: list[Turn]) -> list[Turn]:
        """Writes the opening and the system turn; returns the turns that are left to write."""
        chat_format, config = self.template.format, self.template.config
        text = config.system
        if system is not None:
            if not all(isinstance(part, str) for part in system.parts):
                raise SampleError("media in the system turn", f"{self.key}: a system turn may only hold text")
            text = "".join(part for part in system.parts if isinstance(part, str))
        if text is None:
            self.special(chat_format.begin)
        elif chat_format.system is not None:
            self.special(chat_format.begin_system + chat_format.system[0])
            self._say(text, learned=False)
            self.special(chat_format.system[1])
        else:  # a format without the role: said at the head of the first user turn
            self.special(chat_format.begin)
            if not said or said[0].role != "user":
                said = [Turn("user", (text,)), *said]
            else:
                said = [replace(said[0], parts=(f"{text}\n\n", *said[0].parts)), *said[1:]]
        return said

    def turn(self, turn: Turn, numbers: Iterator[int]) -> None:
        """One user or assistant turn."""
        chat_format = self.template.format
        if turn.role == "system":
            raise SampleError("system turn out of place", f"{self.key}: only the first turn may be the system's")
        prefix = chat_format.user[0] if turn.role == "user" else chat_format.assistant[0]
        self.special(prefix)
        text = ""
        for part in turn.parts:
            if isinstance(part, MediaRef):
                self._say(text, turn.is_learned)
                text = ""
                self._place(next(numbers))
            elif isinstance(part, Region):
                text += self._region(part)
            else:
                text += part
        self._say(text, turn.is_learned)
        if turn.role == "user":
            self.special(chat_format.user[1], learned=turn.is_learned)
        else:
            self.special(chat_format.assistant[1], learned=turn.is_learned)
            self.special(chat_format.assistant[2])

    def special(self, text: str, learned: bool = False) -> None:
        if self.template.format.joins and not self.template.has_special(text):
            self.waiting.append((text, learned))
        else:
            self._flush()
            self._add(self.template._special(text), learned)

    def sample(self, closed: frozenset[Modality]) -> Sample:
        self._flush()
        gates = np.zeros((len(self.ids), len(MODALITIES)), np.float32)
        fusion = self.template.fusion
        media = tuple(replace(item, boxes=tuple(self.boxes[number])) for number, item in self.media.items())
        for item in media:
            if isinstance(fusion, FLoRAConfig) and item.modality not in closed:
                own = fusion.scope == "own_tokens"
                rows = list(item.places) if own else slice(None)
                gates[rows, MODALITIES.index(item.modality)] = 1.0
        following = [*self.ids[1:], 0]
        learned = [*self.learned[1:], False]
        labels = [token if learns else IGNORE for token, learns in zip(following, learned, strict=True)]
        return Sample(self.key, self.ids, labels, gates, media)

    def _say(self, text: str, learned: bool) -> None:
        if self.template.format.joins:
            self.waiting.append((text, learned))
        elif text:
            self._add(self.template.text_ids(text), learned)

    def _flush(self) -> None:
        """Tokenises the text that waits, under a format that joins."""
        if any(text for text, _ in self.waiting):
            ids, learned = self.template.joined_ids(self.waiting, is_first=len(self.ids) <= self.template.num_begin)
            self.ids += ids
            self.learned += learned
        self.waiting = []

    def _add(self, ids: list[int], learned: bool) -> None:
        self.ids += ids
        self.learned += [learned] * len(ids)

    def _place(self, number: int) -> None:
        """Media item `number`: its placeholders and the text after them; nothing at all where it is absent."""
        self.num_placed = number + 1
        ref, plan = self.plans[number]
        if plan is None:
            return
        self._flush()
        places: list[int] = []
        for text, num in self.template._token_runs(ref.modality, plan):
            self._say(text, learned=False)
            self._flush()
            places += range(len(self.ids), len(self.ids) + num)
            self._add([self.template.placeholder_id] * num, learned=False)
        start = places[0] if places else len(self.ids)
        is_one_run = places == list(range(start, start + len(places)))
        offsets = () if is_one_run else tuple(place - start for place in places)
        self.media[number] = PlannedMedia(ref.modality, ref, plan, start, len(places), offsets)
        self._say(self.template.config.media_suffix.get(ref.modality, ""), learned=False)

    def _region(self, region: Region) -> str:
        is_here = self.first_media <= region.media < len(self.plans)
        geometry = self.template._geometry(*self.plans[region.media]) if is_here else None
        if geometry is None:
            raise SampleError(
                "region without its picture",
                f"{self.key}: a region names media item {region.media}; items {self.first_media} to "
                f"{len(self.plans) - 1} are here (turns before them did not fit), and its size must be known",
            )
        if self.plans[region.media][0].modality != "video" and (region.tube or region.time_s is not None):
            raise SampleError(
                "time in a still picture",
                f"{self.key}: found a region at a time in media item {region.media}; wanted a video there",
            )
        try:
            header = self.plans[region.media][0].header
            duration_s = None if header is None else header.duration_s
            region = check_region(region, geometry.width, geometry.height, duration_s)
            if region.box is not None and self.plans[region.media][0].modality == "image":
                x0, y0, x1, y1 = box = geometry.to_shares(region.box)
                if x0 < x1 and y0 < y1:
                    self.boxes[region.media][box] = None
            return self.template.config.regions.render(region, geometry, self._number(region.media))
        except SampleError as error:
            raise SampleError(error.reason, f"{self.key}: {error.detail}") from error

    def _number(self, media: int) -> int | None:
        """The number of a region's picture among those shown up to here, absent ones too; None for the only one.

        Only what was said before counts, so that the text of a turn is the same whatever is shown later.
        """
        seen = [
            i for i in range(self.first_media, max(self.num_placed, media + 1)) if self.plans[i][0].modality in SEEN
        ]
        return seen.index(media) + 1 if len(seen) > 1 else None
