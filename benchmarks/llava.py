"""The same LLaVA twice, as MMChat and as transformers' LlavaForConditionalGeneration, and the same data for both."""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mmchat  # noqa: F401  (repairs torchvision before transformers looks for it)

# isort: split
import numpy as np
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from mmchat.batch import IGNORE, Batch
from mmchat.conversation import MODALITIES, MediaRef
from mmchat.data.chat_template import PlannedMedia, Sample
from mmchat.data.pack import collate
from mmchat.modalities import MediaPlan
from mmchat.models.build import ModelConfig
from mmchat.models.mmchat import MMChat

BATCH_SIZE = 8
PICTURE_START = 4  # tokens that stand before the picture
MAX_TEXT = 597  # with a picture's 144 tokens, the longest sample has 741
TOLERANCE = 1e-5  # of the largest gradient, and of the loss


def picture_side(config: LlavaConfig) -> int:
    """Patches along one side of a picture."""
    return config.vision_config.image_size // config.vision_config.patch_size


# ---- the same model twice -------------------------------------------------------------------------------------------


def tiny_llava() -> LlavaConfig:
    """SigLIP, 4 layers of width 192, 144 patches; Qwen2.5-0.5B's proportions at width 256, 4 layers, 32,000 words."""
    vision = SiglipVisionConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=3, image_size=96, patch_size=8,
        vision_use_head=False,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=32000, hidden_size=256, intermediate_size=1392, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=1, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=31999, projector_hidden_act="gelu",
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip


def large_llava() -> LlavaConfig:
    """CLIP-L/14 at 336 pixels, cut behind the last layer but one, and Qwen2.5-1.5B."""
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
    )  # fmt: skip
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=151935, projector_hidden_act="gelu")


def build_llava(config: LlavaConfig, dtype: torch.dtype, device: str) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    with torch.device(device):
        llava = LlavaForConditionalGeneration(config).to(dtype)
    llava.model.vision_tower.requires_grad_(False)
    llava.config.use_cache = False
    return llava


