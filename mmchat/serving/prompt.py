"""From a conversation to what the engine reads: the template's own ids and gates, and media tokens from the cache."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mmchat.batch import IGNORE, Batch, FeatureShape, MediaBatch
from mmchat.conversation import Conversation, MediaRef, Modality, Part
from mmchat.data.chat_template import ChatTemplate, PlannedMedia, Sample
from mmchat.data.pack import collate, load_media
from mmchat.errors import SampleError
from mmchat.inference.load import Loaded
from mmchat.inference.score import check_room
from mmchat.serving.media_cache import MediaCache, digest_of


@dataclass(frozen=True)
class EncodedMedia:
    """One item of a prompt. tokens [tokens, dim] stand at `places` (none under late fusion, where `start` counts)."""

    modality: Modality
    tokens: Tensor
    places: np.ndarray
    start: int
    shape: FeatureShape


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the opening of its answer.

    gates: [length, modalities] float32. marks: [length, columns] int64, equal where two tokens are the same to the
    LLM: the id, the gates, and the hash of the item whose placeholder it is. What stands before them is not in it.
    """

    token_ids: list[int]
    gates: np.ndarray
    marks: np.ndarray
    media: tuple[EncodedMedia, ...]

    def __len__(self) -> int:
        return len(self.token_ids)

    def answer_marks(self, ids: Sequence[int]) -> np.ndarray:
        """Marks of tokens that the model says: an answer has the gates of the prompt's end."""
        last = np.repeat(self.gates[-1:], len(ids), axis=0)
        return _marks(np.array(ids, np.int64), last, np.zeros((len(ids), 2), np.int64))

    def part(self, start: int, end: int, is_late: bool) -> tuple[Batch, dict[str, Tensor]]:
        """Positions `start` to `end` as a batch of one row, and the media tokens that stand there."""
        tokens: dict[str, list[Tensor]] = {}
        places: dict[str, list[np.ndarray]] = {}
        for item in self.media:
            here = (item.places >= start) & (item.places < end)
            if here.any():
                tokens.setdefault(item.modality, []).append(item.tokens[torch.from_numpy(here)])
                places.setdefault(item.modality, []).append(item.places[here] - start)
        media = {name: _placed(np.concatenate(found)) for name, found in places.items()}
        embedded = {name: torch.cat(found) for name, found in tokens.items()}
        if is_late and end == len(self):  # only the last position's hidden state is looked at
            media, embedded = late_media([self])
        ids = torch.tensor([self.token_ids[start:end]])
        batch = Batch(
            token_ids=ids,
            labels=torch.full_like(ids, IGNORE),
            segment_ids=torch.zeros_like(ids),
            positions=torch.arange(start, end)[None],
            presence=torch.from_numpy(self.gates[None, start:end]),
            media=media,
        )
        return batch, embedded


def in_one_row(steps: Batch, part: Batch) -> Batch:
    """The new tokens of running answers, [rows, 1], and behind them a part of a prompt, [1, length], as one row."""
    rows = len(steps.token_ids)

    def joined(first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first.transpose(0, 1), second], dim=1)

    return Batch(
        token_ids=joined(steps.token_ids, part.token_ids),
        labels=joined(steps.labels, part.labels),
        segment_ids=joined(steps.segment_ids, part.segment_ids),
        positions=joined(steps.positions, part.positions),
        presence=joined(steps.presence, part.presence),
        media={name: replace(item, index=item.index + rows) for name, item in part.media.items()},
    )


def late_media(prompts: Sequence[Prompt]) -> tuple[dict[str, MediaBatch], dict[str, Tensor]]:
    """All media of rows under late fusion, where tokens look at it from outside the LLM."""
    items: dict[str, list[tuple[int, EncodedMedia]]] = {}
    for row, prompt in enumerate(prompts):
        for item in prompt.media:
            items.setdefault(item.modality, []).append((row, item))
    nothing = torch.empty(0)
    media = {
        name: MediaBatch(
            data=nothing,
            shapes=tuple(item.shape for _, item in found),
            index=torch.empty(0, dtype=torch.int64),
            anchors=torch.tensor([[row, 0, item.start] for row, item in found]),
        )
        for name, found in items.items()
    }
    return media, {name: torch.cat([item.tokens for _, item in found]) for name, found in items.items()}


