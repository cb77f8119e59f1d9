"""Stored features: the tokens, values and losses of the encoder itself; what is not one array of floats is refused."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from data_prep import cache_features
from mmchat.config import RunConfig
from mmchat.conversation import MediaHeader, MediaRef, Record
from mmchat.data.lanes import SampleId
from mmchat.data.mixture import Mixture, SourceConfig
from mmchat.data.pack import collate, load_media
from mmchat.data.shards import Shard
from mmchat.errors import SampleError
from mmchat.modalities import MediaPlan
from mmchat.modalities.audio import AudioConfig
from mmchat.modalities.feature_files import StoredFeatures, describe, read_features, write_features
from mmchat.models.build import ModelConfig
from mmchat.models.skeleton import skeleton
from tests import evaluations, models, tiny

ALL = ("image", "video", "audio")


def stored(config: RunConfig, *modalities: str) -> RunConfig:
    values = config.model.model_dump(mode="json")
    for modality in modalities:
        values["modalities"][modality]["stored_features"] = True
    return config.model_copy(update={"model": ModelConfig.model_validate(values)})


@pytest.fixture(scope="module")
def real(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return evaluations.shards(tmp_path_factory.mktemp("real") / "shards", tiny.records(10))


@pytest.fixture(scope="module")
def cached(real: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """All three modalities, one after the other."""
    shards = real
    for modality in ALL:
        out = tmp_path_factory.mktemp(modality)
        command = [shards, "--out", str(out), "--config", "configs/tiny.yaml", "--modality", modality]
        assert cache_features.main(command) == 0
        shards = str(out)
    return shards


def batch_of(template, shards: str):
    mixture = Mixture([SourceConfig(name="x", task="instruct", shards=shards)])
    records = [mixture.record(SampleId("x", 0, i)) for i in range(10)]
    samples = [template.render(mixture.tasks["x"].conversation(record, None), record.key) for record in records]
    return collate(samples, [load_media(sample, template) for sample in samples])


def test_tokens_features_and_loss_are_those_of_the_encoders(real, cached):
    live, template = models.build(models.config())
    reads, stored_template = models.build(stored(models.config(), *ALL))
    models.wake(live), models.wake(reads)
    wanted, found = batch_of(template, real), batch_of(stored_template, cached)
    assert torch.equal(found.token_ids, wanted.token_ids) and torch.equal(found.presence, wanted.presence)
    with torch.no_grad():
        for modality in ALL:
            item = wanted.media[modality]
            encoder = live.encoders[live.shared.get(modality, modality)]
            features = encoder(item.data, item.shapes)
            assert found.media[modality].shapes == item.shapes
            torch.testing.assert_close(found.media[modality].data, features, atol=1e-5, rtol=0)
        expected, got = live(wanted), reads(found)
    assert got.count == expected.count and abs(float(got.sum - expected.sum)) < 1e-4 * float(expected.sum)
    assert not list(reads.encoders.parameters())


def test_a_half_precision_cache_is_half_as_large_and_near(real, cached, tmp_path):
    config = stored(models.config(), "audio")
    maker = cache_features.feature_maker(config, "audio", "float16")
    assert cache_features.cache_features(maker, real, tmp_path) == 10
    (half,) = Shard(tmp_path / "000000.tar").record(1).media  # a tone
    (whole,) = Shard(Path(cached) / "000000.tar").record(1).media
    assert half.header == whole.header and half.header.duration_s in (0.3, 1.1)
    values, made_by = read_features(half.read())
    assert values.dtype == torch.float16 and made_by == maker.made_by
    torch.testing.assert_close(values.float(), read_features(whole.read())[0], atol=2e-3, rtol=2e-3)


def test_a_stopped_run_continues_and_another_encoder_is_refused(real, tmp_path):
    maker = cache_features.feature_maker(models.config(), "audio")
    cache_features.cache_features(maker, real, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "000000.tar").unlink()
    cache_features.cache_features(maker, real, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    maker.made_by = "another"
    with pytest.raises(ValueError, match="other made_by"):
        cache_features.cache_features(maker, real, tmp_path)


def test_what_cannot_be_encoded_stays_and_is_refused_when_met(tmp_path):
    """So that it counts in an evaluation as it would without a cache."""
    record = Record("bad", {"text": "x"}, (MediaRef("audio", b"RIFF....WAVEnothing", MediaHeader(duration_s=1.0)),))
    shards = evaluations.shards(tmp_path / "real", [record], header_of=None)
    out = tmp_path / "out"
    assert cache_features.main([shards, "--out", str(out), "--config", "configs/tiny.yaml", "--modality", "audio"]) == 1
    kept = Shard(out / "000000.tar").record(0)
    template = models.build(stored(models.config(), "audio"))[1]
    reader = template.preprocesses["audio"]
    with pytest.raises(SampleError, match="unreadable features"):
        reader(kept.media[0].read(), reader.plan(kept.media[0].header))


def test_the_plan_shows_a_model_without_the_encoder(tiny_folder):
    found = skeleton(stored(models.config(), *ALL).model, torch.float32)
    assert not list(found.encoders.parameters()) and set(found.encoders) == set(ALL)


def test_a_shared_encoder_that_is_not_loaded_is_refused():
    with pytest.raises(ValueError, match="video shares the encoder of image"):
        stored(models.config(), "image")


def npy(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, values, allow_pickle=True)
    return out.getvalue()


def reader() -> StoredFeatures:
    return StoredFeatures(None, 4, "whisper tiny 0")  # its plan is given


PLAN = MediaPlan((3, 1, 1), 3)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["float16", "float32", ">f4", "float64"])
def test_npy_of_other_programs_is_read(order, dtype):
    values = np.asarray(np.arange(12).reshape(3, 4) / 8, dtype=dtype, order=order)
    assert torch.equal(reader()(npy(values), PLAN), torch.arange(12).reshape(3, 4) / 8)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy(np.array([{"a": 1}], dtype=object)), "unreadable features"),
        (pickle.dumps([1.0]), "unreadable features"),
        (npy(np.zeros((3, 4), np.int64)), "unreadable features"),
        (npy(np.zeros((3, 4), np.float32))[:-1], "unreadable features"),
        (npy(np.zeros((9, 4), np.float32))[:128] , "unreadable features"),
        (b"", "unreadable features"),
        (save({"a": torch.zeros(3, 4), "b": torch.zeros(1)}), "unreadable features"),
        (save({"a": torch.zeros(3, 4, dtype=torch.int8)}), "unreadable features"),
        (write_features(torch.zeros(3, 4), (3, 1, 1), "whisper base 1"), "features of another encoder"),
        (npy(np.zeros((4, 3), np.float32)), "features of another size"),
        (npy(np.zeros((2, 4), np.float32)), "features of another size"),
        (npy(np.full((3, 4), np.nan, np.float32)), "features not finite"),
    ],
)  # fmt: skip
def test_anything_else_is_refused(data, reason):
    with pytest.raises(SampleError) as error:
        reader()(data, PLAN)
    assert error.value.reason == reason


def test_a_header_that_claims_more_than_there_is_sets_nothing_aside():
    small = npy(np.zeros((3, 4), np.float32))
    data = small.replace(b"(3, 4), }" + b" " * 9, b"(999999999999, 4)}")
    assert len(data) == len(small) and data != small
    with pytest.raises(SampleError, match=r"an array of \(999999999999, 4\) in 48 bytes"):
        reader()(data, PLAN)


def test_what_made_features_is_the_encoder_and_what_changes_its_values(tiny_folder):
    config = AudioConfig.model_validate({"encoder": {"kind": "whisper", "pretrained": ".cache/tiny/whisper"}})
    moved = config.model_copy(update={"encoder": config.encoder.model_copy(update={"pretrained": "/x/whisper"})})
    other = config.model_copy(update={"encoder": config.encoder.model_copy(update={"pretrained": "/x/base"})})
    assert describe(config) == describe(moved) != describe(other)
    assert describe(config.model_copy(update={"max_duration_s": 9.0})) == describe(config)
    first, less = (config.model_copy(update={"too_long": "first", "max_duration_s": s}) for s in (30.0, 9.0))
    assert describe(first) != describe(less)  # here the limit says what is heard
