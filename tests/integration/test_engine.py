"""One optimizer step under every ZeRO level: what learns moves, W never does, and a spoiled step leaves no trace."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmchat.models.parts import names_in, parts_of
from mmchat.training.engine import Engine
from mmchat.training.trainable import select, table
from tests import models

pytestmark = pytest.mark.usefixtures("process_group")


def _engine(zero, fusion=None, train=None):
    run = models.config(**({"fusion": fusion} if fusion else {}))
    stage = run.stages[1].model_copy(update={"zero": zero} | ({"train": train} if train else {}))
    model, template = models.build(run)
    parts = select(model, stage, run.model.fusion.kind == "full")
    engine = Engine(model, parts, stage, num_micro_batches=2)
    engine.model.train()
    conversations = models.conversations()
    batches = [models.pack(template, conversations[:2]), models.pack(template, conversations[2:])]
    return engine, batches, parts


def _state(engine):
    return engine.weights(sorted(names_in(engine.model, set(parts_of(engine.model, False)), False)))


def _step(engine, batches, seed=1):
    return engine.train_step(batches, sum(b.num_learned for b in batches), 1.0, seed)


def _spoiled(batches):
    """The first picture is not a number."""
    media = dict(batches[0].media)
    media["image"] = replace(media["image"], data=media["image"].data * torch.nan)
    return [replace(batches[0], media=media), batches[1]]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_step_moves_what_learns_and_nothing_else(zero):
    engine, batches, parts = _engine(zero)
    before = _state(engine)
    engine.rehearse(batches)
    for name, value in _state(engine).items():
        assert torch.equal(value, before[name]), f"the rehearsal moved {name}"
    assert all(not moment.any() for moment in engine.moments().values())

    result = _step(engine, batches)
    assert not result.is_skipped and result.grad_norm > 0
    after, moments = _state(engine), engine.moments()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    learning = {name for part in parts if part.rate for name in part.parameters}
    # A starts to learn when B has left zero.
    assert moved == {name for name in learning if ".fusion_a_" not in name}
    assert {name.partition(".")[2] for name in moments} == learning

    result = _step(engine, _spoiled(batches))
    assert result.is_skipped
    for name, value in _state(engine).items():
        assert torch.equal(value, after[name]), f"a step that is not finite moved {name}"
    for name, value in engine.moments().items():
        assert torch.equal(value, moments[name]), name
    assert not _step(engine, batches).is_skipped
    assert {n for n, v in _state(engine).items() if not torch.equal(v, after[n])} == learning
    engine.close()


@pytest.mark.parametrize("zero", [0, 2, 3])
@pytest.mark.parametrize(
    "fusion",
    [{"kind": "lora", "rank": 4}, {"kind": "full"}, {"kind": "late", "num_heads": 4}],
    ids=lambda f: f["kind"],
)
def test_the_baselines_learn_behind_the_same_switch(fusion, zero):
    engine, batches, parts = _engine(zero, fusion)
    engine.rehearse(batches)
    losses = [_step(engine, batches, seed).loss_sum for seed in range(6)]
    assert losses[-1] < losses[0]
    shares = {part.name: part.num_parameters for part in parts if part.rate}
    assert shares["fusion.all" if fusion["kind"] == "lora" else "fusion"] > 0
    assert ("llm" in {part.name for part in parts}) == (fusion["kind"] != "full")
    engine.close()


def test_state_written_under_one_level_continues_under_another():
    """Whole weights and moments of ZeRO 3 set into ZeRO 0 give the same next step."""
    first, batches, _ = _engine(3)
    first.rehearse(batches)
    _step(first, batches)
    weights, moments = first.weights(list(first.trained)), first.moments()
    first.close()
    second, batches, _ = _engine(0)
    with torch.no_grad():
        for name, value in weights.items():
            second.trained[name].copy_(value)
    second.rehearse(batches)
    second.set_moments(moments, 1)
    third, batches, _ = _engine(1)
    third.rehearse(batches)
    third.set_masters(weights)
    third.set_moments(moments, 1)
    with torch.no_grad():
        for name, value in weights.items():
            third.trained[name].copy_(value)
    a, b = _step(second, batches), _step(third, batches)
    assert a.loss_sum == pytest.approx(b.loss_sum, rel=1e-6) and a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)
    for name, value in second.weights(list(second.trained)).items():
        torch.testing.assert_close(value, third.weights([name])[name], rtol=1e-5, atol=1e-6)
    second.close()
    third.close()


def test_one_micro_batch_of_all_equals_several(tiny_folder):
    from mmchat.data.pack import join

    engine, batches, _ = _engine(0)
    engine.rehearse(batches)
    split = _step(engine, batches)
    whole_engine, whole, parts = _engine(0)
    joined = [join(whole), replace(whole[1], labels=torch.full_like(whole[1].labels, -100))]
    whole_engine.rehearse(joined)
    together = _step(whole_engine, joined)
    assert split.loss_sum == pytest.approx(together.loss_sum, rel=1e-6)
    assert split.grad_norm == pytest.approx(together.grad_norm, rel=1e-5)
    assert "learn (" in table(parts)
    engine.close()
    whole_engine.close()
