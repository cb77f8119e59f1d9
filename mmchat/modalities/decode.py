"""Pixels and samples out of encoded bytes, without torch and without the rest of mmchat.

Run as a program, this file is the child of `mmchat.modalities.sandbox`: decoders of video and audio are
large C libraries that read untrusted bytes, so they work where they can be killed. `fit_square` is here
because still pictures and video frames must be resized by the same code.

A message, in either direction, is its sizes (see `_SIZES`), a JSON object and raw bytes.
"""

from __future__ import annotations

import json
import math
import os
import signal
import struct
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from itertools import chain, dropwhile, groupby
from typing import IO, Any, Literal

import av
import numpy as np
import soundfile
import soxr
from av.video.reformatter import VideoReformatter
from PIL import Image

Resize = Literal["pad", "squash", "crop"]
Seek = Literal["exact", "keyframes"]
# What is known of a sound whose first seconds are asked for: nothing, that it lasts longer, or that it ends with them.
Holds = Literal["any", "part", "whole"]

# Headers round, codecs have a delay, and the last packet may be cut: only beyond this a length is called wrong.
HEADER_SLACK_S = 0.5

# A padded square larger than this is made from a picture that was shrunk first: a strip of 20000 x 400 pixels
# would otherwise need a canvas of 1.2 GB.
_CANVAS_SIDE = 4096

# The containers that are opened. FFmpeg also reads playlists, whose entries name other files and addresses.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,mp3,wav,flac,aac,aiff,gif"

# Sound is read in blocks of so many samples, over all channels: 1 MB.
_BLOCK = 1 << 18
# Decoding starts so long before a piece of a sound: codecs need packets before the first that is right.
_PREROLL_S = 0.5

_SIZES = struct.Struct("<IQ")  # bytes of JSON, raw bytes
_REPAIR = "repair the file (ffmpeg -i IN -c copy OUT), and index its shard again"


class Refusal(Exception):
    """An item that cannot be used: (reason, detail), which the parent raises as SampleError."""


def write_message(file: IO[bytes], content: dict[str, Any], payload: bytes | memoryview = b"") -> None:
    text = json.dumps(content).encode()
    file.write(_SIZES.pack(len(text), len(payload)))
    file.write(text)
    file.write(payload)
    file.flush()


