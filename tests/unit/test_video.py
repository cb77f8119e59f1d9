"""Video: frames of numbered brightness, chosen by their presentation time in every kind of container."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Iterator, Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mmchat.conversation import MediaHeader
from mmchat.errors import SampleError
from mmchat.modalities.image import ImageConfig, ImagePreprocess, square_geometry
from mmchat.modalities.image_encoders import ImageSpec, TimmConfig
from mmchat.modalities.video import VideoConfig, VideoPreprocess

SPEC = ImageSpec(32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear", 2, 2, 8)
LARGE = ImageSpec(64, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear", 4, 4, 8)
STEP = 7  # grey levels between one frame and the next


@pytest.fixture(scope="module")
def shared() -> Iterator[VideoPreprocess]:
    process = VideoPreprocess(VideoConfig(resize="squash"), SPEC)
    yield process
    process.sandbox.close()


def configured(shared: VideoPreprocess, **settings: object) -> VideoPreprocess:
    """Another configuration that decodes in the same child."""
    process = VideoPreprocess(VideoConfig.model_validate({"resize": "squash", **settings}), SPEC)
    process.sandbox = shared.sandbox
    return process


def grey(number: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    return np.full((size[1], size[0], 3), 20 + STEP * number, np.uint8)


def write(
    path: Path,
    frames: Sequence[np.ndarray],
    times_ms: Sequence[int] | None = None,
    codec: str = "libx264",
    rotation: int = 0,
    sound: bool = False,
    **options: str,
) -> bytes:
    """Frames at 10 a second, or at the given times."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000) if times_ms else Fraction(1, 10)
        if rotation:
            stream.set_display_rotation(rotation)
        if sound:
            track = container.add_stream("aac", rate=16_000, layout="mono")
            for start in range(0, 16_000, 1024):
                tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
                tone.pts, tone.rate = start, 16_000
                container.mux(track.encode(tone))
            container.mux(track.encode(None))
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = times_ms[index] if times_ms else index
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.read_bytes()


def numbers(frames: torch.Tensor) -> list[int]:
    """Which frame each is, from its brightness in the middle."""
    return [round((float(value) * 255 - 20) / STEP) for value in frames[:, :, 16, 16].mean(1)]


CONTAINERS = [
    ("a.mp4", "libx264", {"g": "10", "bf": "2"}),
    ("b.mkv", "libx264", {"g": "7", "bf": "3"}),
    ("c.ts", "libx264", {"g": "10"}),
    ("d.webm", "libvpx-vp9", {"g": "10", "deadline": "realtime", "cpu-used": "8"}),
    ("e.avi", "mpeg4", {"g": "10", "qscale": "2"}),
    ("f.mp4", "libx265", {"g": "10", "x265-params": "log-level=none"}),
    ("g.mp4", "libx264", {"g": "300", "movflags": "frag_keyframe+empty_moov"}),
]


@pytest.mark.parametrize(("name", "codec", "options"), CONTAINERS)
def test_frame_choice(tmp_path: Path, shared: VideoPreprocess, name: str, codec: str, options: dict[str, str]) -> None:
    data = write(tmp_path / name, [grey(n) for n in range(30)], codec=codec, **options)
    process = configured(shared, sample={"kind": "num_frames", "num_frames": 6})
    header = process.header(data)
    assert (header.width, header.height) == (64, 48)
    assert header.duration_s == pytest.approx(3.0, abs=0.11) and header.fps == pytest.approx(10, abs=0.5)
    assert header.num_frames is not None and abs(header.num_frames - 30) <= 1
    # The plan of the true duration, so that every container is asked for the same moments.
    plan = process.plan(MediaHeader(width=64, height=48, duration_s=3.0))
    assert plan.times_s == (0.25, 0.75, 1.25, 1.75, 2.25, 2.75)
    assert plan.shape == (6, 2, 2) and plan.num_patches == 24
    frames, times_s = process.frames(data, plan)
    assert frames.shape == (6, 3, 32, 32) and frames.dtype == torch.float32
    assert numbers(frames) == [2, 7, 12, 17, 22, 27]
    assert times_s == pytest.approx((0.2, 0.7, 1.2, 1.7, 2.2, 2.7), abs=1e-3)
    torch.testing.assert_close(process(data, plan), frames)


