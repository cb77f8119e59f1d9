"""What only a CUDA device can show; skipped as 'not run' without one."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from mmchat.models.head import logits_of
from tests import models, runs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", ["flex_attention", "flash_attention_2", "segments"])
def test_packed_equals_separate_on_a_gpu(tiny_folder, backend):
    if backend == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("not run: flash-attn is not installed")
    dtype = torch.bfloat16 if backend == "flash_attention_2" else torch.float32
    run = models.config(llm={"pretrained": ".cache/tiny/llm", "attention": backend})
    model = run.model.build(dtype, 0).cuda().eval()
    models.wake(model)
    from mmchat.data.build import build_template

    template = build_template(run)
    device = torch.device("cuda")
    with torch.no_grad():
        packed = logits_of(model.llm, model.hidden(models.pack(template).to(device)))
        alone = [logits_of(model.llm, model.hidden(b.to(device))) for b in models.singles(template)]
    limit = 5e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=limit, atol=limit)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_bfloat16_training_learns_and_resumes(tiny_folder, tmp_path, zero):
    overrides = ("log.every=1", "stages.align.dtype=bfloat16", f"stages.align.zero={zero}", "--stage", "align")
    runs.train(tmp_path, *overrides)
    losses = [line["loss"] for line in runs.log(tmp_path, "align")]
    assert losses[-1] < losses[0]
    assert runs.train(tmp_path, *overrides).stdout.count("done already") == 1