def read_message(file: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    """Raises EOFError where the other side is gone."""

    def exactly(size: int) -> bytes:
        data = file.read(size)
        if len(data) != size:
            raise EOFError(f"wanted {size} bytes, found {len(data)}")
        return data

    text_size, payload_size = _SIZES.unpack(exactly(_SIZES.size))
    return json.loads(exactly(text_size)), exactly(payload_size)


def cropped_size(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height once the shorter side is scaled to `size` pixels, rounded as torchvision rounds."""
    if width <= height:
        return size, int(size * height / width)
    return int(size * width / height), size


def fit_square(
    image: Image.Image,
    size: int,
    resize: Resize,
    fill: Sequence[int],
    resample: Image.Resampling,
    scaled: Callable[[Image.Image, tuple[int, int], Image.Resampling], Image.Image] = Image.Image.resize,
) -> Image.Image:
    """Brings an RGB picture to size x size pixels.

    pad: centred in a square of its longer side, the rest filled with `fill`; squash: both axes stretched;
    crop: the shorter side scaled to `size`, then the centre. `scaled` resizes to (width, height).
    """
    if resize == "squash":
        return scaled(image, (size, size), resample)
    if resize == "crop":
        width, height = cropped_size(*image.size, size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        return scaled(image, (width, height), resample).crop((left, top, left + size, top + size))
    if max(image.size) > _CANVAS_SIDE:
        scale = _CANVAS_SIDE / max(image.size)
        image = scaled(image, (max(1, round(image.width * scale)), max(1, round(image.height * scale))), resample)
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), tuple(fill))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return scaled(canvas, (size, size), resample)


def video_header(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Container facts, and the size and rotation of the first frame, the only one that is decoded."""
    container, stream = _open(data, "video")
    with container:
        frame = next(_decoded(container.demux(stream)), None)
        if frame is None:
            raise Refusal("empty video", "no frame of the video track can be decoded")
        height, width = _upright(frame, VideoReformatter()).shape[:2]
        duration_s = _duration_s(data, container, stream)
        rate = stream.average_rate or stream.guessed_rate
        num_frames = stream.frames or (round(duration_s * rate) if rate else None)
    fps = float(rate) if rate else (num_frames / duration_s if num_frames and duration_s else None)
    return {
        "width": width,
        "height": height,
        "num_frames": num_frames,
        "fps": fps,
        "duration_s": duration_s,
    }, b""


def video_frames(
    data: bytes,
    times_s: Sequence[float],
    size: int,
    resize: Resize,
    fill: Sequence[int],
    interpolation: str,
    backend: str,
    seek: Seek = "exact",
    is_whole: bool = False,
) -> tuple[dict[str, Any], memoryview]:
    """For each of the rising `times_s` the frame shown then, as [frames, size, size, 3] uint8, and its time.

    Seconds count from the first frame. A time behind the last frame takes the last frame; a video that ends
    before half of the times is refused, its header lied. With `seek` "keyframes" (PyAV only) the last keyframe up to
    the time is taken. is_whole: the times are spread over all of it, as its header tells its length; a video of more
    than twice that is refused.
    """
    resample = Image.Resampling[interpolation.upper()]
    squares = np.empty((len(times_s), size, size, 3), np.uint8)
    found_s: list[float] = []
    # Times in the middles of equal segments tell the whole length.
    longest_s = 2 * (times_s[0] + times_s[-1]) + HEADER_SLACK_S if is_whole else math.inf
    chosen = (
        _pyav_frames(data, times_s, longest_s, seek)
        if backend == "pyav"
        else _BACKENDS[backend](data, times_s, longest_s)
    )
    for index, (pixels, time_s) in enumerate(chosen):
        if found_s and time_s == found_s[-1]:
            squares[index] = squares[index - 1]
        else:
            squares[index] = np.asarray(fit_square(Image.fromarray(pixels), size, resize, fill, resample))
        found_s.append(time_s)
    assert len(found_s) == len(times_s)
    return {"times_s": found_s}, squares.data.cast("B")


def audio_header(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Sample rate and duration, of a sound file or of the audio track of a video."""
    try:
        with soundfile.SoundFile(BytesIO(data)) as file:
            rate_hz, duration_s = file.samplerate, file.frames / file.samplerate
    except soundfile.LibsndfileError:
        container, stream = _open(data, "audio")
        with container:
            rate_hz, duration_s = stream.rate, _duration_s(data, container, stream)
    if not rate_hz:
        raise Refusal("undecodable audio", "nothing tells the sample rate of the audio track")
    return {"sample_rate_hz": rate_hz, "duration_s": duration_s}, b""


def audio_samples(
    data: bytes,
    sample_rate_hz: int,
    max_duration_s: float,
    spans_s: Sequence[Sequence[float]] = (),
    holds: Holds = "any",
) -> tuple[dict[str, Any], memoryview]:
    """The mean of all channels at `sample_rate_hz`, float32: the first `max_duration_s`, or the pieces `spans_s` of it.

    Sound is decoded, mixed and resampled block by block: memory grows with what is kept, not with the file.

    Args:
        spans_s: (start, end) of each piece, rising; the result has all of them in full length, with silence where the
            sound has ended.
        holds: where the header told more than "any", a sound with less than half of what is asked for is refused, and
            one of which "whole" was said if it has more than twice of it.
    """
    spans = [(float(start), float(end)) for start, end in spans_s] or [(0.0, max_duration_s)]
    try:
        with soundfile.SoundFile(BytesIO(data)) as file:
            rate_hz, length_s = file.samplerate, file.frames / file.samplerate
            pieces, num_found = _resampled(_sndfile_blocks(file, spans), rate_hz, sample_rate_hz, len(spans))
    except soundfile.LibsndfileError:
        length_s = None
        rate_hz, blocks = _av_blocks(data, spans)
        pieces, num_found = _resampled(blocks, rate_hz, sample_rate_hz, len(spans))
    if not num_found:
        raise Refusal("empty audio", "the file holds no samples")
    wanted_s, found_s = sum(end - start for start, end in spans), num_found / rate_hz
    if holds != "any":
        _check_sound(data, wanted_s, found_s, length_s, holds == "whole")
    if spans_s:
        pieces = [
            _fitted(piece, round((end - start) * sample_rate_hz))
            for piece, (start, end) in zip(pieces, spans, strict=True)
        ]
    return {}, np.ascontiguousarray(np.concatenate(pieces), np.float32).data.cast("B")


def _check_sound(data: bytes, wanted_s: float, found_s: float, length_s: float | None, is_whole: bool) -> None:
    """Refuses a sound whose header is far from what it holds. length_s: of the file; None where packets must tell."""
    # The track of a video may end before its pictures do, and some containers tell the length of all together.
    if wanted_s > 2 * found_s + HEADER_SLACK_S and (length_s or _packets_s(data)[0]) < wanted_s / 2:
        raise Refusal("truncated audio", f"{found_s:.3f} s are found of {wanted_s:.3f} s by its header; {_REPAIR}")
    if not is_whole or found_s < wanted_s:
        return
    if length_s is None:
        length_s = min(_packets_s(data, "audio"))
    if length_s > 2 * wanted_s + HEADER_SLACK_S:
        raise Refusal("longer than its header", f"{length_s:.3f} s, its header says {wanted_s:.3f} s; {_REPAIR}")


def _resampled(
    blocks: Iterable[tuple[int, np.ndarray]], rate_hz: int, sample_rate_hz: int, num_pieces: int
) -> tuple[list[np.ndarray], int]:
    """Each piece as mono at the new rate, and how many samples were found in all.

    blocks: number of a piece, rising, and [samples, channels] float32 of it.
    """
    pieces = [np.empty(0, np.float32) for _ in range(num_pieces)]
    num_found = 0
    for number, group in groupby(blocks, key=lambda block: block[0]):
        # The same values as resampling all at once, bit for bit.
        resampler = soxr.ResampleStream(rate_hz, sample_rate_hz, 1)
        parts = []
        for _, block in group:
            if not np.isfinite(block).all():
                raise Refusal("audio not finite", "some samples are NaN or infinite")
            num_found += len(block)
            parts.append(resampler.resample_chunk(np.ascontiguousarray(block.mean(axis=1))))
        parts.append(resampler.resample_chunk(np.empty(0, np.float32), last=True))
        pieces[number] = np.concatenate(parts)
    return pieces, num_found


def _fitted(piece: np.ndarray, length: int) -> np.ndarray:
    """Cut, or with silence behind it."""
    return np.pad(piece[:length], (0, max(0, length - len(piece))))


def _open(data: bytes, kind: Literal["video", "audio"]) -> tuple[Any, Any]:
    """The container and its first track of a kind."""
    container = av.open(BytesIO(data), options={"format_whitelist": _CONTAINERS}, metadata_errors="ignore")
    tracks = container.streams.video if kind == "video" else container.streams.audio
    for track in tracks:
        if track.disposition & av.stream.Disposition.attached_pic:
            continue  # the cover of a sound file
        track.codec_context.thread_count = 1  # loader workers are the parallelism
        return container, track
    found = ", ".join(stream.type for stream in container.streams)
    container.close()
    if not found:
        raise Refusal(f"undecodable {kind}", "no track is found in the file")
    raise Refusal(f"no {kind} track", f"the file holds {found}")


def _decoded(packets: Iterable[Any]) -> Iterator[Any]:
    """Frames in order of presentation; a damaged packet costs its own frames only."""
    for packet in packets:
        try:
            yield from packet.decode()
        except av.error.InvalidDataError:
            continue


def _duration_s(data: bytes, container: Any, stream: Any) -> float:
    """What the container says, or the sum of its packets: where it is silent (browser recordings), or guesses.

    Of bare AAC, FFmpeg guesses from the size and the first packets.
    """
    if container.format.name != "aac":
        if stream.duration:
            return float(stream.duration * stream.time_base)
        if container.duration:
            return float(container.duration / av.time_base)
    return _packets_s(data, stream.type)[0]


def _packets_s(data: bytes, kind: Literal["video", "audio", ""] = "") -> tuple[float, float]:
    """Of the packets of the first track of a kind, or of all tracks: from first to last, and the sum of their lengths.

    In seconds. One wrong time, as at the start of some transport streams, makes the first of them wrong.
    """
    container, stream = _open(data, kind or "audio")
    first_s, last_s, total_s = math.inf, -math.inf, 0.0  # not a list of all packets, which may be millions
    with container:
        for packet in container.demux(*([stream] if kind else [])):
            if packet.pts is not None:
                tick_s = float(packet.time_base)
                first_s = min(first_s, packet.pts * tick_s)
                last_s = max(last_s, (packet.pts + (packet.duration or 0)) * tick_s)
                total_s += (packet.duration or 0) * tick_s
    return max(0.0, last_s - first_s), total_s


def _pts(item: Any) -> int:
    """Presentation time of a packet or frame in ticks; AVI has decoding times only."""
    return item.dts if item.pts is None else item.pts


def _upright(frame: Any, converter: VideoReformatter) -> np.ndarray:
    """[height, width, 3], with the container's rotation applied."""
    # PyAV's default is a converter for each frame and a thread for each CPU, which takes longer than the conversion.
    pixels = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


def _check_end(times_s: Sequence[float], longest_s: float, end_s: float) -> None:
    """Refuses a video whose header is far from what it holds; an end that is not known is infinite."""
    if 2 * sum(time_s >= end_s for time_s in times_s) > len(times_s):
        raise Refusal("truncated video", f"it ends at {end_s:.3f} s, frames up to {times_s[-1]:.3f} s were wanted")
    if longest_s < end_s < math.inf:
        header_s = times_s[0] + times_s[-1]
        raise Refusal("longer than its header", f"{end_s:.3f} s, its header says {header_s:.3f} s; {_REPAIR}")


class _Track:
    """A video track whose packets were read once, for the true times; these are ticks of the stream's clock.

    Attributes:
        ticks: of all frames, rising.
        keys: presentation and decoding time of each packet that decoding may start at, rising.
        total_s: the lengths of all packets together, as far as they tell it; one wrong time changes nothing in it.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.container, self.stream = _open(data, "video")
        self.ticks: list[int] = []
        self.keys: list[tuple[int, int]] = []
        self.last_duration: float = 0
        total = 0
        for packet in self.container.demux(self.stream):
            if packet.size == 0 or packet.is_discard or (packet.pts is None and packet.dts is None):
                continue
            self.ticks.append(_pts(packet))
            self.last_duration = packet.duration or self.last_duration
            total += packet.duration or 0
            if packet.is_keyframe:
                self.keys.append((_pts(packet), _pts(packet) if packet.dts is None else packet.dts))
        if not self.ticks:
            raise Refusal("empty video", "the video track holds no packets")
        self.ticks.sort()
        self.keys.sort()
        self.total_s = float(total * self.stream.time_base)

    @property
    def end_s(self) -> float:
        ticks = self.ticks
        return self.seconds(ticks[-1] + (self.last_duration or (ticks[-1] - ticks[-2] if len(ticks) > 1 else math.inf)))

    def seconds(self, tick: float) -> float:
        return float((tick - self.ticks[0]) * self.stream.time_base)

    def tick_at(self, time_s: float) -> int:
        """Of the frame that is shown at a time."""
        # A thousandth of a tick forgives that a time such as 0.1 s is no binary fraction.
        tick = self.ticks[0] + time_s / float(self.stream.time_base) + 1e-3
        return self.ticks[max(0, bisect_right(self.ticks, tick) - 1)]

    def key_at(self, tick: int) -> int:
        """Which of `keys` is the last one up to a tick; -1 where there is none."""
        return bisect_right(self.keys, (tick, math.inf)) - 1

    def packets(self, key: tuple[int, int] | None = None) -> Iterator[Any]:
        """Packets from a keyframe on, or all; the decoder starts anew."""
        if key is not None:
            for target in key:  # some containers seek by presentation time, others by decoding time
                self.container.seek(target, stream=self.stream)
                packets = self.container.demux(self.stream)
                for packet in packets:
                    if packet.is_keyframe and _pts(packet) == key[0]:
                        return chain([packet], packets)
                    if packet.dts is not None and packet.dts > key[1]:
                        break  # landed behind it
        self.container.close()
        self.container, self.stream = _open(self.data, "video")
        packets = self.container.demux(self.stream)
        return packets if key is None else dropwhile(lambda p: not (p.is_keyframe and _pts(p) == key[0]), packets)

    def keyframe(self, key: tuple[int, int]) -> Any | None:
        """One keyframe by itself; None where it is damaged."""
        packet = next(self.packets(key))
        try:
            # The decoder would hold it back for the frames that may be shown before it.
            return next(iter([*packet.decode(), *self.stream.codec_context.decode(None)]), None)
        except av.error.InvalidDataError:
            return None


def _pyav_frames(
    data: bytes, times_s: Sequence[float], longest_s: float, seek: Seek = "exact"
) -> Iterator[tuple[np.ndarray, float]]:
    """Decodes only where frames are wanted."""
    track = _Track(data)
    _check_end(times_s, longest_s if track.total_s > longest_s else math.inf, track.end_s)
    frames = _keyframes if seek == "keyframes" and track.keys else _exact_frames
    converter = VideoReformatter()
    for frame in frames(track, [track.tick_at(time_s) for time_s in times_s]):
        if frame is None:
            raise Refusal("empty video", "no frame of the video track can be decoded")
        yield _upright(frame, converter), track.seconds(_pts(frame))
    track.container.close()


def _exact_frames(track: _Track, ticks: Sequence[int]) -> Iterator[Any | None]:
    frames: Iterator[Any] = iter(())
    frame = None
    for tick in ticks:
        place = track.key_at(tick)
        key = track.keys[place] if place >= 0 else None
        if frame is None or (key is not None and key[0] > _pts(frame)):
            frames = _decoded(track.packets(key))
            frame = next(frames, None)
            if frame is None or _pts(frame) > tick:  # the keyframe is damaged
                frames = _decoded(track.packets())
                frame = next(frames, None)
        while frame is not None and _pts(frame) < tick:
            following = next(frames, None)
            if following is None:
                break
            if _pts(following) > tick:  # the wanted frame is damaged: the one before it stays on the screen
                frames = chain([following], frames)
                break
            frame = following
        yield frame


def _keyframes(track: _Track, ticks: Sequence[int]) -> Iterator[Any | None]:
    frame = None
    for tick in ticks:
        for key in reversed(track.keys[: max(0, track.key_at(tick)) + 1]):
            if frame is not None and _pts(frame) == key[0]:
                break
            if (found := track.keyframe(key)) is not None:  # else the keyframe before it stays on the screen
                frame = found
                break
        yield frame


def _decord_frames(data: bytes, times_s: Sequence[float], longest_s: float) -> Iterator[tuple[np.ndarray, float]]:
    import decord

    reader = decord.VideoReader(BytesIO(data), num_threads=1)
    if reader[0].shape[2] != 3:  # decord 0.6 mangles videos with a quarter turn
        yield from _pyav_frames(data, times_s, longest_s)
        return
    spans = reader.get_frame_timestamp(range(len(reader)))  # [frames, 2] start and end in seconds
    starts_s = spans[:, 0] - spans[0, 0]
    _check_end(times_s, longest_s, float(spans[-1, 1] - spans[0, 0]))
    for index in np.searchsorted(starts_s, np.asarray(times_s) + 1e-6, side="right") - 1:
        yield reader[int(index)].asnumpy(), float(starts_s[index])


def _torchcodec_frames(data: bytes, times_s: Sequence[float], longest_s: float) -> Iterator[tuple[np.ndarray, float]]:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(data, dimension_order="NHWC", num_ffmpeg_threads=1)
    start_s, end_s = decoder.metadata.begin_stream_seconds, decoder.metadata.end_stream_seconds
    _check_end(times_s, longest_s, end_s - start_s)
    for time_s in times_s:
        frame = decoder.get_frame_played_at(min(start_s + time_s, end_s - 1e-6))
        yield frame.data.numpy(), frame.pts_seconds - start_s


_BACKENDS: dict[str, Callable[[bytes, Sequence[float], float], Iterator[tuple[np.ndarray, float]]]] = {
    "decord": _decord_frames,
    "torchcodec": _torchcodec_frames,
}


def _sndfile_blocks(file: Any, spans: Sequence[tuple[float, float]]) -> Iterator[tuple[int, np.ndarray]]:
    """The pieces of an opened sound file as (number of the piece, [samples, channels] float32)."""
    size = max(1, _BLOCK // file.channels)
    for number, (start_s, end_s) in enumerate(spans):
        start, stop = math.floor(start_s * file.samplerate), math.ceil(end_s * file.samplerate)
        if start >= file.frames:
            return
        if start != file.tell():
            file.seek(start)
        while (left := stop - file.tell()) > 0:
            block = file.read(min(left, size), dtype="float32", always_2d=True)
            if not len(block):
                return
            yield number, block


def _av_blocks(data: bytes, spans: Sequence[tuple[float, float]]) -> tuple[int, Iterator[tuple[int, np.ndarray]]]:
    """Sample rate, and the pieces of the first audio track as `_sndfile_blocks` gives them.

    The file is read once from its beginning, and what lies between the pieces is not decoded. So nothing depends on
    indexes and seeking, which many containers of sound lack or have wrong.
    """
    container, stream = _open(data, "audio")
    rate_hz = stream.rate

    def pieces() -> Iterator[tuple[int, np.ndarray]]:
        number, place = 0, 0  # the piece, and the first sample of the block
        with container:
            for start, block in _around(container, stream, spans):
                place = place if start is None else start
                while True:
                    first, stop = math.floor(spans[number][0] * rate_hz), math.ceil(spans[number][1] * rate_hz)
                    if place < stop and place + len(block) > first:
                        yield number, block[max(0, first - place) : stop - place]
                    if place + len(block) < stop:
                        break
                    number += 1
                    if number == len(spans):
                        return
                place += len(block)

    return rate_hz, pieces()


def _around(
    container: Any, stream: Any, spans: Sequence[tuple[float, float]]
) -> Iterator[tuple[int | None, np.ndarray]]:
    """Decoded [samples, channels] float32 around the spans; behind a gap with the number of the first sample."""
    to_float = av.AudioResampler(format="fltp")
    has_gaps = len(spans) > 1 or spans[0][0] > 0
    is_gap = is_behind_gap = False
    begin, tick_s = max(0, stream.start_time or 0), float(stream.time_base)
    for packet in container.demux(stream):
        if has_gaps and packet.pts is not None:
            start_s = (packet.pts - begin) * tick_s
            if not _is_near(start_s, start_s + (packet.duration or 0) * tick_s, spans):
                is_gap = True
                continue
        if is_gap:
            stream.codec_context.flush_buffers()
            to_float = av.AudioResampler(format="fltp")
            is_gap, is_behind_gap = False, True
        for frame in _decoded([packet]):
            start = None
            if is_behind_gap and frame.pts is not None:
                start, is_behind_gap = round((frame.pts - begin) * float(frame.time_base) * stream.rate), False
            for piece in to_float.resample(frame):
                yield start, piece.to_ndarray().T
                start = None
    for piece in to_float.resample(None):
        yield None, piece.to_ndarray().T


def _is_near(start_s: float, end_s: float, spans: Sequence[tuple[float, float]]) -> bool:
    """Whether a packet is needed for one of the rising spans."""
    number = bisect_right(spans, end_s + _PREROLL_S, key=lambda span: span[0]) - 1
    return number >= 0 and start_s <= spans[number][1] + _PREROLL_S


def hang(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Stands for a decoder that never returns; for tests of the time limit."""
    while True:
        time.sleep(1)


def crash(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Stands for a decoder that takes its process along; for tests."""
    os.abort()


def allocate(data: bytes, size: int) -> tuple[dict[str, Any], bytes]:
    """Stands for a decoder that wants `size` bytes; for tests of the memory limit."""
    return {"size": len(bytearray(size))}, b""


_COMMANDS: dict[str, tuple[str, Callable[..., tuple[dict[str, Any], bytes | memoryview]]]] = {
    "video_header": ("undecodable video", video_header),
    "video_frames": ("undecodable video", video_frames),
    "audio_header": ("undecodable audio", audio_header),
    "audio_samples": ("undecodable audio", audio_samples),
    "hang": ("", hang),
    "crash": ("", crash),
    "allocate": ("out of memory", allocate),
}


def main(timeout_s: float, memory_bytes: int) -> None:
    """Answers requests on stdin until it ends."""
    requests = sys.stdin.buffer
    # Only answers may reach the pipe: what a library prints goes to stderr.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    av.logging.set_level(av.logging.PANIC)
    if memory_bytes:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    # The parent kills a child that is late. Should the parent be gone by then, the child's own clock ends it.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # A terminal sends Ctrl-C to every process; the parent is the one that says so, and ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a parent that is gone is no error
    write_message(answers, {"ready": True})
    while True:
        try:
            request, data = read_message(requests)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s)
        reason, command = _COMMANDS[request["command"]]
        try:
            answer, payload = command(data, **request["arguments"])
        except Refusal as refusal:
            answer, payload = {"refused": list(refusal.args)}, b""
        except Exception as error:  # whatever a decoder stumbles over
            answer, payload = {"refused": [reason, f"{type(error).__name__}: {error}"]}, b""
        signal.setitimer(signal.ITIMER_REAL, 0)
        write_message(answers, answer, payload)
        data, payload = b"", b""  # not held while the next item is read


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