def test_variable_frame_rate(tmp_path: Path, shared: VideoPreprocess) -> None:
    times_ms = [0, 40, 80, 1000, 1040, 3000, 3900]
    data = write(tmp_path / "v.mkv", [grey(n) for n in range(7)], times_ms, g="3")
    plan = shared.plan(MediaHeader(width=64, height=48, duration_s=4.0))
    assert plan.times_s == tuple(0.25 + 0.5 * index for index in range(8))
    frames, times_s = shared.frames(data, plan)
    assert numbers(frames) == [2, 2, 4, 4, 4, 4, 5, 5]
    assert times_s == pytest.approx((0.08, 0.08, 1.04, 1.04, 1.04, 1.04, 3.0, 3.0))


def test_a_moment_at_which_a_frame_starts_shows_that_frame(tmp_path: Path, shared: VideoPreprocess) -> None:
    data = write(tmp_path / "v.mp4", [grey(n) for n in range(30)], g="10")
    process = configured(shared, sample={"kind": "num_frames", "num_frames": 15})
    frames, times_s = process.frames(data, process.plan(process.header(data)))
    assert numbers(frames) == list(range(1, 30, 2))
    assert times_s == pytest.approx([n / 10 for n in range(1, 30, 2)])


def linear(data: bytes) -> list[tuple[float, np.ndarray]]:
    """Every frame with its time, without any seeking."""
    with av.open(BytesIO(data)) as container:
        frames = list(container.decode(video=0))
    start = frames[0].pts if frames[0].pts is not None else frames[0].dts
    return [
        (float(((f.dts if f.pts is None else f.pts) - start) * f.time_base), f.to_ndarray(format="rgb24"))
        for f in frames
    ]


def noisy(number: int) -> np.ndarray:
    """Differs from its neighbours everywhere, so that no frame passes for another."""
    ramp = np.linspace(0, 120, 64)[None, :, None] * np.ones((48, 1, 3))
    return (ramp + np.random.default_rng(number).integers(0, 120, (48, 64, 3))).astype(np.uint8)


@pytest.mark.parametrize(("name", "codec", "options"), CONTAINERS)
def test_seeking_shows_the_pixels_of_a_linear_decode(
    tmp_path: Path, shared: VideoPreprocess, name: str, codec: str, options: dict[str, str]
) -> None:
    data = write(tmp_path / name, [noisy(n) for n in range(60)], codec=codec, **options)
    process = VideoPreprocess(VideoConfig(resize="squash", sample={"kind": "num_frames", "num_frames": 9}), LARGE)
    process.sandbox = shared.sandbox
    plan = process.plan(MediaHeader(width=64, height=64, duration_s=6.0))
    found, times_s = process.frames(data, plan)
    shown = linear(data)
    for pixels, time_s, wanted_s in zip(found, times_s, plan.times_s, strict=True):
        expected_s, frame = [(at, frame) for at, frame in shown if at <= wanted_s + 1e-6][-1]
        assert time_s == pytest.approx(expected_s, abs=1e-3)
        square = Image.fromarray(frame).resize((64, 64), Image.Resampling.BILINEAR)
        torch.testing.assert_close(pixels, LARGE.normalise(np.asarray(square)[None])[0], rtol=0, atol=0)


