"""Reading and decoding of mmchat beside webdataset, PyAV and decord: same files, same pixels, all CPU time counted.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/loader.py

Pictures: JPEGs of 0.8 megapixels to normalised tensors of 336 pixels, in one worker process and in two. Container: the
bytes of all members. Video: 16 frames of a clip of a minute. The contenders take turns, several times over; pixels and
bytes are compared before anything is timed. Exits with status 1 where a target is not met.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mmchat  # noqa: F401  (repairs torchvision before timm looks for it)

# isort: split
import av
import numpy as np
import PIL
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from benchmarks.measure import machine, say, spread
from mmchat.conversation import MediaHeader, MediaRef, Record
from mmchat.data.shard_writer import write_shards
from mmchat.data.shards import Shard, expand_shards
from mmchat.modalities.image import ImageConfig, ImagePreprocess
from mmchat.modalities.image_encoders import ImageSpec, TimmConfig
from mmchat.modalities.video import SampleNumFrames, VideoConfig, VideoPreprocess
from mmchat.storage import CacheConfig, File

RESULTS = Path(__file__).resolve().parent / "results"
WIDTH, HEIGHT = 1024, 768
QUALITY, LARGE_QUALITY = 75, 90  # the default of libjpeg and PIL; nearly twice the bytes
# CLIP's figures at 336 pixels.
SPEC = ImageSpec(336, (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758), "bicubic", 24, 24, 1024)
CLIP_S, CLIP_FPS, CLIP_GOP, NUM_FRAMES = 60, 30, 60, 16
NUM_SHARDS = 4
EPOCHS = 10  # over the container, which a single pass reads too fast to time

OPTIONS = {
    "mmchat": {},
    "mmchat fast_resize": {"fast_resize": True},
    "mmchat draft": {"draft": True},
    "mmchat draft, fast_resize": {"draft": True, "fast_resize": True},
}
# Times webdataset's samples per CPU second. Decoding at full scale has none: the same libjpeg and the same resize.
PICTURE_TARGETS = {name: 1.5 for name, options in OPTIONS.items() if options}
CONTAINER_TARGETS = {"mmchat members": 3.0}

Run = Callable[[], int]


# ---- data -----------------------------------------------------------------------------------------------------------


def texture(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """[height, width, 3]: a spectrum that falls with frequency as in photographs, and objects with edges."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    shared = np.exp(2j * np.pi * rng.random(frequency.shape)) / frequency**1.35
    pixels = np.empty((height, width, 3))
    for channel in range(3):
        own = np.exp(2j * np.pi * rng.random(frequency.shape)) / frequency**1.8
        for weight, spectrum in ((45, shared), (20, own)):
            plane = np.fft.irfft2(spectrum, s=(height, width))
            pixels[:, :, channel] = weight * plane / plane.std() + (pixels[:, :, channel] if weight == 20 else 128)
    rows, columns = np.mgrid[:height, :width]
    for _ in range(12):
        x, y, radius = rng.integers(width), rng.integers(height), rng.integers(20, 180)
        pixels[np.hypot(columns - x, rows - y) < radius] += rng.normal(0, 60, 3)
    return np.clip(pixels + rng.normal(0, 1, pixels.shape), 0, 255).astype(np.uint8)


