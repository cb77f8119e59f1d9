"""Storage: blocks of remote files in a folder that never grows past its bound, whatever else happens to it."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pickle
import random
import shutil
import threading
import zlib
from collections.abc import Iterator
from multiprocessing import Queue
from pathlib import Path

import fsspec
import pytest

from mmchat import storage
from mmchat.conversation import StoredBytes
from mmchat.storage import CacheConfig, File, find
from tests.range_server import RangeServer, serving

BLOCK = 10_000
DATA = random.Random(0).randbytes(25 * BLOCK + 77)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "a.bin").write_bytes(DATA)
    with serving(tmp_path / "www") as server:
        yield server


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RETRY_DELAYS_S", (0.01, 0.02))


def cache(tmp_path: Path, num_blocks: float = 1000) -> CacheConfig:
    return CacheConfig(folder=str(tmp_path / "cache"), max_gb=num_blocks * BLOCK / 1e9, block_mb=BLOCK / 1e6)


def held(tmp_path: Path) -> int:
    """Bytes of all blocks in the folder, whole or not."""
    found = 0
    for path in (tmp_path / "cache").iterdir():
        if path.suffix in (".block", ".partial"):
            try:
                found += path.stat().st_size
            except FileNotFoundError:  # removed meanwhile
                continue
    return found


def test_reading_is_by_block(tmp_path: Path, server: RangeServer) -> None:
    file = File.open(f"{server.url}/a.bin", cache(tmp_path))
    assert file.num_bytes == len(DATA)
    for offset in range(0, len(DATA), 300):  # samples of 300 bytes
        assert file.read(offset, min(300, len(DATA) - offset)) == DATA[offset : offset + 300]
    assert server.gets("/a.bin") == [f"bytes={i * BLOCK}-{min(len(DATA), (i + 1) * BLOCK) - 1}" for i in range(26)]
    assert file.read(5, 3 * BLOCK) == DATA[5 : 5 + 3 * BLOCK]
    assert file.read(0, len(DATA)) == DATA and file.read(len(DATA), 0) == b""
    again = pickle.loads(pickle.dumps(File.open(f"{server.url}/a.bin", cache(tmp_path))))
    assert again.read(77, 1000) == DATA[77:1077]
    assert len(server.gets("/a.bin")) == 26 and held(tmp_path) == len(DATA)
    with pytest.raises(OSError, match="wanted 2 bytes at"):
        file.read(len(DATA) - 1, 2)


@pytest.mark.parametrize("num_blocks", [1, 2.5, 7])
def test_the_folder_never_grows_past_its_bound(
    tmp_path: Path, server: RangeServer, num_blocks: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = int(num_blocks * BLOCK)
    most = 0

    def replace(source: Path, target: Path) -> None:
        nonlocal most
        os.rename(source, target)
        most = max(most, held(tmp_path))

    monkeypatch.setattr("mmchat.storage.os.replace", replace)
    file = File.open(f"{server.url}/a.bin", cache(tmp_path, num_blocks))
    rng = random.Random(1)
    for _ in range(200):
        offset = rng.randrange(len(DATA) - 500)
        assert file.read(offset, 500) == DATA[offset : offset + 500]
    assert bound / 2 < most <= bound
    assert int((tmp_path / "cache" / "total").read_text()) >= held(tmp_path)


def test_the_least_recently_read_block_goes_first(tmp_path: Path, server: RangeServer) -> None:
    file = File.open(f"{server.url}/a.bin", cache(tmp_path, 10))
    for number in [*range(10), *range(5)]:
        file.read(number * BLOCK, 1)
    file.read(20 * BLOCK, 1)  # clears to nine tenths, with room for itself
    before = len(server.gets("/a.bin"))
    for number in (0, 1, 2, 3, 4, 7, 8, 9, 20):
        file.read(number * BLOCK, 1)
    assert len(server.gets("/a.bin")) == before
    file.read(5 * BLOCK, 1)
    assert len(server.gets("/a.bin")) == before + 1


def test_a_smaller_bound_clears_what_an_earlier_run_left(tmp_path: Path, server: RangeServer) -> None:
    File.open(f"{server.url}/a.bin", cache(tmp_path)).read(0, len(DATA))
    file = File.open(f"{server.url}/a.bin", cache(tmp_path, 3))
    shutil.copy(next((tmp_path / "cache").glob("*.block")), tmp_path / "cache" / "left.partial")  # by a killed process
    (tmp_path / "www" / "a.bin").touch()  # another version: nothing of it is there
    file = File.open(f"{server.url}/a.bin", cache(tmp_path, 3))
    assert file.read(0, 10) == DATA[:10] and held(tmp_path) <= 3 * BLOCK


def test_damaged_and_deleted_blocks_are_fetched_again(tmp_path: Path, server: RangeServer) -> None:
    file = File.open(f"{server.url}/a.bin", cache(tmp_path))
    file.read(0, 2 * BLOCK)
    for block in (tmp_path / "cache").glob("*.block"):
        block.write_bytes(block.read_bytes()[:-1])
    assert file.read(0, 2 * BLOCK) == DATA[: 2 * BLOCK]
    shutil.rmtree(tmp_path / "cache")
    assert file.read(0, 2 * BLOCK) == DATA[: 2 * BLOCK]
    assert len(server.gets("/a.bin")) == 6 and held(tmp_path) == 2 * BLOCK


def test_a_folder_that_is_deleted_all_the_time(tmp_path: Path, server: RangeServer) -> None:
    file = File.open(f"{server.url}/a.bin", cache(tmp_path, 5))
    done = threading.Event()

    def delete() -> None:
        while not done.is_set():
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)

    thread = threading.Thread(target=delete)
    thread.start()
    try:
        for offset in range(0, len(DATA) - 3000, 3000):
            assert file.read(offset, 3000) == DATA[offset : offset + 3000]
    finally:
        done.set()
        thread.join()


def test_a_changed_object_is_not_mixed_with_the_old_one(tmp_path: Path, server: RangeServer) -> None:
    old = File.open(f"{server.url}/a.bin", cache(tmp_path))
    old.read(0, BLOCK)
    changed = bytes(reversed(DATA))
    (tmp_path / "www" / "a.bin").write_bytes(changed)
    new = File.open(f"{server.url}/a.bin", cache(tmp_path))
    assert new.version != old.version and new.num_bytes == old.num_bytes
    assert new.read(0, len(DATA)) == changed
    assert old.read(0, BLOCK) == DATA[:BLOCK]
    larger = dataclasses.replace(new, cache=CacheConfig(folder=str(tmp_path / "cache"), block_mb=0.02))
    assert larger.read(3, 15_000) == changed[3:15_003]


def test_an_object_that_changes_while_it_is_read_is_refused(tmp_path: Path, server: RangeServer) -> None:
    """Even where its size stays; nothing of the new one is kept under the old one's name."""
    file = File.open(f"{server.url}/a.bin", cache(tmp_path))
    assert file.read(0, 10) == DATA[:10]
    (tmp_path / "www" / "a.bin").write_bytes(bytes(reversed(DATA)))
    asked = len(server.requests)
    for _ in range(2):
        with pytest.raises(OSError, match=r"a\.bin: the object changed while it was read; start again"):
            file.read(BLOCK, 10)
    assert len(server.requests) == asked + 4, "it is not tried again"
    assert file.read(0, 10) == DATA[:10] and held(tmp_path) == BLOCK


