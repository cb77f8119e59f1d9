"""Shards behind URLs: the same batches as from the disk, in few requests, and errors that say what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mmchat import storage
from mmchat.config import SourceConfig, load_config
from mmchat.data.build import build_template
from mmchat.data.loader import Loader, Step
from mmchat.data.mixture import Mixture
from mmchat.data.shards import Shard, expand_shards
from mmchat.errors import SampleError
from mmchat.storage import CacheConfig
from tests import runs
from tests.range_server import RangeServer, serving

NAMES = [f"{number:06d}.tar" for number in range(3)]


@pytest.fixture
def server(tiny_folder: Path, tmp_path: Path) -> Iterator[RangeServer]:
    shutil.copytree(tiny_folder / "shards", tmp_path / "www")
    with serving(tmp_path / "www") as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> CacheConfig:
    return CacheConfig(folder=str(tmp_path / "cache"), block_mb=0.02)


def source(shards: str) -> dict[str, str]:
    return {"name": "tiny", "task": "instruct", "shards": shards}


def overrides(shards: str, cache: CacheConfig) -> list[str]:
    data = json.dumps([source(shards)])
    return [f"stages.align.data={data}", f"cache={json.dumps(cache.model_dump())}"]


def steps(shards: str, cache: CacheConfig, workers: int) -> list[Step]:
    config = load_config("configs/tiny.yaml", [*overrides(shards, cache), f"stages.align.workers={workers}"])
    stage = config.stages[0]
    loader = Loader(stage, config.seed, build_template(config), mixture=Mixture(stage.data, config.cache))
    return [loader.next_step() for _ in range(4)]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_equal_local_ones(tiny_folder: Path, server: RangeServer, cache: CacheConfig, workers: int) -> None:
    local = steps(str(tiny_folder / "shards"), cache, 0)
    remote = steps(server.url + "/{000000..000002}.tar", cache, workers)
    for a, b in zip(local, remote, strict=True):
        assert a.numbers == b.numbers and a.states == b.states and not b.bad
        for x, y in zip(a.batches, b.batches, strict=True):
            assert torch.equal(x.token_ids, y.token_ids) and x.media.keys() == y.media.keys()
            assert all(torch.equal(x.media[m].data, y.media[m].data) for m in x.media)
    for name in NAMES:  # every block once, for all workers
        assert len(server.gets(f"/{name}")) == len(set(server.gets(f"/{name}")))
        assert len(server.gets(f"/{name}")) <= -(-(tiny_folder / "shards" / name).stat().st_size // cache.block_bytes)
        assert len(server.gets(f"/{name}.index.jsonl")) == 1


def test_a_training_run_equals_a_local_one(
    tiny_folder: Path, server: RangeServer, cache: CacheConfig, tmp_path: Path
) -> None:
    found = []
    for name, shards in (("local", str(tiny_folder / "shards")), ("remote", server.url)):
        arguments = [*overrides(shards, cache), "stages.align.steps=2", "--stage", "align"]
        runs.train(tmp_path / name, *arguments)
        found.append([(step["loss"], step["samples_hash"]) for step in runs.log(tmp_path / name, "align")])
    assert found[0] == found[1] and len(found[0]) == 2
    assert any(server.gets(f"/{name}") for name in NAMES)


def test_reading_a_shard_in_order_takes_a_request_a_block(
    tiny_folder: Path, server: RangeServer, cache: CacheConfig
) -> None:
    shard, local = Shard(f"{server.url}/{NAMES[0]}", cache), Shard(tiny_folder / "shards" / NAMES[0])
    for i in range(shard.num_samples):
        record, expected = shard.record(i), local.record(i)
        assert (record.key, record.facts) == (expected.key, expected.facts)
        assert [item.read() for item in record.media] == [item.read() for item in expected.media]
    blocks = -(-shard.num_bytes // cache.block_bytes)
    assert blocks > 3 and len(server.gets(f"/{NAMES[0]}")) in (
        blocks - 1,
        blocks,
    )  # the last may be the tar's end alone


def test_ranges_folders_and_globs_of_urls(server: RangeServer) -> None:
    urls = [f"{server.url}/{name}" for name in NAMES]
    assert expand_shards(server.url + "/{000000..000002}.tar") == urls
    assert expand_shards(server.url) == expand_shards(server.url + "/") == expand_shards(server.url + "/*.tar") == urls
    assert expand_shards([urls[2], f"{server.url}/*0.tar"]) == [urls[2], urls[0]]
    with pytest.raises(ValueError, match="more than once"):
        expand_shards([server.url, urls[1]])
    with pytest.raises(ValueError, match=r"no such shards:\n.*/none-\*\.tar"):
        expand_shards(f"{server.url}/none-*.tar")
    with pytest.raises(ValueError, match=r"no such shards:\n.*without .tar files"):
        expand_shards(f"{server.url}/none")


def test_what_is_wrong_is_told_as_for_local_shards(server: RangeServer, cache: CacheConfig, tmp_path: Path) -> None:
    url = f"{server.url}/{NAMES[0]}"
    (tmp_path / "www" / f"{NAMES[1]}.index.jsonl").unlink()
    with open(tmp_path / "www" / NAMES[2], "ab") as file:
        file.write(bytes(512))
    with pytest.raises(ValueError) as caught:
        Mixture([SourceConfig.model_validate(source(server.url + "/{000000..000003}.tar"))], cache)
    text = str(caught.value)
    assert "3 shards cannot be used" in text
    assert f"shard {server.url}/{NAMES[1]} has no index {NAMES[1]}.index.jsonl" in text and "local copy" in text
    assert f"shard {server.url}/{NAMES[2]} has " in text and "when it was indexed" in text
    assert f"shard {server.url}/000003.tar does not exist" in text
    shutil.copy(tmp_path / "www" / NAMES[0], tmp_path / "www" / "bad.tar")
    (tmp_path / "www" / "bad.tar.index.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"does not start with an index header.*local copy"):
        Shard(f"{server.url}/bad.tar", cache)
    assert Shard(url, cache).record(0).key == "000000"


def test_an_outage_is_a_bad_sample_with_the_address(
    server: RangeServer, cache: CacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "RETRY_DELAYS_S", (0.01,))
    shard = Shard(f"{server.url}/{NAMES[0]}", cache)
    server.fail[f"/{NAMES[0]}"] = [503, 503]
    with pytest.raises(SampleError, match=rf"unreadable shard: {shard.path}: 000000: .*after 2 attempts.*503"):
        shard.record(0)
    assert shard.record(0).key == "000000"
