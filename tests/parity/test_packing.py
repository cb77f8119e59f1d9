"""A packed row equals its conversations alone: logits, loss and gradients, for every backend, connector and LLM."""

from __future__ import annotations

import pytest
import torch

from mmchat.batch import IGNORE
from mmchat.data.pack import join
from mmchat.models.head import logits_of
from tests import models, tiny

BACKENDS = ["segments", "sdpa", "eager"]
CONNECTORS = [
    {"kind": "linear"},
    {"kind": "mlp", "norm_input": True, "norm_output": True},
    {"kind": "pool", "window": [1, 2, 2], "places": True, "norm_output": True},
    {"kind": "pool", "window": [1, 2, 2]},
    {"kind": "pool", "window": [1, 2, 2], "mode": "shuffle"},
    {"kind": "resampler", "num_queries": 4, "num_heads": 4},
    {"kind": "spatio_temporal"},
]
FUSIONS = [
    {"kind": "flora", "rank": 4},
    {"kind": "flora", "rank": 4, "scope": "own_tokens"},
    {"kind": "lora", "rank": 4},
    {"kind": "early"},
    {"kind": "late", "num_heads": 4},
]


def _assert_packed_equals_separate(run):
    model, template = models.build(run)
    models.wake(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.eval()
    pack, alone = models.pack(template), models.singles(template)
    hidden = model.hidden(pack)
    separate = torch.cat([model.hidden(batch) for batch in alone], dim=1)
    torch.testing.assert_close(logits_of(model.llm, hidden), logits_of(model.llm, separate), rtol=1e-5, atol=1e-5)

    loss = model(pack)
    loss.sum.backward()
    packed = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total, count = 0.0, 0
    for batch in alone:
        part = model(batch)
        part.sum.backward()
        total, count = total + part.sum.item(), count + int(part.count)
    assert count == int(loss.count) == int((pack.labels != IGNORE).sum()) > 20
    assert loss.sum.item() == pytest.approx(total, rel=1e-5)
    assert packed.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
    # Some gradients are zero but for rounding (key biases under softmax): the scale is that of the largest one.
    largest = max(float(gradient.abs().max()) for gradient in packed.values())
    for name, parameter in model.named_parameters():
        if name in packed:
            torch.testing.assert_close(
                packed[name] / largest,
                parameter.grad / largest,
                rtol=0,
                atol=1e-5,
                msg=lambda m, name=name: f"{name}: {m}",
            )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", list(tiny.LLMS))
def test_backends_and_llms(tiny_folder, tmp_path, backend, kind):
    llm = {"pretrained": models.llm_folder(tmp_path, kind), "attention": backend}
    _assert_packed_equals_separate(models.config(llm=llm))


@pytest.mark.parametrize("connector", CONNECTORS, ids=lambda c: "-".join(str(v) for v in c.values()))
def test_connectors(tiny_folder, connector):
    clip = {"kind": "transformers", "pretrained": ".cache/tiny/clip"}
    run = models.config(
        image={"encoder": clip, "connector": connector},
        video={
            "encoder": {"kind": "shared"},
            "sample": {"kind": "num_frames", "num_frames": 4},
            "connector": connector,
        },
    )
    _assert_packed_equals_separate(run)


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: "-".join(str(v) for v in f.values()))
def test_fusions(tiny_folder, fusion):
    _assert_packed_equals_separate(models.config(fusion=fusion))


def test_gradient_checkpointing_changes_nothing(tiny_folder):
    gradients = []
    for checkpointing in (False, True):
        llm = {"pretrained": ".cache/tiny/llm", "gradient_checkpointing": checkpointing}
        model, template = models.build(models.config(llm=llm))
        models.wake(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("fusion" in name or "connectors" in name)
        model.train()
        model(models.pack(template)).sum.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 10
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-6)


def test_joined_packs_equal_separate_ones(tiny_folder):
    model, template = models.build(models.config())
    models.wake(model)
    all_of_them = models.conversations()
    first, second = models.pack(template, all_of_them[:2]), models.pack(template, all_of_them[2:])
    joined = model(join([first, second]))
    apart = [model(first), model(second)]
    assert joined.sum.item() == pytest.approx(sum(x.sum.item() for x in apart), rel=1e-6)
    assert int(joined.count) == sum(int(x.count) for x in apart)


def test_the_head_in_chunks_equals_the_head_at_once(tiny_folder, monkeypatch):
    model, template = models.build(models.config())
    models.wake(model)
    pack = models.pack(template)
    values = []
    for chunk in (1024, 7):
        monkeypatch.setattr("mmchat.models.head.HEAD_CHUNK", chunk)
        model.zero_grad()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("fusion" in name)
        loss = model(pack)
        loss.sum.backward()
        values.append((loss.sum.item(), [p.grad.clone() for n, p in model.named_parameters() if p.grad is not None]))
    assert values[0][0] == pytest.approx(values[1][0], rel=1e-6)
    for a, b in zip(values[0][1], values[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
