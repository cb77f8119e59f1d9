"""From a checked request to a conversation: data URIs and remote files to bytes, their headers read and judged.

The model's own preprocess decodes items later; here the same preprocess reads their headers alone, in threads, and
those of clips and sounds in a process that can be killed.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import copy
import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mmchat.conversation import Conversation, MediaHeader, MediaRef, Modality, Part, Region, Role, Turn
from mmchat.errors import SampleError
from mmchat.modalities import Preprocess
from mmchat.modalities.image import ImageLimits
from mmchat.regions import check_region
from mmchat.serving.errors import ApiError, of_sample
from mmchat.serving.fetch import Fetcher
from mmchat.serving.limits import Limits
from mmchat.serving.requests import (
    AudioPart,
    ChatRequest,
    ImagePart,
    Message,
    RegionPart,
    TextPart,
    VideoPart,
)

_DATA = re.compile(r"data:[\w.+-]+/[\w.+-]+(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.I | re.A)
_MAX_PREFIX = 256
_HEADERS_KEPT = 512
# Each scan of a progressive JPEG is a pass over all of its pixels, for perhaps a hundred bytes of the file. Encoders
# write about ten.
_SCAN = re.compile(rb"\xff\xda\0(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")
_MAX_SCANS = 50


class MediaReader:
    """Makes conversations of requests.

    `in_thread` runs short work (JSON, base64, headers of pictures); clips and sounds have threads of their own, so that
    a file that is slow to read holds up its own kind alone.
    """

    def __init__(self, preprocesses: Mapping[Modality, Preprocess], limits: Limits, fetcher: Fetcher) -> None:
        self.preprocesses = preprocesses
        self.limits = limits
        self.fetcher = fetcher
        self._image_limits = ImageLimits(
            max_pixels=limits.image_pixels,
            max_side=limits.image_side,
            min_side=limits.image_min_side,
            max_aspect=limits.image_aspect,
        )
        self._short = ThreadPoolExecutor(4, "read")
        self._long = ThreadPoolExecutor(2, "header")
        self._own = threading.local()
        self._lock = threading.Lock()
        self._headers: OrderedDict[bytes, MediaHeader] = OrderedDict()

    async def in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._short, function, *arguments)

    def close(self) -> None:
        self._short.shutdown(wait=False, cancel_futures=True)
        self._long.shutdown(wait=False, cancel_futures=True)

    async def conversation(self, request: ChatRequest, hold: Callable[[int], None]) -> Conversation:
        """The request's conversation, each item with its header.

        Args:
            hold: is told of the bytes of remote files as they come; it may refuse them by an ApiError.
        Raises:
            ApiError: roles out of order, media that cannot be used, a region without its picture.
        """
        _check_roles(request)
        items: dict[tuple[int, int], MediaRef] = {}
        for i, message in enumerate(request.messages):
            for j, part in enumerate(() if isinstance(message.content, str) else message.content):
                param = f"messages[{i}].content[{j}]"
                match part:
                    case TextPart():
                        continue
                    case _ if message.role != "user":
                        raise ApiError(400, f"{param}: only a user's message may hold it", "invalid_value", param)
                    case ImagePart():
                        items[i, j] = await self._item("image", part.image_url.url, param, hold)
                    case VideoPart():
                        items[i, j] = await self._item("video", part.video_url.url, param, hold)
                    case AudioPart():
                        data = await self.in_thread(_base64, part.input_audio.data, 0, param)
                        items[i, j] = await self._with_header("audio", data, param)
        pictures = [(number, ref) for number, ref in enumerate(items.values()) if ref.modality == "image"]
        turns = [_turn(i, message, items, pictures) for i, message in enumerate(request.messages)]
        return Conversation(tuple(turns))

    async def _item(self, modality: Modality, url: str, param: str, hold: Callable[[int], None]) -> MediaRef:
        if found := _DATA.match(url[:_MAX_PREFIX]):
            data = await self.in_thread(_base64, url, found.end(), param)
        elif url[:5].lower() == "data:":
            raise ApiError(400, f"{param}: wanted data:TYPE;base64,...", "invalid_url", param)
        else:
            data = await self.fetcher.get(url, param, hold)
        return await self._with_header(modality, data, param)

    async def _with_header(self, modality: Modality, data: bytes, param: str) -> MediaRef:
        pool = self._short if modality == "image" else self._long
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, self._judged, modality, data)
        except SampleError as error:
            raise of_sample(error, param) from error

    def _judged(self, modality: Modality, data: bytes) -> MediaRef:
        """The item with its header, within the server's limits and the model's. Raises SampleError."""
        if modality not in self.preprocesses:
            here = ", ".join(self.preprocesses) or "text alone"
            raise SampleError("modality not in the model", f"found {modality}; this model takes {here}")
        if not data:
            raise SampleError(f"empty {modality}", "found no bytes")
        digest = hashlib.sha256(modality.encode() + data).digest()
        with self._lock:
            header = self._headers.get(digest)
        if header is None:
            header = self._read_header(modality, data)
            with self._lock:
                self._headers[digest] = header
                while len(self._headers) > _HEADERS_KEPT:
                    self._headers.popitem(last=False)
        return MediaRef(modality, data, header)

    def _read_header(self, modality: Modality, data: bytes) -> MediaHeader:
        if not hasattr(self._own, "preprocesses"):
            self._own.preprocesses = copy.deepcopy(dict(self.preprocesses))  # a thread, a decoding process
        header: MediaHeader = self._own.preprocesses[modality].header(data)
        limits = self.limits
        if modality == "image" and (scans := sum(1 for _ in _SCAN.finditer(data))) > _MAX_SCANS:
            raise SampleError("too many scans", f"{scans} scans, wanted up to {_MAX_SCANS}")
        if header.width is not None and header.height is not None:
            self._image_limits.check(header.width, header.height)
        longest_s = limits.audio_duration_s if modality == "audio" else limits.video_duration_s
        if header.duration_s is not None and header.duration_s > longest_s:
            raise SampleError(f"{modality} too long", f"{header.duration_s:.3f} s, wanted up to {longest_s:g} s")
        if header.num_frames is not None and header.num_frames > limits.video_frames:
            raise SampleError("video too long", f"{header.num_frames} frames, wanted up to {limits.video_frames}")
        return header


def _base64(text: str, start: int, param: str) -> bytes:
    try:
        return base64.b64decode(text[start:].encode("ascii"), validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{param}: found no valid base64", "invalid_base64", param) from None


def _check_roles(request: ChatRequest) -> None:
    """One system message at most, first; a user's last."""
    for i, message in enumerate(request.messages):
        param = f"messages[{i}].role"
        if i and message.role in ("system", "developer"):
            raise ApiError(400, f"{param}: only the first message may be the system's", "invalid_value", param)
    if request.messages[-1].role != "user":
        param = f"messages[{len(request.messages) - 1}].role"
        raise ApiError(400, f"{param}: the last message must be the user's", "invalid_value", param)


def _turn(
    i: int, message: Message, items: Mapping[tuple[int, int], MediaRef], pictures: list[tuple[int, MediaRef]]
) -> Turn:
    role: Role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return Turn(role, (message.content,))
    parts: list[Part] = []
    for j, part in enumerate(message.content):
        match part:
            case TextPart():
                parts.append(part.text)
            case RegionPart():
                parts.append(_region(part, pictures, f"messages[{i}].content[{j}]"))
            case _:
                parts.append(items[i, j])
    return Turn(role, tuple(parts))


def _region(part: RegionPart, pictures: list[tuple[int, MediaRef]], param: str) -> Region:
    if (part.box is None) == (part.point is None):
        raise ApiError(400, f"{param}: wanted either box or point", "invalid_value", param)
    if part.image >= len(pictures):
        found = f"found picture {part.image} of {len(pictures)}, counted from 0"
        raise ApiError(400, f"{param}.image: {found}", "invalid_value", f"{param}.image")
    number, ref = pictures[part.image]
    assert ref.header is not None and ref.header.width is not None and ref.header.height is not None
    try:
        return check_region(Region(number, part.box, part.point), ref.header.width, ref.header.height)
    except SampleError as error:
        raise of_sample(error, param) from error
