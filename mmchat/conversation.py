"""What is said, seen and heard: conversations, their media and regions, and the records they are phrased from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mmchat.storage import File, inflate, read_local

Modality = Literal["image", "video", "audio"]
Role = Literal["system", "user", "assistant"]

# The order in which modalities are numbered wherever a tensor has a modality axis.
MODALITIES: tuple[Modality, ...] = ("image", "video", "audio")

# x0, y0, x1, y1
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class MediaHeader:
    """What a media file says of itself before anything is decoded. Unknown facts are None.

    width and height are pixels after the EXIF or container rotation is applied.
    """

    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    duration_s: float | None = None
    sample_rate_hz: int | None = None


@dataclass(frozen=True)
class StoredBytes:
    """`size` bytes that lie inside a file, read when they are needed.

    Attributes:
        deflated_size: where set, that many bytes of raw deflate lie there (a member of a zip), which inflate to `size`.
        file: the opened file, local or behind a URL; without it the local `path` is opened for the read.
    """

    path: str
    offset: int
    size: int
    deflated_size: int | None = None
    file: File | None = None

    def read(self) -> bytes:
        """Returns the bytes. Raises OSError where the file is shorter than it should be."""
        stored = self.size if self.deflated_size is None else self.deflated_size
        data = self.file.read(self.offset, stored) if self.file else read_local(self.path, self.offset, stored)
        if self.deflated_size is None:
            return data
        try:
            return inflate(data, self.size)
        except OSError as error:
            raise OSError(f"{self.path} at {self.offset}: {error}") from error


@dataclass(frozen=True)
class MediaRef:
    """One media item as it is stored, still encoded.

    `data` None means that the item is absent: missing at the source or dropped on purpose, which is the same case.
    """

    modality: Modality
    data: bytes | StoredBytes | None
    header: MediaHeader | None = None

    def read(self) -> bytes:
        """Returns the encoded bytes of an item that is present."""
        assert self.data is not None, "an absent item has no bytes"
        return self.data if isinstance(self.data, bytes) else self.data.read()


@dataclass(frozen=True)
class Region:
    """A place in media item `media` (its index in the conversation), in original pixels after EXIF transposition.

    Exactly one of: box (x1, y1, x2, y2); point (x, y); tube ((t, x1, y1, x2, y2), ...) with t in seconds.
    """

    media: int
    box: Box | None = None
    point: tuple[float, float] | None = None
    tube: tuple[tuple[float, float, float, float, float], ...] | None = None
    time_s: float | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        if sum(shape is not None for shape in (self.box, self.point, self.tube)) != 1:
            raise ValueError(f"a region is exactly one of box, point and tube; found {self}")


Part = str | MediaRef | Region


@dataclass(frozen=True)
class Turn:
    """What one side says. `learn` says whether the model is trained to say it: by default, the assistant's turns."""

    role: Role
    parts: tuple[Part, ...]
    learn: bool | None = None

    @property
    def is_learned(self) -> bool:
        return self.role == "assistant" if self.learn is None else self.learn


@dataclass(frozen=True)
class Conversation:
    """Turns in order. Media items are numbered in reading order, present or absent."""

    turns: tuple[Turn, ...]

    @property
    def media(self) -> tuple[MediaRef, ...]:
        return tuple(part for turn in self.turns for part in turn.parts if isinstance(part, MediaRef))


@dataclass(frozen=True)
class Record:
    """The facts of one sample as a shard keeps them; a task phrases them as a conversation at load time."""

    key: str
    facts: dict[str, Any]
    media: tuple[MediaRef, ...] = field(default=())
