"""A modality that a run adds may begin as one that the checkpoint has: video as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data_prep.make_shards import media_header
from mmchat.checkpoint import Checkpoint, find, open_checkpoint
from mmchat.config import ConfigError, RunConfig, parse_config
from mmchat.data.shard_writer import write_shards
from mmchat.inference.load import load
from mmchat.models.fusion import FLoRAConfig
from mmchat.training.stage import StopRequest, train_stage
from mmchat.training.start_as import with_copies
from tests import tiny


def _config(data: Path, folder: Path, modalities: list[str], train: list[str], **more: Any) -> RunConfig:
    values = yaml.safe_load((tiny.ROOT / "configs/tiny.yaml").read_text())
    entries = values["model"]["modalities"]
    entries["video"]["connector"] = entries["image"]["connector"]
    values["model"]["modalities"] = {modality: entries[modality] for modality in modalities}
    values["stages"] = [values["stages"][0] | {
        "name": "only", "train": dict.fromkeys(train, 1e-2), "steps": 2, "save_every": 2,
        "data": [{"name": "x", "task": "instruct", "shards": str(data / modalities[-1])}],
    }]  # fmt: skip
    values["model"]["fusion"]["ranks"] = more.pop("ranks", {})
    return parse_config(values | {"run": modalities[-1], "checkpoints": str(folder)} | more, "test")


def _train(config: RunConfig) -> Checkpoint:
    assert train_stage(config, config.stages[0], None, StopRequest()) == "done"
    return open_checkpoint(find(config.folder))


@pytest.mark.usefixtures("process_group")
def test_video_begins_as_pictures(tiny_folder: Path, tmp_path: Path) -> None:
    for name, kind in (("image", 0), ("video", 2)):
        chosen = [record for record in tiny.records(40) if int(record.key) % 5 in (kind, 4)]
        write_shards(chosen, tmp_path / name, header_of=media_header)
    pictures = _train(_config(tmp_path, tmp_path / "one", ["image"], ["connectors", "fusion"]))
    start = {"start": str(pictures.folder), "start_as": {"video": "image"}}
    config_of = (["image", "video"], ["connectors.video"])
    config = _config(tmp_path, tmp_path / "two", *config_of, **start)
    grown = _train(config)
    assert grown.manifest["parts"] == ["connectors.image", "connectors.video", "fusion.image", "fusion.video"]
    weights = grown.weights()
    pairs = [name for name in weights if name.endswith("_video")]
    assert pairs and all(torch.equal(weights[name], weights[name[:-5] + "image"]) for name in pairs)  # not trained
    mapped = {name: name.replace("image", "video", 1) for name in weights if name.startswith("connectors.image.")}
    assert mapped and all(weights[new].shape == weights[old].shape for old, new in mapped.items())
    # Two steps at 0.01 move a weight by little: it has begun where the other one is.
    assert all(0 < (weights[new] - weights[old]).abs().max() < 0.05 for old, new in mapped.items())
    for name, weight in pictures.weights().items():
        assert torch.equal(weights[name], weight), name
    load(grown.folder)
    # Pairs of another rank are those of the new modality alone.
    smaller = _train(_config(tmp_path, tmp_path / "less", *config_of, ranks={"video": 2}, **start))
    assert {w.shape[0] for name, w in smaller.weights().items() if name.endswith("fusion_a_video")} == {2}
    assert {w.shape[0] for name, w in smaller.weights().items() if name.endswith("fusion_a_image")} == {4}
    load(smaller.folder)


def test_names() -> None:
    names = ("connectors.image.projection.0.weight", "llm.layers.3.mlp.up_proj.fusion_a_image", "encoders.image.w", "x")
    weights = {name: torch.full((1,), float(i)) for i, name in enumerate(names)}
    found = with_copies(weights, {"video": "image"}, FLoRAConfig())
    assert found.keys() - weights.keys() == {name.replace("image", "video") for name in names[:2]}
    assert found["llm.layers.3.mlp.up_proj.fusion_a_video"] == 1


def test_pairs_of_a_lower_rank_begin_as_the_best_approximation() -> None:
    torch.manual_seed(0)
    strong = torch.randn(20, 2) @ torch.randn(2, 30)  # a product of rank 2, and a little of two more
    b, a = torch.randn(20, 4) * 0.01, torch.randn(4, 30) * 0.01
    u, s, v = torch.linalg.svd(strong, full_matrices=False)
    b[:, :2], a[:2] = u[:, :2] * s[:2], v[:2]
    weights = {"x.fusion_a_image": a, "x.fusion_b_image": b}
    found = with_copies(weights, {"video": "image"}, FLoRAConfig(rank=4, ranks={"video": 2}))
    near_a, near_b = found["x.fusion_a_video"], found["x.fusion_b_video"]
    assert near_a.shape == (2, 30) and near_b.shape == (20, 2)
    u, s, v = torch.linalg.svd(b @ a, full_matrices=False)
    torch.testing.assert_close(near_b @ near_a, (u[:, :2] * s[:2]) @ v[:2], rtol=1e-4, atol=1e-4)
    assert found["x.fusion_a_image"] is a


def test_channels_that_say_nothing_can_learn_after_a_reduction() -> None:
    """As in a new pair: A is something, B zero. Also where a layer is narrower than the rank."""
    torch.manual_seed(0)
    weights = {"x.fusion_a_image": torch.randn(16, 30), "x.fusion_b_image": torch.zeros(4, 16)}
    found = with_copies(weights, {"video": "image"}, FLoRAConfig(rank=16, ranks={"video": 8}))
    assert found["x.fusion_a_video"].shape == (8, 30) and found["x.fusion_a_video"].abs().sum(1).min() > 0
    assert found["x.fusion_b_video"].shape == (4, 8) and not found["x.fusion_b_video"].any()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"start_as": {"video": "image"}}, "needs `start`"),
        ({"start": "x", "start_as": {"audio": "image"}}, "wanted two of the modalities image, video"),
        ({"start": "x", "start_as": {"image": "image"}}, "wanted two of the modalities"),
        (
            {"start": "x", "start_as": {"video": "image"}, "ranks": {"video": 5}},
            "pairs of rank 5 cannot begin as those of rank 4",
        ),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _config(tmp_path, tmp_path, ["image", "video"], ["connectors"], **more)


def test_connectors_must_be_the_same(tmp_path: Path) -> None:
    values = yaml.safe_load((tiny.ROOT / "configs/tiny.yaml").read_text())
    with pytest.raises(ConfigError, match="their connectors differ"):
        parse_config(values | {"start": "x", "start_as": {"video": "image"}}, "test")


def test_a_clip_may_look_across_frames_where_a_picture_has_one(tmp_path: Path) -> None:
    values = yaml.safe_load((tiny.ROOT / "configs/tiny.yaml").read_text())
    of_picture = {"kind": "attentive", "hidden_dim": 16, "num_heads": 2}
    values["model"]["modalities"]["image"]["connector"] = of_picture
    values["model"]["modalities"]["video"]["connector"] = of_picture | {"across_frames": True}
    parse_config(values | {"start": "x", "start_as": {"video": "image"}}, "test")
