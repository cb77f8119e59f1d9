"""Sixteen streams at once beside one stream and an offline batch; gaps between tokens; second questions; cancels.

    GOMP_SPINCOUNT=20000 python benchmarks/serving.py

Every request has a picture of its own, in fp32; no answer ends before its length, so that all contenders make the same
number of tokens. Answers are compared before anything is timed. Wall-clock time: nothing else should run. Exits with
status 1 where a target is not met.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import io
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TypeVar

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mmchat  # noqa: F401  (repairs torchvision before transformers looks for it)

# isort: split
import numpy as np
import torch
import transformers
import yaml
from PIL import Image

from benchmarks.measure import machine, say, spread
from mmchat.config import read_values
from mmchat.conversation import Conversation, MediaRef, Turn
from mmchat.data.pack import load_media
from mmchat.inference.generate import Decoding, generate
from mmchat.inference.load import Loaded, load
from mmchat.models.packed import pack
from mmchat.serving.engine import Ask, Engine

T = TypeVar("T")
RESULTS = Path(__file__).resolve().parent / "results"
STREAMS = 16
IMAGE, MANY_TOKENS = "model.modalities.image.connector", 576
TARGETS = {
    "times_one_stream": (3.0, "at least"),
    "of_offline_batch": (0.8, "at least"),
    "p99_by_median_gap": (2.5, "at most"),
    "second_by_first_question": (0.2, "at most"),
    "growth_after_cancels_mb": (32.0, "at most"),
}


@dataclass(frozen=True)
class Settings:
    config: str
    tokens: int
    rounds: int
    questions: int
    cancels: int
    picture: tuple[int, int]
    photo: tuple[int, int]


@dataclass(frozen=True)
class Said:
    """One answer: its text; when the request was made and each piece came, in seconds; tokens said until each piece."""

    text: str
    asked_s: float
    pieces_s: tuple[float, ...]
    num_tokens: tuple[int, ...]

    @property
    def gaps_s(self) -> list[float]:
        """Between tokens. Text that is not certain yet, as half a character, comes with the next token's."""
        gaps: list[float] = []
        for i in range(1, len(self.pieces_s)):
            tokens = max(1, self.num_tokens[i] - self.num_tokens[i - 1])
            gaps += [(self.pieces_s[i] - self.pieces_s[i - 1]) / tokens] * tokens
        return gaps


def picture(seed: int, size: tuple[int, int]) -> MediaRef:
    """A JPEG with the soft structure of a photograph, different for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=85)
    return MediaRef("image", out.getvalue())


def question(seed: int, size: tuple[int, int]) -> Conversation:
    words = "What can be seen here, and what is it for?" + " Be exact." * (seed % 3)
    return Conversation((Turn("user", (picture(seed, size), words)),))


def prepared(config: str, overrides: Sequence[str] = ()) -> Loaded:
    """The model with random low-rank pairs, which say nothing before training, and answers that do not end."""
    if overrides:
        with NamedTemporaryFile("w", suffix=".yaml") as changed:
            yaml.safe_dump(read_values(config, overrides), changed)
            changed.flush()
            return prepared(changed.name)
    loaded = load(config, "float32")
    if loaded.checkpoint is None:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for name, parameter in loaded.model.named_parameters():
                if ".fusion_b_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    pack(loaded.model)
    template = copy.copy(loaded.template)
    template.end_ids = [-1]
    return replace(loaded, template=template)


@contextmanager
def running(loaded: Loaded, **limits: int) -> Iterator[Engine]:
    engine = Engine(loaded, **limits)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


async def ask(engine: Engine, conversation: Conversation, tokens: int) -> Said:
    asked_s = time.perf_counter()
    times, counts, texts = [], [], []
    answer = engine.submit(Ask(conversation, Decoding(tokens)))
    async for piece in answer:
        times.append(time.perf_counter())
        counts.append(answer.completion_tokens)
        texts.append(piece.text)
    return Said("".join(texts), asked_s, tuple(times), tuple(counts))


async def streams(engine: Engine, lists: list[list[Conversation]], tokens: int) -> list[list[Said]]:
    """Each list is one user's, who asks again as soon as the answer is there: requests join and leave all the time."""

    async def user(asked: list[Conversation]) -> list[Said]:
        return [await ask(engine, conversation, tokens) for conversation in asked]

    return list(await asyncio.gather(*map(user, lists)))


