"""Linear layers laid out for a CPU: the same numbers as before, and left alone where they cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmchat.models.fusion import LowRankFusion
from mmchat.models.packed import PackedFusion, PackedLinear, can_pack, pack
from tests import models

FUSIONS = [{"kind": "flora", "rank": 4}, {"kind": "lora", "rank": 4}, {"kind": "late", "num_heads": 4}]


def _logits(model, template):
    with torch.no_grad():
        return [model.logits(batch) for batch in models.singles(template)]


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: f["kind"])
def test_the_same_logits(tiny_folder, fusion):
    model, template = models.build(models.config(fusion=fusion))
    models.wake(model)
    before = _logits(model, template)
    assert can_pack(model)
    pack(model)
    kinds = {type(module) for module in model.llm.modules()}
    assert PackedLinear in kinds and not kinds & {nn.Linear, LowRankFusion}
    assert (PackedFusion in kinds) == (fusion["kind"] != "late")
    for one, other in zip(before, _logits(model, template), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "gemma3"])
def test_other_llms(tiny_folder, tmp_path, kind):
    """Qwen 2 has biases, GPT-2 transposed weights, Gemma a head that is its embedding."""
    model, template = models.build(models.config(llm={"pretrained": models.llm_folder(tmp_path, kind)}))
    models.wake(model)
    before = _logits(model, template)
    pack(model)
    for one, other in zip(before, _logits(model, template), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_model_in_bfloat16_stays_as_it_is(tiny_folder):
    run = models.config()
    model = run.model.build(torch.bfloat16, 0)
    pack(model)
    assert not can_pack(model) and not any(isinstance(module, PackedLinear) for module in model.modules())
