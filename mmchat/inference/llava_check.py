"""Whether a LLaVA folder, loaded by plain transformers, answers as an mmchat model: same ids, pixels and logits."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoImageProcessor, AutoProcessor, LlavaForConditionalGeneration

from mmchat.conversation import Conversation, MediaRef, Turn
from mmchat.data.chat_template import ChatTemplate
from mmchat.data.pack import collate, load_media
from mmchat.inference.load import Loaded
from mmchat.modalities.image import ImageConfig, ImagePreprocess, upright

TOLERANCE = 1e-4  # of logits, and of the largest of them where that is above 1
PIXEL_TOLERANCE = 1e-4  # of normalised pixels, where a level of 255 is about 0.014


@dataclass(frozen=True)
class Heard:
    """A prompt, and what a model makes of it.

    Attributes:
        token_ids: [length], with the picture's token at every placeholder.
        pixels: [pictures, 3, size, size] float32; None without a picture.
        logits: [length, vocabulary] float32, of every position.
    """

    conversation: Conversation
    token_ids: Tensor
    pixels: Tensor | None
    logits: Tensor


def prompts(picture: bytes, question: str) -> list[Conversation]:
    """A question about a picture, one more behind an answer, and one without a picture."""
    seen = Turn("user", (MediaRef("image", picture), question))
    return [
        Conversation((seen,)),
        Conversation((seen, Turn("assistant", ("Yes.",)), Turn("user", ("And what else?",)))),
        Conversation((Turn("user", (question,)),)),
    ]


@torch.no_grad()
def hear(loaded: Loaded, conversations: Sequence[Conversation], image_id: int) -> list[Heard]:
    """What an mmchat model makes of prompts. image_id: of the picture's token, which is put at the placeholders.

    Pictures are decoded and resized in full: the faster options (draft, fast_resize) are of this project alone.
    """
    template, heard = exact_template(loaded.template), []
    for conversation in conversations:
        sample = template.render(conversation, answer=True)
        batch = collate([sample], [load_media(sample, template)])
        logits = loaded.model.logits(batch.to(loaded.device))[0].float().cpu()
        token_ids = batch.token_ids[0].clone()
        media = batch.media.get("image")
        if media is not None:
            token_ids[media.index] = image_id
        heard.append(Heard(conversation, token_ids, media.data if media is not None else None, logits))
    return heard


def exact_template(template: ChatTemplate) -> ChatTemplate:
    """The template with a picture's faster, slightly other resizing off."""
    image = template.preprocesses["image"]
    assert isinstance(image, ImagePreprocess) and isinstance(image.config, ImageConfig)
    exact = ImagePreprocess(image.config.model_copy(update={"draft": False, "fast_resize": False}), image.spec)
    copied = template.without_dropout()
    copied.preprocesses = {**template.preprocesses, "image": exact}
    return copied


@torch.no_grad()
def differences(
    folder: str | Path, heard: Sequence[Heard], num_with_logits: int | None = None, with_ids: bool = True
) -> tuple[list[str], float]:
    """What differs between stored answers and those of a LLaVA folder; and the largest difference of a logit.

    The folder is loaded as any user of transformers does, in float32, from safetensors.

    Args:
        num_with_logits: of how many of the prompts logits are compared; of all, ids and pixels are.
        with_ids: whether the ids of the folder's own chat template are compared.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = load_llava(folder)
    model.to(device)
    processor = load_processor(folder)
    found, largest = [], 0.0
    for i, one in enumerate(heard):
        name = f"prompt {i + 1}"
        if with_ids and (difference := different_ids(one.token_ids, processor, one.conversation)) is not None:
            found.append(f"{name}: {difference}")
        if one.pixels is not None:
            pictures = [upright(item.read()) for item in one.conversation.media]
            theirs = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
            found += [f"{name}: {difference}" for difference in _different_pixels(one.pixels, theirs)]
        if num_with_logits is not None and i >= num_with_logits:
            continue
        arguments = {} if one.pixels is None else {"pixel_values": one.pixels.to(device)}
        theirs = model(input_ids=one.token_ids[None].to(device), **arguments).logits[0].float().cpu()
        shared = min(theirs.shape[-1], one.logits.shape[-1])
        change = float((theirs[:, :shared] - one.logits[:, :shared]).abs().max())
        largest = max(largest, change)
        limit = TOLERANCE * max(1.0, float(one.logits.abs().max()))
        if not change <= limit:  # also where it is no number
            found.append(f"{name}: logits differ by up to {change:.3g}; wanted {limit:.1g} at most")
    return found, largest


def load_llava(folder: str | Path) -> LlavaForConditionalGeneration:
    """In float32, from safetensors alone; no code of the folder runs. Raises ValueError for a file that is damaged."""
    try:
        return LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        ).eval()
    except SafetensorError as error:
        raise ValueError(f"{folder}: its weights cannot be read ({error})") from error


def load_processor(folder: str | Path) -> Any:
    """With pictures resized by PIL, as here; transformers' other way moves some values by a level of 255."""
    processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    return processor


def messages(conversation: Conversation) -> list[dict[str, Any]]:
    """A conversation as transformers' processors take it, with pictures as they are shown."""
    return [
        {
            "role": turn.role,
            "content": [
                {"type": "image", "image": upright(part.read())}
                if isinstance(part, MediaRef)
                else {"type": "text", "text": part}
                for part in turn.parts
            ],
        }
        for turn in conversation.turns
    ]


def different_ids(ours: Tensor, processor: Any, conversation: Conversation) -> str | None:
    """In words, where a prompt parts from what the processor's chat template makes of it; None where they are the same.

    ours: [length], with the picture's token at every placeholder.
    """
    try:
        inputs = processor.apply_chat_template(
            messages(conversation), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    except Exception as error:  # a template refuses a conversation by raising whatever its author chose
        return f"the chat template refuses it ({type(error).__name__}: {error})"
    theirs = inputs["input_ids"][0]
    length = min(len(ours), len(theirs))
    same = ours[:length] == theirs[:length]
    if bool(same.all()) and len(ours) == len(theirs):
        return None
    place = length if bool(same.all()) else int(same.int().argmin())
    around = [processor.tokenizer.convert_ids_to_tokens(ids[place : place + 4].tolist()) for ids in (ours, theirs)]
    return (
        f"token ids differ from position {place} of {len(ours)} and {len(theirs)}: mmchat says {around[0]}, the chat "
        f"template {around[1]}"
    )


def _different_pixels(ours: Tensor, theirs: Tensor) -> list[str]:
    if ours.shape != theirs.shape:
        return [f"pictures have the shape {tuple(theirs.shape)}; wanted {tuple(ours.shape)}"]
    change = float((ours - theirs).abs().max())
    return [f"pixels differ by up to {change:.3g} (normalised)"] if not change <= PIXEL_TOLERANCE else []


def drawn_picture(width: int = 400, height: int = 300) -> bytes:
    """A picture with edges, colours and a gradient, as PNG: what is compared where the user names none."""
    picture = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((20, 30, width // 2, height // 2), fill=(210, 40, 50))
    draw.ellipse((width // 2, height // 3, width - 15, height - 10), fill=(30, 120, 220), outline="white", width=5)
    draw.line((0, height, width, 0), fill=(250, 220, 60), width=7)
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()
