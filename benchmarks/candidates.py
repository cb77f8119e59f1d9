"""A hundred candidate answers behind one shared prompt, beside each in a conversation of its own: CPU time, one thread.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/candidates.py

The model of configs/demo.yaml, untrained, with a picture and ten rounds of history, in fp32. Likelihoods are compared
before anything is timed; the contenders take turns. Exits with status 1 where the target is not met.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mmchat  # noqa: F401  (repairs torchvision before transformers looks for it)

# isort: split
import numpy as np
import torch
import transformers
from PIL import Image

from benchmarks.measure import machine, say, spread
from mmchat.batch import IGNORE, Batch
from mmchat.conversation import Conversation, MediaRef, Turn
from mmchat.data.chat_template import Sample
from mmchat.data.pack import collate, load_media
from mmchat.inference.load import Loaded, load
from mmchat.inference.score import candidate_likelihoods
from mmchat.models.head import head_loss

RESULTS = Path(__file__).resolve().parent / "results"
TARGET = 8.0  # times as fast as candidate by candidate
TOLERANCE = 1e-4  # nats, of a candidate's summed log-likelihood
PACK = 10  # conversations that the second contender reads at once
NUM_ROUNDS = 10

THINGS = ("dog", "man", "red car", "table", "small white boat", "tree", "woman with an umbrella", "sign", "cat",
          "horse")  # fmt: skip
PLACES = ("on the left", "in the background", "next to the wall", "behind it", "in the middle of the road")


def conversation(rng: random.Random) -> Conversation:
    """A picture of noise, a caption, nine answered questions and the tenth."""
    out = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
    Image.fromarray(noise).save(out, "JPEG")
    turns = []
    for number in range(NUM_ROUNDS):
        question = f"is there a {rng.choice(THINGS)} {rng.choice(PLACES)}?"
        opening = (MediaRef("image", out.getvalue()), "Here is what is known: a street with people and cars\n")
        turns.append(Turn("user", (*(opening if number == 0 else ()), question)))
        if number < NUM_ROUNDS - 1:
            turns.append(Turn("assistant", (f"yes, there is 1 {rng.choice(PLACES)}",)))
    return Conversation(tuple(turns))


def candidates(rng: random.Random, count: int) -> list[str]:
    """Short answers of about the lengths that Visual Dialog has: 2.9 words on average, few above ten."""
    words = ["yes", "no", "it", "is", "a", "the", "looks", "like", "2", "white", "brown", "can't", "tell", "i", "think",
             "so", "not", "really", "maybe", "just", "one"]  # fmt: skip
    made: dict[str, None] = {}
    while len(made) < count:
        length = min(1 + int(rng.expovariate(1 / 2.2)), 14)
        made[" ".join(rng.choice(words) for _ in range(length))] = None
    return list(made)


def whole(loaded: Loaded, asked: Conversation, text: str) -> Sample:
    """The conversation with one candidate, whose tokens alone have labels."""
    sample = loaded.template.render(Conversation((*asked.turns, Turn("assistant", (text,)))))
    start = len(loaded.template.render(asked, answer=True)) - 1
    return replace(sample, labels=[IGNORE] * start + sample.labels[start:])


@torch.no_grad()
def one_by_one(loaded: Loaded, batches: list[Batch]) -> list[float]:
    """Every batch holds one whole conversation; logits are made at the candidate's tokens only."""
    return [-float(loaded.model(batch).sum) for batch in batches]


@torch.no_grad()
def in_packs(loaded: Loaded, batches: list[Batch]) -> list[float]:
    """Every batch holds several whole conversations end to end."""
    found = []
    for batch in batches:
        hidden = loaded.model.hidden(batch)
        for segment in range(int(batch.segment_ids.max()) + 1):
            rows = batch.segment_ids[0] == segment
            found.append(-float(head_loss(loaded.model.llm, hidden[:, rows], batch.labels[:, rows]).sum))
    return found


