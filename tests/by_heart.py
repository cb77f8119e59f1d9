"""A tiny checkpoint that has learned a few answers by heart, so that what it says is known."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from mmchat.batch import IGNORE
from mmchat.checkpoint import write_checkpoint
from mmchat.config import dump_config
from mmchat.conversation import Conversation, MediaRef, Region, Turn
from mmchat.models.parts import names_in
from mmchat.models.probe import probe_logits
from mmchat.training.resume import bases
from tests import models

DRUM = (16.0, 8.0, 48.0, 24.0)  # in PICTURE, in pixels
PARTS = [f"{kind}.{modality}" for kind in ("connectors", "fusion") for modality in ("audio", "image", "video")]


def picture(kind: str = "PNG", size: tuple[int, int] = (64, 32), colour: str = "red", turned: bool = False) -> bytes:
    """A grey picture with a disc in DRUM; `turned` is stored on its side, with EXIF that says so."""
    image = Image.new("RGB", size, (128, 128, 128))
    ImageDraw.Draw(image).ellipse(DRUM, fill=colour)
    exif = Image.Exif()
    if turned:
        image = image.transpose(Image.Transpose.ROTATE_90)
        exif[0x0112] = 6
    out = io.BytesIO()
    image.save(out, kind, exif=exif.tobytes())
    return out.getvalue()


def conversations() -> list[Conversation]:
    """A box asked for, in one picture and in the second of two; a box asked about; and a place found by two names."""
    one, other = MediaRef("image", picture()), MediaRef("image", picture(colour="blue"))
    where = "Where is the drum?"

    def said(question: tuple, answer: tuple) -> Conversation:
        return Conversation((Turn("user", question), Turn("assistant", answer)))

    return [
        said((one, where), (Region(0, box=DRUM),)),
        said((one, other, where), ("It is ", Region(1, box=DRUM), ".")),
        said((one, "What is in ", Region(0, box=DRUM), "?"), ("A drum.",)),
        said((one, "Describe it."), ("A drum ", Region(0, box=DRUM), " on a wall ", Region(0, point=(8, 4)), ".")),
    ]


def checkpoint(folder: Path, learned_by_heart: Sequence[Conversation] = ()) -> Path:
    """The checkpoint's folder below `folder`, laid out and written as a run does it. Takes some seconds.

    learned_by_heart: instead of `conversations()`.
    """
    config = models.config(fusion={"kind": "flora", "rank": 32, "alpha": 64})
    model, template = models.build(config)
    names = names_in(model, set(PARTS), is_full=False)
    learned = [parameter.requires_grad_() for name, parameter in model.named_parameters() if name in names]
    batch = models.pack(template, list(learned_by_heart) or conversations())
    wanted = batch.labels != IGNORE
    optimizer = torch.optim.Adam(learned, lr=5e-3)
    for step in range(1, 401):
        loss = model(batch)
        (loss.sum / loss.count).backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            with torch.no_grad():
                two = model.logits(batch)[wanted].topk(2).values  # [learned, 2]
                is_learned = torch.equal(model.logits(batch)[wanted].argmax(-1), batch.labels[wanted])
            # Sure enough that half precision makes no other answer.
            if is_learned and float((two[:, 0] - two[:, 1]).min()) > 1:
                break
    else:
        raise AssertionError(f"the answers are not learned after {step} steps")
    with torch.no_grad():
        own = dict(model.named_parameters()) | dict(model.named_buffers())
        weights = {name: own[name].detach().clone() for name in names}
    facts = {
        "run": "tiny", "stage": "instruct", "step": step, "is_last": True, "parts": PARTS,
        "fusion": config.model.fusion.model_dump(mode="json"), "bases": bases(config),
        "probe": {"dtype": "float32", "logits": probe_logits(model, torch.device("cpu"))},
    }  # fmt: skip
    moments = {f"exp_avg.{name}": torch.zeros_like(value) for name, value in weights.items()}
    state = {"step": step, "lanes": {}}
    place = folder / "tiny" / "instruct" / f"step-{step:06d}"
    return write_checkpoint(place, dump_config(config), weights, moments, state, facts)