def offline(loaded: Loaded, asked: list[Conversation], tokens: int) -> list[str]:
    def answers() -> list[str]:
        samples = [loaded.template.render(conversation, answer=True) for conversation in asked]
        media = [load_media(sample, loaded.template) for sample in samples]
        return generate(loaded.model, loaded.template, samples, media, loaded.device, Decoding(tokens))

    return in_a_thread(answers)


def in_a_thread(function: Callable[[], T]) -> T:
    """Called in a thread that ends, and OpenMP's threads with it: left over, they would slow down the engine's."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def throughput(loaded: Loaded, settings: Settings) -> dict[str, object]:
    """Tokens a second of one stream, of sixteen and of the offline batch, from the first request to the last token."""
    asked = [[question(100 * r + s, settings.picture) for r in range(settings.rounds)] for s in range(STREAMS)]
    tokens = settings.tokens
    texts = offline(loaded, [mine[0] for mine in asked], tokens)
    with running(loaded) as engine:
        found = asyncio.run(streams(engine, [mine[:1] for mine in asked], tokens))
    differing = sum(text != said[0].text for text, said in zip(texts, found, strict=True))
    assert not differing, f"{differing} of {STREAMS} answers are not those of the offline batch"
    say(f"{STREAMS} answers of {tokens} tokens are those of the offline batch")

    with running(loaded) as engine:
        begun_s = time.perf_counter()
        asyncio.run(streams(engine, [[question(9000 + r, settings.picture) for r in range(settings.rounds)]], tokens))
        one = settings.rounds * tokens / (time.perf_counter() - begun_s)
        begun_s = time.perf_counter()
        found = asyncio.run(streams(engine, asked, tokens))
        many = STREAMS * settings.rounds * tokens / (time.perf_counter() - begun_s)
    begun_s = time.perf_counter()
    for r in range(settings.rounds):
        offline(loaded, [mine[r] for mine in asked], tokens)
    batch = STREAMS * settings.rounds * tokens / (time.perf_counter() - begun_s)
    gaps = [gap for mine in found for said in mine for gap in said.gaps_s]
    p99 = float(np.quantile(gaps, 0.99))
    return {
        "tokens_per_s": {"one stream": one, f"{STREAMS} streams": many, f"offline batch of {STREAMS}": batch},
        "gaps_s": {
            "median": statistics.median(gaps),
            "p99": p99,
            "max": max(gaps),
            "count": len(gaps),
        },
        "times_one_stream": many / one,
        "of_offline_batch": many / batch,
        "p99_by_median_gap": p99 / statistics.median(gaps),
    }


def second_questions(loaded: Loaded, settings: Settings) -> dict[str, object]:
    """Times to the first piece, by how many tokens the picture has: the configuration's, and as many as LLaVA-1.5's."""
    many = in_a_thread(lambda: prepared(settings.config, [f"{IMAGE}={{kind: resampler, num_queries: {MANY_TOKENS}}}"]))
    found = {"as configured": _two_questions(loaded, settings), f"{MANY_TOKENS} tokens": _two_questions(many, settings)}
    return {
        "pictures": found,
        "second_by_first_question": found[f"{MANY_TOKENS} tokens"]["second_by_first"],
    }


def _two_questions(loaded: Loaded, settings: Settings) -> dict[str, object]:
    """Time to the first piece of a first and of a second question about a picture, one user alone."""

    async def both(engine: Engine, seed: int) -> tuple[float, float]:
        first = question(seed, settings.photo)
        said = await ask(engine, first, 8)
        turns = (*first.turns, Turn("assistant", (said.text,)), Turn("user", ("Why?",)))
        again = await ask(engine, Conversation(turns), 8)
        return said.pieces_s[0] - said.asked_s, again.pieces_s[0] - again.asked_s

    with running(loaded) as engine:
        asyncio.run(both(engine, 20_000))  # starts what is started once
        times = [asyncio.run(both(engine, 20_001 + i)) for i in range(settings.questions)]
    return {
        "first_s": spread([first for first, _ in times]),
        "second_s": spread([second for _, second in times]),
        "second_by_first": statistics.median(second / first for first, second in times),
    }


def size(text: str) -> tuple[int, int]:
    width, height = map(int, text.split("x"))
    return width, height


def resident_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status tells no VmRSS; this benchmark needs Linux")


def cancels(loaded: Loaded, settings: Settings) -> dict[str, object]:
    """Growth of resident memory over requests that are cancelled after their first piece, with bounded caches."""

    async def some(engine: Engine, first: int, count: int) -> None:
        async def one(seed: int) -> None:
            answer = engine.submit(Ask(question(seed, (320, 240)), Decoding(settings.tokens)))
            async for _ in answer:
                answer.cancel()

        for begin in range(first, first + count, STREAMS):
            await asyncio.gather(*(one(seed) for seed in range(begin, min(begin + STREAMS, first + count))))

    with running(loaded, cache_tokens=1024, media_bytes=1 << 20) as engine:
        asyncio.run(some(engine, 50_000, max(STREAMS, settings.cancels // 5)))  # until the caches are full
        before = resident_mb()
        asyncio.run(some(engine, 60_000, settings.cancels))
        after = resident_mb()
        asyncio.run(ask(engine, question(1, (320, 240)), 2))  # by its turn, all that is cancelled has gone
        stats = engine.stats()
    assert stats["running"] == stats["waiting"] == 0, f"places that were not freed: {stats}"
    return {"cancels": settings.cancels, "resident_mb": [before, after], "growth_after_cancels_mb": after - before}


def run(settings: Settings) -> tuple[dict[str, object], bool]:
    loaded = in_a_thread(lambda: prepared(settings.config))
    answers = f"{settings.rounds} answers of {settings.tokens} tokens"
    say(f"{settings.config} on {loaded.device}: {STREAMS} streams of {answers}")
    results: dict[str, object] = {}
    for part in (throughput, second_questions, cancels):
        found = part(loaded, settings)
        results |= found
        say(f"{part.__name__}: {json.dumps(found)}")
    is_met = True
    say(f"\n{'':<28}{'found':>9}   target")
    for name, (target, way) in TARGETS.items():
        value = float(results[name])  # type: ignore[arg-type]
        is_fine = value >= target if way == "at least" else value <= target
        is_met &= is_fine
        say(f"{name:<28}{value:>9.2f}   {way} {target:g}{'' if is_fine else '   NOT MET'}")
    return results | {"targets": {name: f"{way} {target:g}" for name, (target, way) in TARGETS.items()}}, is_met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml", help="the model: a YAML")
    parser.add_argument("--tokens", type=int, default=64, help="of every answer")
    parser.add_argument("--rounds", type=int, default=3, help="questions that every stream asks")
    parser.add_argument("--questions", type=int, default=7, help="pairs of first and second questions")
    parser.add_argument("--cancels", type=int, default=1000)
    parser.add_argument("--picture", type=size, default="1024x768", help="WIDTHxHEIGHT of the streams' pictures")
    parser.add_argument("--photo", type=size, default="4000x3000", help="of the picture that is asked about twice")
    parser.add_argument("--out", type=Path, default=RESULTS / "serving_cpu.json", help="where the figures go")
    arguments = parser.parse_args()
    if min(arguments.tokens, arguments.rounds, arguments.questions, arguments.cancels) < 1 or arguments.tokens < 2:
        parser.error("--rounds, --questions and --cancels must be at least 1, and --tokens 2")
    settings = Settings(
        arguments.config,
        arguments.tokens,
        arguments.rounds,
        arguments.questions,
        arguments.cancels,
        arguments.picture,
        arguments.photo,
    )
    results, is_met = run(settings)
    command = shlex.join(["python", *sys.argv])
    facts = machine(transformers) | {"cores": os.cpu_count()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"command": command, "machine": facts, **results}, indent=1) + "\n")
    say(f"written to {arguments.out}")
    if not is_met:
        raise SystemExit("a target is not met")


if __name__ == "__main__":
    main()