def build_mmchat(llava: LlavaForConditionalGeneration, dtype: torch.dtype, checkpointing: bool = False) -> MMChat:
    """MMChat with the weights of `llava`, by way of folders that its configuration names."""
    with torch.device(llava.device):
        llm = AutoModelForCausalLM.from_config(llava.config.text_config, dtype=dtype)
    llm.model.load_state_dict(llava.model.language_model.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        llm.save_pretrained(f"{folder}/llm")
        llava.model.vision_tower.save_pretrained(f"{folder}/vision")
        encoder = {"kind": "transformers", "pretrained": f"{folder}/vision", "layer": llava.config.vision_feature_layer}
        config = ModelConfig.model_validate(
            {
                "llm": {"pretrained": f"{folder}/llm", "gradient_checkpointing": checkpointing},
                "modalities": {"image": {"encoder": encoder, "connector": {"kind": "mlp"}}},
                "fusion": {"kind": "full"},
            }
        )
        model = config.build(dtype, seed=0)
    projection, projector = model.connectors["image"].projection, llava.model.multi_modal_projector
    projection[0].load_state_dict(projector.linear_1.state_dict())
    projection[2].load_state_dict(projector.linear_2.state_dict())
    return model.train()


# ---- the same data twice --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A conversation: ids with placeholders, which of them are learned, and its picture or None."""

    ids: list[int]
    learned: list[bool]
    picture: Tensor | None

    @property
    def labels(self) -> list[int]:
        """In transformers' way: the label stands on the learned token itself."""
        return [token if learned else IGNORE for token, learned in zip(self.ids, self.learned, strict=True)]


def make_examples(count: int, config: LlavaConfig, seed: int) -> list[Example]:
    """Four in five have a picture; log-normal text whose end, about 44 %, is the answer that is learned."""
    rng, size, num_placeholders = random.Random(seed), config.vision_config.image_size, picture_side(config) ** 2
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(count):
        length = min(MAX_TEXT, max(24, round(rng.lognormvariate(4.79, 0.65))))
        answer = max(1, round(length * rng.uniform(0.25, 0.63)))
        ids = [rng.randrange(10, config.image_token_index - 1) for _ in range(length)]
        learned = [False] * (length - answer) + [True] * answer
        picture = None
        if rng.random() < 0.8:
            picture = torch.randn(3, size, size, generator=generator)
            ids[PICTURE_START:PICTURE_START] = [config.image_token_index] * num_placeholders
            learned[PICTURE_START:PICTURE_START] = [False] * num_placeholders
        examples.append(Example(ids, learned, picture))
    return examples


def batched(examples: list[Example]) -> list[list[Example]]:
    return [examples[start : start + BATCH_SIZE] for start in range(0, len(examples), BATCH_SIZE)]


def facts_of(examples: list[Example]) -> dict[str, float]:
    """Lengths, the learned share, and what padding to the longest of a batch adds."""
    lengths = [len(e.ids) for e in examples]
    padded = sum(len(chosen) * max(len(e.ids) for e in chosen) for chosen in batched(examples))
    return {
        "samples": len(examples), "mean_tokens": statistics.mean(lengths), "max_tokens": max(lengths),
        "learned_share": sum(sum(e.learned) for e in examples) / sum(lengths),
        "padded_over_real": padded / sum(lengths),
    }  # fmt: skip


def pack(examples: Iterable[Example], side: int) -> Batch:
    """One row of conversations; a picture has side * side placeholders."""
    samples, pictures = [], []
    for example in examples:
        media: tuple[PlannedMedia, ...] = ()
        if example.picture is not None:
            plan = MediaPlan((1, side, side), side * side)
            media = (PlannedMedia("image", MediaRef("image", None), plan, PICTURE_START, side * side),)
        gates = np.zeros((len(example.ids), len(MODALITIES)), np.float32)
        samples.append(Sample("", example.ids, [*example.labels[1:], IGNORE], gates, media))
        pictures.append([example.picture[None]] if example.picture is not None else [])
    return collate(samples, pictures)


def pad(examples: list[Example]) -> dict[str, Tensor]:
    """The peers' batch: rows of equal length, padded on the right."""
    longest = max(len(example.ids) for example in examples)

    def padded(values: Iterable[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in values])

    batch = {
        "input_ids": padded((e.ids for e in examples), 0),
        "attention_mask": padded(([1] * len(e.ids) for e in examples), 0),
        "labels": padded((e.labels for e in examples), IGNORE),
    }
    pictures = [e.picture for e in examples if e.picture is not None]
    return batch | ({"pixel_values": torch.stack(pictures)} if pictures else {})


def processor(config: LlavaConfig) -> LlavaProcessor:
    """TRL asks for one; nothing is ever processed by it."""
    words = {"<pad>": 0, "</s>": 1, "<image>": config.image_token_index}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<pad>")), pad_token="<pad>", eos_token="</s>",
        chat_template="{{ messages }}",
    )  # fmt: skip
    return LlavaProcessor(SiglipImageProcessor(), tokenizer, patch_size=config.vision_config.patch_size)


# ---- the check ------------------------------------------------------------------------------------------------------


def compare(model: MMChat, llava: LlavaForConditionalGeneration, examples: list[Example]) -> dict[str, float]:
    """Largest differences in loss and gradients over batches of the examples; raises AssertionError beyond TOLERANCE.

    gradient: relative to the largest gradient of all. parameter_gradient: to the largest of the same parameter.
    """
    projection = {"linear_1": "projection.0", "linear_2": "projection.2"}
    worst = {"loss": 0.0, "gradient": 0.0, "parameter_gradient": 0.0}
    for chosen in batched(examples):
        padded = pad(chosen)
        learned = int((padded["labels"] != IGNORE).sum())
        theirs = llava(**padded, num_items_in_batch=torch.tensor(learned)).loss
        theirs.backward()
        ours = model(pack(chosen, picture_side(llava.config)))
        assert ours.count == learned
        (ours.sum / learned).backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        wanted = {}
        for name, parameter in llava.named_parameters():
            name = name.replace("model.language_model", "llm.model").removeprefix("model.")
            for old, new in projection.items():
                name = name.replace(f"multi_modal_projector.{old}", f"connectors.image.{new}")
            if parameter.grad is not None:
                wanted[name] = parameter.grad
        assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
        largest = max(float(g.abs().max()) for g in wanted.values())
        worst["loss"] = max(worst["loss"], abs(ours.sum.item() / learned / theirs.item() - 1))
        for name, gradient in wanted.items():
            difference = float((found[name] - gradient).abs().max())
            worst["gradient"] = max(worst["gradient"], difference / largest)
            own = difference / max(float(gradient.abs().max()), 1e-30)
            worst["parameter_gradient"] = max(worst["parameter_gradient"], own)
        model.zero_grad()
        llava.zero_grad()
    assert worst["loss"] < TOLERANCE and worst["gradient"] < TOLERANCE, worst
    return worst
