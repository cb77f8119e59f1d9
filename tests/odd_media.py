"""Sounds and videos that are odd: hours long, without a track, or with headers that lie. Each is a whole, real file."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from io import BytesIO

import av
import numpy as np
import soundfile

EIGHT_HOURS_S = 8 * 3600


def silent_flac(seconds: int, rate: int = 8000) -> bytes:
    """Silence, written minute by minute: eight hours take 0.7 MB."""
    out = BytesIO()
    with soundfile.SoundFile(out, "w", rate, 1, format="FLAC") as file:
        block = np.zeros(rate * 60, np.int16)
        for start in range(0, seconds, 60):
            file.write(block[: rate * min(60, seconds - start)])
    return out.getvalue()


def silent_aac(seconds: int, rate: int = 16_000) -> bytes:
    """Silence in an mp4; packets are copies of one, so that hours of them are made in seconds."""
    out = BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=rate, layout="mono")
        packets = []
        for i in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.rate, frame.pts = rate, i * 1024
            packets += stream.encode(frame)
        last = packets[-1]
        start, clock, body = last.pts, last.time_base, bytes(last)
        assert start is not None
        for packet in packets:
            container.mux(packet)
        for i in range(1, seconds * rate // 1024 - len(packets)):
            copy = av.Packet(body)
            copy.stream, copy.time_base = stream, clock
            copy.pts = copy.dts = start + i * 1024
            copy.duration = 1024
            container.mux(copy)
    return out.getvalue()


def slides(seconds: int, every_s: float = 1.0) -> bytes:
    """A grey video of one picture every so often, each a keyframe; they are copies of one packet."""
    out = BytesIO()
    with av.open(out, "w", format="matroska") as container:
        stream = container.add_stream("mjpeg", rate=Fraction(1 / every_s).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 128, np.uint8), format="rgb24")
        frame.pts, frame.time_base = 0, stream.codec_context.time_base
        packets = [*stream.encode(frame), *stream.encode(None)]
        body = bytes(packets[0])
        for i in range(round(seconds / every_s)):
            packet = av.Packet(body)
            packet.stream, packet.time_base = stream, Fraction(1, 1000)
            packet.pts = packet.dts = round(1000 * i * every_s)
            packet.duration, packet.is_keyframe = round(1000 * every_s), True
            container.mux(packet)
    return out.getvalue()


def film(seconds: float, sound: np.ndarray | None = None, rate: int = 16_000, format: str = "matroska") -> bytes:
    """Ten grey frames a second, each a little brighter than the one before it; with a mono sound where it is given.

    Both are written by turns, as cameras do.
    """
    out = BytesIO()
    with av.open(out, "w", format=format) as container:
        video = container.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        track = container.add_stream("aac", rate=rate, layout="mono") if sound is not None else None
        heard = 0
        for number in range(round(10 * seconds)):
            grey = np.full((48, 64, 3), 20 + 2 * number % 200, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
            while track is not None and sound is not None and heard < min(len(sound), (number + 1) * rate // 10):
                piece = av.AudioFrame.from_ndarray(sound[None, heard : heard + 1024].copy(), "fltp", "mono")
                piece.rate, piece.pts = rate, heard
                container.mux(track.encode(piece))
                heard += 1024
        container.mux(video.encode(None))
        if track is not None:
            container.mux(track.encode(None))
    return out.getvalue()


def without_frames(format: str) -> bytes:
    """A video track, and nothing in it."""
    out = BytesIO()
    with av.open(out, "w", format=format) as container:
        video = container.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    return out.getvalue()


def bare_aac(samples: np.ndarray, rate: int = 16_000) -> bytes:
    """ADTS: packets one behind the other, without any header that tells their length."""
    out = BytesIO()
    with av.open(out, "w", format="adts") as container:
        stream = container.add_stream("aac", rate=rate, layout="mono")
        stream.bit_rate = 256_000
        for start in range(0, len(samples) - 1023, 1024):
            frame = av.AudioFrame.from_ndarray(samples[None, start : start + 1024].copy(), "fltp", "mono")
            frame.rate, frame.pts = rate, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def says(data: bytes, seconds: float) -> bytes:
    """A matroska file whose header says another length. The field is a double behind its id and size."""
    field = b"\x44\x89\x88"
    start = data.index(field) + len(field)
    scale = 1000.0  # in thousandths of a second, the usual clock
    return data[:start] + struct.pack(">d", seconds * scale) + data[start + 8 :]


def steps(seconds: int, rate: int, heights: Sequence[float]) -> np.ndarray:
    """A tone whose pitch changes every second: which second a piece is from can be heard."""
    pieces = []
    for second in range(seconds):
        times = np.arange(rate) / rate
        pieces.append(0.4 * np.sin(2 * np.pi * heights[second % len(heights)] * times))
    return np.concatenate(pieces).astype(np.float32)


def wav(samples: np.ndarray, rate: int = 16_000, subtype: str = "FLOAT") -> bytes:
    out = BytesIO()
    soundfile.write(out, samples, rate, subtype, format="WAV")
    return out.getvalue()
