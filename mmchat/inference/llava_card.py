"""The model card of an exported LLaVA: README.md with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mmchat.config import RunConfig, parse_config
from mmchat.conversation import Modality
from mmchat.inference.hub import is_hub_name
from mmchat.inference.hub_card import Base, base_of, evaluation, read_metrics
from mmchat.inference.load import Loaded

USE = """\
```python
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}", backend="pil")
talk = [{{"role": "user", "content": [
    {{"type": "image", "image": Image.open("photo.jpg")}},
    {{"type": "text", "text": "What is this?"}},
]}}]
inputs = processor.apply_chat_template(
    talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
```
"""


def llava_card(
    loaded: Loaded, name: str, assumed: Modality | None, licence: str | None, evaluations: Sequence[Path]
) -> str:
    """The text of README.md.

    Args:
        name: of the folder.
        assumed: the modality whose FLoRA pairs were merged.
        licence: of the trained weights, by its SPDX name.
        evaluations: metrics.json files of infer.py evaluate.
    Raises:
        ValueError: one of `evaluations` is something else.
    """
    config = loaded.config
    if loaded.checkpoint is not None:  # with the paths that were written down, not those of this machine
        config = parse_config(yaml.safe_load(loaded.checkpoint.config_text), str(loaded.checkpoint.folder))
    bases = _bases(config, loaded.config)
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    front |= {"license": licence.lower()} if licence else {"license": "other", "license_name": "not-stated"}
    if on_hub := [base.name for base in bases if base.is_on_hub]:
        front["base_model"] = on_hub
    front["tags"] = ["llava", "mmchat"]
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {name}\n",
        "".join(f"* {fact}\n" for fact in _facts(config, assumed)),
        f"## Use\n\n{USE.format(name=name)}",
        f"## Licences\n\nThe trained weights: {licence or 'not stated; whoever publishes them fills this in'}.\n",
        "| base model | what | licence |\n|---|---|---|\n"
        + "".join(f"| {b.part} | {b.origin or b.name} | {b.licence or 'not stated'} |\n" for b in bases),
        evaluation(loaded, read_metrics(evaluations)),
        f"## Training\n\n```yaml\n{yaml.safe_dump(config.model_dump(mode='json'), sort_keys=False, width=110)}```\n",
    ]
    return "\n".join(sections)


def _facts(config: RunConfig, assumed: Modality | None) -> list[str]:
    image, regions = config.model.modalities.image, config.chat.regions
    assert image is not None
    facts = [
        "A LLaVA of transformers, exported from mmchat. Ids, pixels and logits were compared with the trained model's.",
        f"Places in text: dialect {regions.dialect}, frame {regions.frame}. transformers does not read them.",
        f"Pictures are resized by `{image.resize}`. mmchat also turns them as their EXIF says, and puts transparent "
        "ones on white: do the same before you call the processor.",
    ]
    if assumed is not None:
        facts.append(
            f"What was learned for {assumed} acts on every prompt, also on text alone, where the trained model answers "
            "as its base LLM does."
        )
    return facts


def _bases(stored: RunConfig, found: RunConfig) -> list[Base]:
    """The LLM and the encoder: as they were named, and as they lie on this machine."""
    bases = []
    for part, name, place in (
        ("llm", stored.model.llm.pretrained, found.model.llm.pretrained),
        *(
            (modality, entry.encoder.model_dump().get("pretrained"), other.encoder.model_dump().get("pretrained"))
            for (modality, entry), other in zip(
                stored.model.modalities.entries().items(), found.model.modalities.entries().values(), strict=True
            )
        ),
    ):
        source = Path(str(place)) if Path(str(place)).is_dir() else None
        bases.append(base_of(part, str(name), source, "", source is None and is_hub_name(str(name))))
    return bases