class Reader:
    """Makes prompts, for several threads: each has decoders of its own, so that one that hangs stops no other."""

    def __init__(self, loaded: Loaded, cache: MediaCache) -> None:
        self.loaded = loaded
        self.cache = cache
        # A tokenizer is told anew with every call whether special tokens count, so that threads must take turns; and it
        # is not the one that answers are decoded with.
        self._template = copy.copy(loaded.template)
        self._template.tokenizer = copy.deepcopy(loaded.template.tokenizer)
        self._rendering = threading.Lock()
        self._encoding = threading.Lock()
        self._own = threading.local()

    def read(self, conversation: Conversation, key: str = "request") -> Prompt:
        """Raises SampleError where the conversation cannot be used: its media, its regions, its length."""
        decoders = self._decoders()
        refs: dict[MediaRef, bytes] = {}
        turns = []
        for turn in conversation.turns:
            parts: list[Part] = []
            for part in turn.parts:
                if isinstance(part, MediaRef) and part.data is not None:
                    part, digest = self._known(decoders, part)
                    refs[part] = digest
                parts.append(part)
            turns.append(replace(turn, parts=tuple(parts)))
        with self._rendering:  # headers are known by now, so that nothing is decoded here
            sample = self._template.render(Conversation(tuple(turns)), key, answer=True)
        check_room(self.loaded, sample, 1)
        digests = [refs[item.ref] for item in sample.media]
        media = tuple(self._encoded(decoders, sample, *pair) for pair in zip(sample.media, digests, strict=True))
        hashes = np.zeros((len(sample), 2), np.int64)
        for item, digest in zip(sample.media, digests, strict=True):
            hashes[list(item.places)] = np.frombuffer(digest[:16], np.int64)
        return Prompt(sample.token_ids, sample.gates, _marks(np.array(sample.token_ids), sample.gates, hashes), media)

    def _decoders(self) -> ChatTemplate:
        """The template with preprocesses of the calling thread, which have decoding processes of their own."""
        if not hasattr(self._own, "template"):
            template = copy.copy(self._template)
            template.preprocesses = copy.deepcopy(dict(template.preprocesses))
            self._own.template = template
        found: ChatTemplate = self._own.template
        return found

    def _known(self, decoders: ChatTemplate, ref: MediaRef) -> tuple[MediaRef, bytes]:
        """The item in memory with its header, and its hash. One that the model has no use for is the template's."""
        try:
            data = ref.read()
        except OSError as error:
            raise SampleError("unreadable media", str(error)) from error
        digest = digest_of(ref.modality, data)
        preprocess = decoders.preprocesses.get(ref.modality)
        found = self.cache.get(digest)
        header = ref.header if found is None else found.header
        if header is None and preprocess is not None:
            header = preprocess.header(data)
        if header is not None and found is None:
            self.cache.put(digest, header)
        return MediaRef(ref.modality, data, header), digest

    def _encoded(self, decoders: ChatTemplate, sample: Sample, item: PlannedMedia, digest: bytes) -> EncodedMedia:
        found = self.cache.get(digest)
        tokens = None if found is None else found.tokens
        if tokens is None:
            only = replace(sample, media=(item,))
            decoded = load_media(only, decoders)
            with self._encoding, torch.no_grad():  # one at a time, so that the engine keeps most of the machine
                found = self.cache.get(digest)
                tokens = None if found is None else found.tokens
                if tokens is None:
                    batch = collate([only], [decoded]).to(self.loaded.device)
                    tokens = self.loaded.model.media_tokens(batch)[item.modality]
            assert item.ref.header is not None, "the template has planned by it"
            self.cache.put(digest, item.ref.header, tokens)
        return EncodedMedia(item.modality, tokens, np.array(list(item.places), np.int64), item.start, item.plan.shape)


def _placed(places: np.ndarray) -> MediaBatch:
    """Where media tokens stand that are known already."""
    return MediaBatch(torch.empty(0), (), torch.from_numpy(places), torch.empty(0, 3, dtype=torch.int64))


def _marks(token_ids: np.ndarray, gates: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(gates).view(np.int32).astype(np.int64)
    return np.concatenate([token_ids.astype(np.int64)[:, None], bits, hashes], axis=1)
