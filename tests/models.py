"""Small MMChat models and samples for tests, built through the real configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from mmchat.batch import Batch
from mmchat.config import RunConfig, parse_config
from mmchat.conversation import Conversation, MediaRef, Turn
from mmchat.data.build import build_template
from mmchat.data.chat_template import ChatTemplate, Sample
from mmchat.data.pack import collate, load_media
from mmchat.models.mmchat import MMChat
from tests import tiny


def config(**model: Any) -> RunConfig:
    """configs/tiny.yaml with parts of `model` replaced: config(fusion={...}, llm={...}, image={...})."""
    values = yaml.safe_load((tiny.ROOT / "configs/tiny.yaml").read_text())
    for name, value in model.items():
        if name in ("image", "video", "audio"):
            values["model"]["modalities"][name] = value
        else:
            values["model"][name] = value
    return parse_config(values, "test")


def build(run: RunConfig) -> tuple[MMChat, ChatTemplate]:
    model = run.model.build(torch.float32, run.seed)
    return model.eval(), build_template(run)


def wake(model: MMChat, seed: int = 0) -> None:
    """Gives B (zero at the start) random values, so that fusion says something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".fusion_b_" in name or name == "late.out.weight":
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def conversations() -> list[Conversation]:
    """One each with a picture, a sound, a clip, two pictures and a later sound, and text alone."""
    import random

    rng = random.Random(5)
    image = MediaRef("image", tiny.picture("red", rng))
    other = MediaRef("image", tiny.picture("blue", rng, (30, 50)))
    audio = MediaRef("audio", tiny.tone(440.0, 0.7))
    video = MediaRef("video", tiny.clip("left"))

    def ask(*parts: Any) -> tuple[Turn, Turn]:
        return Turn("user", parts), Turn("assistant", ("An answer.",))

    return [
        Conversation(ask(image, "What?")),
        Conversation(ask("Listen ", audio, " now")),
        Conversation(ask(video, "Which way?")),
        Conversation((*ask(image, other, "Both?"), *ask("And this?", audio))),
        Conversation(ask("Say 3.")),
    ]


def pack(template: ChatTemplate, chosen: list[Conversation] | None = None) -> Batch:
    samples = [template.render(c, f"c{i}") for i, c in enumerate(chosen or conversations())]
    return collate(samples, [load_media(sample, template) for sample in samples])


def singles(template: ChatTemplate, chosen: list[Conversation] | None = None) -> list[Batch]:
    return [pack(template, [c]) for c in (chosen or conversations())]


def sample_of(template: ChatTemplate, conversation: Conversation) -> Sample:
    return template.render(conversation)


def llm_folder(tmp: Path, kind: str) -> str:
    return str(tiny.build_llm(tmp / kind, kind))
