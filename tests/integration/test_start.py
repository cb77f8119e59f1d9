"""A run that begins with another run's checkpoint: what it takes over, what stays as it was, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data_prep.make_shards import media_header
from mmchat.checkpoint import Checkpoint, CheckpointError, find, open_checkpoint
from mmchat.config import RunConfig, parse_config
from mmchat.data.shard_writer import write_shards
from mmchat.inference.load import load
from mmchat.training.plan import print_plan
from mmchat.training.stage import StopRequest, train_stage
from mmchat.training.start import check_parts, open_start
from tests import models, tiny

pytestmark = pytest.mark.usefixtures("process_group")
GROWING = ["connectors.audio", "fusion.audio"]


@pytest.fixture(scope="module")
def data(tiny_folder, tmp_path_factory) -> Path:
    """Shards of pictures and text, and the same with sounds."""
    folder = tmp_path_factory.mktemp("data")
    for name, kinds in (("image", (0, 3, 4)), ("audio", (0, 1, 3, 4))):
        chosen = [record for record in tiny.records(40) if int(record.key) % 5 in kinds]
        write_shards(chosen, folder / name, header_of=media_header)
    return folder


def _config(data: Path, folder: Path, last: str, train: list[str], **more: Any) -> RunConfig:
    """configs/tiny.yaml with the modalities up to `last`, and one short stage that trains these parts."""
    values = yaml.safe_load((tiny.ROOT / "configs/tiny.yaml").read_text())
    kept = ("image", "audio")[: 1 + (last == "audio")]
    values["model"]["modalities"] = {m: values["model"]["modalities"][m] for m in kept}
    values["stages"] = [values["stages"][0] | {
        "name": "only", "train": dict.fromkeys(train, 1e-2), "steps": 4, "save_every": 2,
        "data": [{"name": "x", "task": "instruct", "shards": str(data / last)}],
    }]  # fmt: skip
    for path, value in more.items():
        *parents, key = path.split("__")
        here = values
        for parent in parents:
            here = here[int(parent) if parent.isdigit() else parent]
        here[key] = value
    return parse_config(values | {"run": last, "checkpoints": str(folder)}, "test")


def _train(config: RunConfig, is_stopped: bool = False) -> Checkpoint:
    stop = StopRequest()
    stop.is_set = is_stopped  # requested before the first step: the run ends after it
    assert train_stage(config, config.stages[0], None, stop) == ("stopped" if is_stopped else "done")
    return open_checkpoint(find(config.folder))


def _losses(checkpoint: Checkpoint) -> list[float]:
    lines = map(json.loads, (checkpoint.folder.parent / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "event" not in line]


@pytest.fixture(scope="module")
def pictures(data, tmp_path_factory) -> Checkpoint:
    """Another run, of pictures alone."""
    return _train(_config(data, tmp_path_factory.mktemp("pictures"), "image", ["connectors", "fusion"]))


@pytest.fixture(scope="module")
def grown(data, pictures, tmp_path_factory) -> Checkpoint:
    """An unbroken run that began with it and taught it to hear."""
    folder = tmp_path_factory.mktemp("grown")
    return _train(_config(data, folder, "audio", GROWING, start=str(pictures.folder.parents[1])))


def test_a_modality_is_added_and_the_others_answer_bitwise_as_before(pictures, grown):
    before, after = load(pictures.folder, "float32"), load(grown.folder, "float32")
    for conversation in (models.conversations()[0], models.conversations()[4]):  # a picture; text alone
        batches = [models.pack(loaded.template, [conversation]) for loaded in (before, after)]
        with torch.no_grad():
            assert torch.equal(before.model.logits(batches[0]), after.model.logits(batches[1]))
    kept, weights = pictures.weights(), grown.weights()
    for name, weight in kept.items():
        assert torch.equal(weights[name], weight), name
    untrained = dict(models.build(after.config)[0].named_parameters())
    new = weights.keys() - kept.keys()
    assert new and all("audio" in name and not torch.equal(weights[name], untrained[name]) for name in new)
    assert grown.manifest["parts"] == ["connectors.audio", "connectors.image", "fusion.audio", "fusion.image"]
    assert grown.manifest["start"]["manifest_sha256"] == pictures.manifest["sha256"]
    assert grown.manifest["start"]["folder"] == str(pictures.folder) and grown.manifest["start"]["step"] == 4


def test_a_resume_needs_the_other_run_no_more(data, pictures, grown, tmp_path):
    shutil.copytree(pictures.folder, tmp_path / "other")
    config = _config(data, tmp_path / "broken", "audio", GROWING, start=str(tmp_path / "other"))
    assert _train(config, is_stopped=True).step == 1
    with pytest.raises(CheckpointError, match=r"start: was .*other', is None"):
        _train(config.model_copy(update={"start": None}))
    shutil.rmtree(tmp_path / "other")
    found = _train(config)
    assert found.manifest["start"]["manifest_sha256"] == pictures.manifest["sha256"]
    for name, weight in grown.weights().items():
        assert torch.equal(found.weights()[name], weight), name


def test_frozen_pairs_stay_and_learning_ones_learn_where_every_weight_is_partitioned(data, pictures, grown, tmp_path):
    """ZeRO 3 leaves weights as small as these whole, unless it is told not to."""
    sharp = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    config = _config(
        data, tmp_path, "audio", GROWING, start=str(pictures.folder), stages__0__zero=3, stages__0__deepspeed=sharp
    )
    found = _train(config)
    weights = found.weights()
    assert weights.keys() == grown.weights().keys()
    for name, weight in pictures.weights().items():
        assert torch.equal(weights[name], weight), name
    assert _losses(found) == pytest.approx(_losses(grown), abs=1e-4)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model__fusion__rank": 2}, r"model\.fusion\.rank: was 4, is 2"),
        ({"model__fusion": {"kind": "lora"}}, r"model\.fusion\.kind: was 'flora', is 'lora'"),
        ({"model__modalities__image__connector__kind": "linear"}, r"image\.connector\.kind: was 'mlp', is 'linear'"),
        ({"model__modalities__image__resize": "squash"}, r"image\.resize: was 'pad', is 'squash'"),
        ({"model__modalities": {}}, r"modalities\.image: the checkpoint has it, this configuration has not; add it"),
        ({"start": "no/such/run"}, "start: no/such/run holds no checkpoint"),
    ],
    ids=["rank", "fusion", "connector", "resize", "modality", "folder"],
)
def test_weights_that_would_mean_something_else_are_refused(data, pictures, tmp_path, changed, said):
    with pytest.raises(CheckpointError, match=said):
        open_start(_config(data, tmp_path, "audio", GROWING, **{"start": str(pictures.folder), **changed}))


@pytest.mark.parametrize(("new", "old"), [("audio", "video"), ("image", "video")])
def test_nothing_begins_as_what_is_not_there_nor_in_place_of_what_is(data, pictures, tmp_path, new, old):
    entry = yaml.safe_load((tiny.ROOT / "configs/tiny.yaml").read_text())["model"]["modalities"]
    entry["video"]["connector"] = entry["audio"]["connector"] = entry["image"]["connector"]
    more = {"model__modalities": entry, "start": str(pictures.folder), "start_as": {new: old}}
    with pytest.raises(CheckpointError, match=f"start_as {new}: {old}: wanted .* has connectors.image, fusion.image"):
        open_start(_config(data, tmp_path, "image", ["connectors"], **more))


def test_another_base_model_is_refused_by_its_files_or_by_what_it_answers(data, pictures, tmp_path):
    def config(name: str, **llm: Any) -> RunConfig:
        folder = str(tiny.build_llm(tmp_path / name, **llm))
        start = {"start": str(pictures.folder), "model__llm__pretrained": folder}
        return _config(data, tmp_path, "audio", GROWING, **start)

    with pytest.raises(CheckpointError, match=r"base model of llm: was \.cache/tiny/llm .*, is .*/qwen"):
        open_start(config("qwen", kind="qwen2"))
    with pytest.raises(CheckpointError, match="does not answer the stored probe"):
        _train(config("seed", seed=1))


def test_parts_that_only_the_checkpoint_has_are_refused(data, pictures, tmp_path):
    model, _ = models.build(_config(data, tmp_path, "audio", GROWING))
    assert check_parts(model, pictures, is_full=False) == GROWING
    older = replace(pictures, manifest={**pictures.manifest, "parts": ["connectors.image", "fusion"]})
    with pytest.raises(CheckpointError, match=r"holds fusion, which .* its parts are .*fusion\.audio, fusion\.image"):
        check_parts(model, older, is_full=False)


def test_what_may_differ_is_said_and_the_plan_says_what_it_starts_from(data, pictures, tmp_path, capsys):
    more = {"start": str(pictures.folder), "chat": {"region_dialect": "percent"}, "stages__0__workers": 0}
    config = _config(data, tmp_path, "audio", GROWING, model__fusion__adapter_dropout={}, **more)
    _, changed = open_start(config)
    assert changed == ["chat.region_dialect: was 'shikra', is 'percent'"]
    print_plan(config, config.stages, seconds=60, ranks=1, json_file=None)
    said = capsys.readouterr().out
    assert f"starts from {pictures.folder} (run image, stage only, step 4)" in said and changed[0] in said
