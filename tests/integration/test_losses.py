"""A stage that minimises something else than the loss of the answers: boxes read from media tokens, without the LLM."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from data_prep.make_shards import media_header
from mmchat.checkpoint import Checkpoint, checkpoints_in, open_checkpoint
from mmchat.config import RunConfig, StageConfig, parse_config
from mmchat.conversation import Conversation, MediaRef, Record, Region, Turn
from mmchat.data.build import build_template
from mmchat.data.pack import collate, join, load_media
from mmchat.data.shard_writer import write_shards
from mmchat.inference.load import load
from mmchat.models.skeleton import skeleton
from mmchat.training.flops import FlopCounter
from mmchat.training.losses import Objective, kept_connectors
from mmchat.training.memory import MicroBatch, activations
from mmchat.training.stage import StopRequest, train_stage
from mmchat.training.trainable import select
from tests import tiny

pytestmark = pytest.mark.usefixtures("process_group")


def _record(i: int) -> Record:
    """A red square somewhere on a grey picture, and the question where it is."""
    rng = random.Random(i)
    x, y, side = rng.randrange(16), rng.randrange(16), rng.randrange(12, 17)
    picture = Image.new("RGB", (32, 32), (90, 90, 90))
    picture.paste((220, 20, 20), (x, y, x + side, y + side))
    file = io.BytesIO()
    picture.save(file, "PNG")
    box = {"region": {"media": 0, "box": [x, y, x + side, y + side]}}
    turns = [
        {"role": "user", "parts": [{"media": 0}, {"text": "Where?"}]},
        {"role": "assistant", "parts": [box]},
    ]
    return Record(f"{i:04}", {"turns": turns}, (MediaRef("image", file.getvalue()),))


@pytest.fixture(scope="module")
def shards(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("squares")
    write_shards([_record(i) for i in range(64)], folder, header_of=media_header)
    return folder


def _config(
    shards: Path,
    folder: Path,
    losses: dict[str, float],
    steps: int = 6,
    train: dict[str, float] | None = None,
    read_boxes: bool = True,
) -> RunConfig:
    values = yaml.safe_load((tiny.ROOT / "configs/tiny.yaml").read_text())
    image = values["model"]["modalities"]["image"] | {"read_boxes": read_boxes, "connector": {"kind": "attentive"}}
    values["model"] |= {"modalities": {"image": image}, "fusion": {"kind": "flora", "rank": 2}}
    data = [{"name": "squares", "task": "instruct", "shards": str(shards)}]
    common = {"data": data, "batch": {"lanes": 2, "tokens": 512}, "workers": 0}
    say = common | {"name": "say", "train": {"connectors": 1e-2, "fusion": 1e-2}, "steps": 2}
    places = common | {
        "name": "places",
        "train": train or {"connectors": 1e-2, "readouts": 1e-2},
        "losses": losses,
        "steps": steps,
        "save_every": steps // 2,
        "schedule": {"min_ratio": 1.0},
    }
    values["stages"] = [say, places, say | {"name": "last"}]
    return parse_config(values | {"run": "squares", "checkpoints": str(folder)}, "test")


def _train(config: RunConfig, stage: StageConfig) -> Checkpoint:
    index = config.stages.index(stage)
    previous = config.folder / config.stages[index - 1].name if index else None
    assert train_stage(config, stage, previous, StopRequest()) == "done"
    return open_checkpoint(checkpoints_in(config.folder / stage.name)[-1])


def _log(config: RunConfig) -> list[dict[str, Any]]:
    """The steps of the stage `places`."""
    lines = (config.folder / "places" / "log.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def test_a_connector_learns_places_without_the_llm_and_continues_bitwise(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(shards, tmp_path / "whole", {"answers": 0, "regions": 1, "keep": 0.01}, steps=40)
    said = _train(config, config.stages[0])
    # The LLM's pass would be a fault: it is asked for the probe of a checkpoint alone.
    monkeypatch.setattr("mmchat.training.losses.head_loss", _refuse)
    placed = _train(config, config.stages[1])
    losses = [line["loss"] for line in _log(config)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses
    assert placed.manifest["parts"] == ["connectors.image", "fusion.image", "readouts.image"]
    before, after = said.weights(), placed.weights()
    pairs = [name for name in before if "fusion_" in name]
    assert pairs and all(torch.equal(before[name], after[name]) for name in pairs)
    load(placed.folder)

    # Continued from its middle, the kept tokens are those of the beginning again.
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    broken = _config(shards, tmp_path / "broken", {"answers": 0, "regions": 1, "keep": 0.01}, steps=40)
    shutil.rmtree(checkpoints_in(broken.folder / "places")[-1])
    again = _train(broken, broken.stages[1])
    assert all(torch.equal(again.weights()[name], weight) for name, weight in after.items())


def test_boxes_reach_the_connector_in_shares_of_its_input(shards: Path, tmp_path: Path) -> None:
    """Of question and answer alike, each with its picture; the short side is padded."""
    template = build_template(_config(shards, tmp_path, {"regions": 1}))
    file = io.BytesIO()
    Image.new("RGB", (40, 20)).save(file, "PNG")
    first, second = (MediaRef("image", file.getvalue()) for _ in range(2))
    conversation = Conversation((
        Turn("user", (first, second, "Which is like ", Region(1, box=(0, 0, 10, 20)), "?")),
        Turn("assistant", ("Like ", Region(1, box=(0, 0, 10, 20)), "?"), learn=False),
        Turn("user", ("Yes.",)),
        Turn("assistant", (Region(0, box=(20, 0, 40, 10)), "."), learn=True),
    ))  # fmt: skip
    sample = template.render(conversation)
    assert [item.boxes for item in sample.media] == [((0.5, 0.25, 1.0, 0.5),), ((0.0, 0.25, 0.25, 0.75),)]
    batch = collate([sample, sample], [load_media(sample, template)] * 2)
    assert join([batch, batch]).num_boxes == 8


def test_the_plan_counts_no_llm_where_it_does_not_run(shards: Path, tmp_path: Path) -> None:
    flops = []
    for answers in (1, 0):
        config = _config(shards, tmp_path, {"answers": answers, "regions": 1})
        model = skeleton(config.model, torch.float32)
        select(model, config.stages[1], is_full=False)
        kept = activations(model, config.stages[1], [MicroBatch(64, {"image": ([(1, 4, 4)], 16)})], False)
        assert bool(kept["llm_activations"]) == bool(answers) == bool(kept["logits"])
        flops.append(FlopCounter(model, bool(answers)).count_sizes([64], 8, {"image": (16, 16)}))
    assert 0 < flops[1] < flops[0]


def test_what_is_kept_changes_less(shards: Path, tmp_path: Path) -> None:
    moved = []
    for keep in (0.0, 10.0):
        config = _config(shards, tmp_path / str(keep), {"answers": 0, "regions": 1, "keep": keep})
        before = _train(config, config.stages[0]).weights()
        after = _train(config, config.stages[1]).weights()
        name = "connectors.image.projection.leave.weight"
        moved.append(float((after[name] - before[name]).norm()))
    assert 0 < moved[1] < moved[0]


def test_losses_add_up_beside_the_answers(shards: Path, tmp_path: Path) -> None:
    """A step's loss with boxes is that without them and the boxes' own, in the first step that all begin alike."""
    firsts = {}
    for name, losses in {"both": (1, 1), "answers": (1, 0), "twice": (1, 2)}.items():
        train = {"connectors": 1e-2} | ({"readouts": 1e-2} if losses[1] else {})
        config = _config(shards, tmp_path / name, {"answers": losses[0], "regions": losses[1]}, 2, train)
        _train(config, config.stages[0])
        _train(config, config.stages[1])
        firsts[name] = _log(config)[0]["loss"]
    of_boxes = firsts["both"] - firsts["answers"]
    assert of_boxes > 0.01
    assert firsts["twice"] - firsts["answers"] == pytest.approx(2 * of_boxes, rel=1e-4)


def test_nothing_to_keep_is_refused(shards: Path, tmp_path: Path) -> None:
    config = _config(shards, tmp_path, {"answers": 0, "regions": 1, "keep": 1})
    with pytest.raises(ValueError, match=r"connectors\.image begins anew"):
        train_stage(config, config.stages[1], None, StopRequest())


def test_a_stand_in_is_not_kept(shards: Path, tmp_path: Path) -> None:
    config = _config(shards, tmp_path, {"answers": 0, "regions": 1, "keep": 1})
    model = config.model.build(torch.float32, 0).train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    objective = Objective(config.stages[1].losses, kept_connectors(model, weights))
    with torch.no_grad():
        for parameter in model.connectors.parameters():
            parameter += 0.1
    template = build_template(config)
    text = template.render(Conversation((Turn("user", ("Hi.",)), Turn("assistant", ("Hi.",), learn=True))))
    loss = objective(model, collate([text], [[]]))
    loss.sum.backward()
    gradients = [p.grad.abs().max() for p in (*model.connectors.parameters(), *model.readouts.parameters())]
    assert float(loss.sum.detach()) == 0 and loss.count == 0 and not any(gradients)


@pytest.mark.parametrize(
    ("train", "losses", "message"),
    [
        ({"connectors": 1e-3, "fusion": 1e-3}, {"answers": 0, "regions": 1}, r"so that fusion\.image cannot learn"),
        ({"connectors": 1e-3, "readouts": 1e-3}, {"answers": 1}, r"readouts\.image learns from `regions` alone"),
        ({"fusion": 1e-3}, {"keep": 1}, "`keep` holds connectors that learn, and none does"),
    ],
)
def test_parts_that_could_not_learn_are_refused(
    shards: Path, tmp_path: Path, train: dict[str, float], losses: dict[str, float], message: str
) -> None:
    config = _config(shards, tmp_path, losses, train=train)
    with pytest.raises(ValueError, match=message):
        train_stage(config, config.stages[1], None, StopRequest())


def test_the_layer_that_reads_boxes_may_come_later_and_not_go(shards: Path, tmp_path: Path) -> None:
    without = _config(shards, tmp_path, {}, train={"fusion": 1e-3}, read_boxes=False)
    config = _config(shards, tmp_path, {"regions": 1})
    _train(without, without.stages[0])
    _train(config, config.stages[1])
    with pytest.raises(ValueError, match=r"read_boxes: was True, is False"):
        train_stage(without, without.stages[2], config.folder / "places", StopRequest())


def _refuse(*_: Any) -> None:
    raise AssertionError("the LLM was run")
