"""What one request, and one client, may take of the server; every value can be set from the command line."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from mmchat.modalities.image import PIL_MAX_PIXELS
from mmchat.schema import Schema


class Limits(Schema):
    """Bounds that are checked before the work that they bound.

    Attributes:
        body_bytes: of a request's body. all_bodies_bytes: of the bodies and fetched files held at one time.
        values: in the JSON of a request, before it is read.
        characters: of all texts of a request together.
        messages, parts, images, videos, audios, regions: of one request.
        image_pixels, image_side, image_min_side, image_aspect: of a picture, and of a clip's frames.
        video_frames, video_duration_s, audio_duration_s: of one file, as its header tells them; how many frames a model
            sees is its own matter.
        choices: answers to one request (`n`).
        new_tokens: of one answer, which may be asked for; default_new_tokens: where the request does not say.
        decode_timeout_s, decode_memory_bytes: of the process that decodes clips and sounds; the model's configuration
            may allow less.
        head_timeout_s: for the head of a request, and how long a connection may be idle. body_timeout_s: for its body.
        write_timeout_s: for a client that does not read what was sent.
        ping_s: silence in a stream after which a comment is sent, so that proxies keep it open.
        connections: at one time.
        fetch_bytes, fetch_timeout_s: of one file at a remote address, where those are allowed.
    """

    body_bytes: int = Field(default=64 * 2**20, ge=1024)
    all_bodies_bytes: int = Field(default=2**30, ge=1024)
    values: int = Field(default=300_000, ge=100)
    characters: int = Field(default=200_000, ge=1)
    messages: int = Field(default=200, ge=1)
    parts: int = Field(default=400, ge=1)
    images: int = Field(default=16, ge=0)
    videos: int = Field(default=4, ge=0)
    audios: int = Field(default=8, ge=0)
    regions: int = Field(default=64, ge=0)
    image_pixels: int = Field(default=50_000_000, ge=1, le=2 * PIL_MAX_PIXELS)
    image_side: int = Field(default=20_000, ge=1)
    image_min_side: int = Field(default=2, ge=1)
    image_aspect: float = Field(default=50.0, ge=1)
    video_frames: int = Field(default=100_000, ge=1)
    video_duration_s: float = Field(default=600.0, gt=0)
    audio_duration_s: float = Field(default=600.0, gt=0)
    choices: int = Field(default=8, ge=1)
    new_tokens: int = Field(default=2048, ge=1)
    default_new_tokens: int = Field(default=512, ge=1)
    decode_timeout_s: float = Field(default=20.0, gt=0)
    decode_memory_bytes: int = Field(default=8 * 2**30, ge=2**29)
    head_timeout_s: float = Field(default=20.0, gt=0)
    body_timeout_s: float = Field(default=120.0, gt=0)
    write_timeout_s: float = Field(default=60.0, gt=0)
    ping_s: float = Field(default=15.0, gt=0)
    connections: int = Field(default=1000, ge=1)
    fetch_bytes: int = Field(default=32 * 2**20, ge=1)
    fetch_timeout_s: float = Field(default=15.0, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.default_new_tokens > self.new_tokens:
            raise ValueError(
                f"found default_new_tokens {self.default_new_tokens} above new_tokens {self.new_tokens}; wanted at "
                "most as many"
            )
        if self.body_bytes > self.all_bodies_bytes:
            raise ValueError(
                f"found body_bytes {self.body_bytes} above all_bodies_bytes {self.all_bodies_bytes}; no request of "
                "that size could ever be read"
            )
        return self


class Holdings:
    """Counts the bytes of all requests that are held; used on the event loop alone."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0

    def take(self, count: int) -> bool:
        """Whether there is room for so many bytes more; if so, they are counted."""
        if self.held + count > self.most:
            return False
        self.held += count
        return True

    def give_back(self, count: int) -> None:
        self.held -= count
        assert self.held >= 0, "more was given back than taken"
