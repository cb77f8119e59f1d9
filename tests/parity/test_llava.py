"""The same weights as transformers' LLaVA give the same logits."""

from __future__ import annotations

import random

import torch
from transformers import CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration

from mmchat.conversation import Conversation, MediaRef, Turn
from tests import models, tiny

IMAGE_TOKEN = tiny.VOCABULARY - 1


def test_logits_equal_llava(tiny_folder):
    fusion = {"kind": "early"}
    model, template = models.build(
        models.config(fusion=fusion, image={"encoder": {"kind": "transformers", "pretrained": ".cache/tiny/clip"},
                                            "connector": {"kind": "mlp"}})
    )  # fmt: skip
    clip = CLIPVisionModel.from_pretrained(".cache/tiny/clip")
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=clip.config, text_config=model.llm.config, image_token_index=IMAGE_TOKEN,
            projector_hidden_act="gelu", vision_feature_layer=-2, vision_feature_select_strategy="default",
        )
    ).eval()  # fmt: skip
    llava.model.vision_tower.load_state_dict(clip.state_dict())
    llava.model.language_model.load_state_dict(model.llm.model.state_dict())
    llava.lm_head.load_state_dict(model.llm.lm_head.state_dict())
    projection = model.connectors["image"].projection
    llava.model.multi_modal_projector.linear_1.load_state_dict(projection[0].state_dict())
    llava.model.multi_modal_projector.linear_2.load_state_dict(projection[2].state_dict())

    rng = random.Random(1)
    pictures = [MediaRef("image", tiny.picture(c, rng, (40, 56))) for c in ("red", "yellow")]
    conversation = Conversation(
        (Turn("user", (pictures[0], "One, ", pictures[1], "two?")), Turn("assistant", ("Yes.",)))
    )
    batch = models.pack(template, [conversation])
    media = batch.media["image"]
    ids = batch.token_ids.clone()
    ids[0, media.index] = IMAGE_TOKEN
    with torch.no_grad():
        ours = model.logits(batch)
        theirs = llava(input_ids=ids, pixel_values=media.data, attention_mask=torch.ones_like(ids)).logits
    assert len(media.shapes) == 2 and len(media.index) == 32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
