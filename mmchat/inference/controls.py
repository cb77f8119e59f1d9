"""Controls of an evaluation: media taken away, exchanged, blanked or out of order: do answers come from it at all?"""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, Self

import numpy as np
import soundfile
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from mmchat.conversation import MODALITIES, MediaHeader, MediaRef, Modality, Record, StoredBytes
from mmchat.data.chat_template import ChatTemplate, Sample
from mmchat.data.lanes import SampleId
from mmchat.data.mixture import Mixture
from mmchat.errors import SampleError
from mmchat.modalities.audio import SAMPLE_RATE_HZ
from mmchat.modalities.image import upright
from mmchat.schema import Schema

GREY = (128, 128, 128)
_BLOCK = 1 << 20  # samples of silence written at a time


class Controls(Schema):
    """What an evaluation does to the media, in this order; by default nothing.

    swap: modalities whose items come from another record, in a random circle of records with as many items. A picture
        is brought to the size of the one that it stands for: places mean the same, and its content alone differs.
    blank: modalities whose items are uniform: pictures grey, sound silent, of the same size or length.
    missing: share of records, by modality, that go without their items, drawn by a hash of seed and key.
    shuffle: videos whose frames come in any order, drawn by a hash of seed and key: what was seen stays, what was first
        is not known. Times that the model is told stay with the places, not with the frames.
    """

    swap: tuple[Modality, ...] = ()
    blank: tuple[Modality, ...] = ()
    missing: dict[Modality, float] = Field(default_factory=dict)
    shuffle: tuple[Literal["video"], ...] = ()
    seed: int = 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, given in (("swap", self.swap), ("blank", self.blank), ("shuffle", self.shuffle)):
            if len(set(given)) < len(given):
                raise ValueError(f"{name} {', '.join(given)}: a modality is given twice; give each once")
        if "video" in self.blank:
            raise ValueError("blank video: there is no blank clip; use missing video=1 or swap video")
        if both := set(self.swap) & set(self.blank):
            raise ValueError(f"swap and blank of {', '.join(both)}: what is swapped in would be blanked; choose one")
        for modality, share in self.missing.items():
            if not 0 <= share <= 1:
                raise ValueError(f"missing {modality}={share:g}: wanted a share of the records, 0 to 1")
        return self

    def described(self) -> list[str]:
        """A line for each control that is on, for a person."""
        names = {"image": "pictures", "video": "clips", "audio": "sounds"}
        lines = [f"{names[modality]} swapped between records" for modality in self.swap]
        lines += [f"{names[modality]} blank" for modality in self.blank]
        lines += [f"{names[one]} missing from {share:.0%} of records" for one, share in self.missing.items()]
        lines += [f"frames of {names[modality]} in any order" for modality in self.shuffle]
        return lines

    def shuffled(self, sample: Sample, tensors: Sequence[Tensor], key: str) -> list[Tensor]:
        """A sample's decoded items, with frames (or their stored features) in an order drawn by `key` under `shuffle`.

        Every order is equally likely, the right one among them.
        """
        rng, found = random.Random(f"{self.seed}/shuffle/{key}"), []
        for item, tensor in zip(sample.media, tensors, strict=True):
            if item.modality in self.shuffle:
                num_frames = item.plan.shape[0]
                order = rng.sample(range(num_frames), num_frames)
                tensor = tensor.unflatten(0, (num_frames, -1))[order].flatten(0, 1)
            found.append(tensor)
        return found

    def is_missing(self, modality: Modality, key: str) -> bool:
        return random.Random(f"{self.seed}/missing/{modality}/{key}").random() < self.missing.get(modality, 0.0)