@pytest.mark.parametrize(("name", "codec", "options"), CONTAINERS)
def test_keyframes_alone(
    tmp_path: Path, shared: VideoPreprocess, name: str, codec: str, options: dict[str, str]
) -> None:
    """The last keyframe up to each moment, its own pixels, and its true time."""
    data = write(tmp_path / name, [grey(n) for n in range(30)], codec=codec, **options)
    settings = {"sample": {"kind": "num_frames", "num_frames": 6}}
    process = configured(shared, seek="keyframes", **settings)
    plan = process.plan(MediaHeader(width=64, height=48, duration_s=3.0))
    frames, times_s = process.frames(data, plan)
    with av.open(BytesIO(data)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
        ticks = sorted(p.dts if p.pts is None else p.pts for p in packets)
        keys_s = [
            float(((p.dts if p.pts is None else p.pts) - ticks[0]) * p.time_base) for p in packets if p.is_keyframe
        ]
    expected_s = [max(at for at in keys_s if at <= wanted_s + 1e-6) for wanted_s in plan.times_s]
    assert times_s == pytest.approx(expected_s, abs=1e-3)
    assert numbers(frames) == [round(at * 10) for at in expected_s]
    exact, exact_s = configured(shared, **settings).frames(data, plan)
    longest = int(options["g"]) / 10
    assert all(0 <= b - a < longest for a, b in zip(times_s, exact_s, strict=True))
    for frame, number in zip(frames, numbers(frames), strict=True):
        if number in numbers(exact):
            torch.testing.assert_close(frame, exact[numbers(exact).index(number)], rtol=0, atol=0)


def test_a_damaged_keyframe_leaves_the_one_before_it(tmp_path: Path, shared: VideoPreprocess) -> None:
    path = tmp_path / "v.mkv"
    data = bytearray(write(path, [grey(n) for n in range(30)], codec="ffv1", g="1", slices="4", slicecrc="1"))
    with av.open(BytesIO(bytes(data))) as container:
        packet = [p for p in container.demux(video=0) if p.size][15]
    start = bytes(data).index(bytes(packet))
    data[start : start + packet.size] = bytes(packet.size)
    process = configured(shared, seek="keyframes", sample={"kind": "num_frames", "num_frames": 30})
    found = numbers(process(bytes(data), process.plan(MediaHeader(width=64, height=48, duration_s=3.0))))
    assert found[:15] == list(range(15)) and found[16:] == list(range(16, 30)) and found[15] in (14, 15)


def test_keyframes_need_pyav() -> None:
    with pytest.raises(ValueError, match=r"keyframes needs backend: pyav, found decord"):
        VideoConfig(seek="keyframes", backend="decord")


@pytest.mark.parametrize("backend", ["decord"])
def test_other_backends_choose_the_same_frames(tmp_path: Path, shared: VideoPreprocess, backend: str) -> None:
    data = write(tmp_path / "v.mp4", [grey(n) for n in range(30)], g="10", bf="2")
    plan = shared.plan(shared.header(data))
    expected, expected_s = shared.frames(data, plan)
    found, found_s = configured(shared, backend=backend).frames(data, plan)
    assert numbers(found) == numbers(expected) and found_s == pytest.approx(expected_s)


@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_rotation(tmp_path: Path, shared: VideoPreprocess, rotation: int, backend: str) -> None:
    """A red corner at the top left of the stored picture turns with the container's rotation."""
    stored = grey(2)
    stored[:24, :32] = (255, 0, 0)
    data = write(tmp_path / "r.mp4", [stored] * 5, rotation=rotation)
    process = configured(shared, backend=backend)
    header = process.header(data)
    assert (header.width, header.height) == ((64, 48) if rotation == 180 else (48, 64))
    plan = process.plan(header)
    assert plan.geometry == square_geometry(header.width, header.height, 32, "squash")
    frame = process(data, plan)[0]
    corners = {"top left": (8, 8), "top right": (8, 24), "bottom left": (24, 8), "bottom right": (24, 24)}
    red = [name for name, (y, x) in corners.items() if float(frame[0, y, x] - frame[1, y, x]) > 0.5]
    # FFmpeg's rotation counts anticlockwise.
    assert red == [{90: "bottom left", -90: "top right", 180: "bottom right"}[rotation]]


def test_frames_are_resized_as_pictures(tmp_path: Path, shared: VideoPreprocess) -> None:
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:, ::2] = 255
    data = write(tmp_path / "p.mkv", [picture] * 3, codec="ffv1")
    for resize in ("pad", "squash", "crop"):
        video = configured(shared, resize=resize)
        still = ImagePreprocess(ImageConfig(encoder=TimmConfig(model="test_vit"), resize=resize), SPEC)
        with av.open(BytesIO(data)) as container:
            file = BytesIO()
            next(container.decode(video=0)).to_image().save(file, "PNG")
        expected = still(file.getvalue(), still.plan(still.header(file.getvalue())))
        found = video(data, video.plan(video.header(data)))
        torch.testing.assert_close(found[:1], expected, rtol=0, atol=2 / 255)