def make_shards(folder: Path, num_samples: int, num_pictures: int, quality: int = QUALITY) -> list[str]:
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(num_pictures):
        file = BytesIO()
        Image.fromarray(texture(rng, WIDTH, HEIGHT)).save(file, "JPEG", quality=quality)
        pictures.append(file.getvalue())
    header = MediaHeader(width=WIDTH, height=HEIGHT)
    records = (
        Record(
            f"{i:06d}",
            {"caption": f"Picture {i}, described in a sentence of the usual length, as captions are."},
            (MediaRef("image", pictures[i % num_pictures], header),),
        )
        for i in range(num_samples)
    )
    write_shards(records, folder, samples_per_shard=-(-num_samples // NUM_SHARDS))
    return [str(path) for path in expand_shards(str(folder))]


def make_clip() -> bytes:
    """A camera that moves over a picture, with something moving in front of it."""
    scene = texture(np.random.default_rng(1), 1280, 720)
    file = BytesIO()
    options = {"g": str(CLIP_GOP), "keyint_min": str(CLIP_GOP), "sc_threshold": "0", "preset": "veryfast"}
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=CLIP_FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for i in range(CLIP_S * CLIP_FPS):
            x, y = int(320 + 300 * np.sin(i / 200)), int(180 + 150 * np.cos(i / 170))
            frame = scene[y : y + 360, x : x + 640].copy()
            left = int(290 + 250 * np.sin(i / 25))
            frame[150:210, left : left + 60] = (i % 255, 200, 40)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


# ---- pictures -------------------------------------------------------------------------------------------------------


def peer_tensor(image: Image.Image) -> Tensor:
    """[3, 336, 336], as one writes it behind `.decode("pil")`."""
    square = image.resize((SPEC.size, SPEC.size), SPEC.resample)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float()
    return pixels.div_(255).sub_(torch.tensor(SPEC.mean)[:, None, None]).div_(torch.tensor(SPEC.std)[:, None, None])


def peer_sample(sample: dict[str, Any]) -> Tensor:
    return peer_tensor(sample["0.jpg"])


def peer_dataset(shards: list[str]) -> webdataset.WebDataset:
    return webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)


def preprocess(options: dict[str, bool]) -> ImagePreprocess:
    encoder = TimmConfig(model="unused", pretrained=False)
    return ImagePreprocess(ImageConfig.model_validate({"encoder": encoder, "resize": "squash", **options}), SPEC)


class OurPictures(IterableDataset[Tensor]):
    """What a loader worker does for a sample, whole shards to a worker as in webdataset."""

    def __init__(self, shards: list[str], options: dict[str, bool]) -> None:
        self.shards = [Shard(Path(path)) for path in shards]
        self.preprocess = preprocess(options)

    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        for shard in self.shards if info is None else self.shards[info.id :: info.num_workers]:
            for i in range(shard.num_samples):
                (item,) = shard.record(i).media
                assert item.header is not None
                yield self.preprocess(item.read(), self.preprocess.plan(item.header))[0]


def compare_pictures(shards: list[str]) -> dict[str, dict[str, float]]:
    """Differences from webdataset's path in levels of 255. Raises AssertionError where the exact path has any."""
    expected = list(peer_dataset(shards[:1]).decode("pil").map(peer_sample))
    std = torch.tensor(SPEC.std)[:, None, None]
    differences = {}
    for name, options in OPTIONS.items():
        pairs = list(zip(expected, OurPictures(shards[:1], options), strict=True))
        levels = [((a - b) * std * 255).abs() for a, b in pairs]
        differences[name] = {
            "mean": float(torch.stack([x.mean() for x in levels]).mean()),
            "max": float(torch.stack([x.max() for x in levels]).max()),
        }
        assert options or all(torch.equal(a, b) for a, b in pairs), "the exact path shows other pixels than webdataset"
    return differences


def drain(dataset: IterableDataset[Tensor], workers: int) -> int:
    return sum(1 for _ in DataLoader(dataset, batch_size=None, num_workers=workers))


def decode_alone(jpegs: list[bytes], scale: int) -> int:
    """The limit: libjpeg-turbo, at full or reduced scale, and nothing else."""
    for data in jpegs:
        image = Image.open(BytesIO(data))
        if scale > 1:
            image.draft(None, (WIDTH // scale, HEIGHT // scale))
        image.load()
    return len(jpegs)


# ---- container ------------------------------------------------------------------------------------------------------


def peer_members(shards: list[str]) -> Iterator[list[bytes]]:
    for sample in peer_dataset(shards):
        yield [sample["0.jpg"], sample["json"]]


def our_members(shards: list[str]) -> Iterator[list[bytes]]:
    for path in shards:
        shard, file = Shard(Path(path)), File.open(path, CacheConfig())
        for i in range(shard.num_samples):
            yield [file.read(*place) for place in shard.entry(i).members.values()]


def our_records(shards: list[str]) -> Iterator[list[bytes]]:
    """Facts are parsed and checked besides."""
    for path in shards:
        shard = Shard(Path(path))
        for i in range(shard.num_samples):
            yield [item.read() for item in shard.record(i).media]


def drain_members(read: Callable[[list[str]], Iterator[list[bytes]]], shards: list[str]) -> int:
    return sum(1 for _ in range(EPOCHS) for _ in read(shards))


def container(
    title: str, shards: list[str], repetitions: int, targets: dict[str, float]
) -> tuple[dict[str, Any], bool]:
    """Reading alone, after the bytes of both were found equal."""
    sizes = []
    for a, b, c in zip(peer_members(shards), our_members(shards), our_records(shards), strict=True):
        assert sorted(a) == sorted(b) and c == a[:1], "the container gives other bytes than webdataset"
        sizes.append(sum(map(len, a)))
    readers = {"webdataset": peer_members, "mmchat members": our_members, "mmchat records": our_records}
    runs: dict[str, Run] = {name: partial(drain_members, read, shards) for name, read in readers.items()}
    rows, is_met = report(title, take_turns(title, runs, repetitions, ended_cpu_s), targets)
    return rows | {"mean_sample_kb": sum(sizes) / len(sizes) / 1e3}, is_met


# ---- video ----------------------------------------------------------------------------------------------------------


def linear_frames(data: bytes, times_s: tuple[float, ...]) -> Tensor:
    """PyAV from the first frame to the last that is wanted."""
    chosen: list[np.ndarray] = []
    with av.open(BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        last = None
        for frame in container.decode(stream):
            while len(chosen) < len(times_s) and frame.time > times_s[len(chosen)] + 1e-6:
                chosen.append(last.to_ndarray(format="rgb24"))
            if len(chosen) == len(times_s):
                break
            last = frame
    chosen += [last.to_ndarray(format="rgb24")] * (len(times_s) - len(chosen))
    return torch.stack([peer_tensor(Image.fromarray(pixels)) for pixels in chosen])


def decord_frames(data: bytes, times_s: tuple[float, ...]) -> Tensor:
    import decord

    reader = decord.VideoReader(BytesIO(data), num_threads=1)
    indices = [int(time_s * CLIP_FPS + 1e-6) for time_s in times_s]
    return torch.stack([peer_tensor(Image.fromarray(pixels)) for pixels in reader.get_batch(indices).asnumpy()])


def our_video(seek: str) -> VideoPreprocess:
    config = VideoConfig.model_validate({"resize": "squash", "seek": seek})
    return VideoPreprocess(config.model_copy(update={"sample": SampleNumFrames(num_frames=NUM_FRAMES)}), SPEC)


# ---- measuring ------------------------------------------------------------------------------------------------------


def ended_cpu_s() -> float:
    """CPU seconds of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def living_cpu_s() -> float:
    """CPU seconds of this process and of its living children: the one that decodes videos stays alive. Linux only."""
    children = [pid for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]
    waits = [file.read_text() for pid in children for file in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return time.process_time() + sum(int(wait.split()[0]) for wait in waits) / 1e9


def take_turns(
    title: str, runs: dict[str, Run], repetitions: int, clock: Callable[[], float]
) -> dict[str, dict[str, list[float]]]:
    """CPU milliseconds and real samples a second of every run, once in each repetition."""
    figures: dict[str, dict[str, list[float]]] = {name: {"cpu_ms": [], "samples_per_s": []} for name in runs}
    begun = time.perf_counter()
    for repetition in range(repetitions):
        for name, run in runs.items():
            started, cpu = time.perf_counter(), clock()
            num_samples = run()
            figures[name]["cpu_ms"].append((clock() - cpu) / num_samples * 1e3)
            figures[name]["samples_per_s"].append(num_samples / (time.perf_counter() - started))
        left = (time.perf_counter() - begun) / (repetition + 1) * (repetitions - repetition - 1)
        say(f"{title}: repetition {repetition + 1}/{repetitions}, {left:.0f} s left")
    return figures


def report(
    title: str, figures: dict[str, dict[str, list[float]]], targets: dict[str, float]
) -> tuple[dict[str, Any], bool]:
    """Prints the medians; the first contender is what the others are compared with, within a repetition."""
    base = next(iter(figures.values()))["cpu_ms"]
    say(f"\n{title:<40} {'CPU ms/sample':>20} {'samples/CPU s':>14} {'samples/s':>10} {'times the first':>22}  target")
    rows, is_met = {}, True
    for name, found in figures.items():
        cpu, rate = spread(found["cpu_ms"]), spread(found["samples_per_s"])
        times = spread([a / b for a, b in zip(base, found["cpu_ms"], strict=True)])
        target = targets.get(name)
        met = target is None or times["median"] >= target
        is_met &= met
        rows[name] = {"cpu_ms": cpu, "samples_per_s": rate, "times": times, "target": target}
        say(
            f"{name:<40} {cpu['median']:>10.3f} +-{cpu['iqr'] / 2:<7.3f} {1e3 / cpu['median']:>14.1f} "
            f"{rate['median']:>10.1f} {times['median']:>8.2f} ({times['min']:.2f}-{times['max']:.2f})"
            + ("" if target is None else f"  {target:g}: {'met' if met else 'NOT met'}")
        )
    return rows, is_met


def run(repetitions: int, num_samples: int, num_pictures: int) -> tuple[dict[str, Any], bool]:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    met = []
    with tempfile.TemporaryDirectory() as folder:
        say("making pictures and a clip, about half a minute")
        shards = make_shards(Path(folder), num_samples, num_pictures)
        jpegs = [members[0] for members in peer_members(shards[:1])]
        size_kb = sum(map(len, jpegs)) / len(jpegs) / 1e3
        results["data"] = {"samples": num_samples, "pictures": num_pictures, "mean_jpeg_kb": size_kb}
        say(f"{num_samples} samples, JPEGs of {size_kb:.0f} kB on average")

        results["levels_from_webdataset"] = differences = compare_pictures(shards)
        for name, levels in differences.items():
            say(f"{name}: {levels['mean']:.4f} of 255 levels from webdataset's pixels, {levels['max']:.0f} at most")
        for workers in (1, 2):
            runs: dict[str, Run] = {
                "webdataset": partial(drain, peer_dataset(shards).decode("pil").map(peer_sample), workers)
            }
            runs |= {name: partial(drain, OurPictures(shards, options), workers) for name, options in OPTIONS.items()}
            if workers == 1:
                runs |= {
                    f"limit: decoding alone, scale 1/{scale}": partial(decode_alone, jpegs, scale) for scale in (1, 2)
                }
            title = f"pictures, workers {workers}"
            figures = take_turns(title, runs, repetitions, ended_cpu_s)
            results[title], is_met = report(title, figures, PICTURE_TARGETS)
            met.append(is_met)

        large = make_shards(Path(folder) / "large", num_samples, num_pictures, LARGE_QUALITY)
        for title, paths, targets in (
            ("container", shards, CONTAINER_TARGETS),
            (f"container, JPEG quality {LARGE_QUALITY}", large, {}),
        ):
            results[title], is_met = container(title, paths, repetitions, targets)
            met.append(is_met)

    clip = make_clip()
    exact, keyframes = our_video("exact"), our_video("keyframes")
    plan = exact.plan(exact.header(clip))
    found, found_s = exact.frames(clip, plan)
    assert torch.equal(found, linear_frames(clip, plan.times_s)), "seeking shows other frames than a linear decode"
    _, keys_s = keyframes.frames(clip, plan)
    early = [a - b for a, b in zip(found_s, keys_s, strict=True)]
    results["keyframes_early_s"] = {"mean": sum(early) / len(early), "max": max(early)}
    say(f"keyframes show {results['keyframes_early_s']['mean']:.2f} s earlier on average, {max(early):.2f} s at most")

    def once(frames: Callable[..., Any], *arguments: Any) -> int:
        frames(*arguments)
        return 1

    runs = {
        "PyAV, linear": partial(once, linear_frames, clip, plan.times_s),
        "decord": partial(once, decord_frames, clip, plan.times_s),
        "mmchat seek: exact": partial(once, exact, clip, plan),
        "mmchat seek: keyframes": partial(once, keyframes, clip, plan),
    }
    try:
        import decord  # noqa: F401
    except ImportError:
        del runs["decord"]
        say("decord is not installed: not run")
    figures = take_turns("video", runs, max(repetitions, 7), living_cpu_s)
    results["video, 16 frames of a minute"], _ = report("video, 16 frames of a minute", figures, {})
    exact.sandbox.close()
    keyframes.sandbox.close()
    return results, all(met)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5, help="turns that every contender takes")
    parser.add_argument("--samples", type=int, default=384, help="samples of the shards")
    parser.add_argument("--pictures", type=int, default=48, help="different pictures among them")
    parser.add_argument("--out", type=Path, default=RESULTS / "loader_cpu.json", help="where the figures go")
    arguments = parser.parse_args()
    if min(arguments.repetitions, arguments.samples, arguments.pictures) < 1:
        parser.error("--repetitions, --samples and --pictures must be at least 1")
    results, is_met = run(arguments.repetitions, arguments.samples, arguments.pictures)
    command = shlex.join(["python", *sys.argv])
    facts = machine(webdataset, av, PIL, np) | {"cores": os.cpu_count()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"command": command, "machine": facts, **results}, indent=1) + "\n")
    say(f"written to {arguments.out}")
    if not is_met:
        raise SystemExit("a target is not met")


if __name__ == "__main__":
    main()