@dataclass
class ControlledRecords:
    """The first `total` records of a mixture's only source as an evaluation shows them.

    Attributes:
        num_changed: records so far whose media a control changed, by control: {"swap image": 40}.
    """

    mixture: Mixture
    template: ChatTemplate
    total: int
    controls: Controls
    num_changed: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._source = self.mixture.sources[0].name
        self._partners = {modality: self._circles(modality) for modality in self.controls.swap}

    def key(self, i: int) -> str:
        """Key of record `i`, also where its facts cannot be read."""
        shard, number = self.mixture.locate(SampleId(self._source, 0, i))
        try:
            return shard.entry(number).key
        except SampleError:
            return f"{shard.path}#{number}"

    def record(self, i: int) -> Record:
        """Record `i` under the controls; media stays in the shard. Raises SampleError."""
        record = self.mixture.record(SampleId(self._source, 0, i))
        shown = {item.modality for item in record.media if item.data is not None}
        changed: list[str] = []
        for modality, partners in self._partners.items():
            if modality in shown:
                if i not in partners:
                    raise SampleError(
                        "nothing to swap with", f"{record.key}: no other record has as many items of {modality}"
                    )
                pairs = zip(_items(record.media, modality), _items(self._media(partners[i]), modality), strict=True)
                record = _given(record, modality, [self._fitted(*pair) for pair in pairs])
                changed.append(f"swap {modality}")
        for modality in shown & set(self.controls.blank):
            blank = [self._blank(item) for item in _items(record.media, modality)]
            record = _given(record, modality, blank)
            changed.append(f"blank {modality}")
        for modality in shown & set(self.controls.missing):
            if self.controls.is_missing(modality, record.key):
                # The size stays known, as it does when training drops an item.
                absent = [replace(item, data=None) for item in _items(record.media, modality)]
                record = _given(record, modality, absent)
                changed.append(f"missing {modality}")
        changed += [f"shuffle {modality}" for modality in self.controls.shuffle if _items(record.media, modality)]
        self.num_changed.update(changed)
        return record

    def _media(self, i: int) -> tuple[MediaRef, ...]:
        """Media of record `i` by its index line alone."""
        shard, number = self.mixture.locate(SampleId(self._source, 0, i))
        entry = shard.entry(number)
        if entry.problem is not None:
            raise SampleError(*entry.problem)
        return entry.media

    def _circles(self, modality: Modality) -> dict[int, int]:
        """Record to the one whose items it gets: the next in a random circle, so never itself.

        Raises ValueError where no record has another one to swap with.
        """
        groups: dict[int, list[int]] = {}
        for i in range(self.total):
            try:
                count = len(_items(self._media(i), modality))
            except SampleError:
                continue  # it is counted when it is asked
            if count:
                groups.setdefault(count, []).append(i)
        partners: dict[int, int] = {}
        for places in groups.values():
            random.Random(f"{self.controls.seed}/swap/{modality}").shuffle(places)
            if len(places) > 1:
                partners |= dict(zip(places, [*places[1:], places[0]], strict=True))
        if not partners:
            raise ValueError(
                f"swap {modality}: among {self.total} records no two have as many items of {modality}; raise the limit"
            )
        return partners

    def _fitted(self, own: MediaRef, other: MediaRef) -> MediaRef:
        """The other item; a picture in the size of the own one. Raises SampleError."""
        if own.modality != "image" or (header := self._header(own)) is None:
            return other
        if not (header.width and header.height):
            raise SampleError("header incomplete", f"a swapped image needs the size of the own one, found {header}")
        if other.header is not None and (other.header.width, other.header.height) == (header.width, header.height):
            return other
        assert isinstance(other.data, StoredBytes), "media of a shard lies in its tar"
        data = _Resized(**vars(other.data), width=header.width, height=header.height)
        return MediaRef("image", data, MediaHeader(header.width, header.height))

    def _header(self, item: MediaRef) -> MediaHeader | None:
        """What the index or else the file says of an item; None where the model has no such modality."""
        if item.header is None and item.modality in self.template.preprocesses:
            return self.template.preprocesses[item.modality].header(_read(item))
        return item.header

    def _blank(self, item: MediaRef) -> MediaRef:
        """A uniform item of the same size or length. Raises SampleError."""
        header = self._header(item)
        if header is not None and item.modality == "image" and header.width and header.height:
            return replace(item, data=_grey(header.width, header.height))
        if header is not None and item.modality == "audio" and header.duration_s:
            return replace(item, data=_silence(round(header.duration_s * SAMPLE_RATE_HZ)))
        raise SampleError(
            "header incomplete", f"a blank {item.modality} needs the size of the real one, found {header}"
        )


@dataclass(frozen=True)
class _Resized(StoredBytes):
    """A stored picture as a PNG of another size, made when it is read: all records' would fill the memory."""

    width: int = 0
    height: int = 0

    def read(self) -> bytes:
        """Raises SampleError where the picture cannot be decoded, and OSError as any stored bytes do."""
        out = io.BytesIO()
        upright(super().read()).resize((self.width, self.height)).save(out, "PNG", compress_level=1)
        return out.getvalue()


def parse_missing(texts: Sequence[str]) -> dict[str, Any]:
    """{"image": 0.5} of ["image=0.5"]. Raises ValueError."""
    found: dict[str, Any] = {}
    for text in texts:
        modality, _, share = text.partition("=")
        if modality in found:
            raise ValueError(f"missing {text!r}: there is a share of {modality} already; give each modality once")
        try:
            found[modality] = float(share)
        except ValueError as error:
            raise ValueError(f"missing {text!r}: wanted MODALITY=SHARE, such as image=0.5") from error
        if modality not in MODALITIES:
            raise ValueError(f"missing {text!r}: the modalities are {', '.join(MODALITIES)}")
    return found


def _items(media: Sequence[MediaRef], modality: Modality) -> list[MediaRef]:
    """The items of the modality that are there."""
    return [item for item in media if item.modality == modality and item.data is not None]


def _given(record: Record, modality: Modality, items: Sequence[MediaRef]) -> Record:
    """The record with the items of the modality that are there exchanged, in order, for others."""
    given = iter(items)
    is_own = [item.modality == modality and item.data is not None for item in record.media]
    return replace(
        record, media=tuple(next(given) if own else item for own, item in zip(is_own, record.media, strict=True))
    )


def _read(item: MediaRef) -> bytes:
    try:
        return item.read()
    except OSError as error:
        raise SampleError("unreadable shard", str(error)) from error


@lru_cache(256)
def _grey(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), GREY).save(out, "PNG")
    return out.getvalue()


@lru_cache(256)
def _silence(num_samples: int) -> bytes:
    """FLAC, in which silence takes next to no room."""
    out = io.BytesIO()
    with soundfile.SoundFile(out, "w", SAMPLE_RATE_HZ, 1, format="FLAC") as file:
        for start in range(0, num_samples, _BLOCK):  # hours of it would be gigabytes
            file.write(np.zeros(min(_BLOCK, num_samples - start), np.float32))
    return out.getvalue()