def test_plans(shared: VideoPreprocess) -> None:
    def count(header: MediaHeader, shrink: int = 0, **settings: object) -> int:
        plan = configured(shared, **settings).plan(header, shrink)
        assert len(plan.times_s) == plan.shape[0] and all(0 < time < 10 for time in plan.times_s)
        return plan.shape[0]

    header = MediaHeader(width=64, height=48, duration_s=10.0, num_frames=300)
    assert [count(header, shrink) for shrink in range(5)] == [8, 4, 2, 1, 1]
    assert count(header, sample={"kind": "fps", "fps": 2}) == 20
    assert count(header, sample={"kind": "fps", "fps": 2, "max_frames": 16}) == 16
    assert count(header, sample={"kind": "fps", "fps": 0.01}) == 1
    assert count(header, max_total_pixels=5 * 32 * 32 + 7) == 5
    assert count(MediaHeader(width=64, height=48, duration_s=0.1, num_frames=3)) == 3


def test_limits(shared: VideoPreprocess) -> None:
    for header, reason in [
        (MediaHeader(width=64, height=48, duration_s=4000.0), "video too long"),
        (MediaHeader(width=64, height=48, duration_s=0.0), "empty video"),
        (MediaHeader(width=64, height=48), "header incomplete"),
        (MediaHeader(width=30_000, height=48, duration_s=1.0), "picture too large"),
    ]:
        with pytest.raises(SampleError) as caught:
            shared.plan(header)
        assert caught.value.reason == reason


def test_a_lying_duration(tmp_path: Path, shared: VideoPreprocess) -> None:
    data = write(tmp_path / "v.mp4", [grey(n) for n in range(10)])
    process = configured(shared, sample={"kind": "num_frames", "num_frames": 4})
    frames, times_s = process.frames(data, process.plan(MediaHeader(width=64, height=48, duration_s=1.4)))
    assert numbers(frames) == [1, 5, 8, 9] and times_s[-1] == pytest.approx(0.9)
    with pytest.raises(SampleError) as caught:
        process(data, process.plan(MediaHeader(width=64, height=48, duration_s=60.0)))
    assert caught.value.reason == "truncated video"


def test_a_damaged_stretch_costs_its_frames_only(tmp_path: Path, shared: VideoPreprocess) -> None:
    data = bytearray(write(tmp_path / "v.ts", [grey(n) for n in range(30)], g="5"))
    middle = len(data) // 2 // 188 * 188
    data[middle : middle + 188 * 12] = bytes(188 * 12)
    plan = shared.plan(MediaHeader(width=64, height=48, duration_s=3.0))
    frames = shared(bytes(data), plan)
    assert frames.shape[0] == 8 and numbers(frames)[0] == 1 and numbers(frames)[-1] == 28