def run(config: str, num_candidates: int, every: int, repetitions: int) -> tuple[dict[str, object], bool]:
    torch.set_num_threads(1)
    loaded = load(config, "float32")
    with torch.no_grad():  # at zero, as they are before training, the low-rank pairs would say nothing
        generator = torch.Generator().manual_seed(0)
        for name, parameter in loaded.model.named_parameters():
            if ".fusion_b_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    rng = random.Random(0)
    asked, texts = conversation(rng), candidates(rng, num_candidates)
    prompt = loaded.template.render(asked, answer=True)
    media = load_media(prompt, loaded.template)
    timed = texts[::every]
    samples = [whole(loaded, asked, text) for text in timed]
    singles = [collate([sample], [media]) for sample in samples]
    packs = [collate(samples[i : i + PACK], [media] * len(samples[i : i + PACK])) for i in range(0, len(samples), PACK)]
    counts = [len(loaded.template.text_ids(text)) + 1 for text in texts]
    shared_tokens = len(prompt) + sum(counts) - num_candidates
    limit = (num_candidates * len(prompt) + sum(counts)) / shared_tokens
    say(f"prompt {len(prompt)} tokens, {num_candidates} candidates of {sum(counts) / num_candidates:.1f} tokens")
    say(f"limit: {limit:.1f} times by the tokens that are read")

    contenders: dict[str, tuple[Callable[[], list[float]], int]] = {
        "shared prompt": (lambda: [total for total, _ in candidate_likelihoods(loaded, prompt, media, texts)], 1),
        "one by one": (lambda: one_by_one(loaded, singles), every),
        f"packs of {PACK}": (lambda: in_packs(loaded, packs), every),
    }
    found = {name: score() for name, (score, _) in contenders.items()}
    wanted = found["one by one"]
    found["shared prompt"] = found["shared prompt"][::every]
    differences = {}
    for name, values in found.items():
        differences[name] = max(abs(a - b) for a, b in zip(values, wanted, strict=True))
        say(f"{name}: at most {differences[name]:.1e} nats from one by one")
        assert differences[name] < TOLERANCE, f"{name} differs by {differences[name]} nats"

    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repetitions):
        for name, (score, share) in contenders.items():
            started = time.process_time()
            score()
            seconds[name].append((time.process_time() - started) * share)
        say(f"turn {turn + 1}: " + ", ".join(f"{name} {values[-1]:.2f} s" for name, values in seconds.items()))
    ratios = {
        name: spread([other / own for other, own in zip(values, seconds["shared prompt"], strict=True)])
        for name, values in seconds.items()
        if name != "shared prompt"
    }
    for name, ratio in ratios.items():
        say(
            f"shared prompt is {ratio['median']:.1f} times as fast as {name} ({ratio['min']:.1f} to {ratio['max']:.1f})"
        )
    results = {
        "prompt_tokens": len(prompt),
        "candidates": num_candidates,
        "candidate_tokens": sum(counts),
        "timed_of_the_others": len(timed),
        "limit_by_tokens": limit,
        "largest_difference_nats": differences,
        "cpu_s": {name: spread(values) for name, values in seconds.items()},
        "times_as_fast_as": ratios,
        "target": TARGET,
    }
    return results, ratios["one by one"]["median"] >= TARGET


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml", help="the model")
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument(
        "--every", type=int, default=10, help="of the others, every n-th candidate is read, and counts n times"
    )
    parser.add_argument("--repetitions", type=int, default=5, help="turns that every contender takes")
    parser.add_argument("--out", type=Path, default=RESULTS / "candidates_cpu.json", help="where the figures go")
    arguments = parser.parse_args()
    if min(arguments.candidates, arguments.every, arguments.repetitions) < 1 or arguments.candidates % arguments.every:
        parser.error("--candidates, --every and --repetitions must be at least 1, and --every must divide --candidates")
    results, is_met = run(arguments.config, arguments.candidates, arguments.every, arguments.repetitions)
    command = shlex.join(["python", *sys.argv])
    facts = machine(transformers) | {"cores": os.cpu_count()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"command": command, "machine": facts, **results}, indent=1) + "\n")
    say(f"written to {arguments.out}")
    if not is_met:
        raise SystemExit("the target is not met")


if __name__ == "__main__":
    main()