def test_blocks_of_objects_without_a_version_serve_one_opening(
    tmp_path: Path, server: RangeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.has_versions = False
    first = File.open(f"{server.url}/a.bin", cache(tmp_path))
    assert first.read(0, 10) == pickle.loads(pickle.dumps(first)).read(0, 10) == DATA[:10]
    assert len(server.gets("/a.bin")) == 1, "what a worker reads is shared"
    (tmp_path / "www" / "a.bin").write_bytes(bytes(reversed(DATA)))
    assert File.open(f"{server.url}/a.bin", cache(tmp_path)).read(0, 10) == DATA[:-11:-1]
    assert capsys.readouterr().err.count("neither ETag nor time") == 1


def _read_at_random(file: File, seed: int, failures: Queue[str], most: Queue[int]) -> None:
    rng, largest = random.Random(seed), 0
    assert file.cache is not None
    folder = Path(file.cache.folder)
    try:
        for _ in range(300):
            offset = rng.randrange(len(DATA) - 700)
            if file.read(offset, 700) != DATA[offset : offset + 700]:
                failures.put(f"other bytes at {offset}")
            largest = max(largest, held(folder.parent))
    except Exception as error:
        failures.put(repr(error))
    most.put(largest)


@pytest.mark.parametrize(("start", "num_blocks"), [("fork", 4), ("spawn", 1000)])
def test_processes_share_the_folder(tmp_path: Path, server: RangeServer, start: str, num_blocks: int) -> None:
    """Under pressure, each is evicted under the others' hands; with room, each block is fetched once for all."""
    file = File.open(f"{server.url}/a.bin", cache(tmp_path, num_blocks))
    file.read(len(DATA) - 1, 1)  # a forked process must not talk through its parent's connection
    context = multiprocessing.get_context(start)
    failures, most = context.Queue(), context.Queue()
    processes = [context.Process(target=_read_at_random, args=(file, seed, failures, most)) for seed in range(3)]
    for process in processes:
        process.start()
    largest = max(most.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(30)
    assert failures.empty(), failures.get()
    assert 0 < largest <= num_blocks * BLOCK
    if num_blocks == 1000:
        assert len(server.gets("/a.bin")) == 26


def test_failures_that_pass_are_bridged(
    tmp_path: Path, server: RangeServer, hasty: None, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fail["/a.bin"] = [503, 503, 503, 503]  # the first question is asked as HEAD and as GET
    file = File.open(f"{server.url}/a.bin", cache(tmp_path))
    server.fail["/a.bin"] = [500, 429]
    capsys.readouterr()
    assert file.read(0, 10) == DATA[:10]
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"{server.url}/a.bin at byte 0: ") and "500" in first and first.endswith("again in 0.01 s")
    assert "429" in second and second.endswith("again in 0.02 s")
    server.fail["/a.bin"] = [0, 0]
    assert file.read(BLOCK, 10) == DATA[BLOCK : BLOCK + 10]


def test_failures_that_stay_say_what_to_do(tmp_path: Path, server: RangeServer, hasty: None) -> None:
    file = File.open(f"{server.url}/a.bin", cache(tmp_path))
    server.fail["/a.bin"] = [503] * 20
    with pytest.raises(OSError, match=rf"{server.url}/a.bin at byte 10000 .* after 3 attempts: .*503.*network"):
        file.read(BLOCK + 5, 10)
    server.fail["/a.bin"] = [403] * 20
    with pytest.raises(OSError, match="credentials"):
        file.read(BLOCK + 5, 10)
    assert len(server.fail["/a.bin"]) == 19  # not asked again
    with pytest.raises(OSError, match="credentials"):
        File.open(f"{server.url}/a.bin", cache(tmp_path))
    server.fail.clear()
    asked = len(server.requests)
    with pytest.raises(FileNotFoundError, match=r"none.bin does not exist"):
        File.open(f"{server.url}/none.bin", cache(tmp_path))
    assert len(server.requests) <= asked + 2
    (tmp_path / "www" / "a.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"a.bin at byte 10000 does not exist"):
        file.read(BLOCK + 5, 10)
    with pytest.raises(OSError, match="after 3 attempts") as caught:
        File.open("http://127.0.0.1:9/a.bin", cache(tmp_path))  # nobody listens there
    assert not isinstance(caught.value, FileNotFoundError)


def test_a_server_without_ranges_is_refused(tmp_path: Path, server: RangeServer, hasty: None) -> None:
    file = File.open(f"{server.url}/a.bin", cache(tmp_path))
    server.has_ranges = False
    with pytest.raises(OSError, match="does not serve byte ranges"):
        file.read(0, 10)
    assert not list((tmp_path / "cache").glob("*.block"))


def test_a_server_without_ranges_is_refused_before_it_sends_the_object(tmp_path: Path, server: RangeServer) -> None:
    with open(tmp_path / "www" / "large.bin", "wb") as large:
        large.truncate(200_000_000)
    server.has_ranges = False
    with pytest.raises(OSError, match=r"large.bin: its server does not serve byte ranges.*copy them") as caught:
        File.open(f"{server.url}/large.bin", cache(tmp_path))
    assert "credentials" not in str(caught.value) and server.num_sent < 50_000_000


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/nope", "/dev/null"])
def test_an_unusable_cache_folder_is_named(tmp_path: Path, server: RangeServer, folder: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"cache\.folder .* cannot be used: .*that you may write") as caught:
        File.open(f"{server.url}/a.bin", CacheConfig(folder=str(tmp_path / folder)))
    assert not isinstance(caught.value, FileNotFoundError) and str(tmp_path / folder) in str(caught.value)
    file = File.open(f"{server.url}/a.bin", cache(tmp_path))
    file = dataclasses.replace(file, cache=CacheConfig(folder=str(tmp_path / folder)))  # it broke later
    with pytest.raises(OSError, match=r"cache\.folder .* cannot be used"):
        file.read(0, 10)


def test_blocks_that_another_user_wrote_are_read(
    tmp_path: Path, server: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = File.open(f"{server.url}/a.bin", cache(tmp_path))
    file.read(0, 10)

    def refuse(descriptor: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("mmchat.storage.os.utime", refuse)
    assert file.read(5, 10) == DATA[5:15] and len(server.gets("/a.bin")) == 1


def test_a_full_disk_is_named(tmp_path: Path, server: RangeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    file = File.open(f"{server.url}/a.bin", cache(tmp_path))

    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left.*cache\.max_gb"):
        file.read(0, 10)


def test_other_stores_and_globs(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in ("b", "a", "c/d"):
        memory.pipe_file(f"/mmchat-test/{name}.tar", DATA)
    try:
        assert find("memory://mmchat-test/*.tar") == ["memory:///mmchat-test/a.tar", "memory:///mmchat-test/b.tar"]
        file = File.open("memory://mmchat-test/c/d.tar", cache(tmp_path))
        assert file.read(BLOCK - 5, 10) == DATA[BLOCK - 5 : BLOCK + 5]
        with pytest.raises(FileNotFoundError):
            File.open("memory://mmchat-test/c", cache(tmp_path))
    finally:
        memory.rm("/mmchat-test", recursive=True)
    for unusable in ("nosuchkind://x/a.tar", "simplecache::http://x/a.tar", "filecache::s3://x/a.tar"):
        with pytest.raises(ValueError, match=r"nosuchkind|chained"):
            File.open(unusable, cache(tmp_path))


def test_local_files_are_read_in_place(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(DATA)
    file = File.open(str(path), cache(tmp_path))
    assert file.read(3, 5000) == DATA[3:5003] and file.cache is None and not (tmp_path / "cache").exists()
    with pytest.raises(OSError, match=f"wanted 9 bytes at {len(DATA) - 4}, found 4"):
        file.read(len(DATA) - 4, 9)
    path.unlink()
    path.write_bytes(bytes(100))
    assert File.open(str(path), cache(tmp_path)).read(0, 5) == bytes(5)
    with pytest.raises(FileNotFoundError):
        File.open(str(tmp_path), cache(tmp_path))


def test_members_of_a_zip_are_inflated_within_their_size(tmp_path: Path) -> None:
    text = b"seen and heard, " * 1000
    packer = zlib.compressobj(wbits=-15)
    packed = packer.compress(text) + packer.flush()
    path = tmp_path / "a.zip"
    path.write_bytes(b"head" + packed + b"tail")
    stored = StoredBytes(str(path), 4, len(text), deflated_size=len(packed))
    assert stored.read() == text == pickle.loads(pickle.dumps(stored)).read()
    for size, found in ((len(text) - 1, "found more"), (len(text) + 1, f"found {len(text)} bytes")):
        with pytest.raises(OSError, match=found):
            StoredBytes(str(path), 4, size, deflated_size=len(packed)).read()
    with pytest.raises(OSError, match="no end"):
        StoredBytes(str(path), 4, len(text), deflated_size=len(packed) - 3).read()
    with pytest.raises(OSError, match="no deflate stream"):
        StoredBytes(str(path), 0, len(text), deflated_size=len(packed)).read()
    bomb = zlib.compressobj(9, wbits=-15)
    bombed = bomb.compress(bytes(100_000_000)) + bomb.flush()
    path.write_bytes(bombed)
    with pytest.raises(OSError, match="should hold 10 bytes, found more"):
        StoredBytes(str(path), 0, 10, deflated_size=len(bombed)).read()


def test_the_bound_holds_at_least_one_block() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        CacheConfig(max_gb=0.001, block_mb=8)
