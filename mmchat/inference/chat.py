"""A conversation with a model: streamed answers, and a cache kept across turns."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor
from transformers.cache_utils import DynamicCache

from mmchat.conversation import Conversation, MediaRef, Part, Region, Turn
from mmchat.data.chat_template import SEEN, PlannedMedia, Sample
from mmchat.data.pack import collate, load_media
from mmchat.errors import SampleError
from mmchat.inference.generate import Decoding, TokenStream
from mmchat.inference.load import Loaded
from mmchat.inference.safety import Guard
from mmchat.inference.text_stream import TextStream
from mmchat.modalities.image import size_of
from mmchat.regions import check_region

# The second form is what was meant as a place and is none. A blank behind the < makes either plain text.
_MARK = re.compile(r"<(box|point)\s*:([^<>]*)>|</?(?:box|point)\b[^<>]*>?", re.I)


class ChatSession:
    """One conversation. A picture is encoded and read once, however many questions follow.

    The key-value cache is kept as far as the tokens and the fusion's gates of the conversation have not changed: a
    modality that appears in a later turn opens its gates on the earlier tokens too (scope `segment`), so they are then
    read again, exactly as training would see them.
    """

    def __init__(
        self,
        loaded: Loaded,
        decoding: Decoding | None = None,
        system: str | None = None,
        guard: Guard | None = None,
    ) -> None:
        """guard: judges each sentence before it is yielded; the history keeps what was yielded."""
        self.loaded = loaded
        self.decoding = decoding or Decoding()
        self.guard = guard
        self.turns: tuple[Turn, ...] = () if system is None else (Turn("system", (system,)),)
        self._cache: DynamicCache | None = None
        self._cached: Sample | None = None
        self._decoded: list[tuple[MediaRef, Tensor]] = []  # of the turns so far

    def afresh(self) -> ChatSession:
        """A new conversation with the same model, decoding and system turn."""
        other = ChatSession(self.loaded, self.decoding, guard=self.guard)
        other.turns = tuple(turn for turn in self.turns[:1] if turn.role == "system")
        return other

    def ask(self, parts: Sequence[Part]) -> Iterator[str]:
        """Says one user turn and yields the answer in pieces of text.

        Raises:
            SampleError: a media item cannot be used; the conversation is as before.
        """
        loaded = self.loaded
        turns = (*self.turns, Turn("user", tuple(parts)))
        sample = loaded.template.render(Conversation(turns), answer=True)
        # Decoded before the cache is touched, so that an unusable item leaves the conversation as it was.
        decoded = [(item.ref, self._decode(sample, item)) for item in sample.media]
        known = self._shared_length(sample)
        rest = _after(sample, known, keep_media=loaded.model.late is not None)
        tensors = [tensor for ref, tensor in decoded if any(ref is item.ref for item in rest.media)]
        batch = collate([rest], [tensors])
        batch = replace(batch, positions=batch.positions + known).to(loaded.device)
        # Not kept until the answer is whole: one that is broken off leaves the cache half written.
        cache, self._cache = self._cache, None
        stream = TokenStream(loaded.model, batch, None, loaded.template.end_ids, self.decoding, cache)
        ids: list[int] = []
        said = ""
        pieces = self._pieces(stream, ids)
        for piece in self.guard.stream(pieces) if self.guard is not None else pieces:
            said += piece
            yield piece
        self.turns = (*turns, Turn("assistant", (said,)))
        self._decoded = decoded
        self._cache = stream.cache
        self._cached = _extended(sample, ids[:-1])

    def _pieces(self, stream: TokenStream, ids: list[int]) -> Iterator[str]:
        """The text of a stream, in pieces; `ids` gets the tokens."""
        text = TextStream(self.loaded.template)
        for chosen in stream:
            ids.append(int(chosen[0]))
            if piece := text.feed(ids[-1]):
                yield piece
        if rest := text.finish():
            yield rest

    def _decode(self, sample: Sample, item: PlannedMedia) -> Tensor:
        for ref, tensor in self._decoded:
            if ref is item.ref:
                return tensor
        return load_media(replace(sample, media=(item,)), self.loaded.template)[0]

    def _shared_length(self, sample: Sample) -> int:
        """How many tokens of the cache still hold for this prompt; the cache is cut to them."""
        known = 0
        if self._cached is not None and self._cache is not None:
            known = _common_length(self._cached, sample)
        # At least one token must be fed to get an answer from.
        known = min(known, len(sample) - 1)
        if self._cache is None or known == 0:
            self._cache = None
            return 0
        if known < self._cache.get_seq_length():
            if any(getattr(layer, "is_sliding", False) for layer in self._cache.layers):
                self._cache = None  # a sliding window has forgotten what a cut would need
                return 0
            self._cache.crop(known - self._cache.get_seq_length())  # negative: how many to take off
        return known


def _common_length(old: Sample, new: Sample) -> int:
    """Length of the common beginning of two samples: tokens, gates and media alike; never inside a media item."""
    length = min(len(old), len(new))
    same = np.array(old.token_ids[:length]) == np.array(new.token_ids[:length])
    same &= (old.gates[:length] == new.gates[:length]).all(axis=1)
    common = length if same.all() else int(same.argmin())
    for i in range(max(len(old.media), len(new.media))):
        pair = [media[i] for media in (old.media, new.media) if i < len(media)]
        if len(pair) < 2 or pair[0].ref is not pair[1].ref or pair[0].start != pair[1].start:
            return min(common, *(item.start for item in pair))
        if pair[0].start < common < pair[0].end:
            return pair[0].start
    return common


def _after(sample: Sample, known: int, keep_media: bool) -> Sample:
    """The tokens that are not in the cache, and their media.

    keep_media: under late fusion every token looks at all media, so all of it stays, where it was.
    """
    media = sample.media
    if not keep_media:
        media = tuple(replace(item, start=item.start - known) for item in media if item.start >= known)
    return Sample(sample.key, sample.token_ids[known:], sample.labels[known:], sample.gates[known:], media)


def _extended(sample: Sample, ids: list[int]) -> Sample:
    """The prompt with the generated tokens that are in the cache."""
    gates = np.concatenate([sample.gates, np.repeat(sample.gates[-1:], len(ids), axis=0)])
    token_ids = [*sample.token_ids, *ids]
    return Sample(sample.key, token_ids, [*sample.labels, *([-100] * len(ids))], gates, sample.media)


def read_question(text: str, media: Sequence[MediaRef]) -> list[Part]:
    """A typed question, in which `<box:x1,y1,x2,y2>` and `<point:x,y>` are places in original pixels.

    Original means as the picture is shown, turned as its EXIF says. Where there are several pictures, the number of one
    comes first, counted from 1 over the pictures and videos of the conversation: `<box:2:x1,y1,x2,y2>`. With a blank
    behind the `<` it is plain text.

    Args:
        media: of the whole conversation, that of this question included.
    Raises:
        SampleError: a place that cannot be read, that lies outside its picture, or whose picture is not clear.
    """
    parts: list[Part] = []
    end = 0
    for match in _MARK.finditer(text):
        parts += [text[end : match.start()], _region(match, media)]
        end = match.end()
    return [part for part in (*parts, text[end:]) if part != ""]


def _region(match: re.Match[str], media: Sequence[MediaRef]) -> Region:
    wanted = (
        "<box:x1,y1,x2,y2> or <point:x,y> in pixels; of the second picture <box:2:x1,y1,x2,y2>. "
        "With a blank behind the <, it is plain text"
    )
    if match[1] is None:
        raise SampleError("region not readable", f"found {match[0].strip()}; wanted {wanted}")
    kind = match[1].lower()
    number, colon, values = match[2].rpartition(":")
    try:
        numbers = tuple(float(value) for value in values.split(","))
        chosen = int(number) if colon else 1
    except ValueError as error:
        raise SampleError("region not readable", f"found {match[0]}; wanted {wanted}") from error
    if len(numbers) != {"box": 4, "point": 2}[kind]:
        raise SampleError("region not readable", f"found {match[0]} with {len(numbers)} numbers; wanted {wanted}")
    shown = [i for i, item in enumerate(media) if item.modality in SEEN]
    if not colon and len(shown) > 1:
        raise SampleError(
            "region names no picture", f"found {match[0]} and {len(shown)} pictures; wanted <{kind}:NUMBER:...>"
        )
    if not 1 <= chosen <= len(shown) or media[shown[chosen - 1]].modality != "image":
        found = ", ".join(media[i].modality for i in shown) or "nothing to see"
        raise SampleError("region without its picture", f"found {match[0]} in a conversation with {found}")
    item = shown[chosen - 1]
    region = Region(item, box=numbers) if len(numbers) == 4 else Region(item, point=numbers)  # type: ignore[arg-type]
    try:
        return check_region(region, *size_of(media[item].read()))
    except SampleError as error:
        raise SampleError(error.reason, f"{match[0]}: {error.detail}") from error