def test_a_recording_without_duration(tmp_path: Path, shared: VideoPreprocess) -> None:
    """What a browser streams: a webm whose header was never completed."""
    file = BytesIO()
    file.seekable = lambda: False  # type: ignore[method-assign]
    with av.open(file, "w", format="webm", options={"live": "1"}) as container:
        stream = container.add_stream("libvpx-vp9", rate=10, options={"deadline": "realtime", "cpu-used": "8"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey(number), format="rgb24")))
        container.mux(stream.encode(None))
    with av.open(BytesIO(file.getvalue())) as container:
        assert container.duration is None
    header = shared.header(file.getvalue())
    assert header.duration_s == pytest.approx(2.0, abs=0.11)
    frames = shared(file.getvalue(), shared.plan(header))
    assert numbers(frames)[0] == 1 and numbers(frames)[-1] == 18


def test_files_without_pictures(tmp_path: Path, shared: VideoPreprocess) -> None:
    with av.open(str(tmp_path / "a.m4a"), "w") as container:
        track = container.add_stream("aac", rate=16_000, layout="mono")
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        tone.rate = 16_000
        container.mux(track.encode(tone))
        container.mux(track.encode(None))
    with pytest.raises(SampleError) as caught:
        shared.header((tmp_path / "a.m4a").read_bytes())
    assert caught.value.reason == "no video track"
    data = write(tmp_path / "v.mp4", [grey(0)] * 3)
    for bad in (b"", b"text", data[: len(data) // 2]):
        with pytest.raises(SampleError) as caught:
            shared.header(bad)
        assert caught.value.reason in ("undecodable video", "empty video")


def test_a_video_with_sound_keeps_its_own_clock(tmp_path: Path, shared: VideoPreprocess) -> None:
    data = write(tmp_path / "s.mp4", [grey(n) for n in range(30)], sound=True, g="10")
    frames, _ = shared.frames(data, shared.plan(shared.header(data)))
    assert numbers(frames) == [1, 5, 9, 13, 16, 20, 24, 28]


def test_animated_gif(shared: VideoPreprocess) -> None:
    file = BytesIO()
    pictures = [Image.fromarray(grey(n)) for n in range(6)]
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=100)
    frames = shared(file.getvalue(), shared.plan(shared.header(file.getvalue())))
    assert numbers(frames) == [0, 1, 2, 3, 4, 5]


def test_a_single_frame(tmp_path: Path, shared: VideoPreprocess) -> None:
    data = write(tmp_path / "v.mkv", [grey(3)])
    assert numbers(shared(data, shared.plan(MediaHeader(width=64, height=48, duration_s=0.1)))) == [3] * 8


class Videos(Dataset[torch.Tensor]):
    def __init__(self, process: VideoPreprocess, data: bytes) -> None:
        self.process, self.data = process, data

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.process(self.data, self.process.plan(self.process.header(self.data)))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_workers_decode(tmp_path: Path, shared: VideoPreprocess, start: str) -> None:
    """Workers are daemonic processes, and a forked one inherits a child that it must not talk to."""
    data = write(tmp_path / "v.mp4", [grey(n) for n in range(8)])
    expected = shared(data, shared.plan(shared.header(data)))
    gc.collect()  # encoders of the tests before have threads: freed in a forked child, they would be waited for in vain
    loader = DataLoader(Videos(shared, data), batch_size=None, num_workers=2, multiprocessing_context=start)
    assert all(torch.equal(frames, expected) for frames in loader)


def test_config_and_pickling() -> None:
    image = ImageConfig(encoder=TimmConfig(model="test_vit", pretrained=False))
    config = VideoConfig()
    assert config.build_encoder() is None and config.preprocess(image).spec == image.encoder.spec()
    with pytest.raises(ValueError, match="not configured"):
        config.preprocess()
    own = VideoConfig(encoder=TimmConfig(model="test_vit", pretrained=False))
    assert own.preprocess().spec == own.encoder.spec() and own.build_encoder() is not None
    assert pickle.loads(pickle.dumps(own.preprocess())).config == own
