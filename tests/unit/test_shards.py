"""Shards: what is written comes back by its index; nothing bad is read, or passed over in silence."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmchat.conversation import MediaHeader, MediaRef, Modality, Record, StoredBytes
from mmchat.data.shard_index import index_shard
from mmchat.data.shard_writer import write_shards
from mmchat.data.shards import Shard, expand_shards, index_path
from mmchat.errors import SampleError


def jpeg(width: int = 32) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, 24)).save(data, "JPEG")
    return data.getvalue()


def header_of(modality: Modality, data: bytes) -> MediaHeader:
    if modality != "image":
        return MediaHeader(duration_s=1.5)
    try:
        width, height = Image.open(io.BytesIO(data)).size
    except OSError as error:
        raise SampleError("undecodable image", str(error)) from error
    return MediaHeader(width=width, height=height)


def records(count: int) -> list[Record]:
    media = (MediaRef("image", jpeg()), MediaRef("audio", None))
    return [Record(f"{i:04d}", {"caption": f"number {i}"}, media) for i in range(count)]


def make_tar(path: Path, members: Sequence[tuple[str, bytes | tarfile.TarInfo]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            content = b"" if isinstance(data, tarfile.TarInfo) else data
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def problem_of(path: Path, i: int = 0) -> str:
    with pytest.raises(SampleError) as caught:
        Shard(path).record(i)
    return caught.value.reason


def test_records_come_back(tmp_path: Path) -> None:
    video = tmp_path / "clip.webm"
    video.write_bytes(b"\x1a\x45\xdf\xa3....webm")
    facts = {"turns": [{"text": "schön \U0001f600 <image>"}], "number": 1.5, "nothing": None}
    media = (
        MediaRef("image", jpeg(40)),
        MediaRef("video", StoredBytes(str(video), 0, video.stat().st_size)),
        MediaRef("audio", None),
    )
    report = write_shards([Record("a/b-c_1", facts, media)], tmp_path / "out", header_of=header_of)
    assert report.num_samples == 1 and not report.problems
    shard = Shard(report.shards[0])
    record = shard.record(0)
    assert (record.key, record.facts) == ("a/b-c_1", facts)
    assert [item.modality for item in record.media] == ["image", "video", "audio"]
    assert record.media[0].read() == jpeg(40) and record.media[1].read() == video.read_bytes()
    assert record.media[0].header == MediaHeader(width=40, height=24)
    assert record.media[2].data is None and record.media[2].header is None
    entry = shard.entry(0)
    assert entry.members.keys() == {"json", "0.jpg", "1.webm"}
    assert entry.num_characters == len(facts["turns"][0]["text"])  # type: ignore[index]


def test_same_samples_same_bytes_and_same_index_as_a_foreign_shard(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shards(records(25), tmp_path / name, samples_per_shard=10, header_of=header_of)
    first = {path.name: path.read_bytes() for path in sorted((tmp_path / "a").iterdir())}
    assert first == {path.name: path.read_bytes() for path in sorted((tmp_path / "b").iterdir())}
    assert len(first) == 6
    for path in expand_shards(str(tmp_path / "b")):
        written = index_path(path).read_bytes()
        index_path(path).unlink()
        index_shard(path, header_of)
        assert index_path(path).read_bytes() == written


def test_shards_end_by_samples_and_by_bytes(tmp_path: Path) -> None:
    report = write_shards(records(7), tmp_path / "samples", samples_per_shard=3)
    assert [Shard(path).num_samples for path in report.shards] == [3, 3, 1]
    report = write_shards(records(7), tmp_path / "bytes", max_shard_bytes=3 * 2560)  # 512 + 1024 and 512 + 512 each
    assert [Shard(path).num_samples for path in report.shards] == [3, 3, 1]
    report = write_shards(records(3), tmp_path / "large", max_shard_bytes=1)
    assert [Shard(path).num_samples for path in report.shards] == [1, 1, 1]


def test_unusable_samples_are_counted_and_the_rest_is_written(tmp_path: Path) -> None:
    picture = (MediaRef("image", jpeg()),)
    report = write_shards(
        [
            Record("good", {}, picture),
            SampleError("missing media", "from the importer"),
            Record("../../etc/passwd", {}),
            Record("a.b", {}),
            Record("__meta__/a", {}),
            Record("x" * 81, {}),
            Record("good", {}, picture),
            Record("nan", {"x": float("nan")}),
            Record("surrogate", {"x": "\ud800"}),
            Record("media", {"media": 1}),
            Record("unknown", {}, (MediaRef("image", b"hello"),)),
            Record("gone", {}, (MediaRef("image", StoredBytes(str(tmp_path / "gone.jpg"), 0, 10)),)),
            Record("broken", {}, (MediaRef("image", jpeg()[:20]),)),
            Record("last", {}, picture),
        ],
        tmp_path / "out",
        header_of=header_of,
    )
    assert report.problems == {
        "missing media": 1,
        "unsafe key": 4,
        "duplicate key": 1,
        "unwritable facts": 2,
        "reserved fact": 1,
        "unknown media type": 1,
        "unreadable media": 1,
        "undecodable image": 1,
    }
    assert len(report.examples["unsafe key"]) == 3
    shard = Shard(report.shards[0])
    assert [shard.record(i).key for i in range(shard.num_samples)] == ["good", "last"]


def test_a_failure_leaves_whole_shards_only(tmp_path: Path) -> None:
    def failing():
        yield from records(5)
        raise OSError("the source went away")

    with pytest.raises(OSError, match="went away"):
        write_shards(failing(), tmp_path, samples_per_shard=2)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {name + end for name in ("000000.tar", "000001.tar") for end in ("", ".index.jsonl")}
    with pytest.raises(ValueError, match="already has shards"):
        write_shards(records(1), tmp_path)


@pytest.mark.parametrize(
    ("data", "modality", "type_"),
    [
        (b"RIFF\0\0\0\0WAVEfmt ", "audio", "wav"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "image", "webp"),
        (b"\0\0\0\x18ftypisom", "video", "mp4"),
        (b"\0\0\0\x18ftypM4A ", "audio", "m4a"),
        (b"OggS" + bytes(24) + b"OpusHead", "audio", "opus"),
        (b"fLaC", "audio", "flac"),
        (b"\x89PNG\r\n", "image", "png"),
    ],
)
def test_types_are_told_by_content(tmp_path: Path, data: bytes, modality: Modality, type_: str) -> None:
    path = tmp_path / "wrong.jpg"
    path.write_bytes(data)
    record = Record("a", {}, (MediaRef(modality, StoredBytes(str(path), 0, len(data))),))
    report = write_shards([record], tmp_path / "out")
    assert f"0.{type_}" in Shard(report.shards[0]).entry(0).members


def test_foreign_shards(tmp_path: Path) -> None:
    path = make_tar(
        tmp_path / "x.tar",
        [
            ("./pair.jpg", jpeg(50)),
            ("./pair.TXT", b" a caption \n"),
            ("many.json", b'{"caption": "c"}'),
            ("many.img10.jpg", jpeg(10)),
            ("apart.0.png", jpeg(20)),  # its json comes later
            ("many.img2.jpg", jpeg(2)),
            ("many.cls", b"7"),
            ("._pair.jpg", b"what a Mac leaves"),
            ("apart.json", b'{"caption": "d"}'),
        ],
    )
    report = index_shard(path, header_of)
    assert report.num_samples == 3 and not report.problems
    shard = Shard(path)
    pair, many, apart = (shard.record(i) for i in range(3))
    assert pair.facts == {"caption": "a caption"} and pair.media[0].header == MediaHeader(width=50, height=24)
    assert [item.header and item.header.width for item in many.media] == [2, 10]
    assert apart.key == "apart" and apart.facts == {"caption": "d"} and len(apart.media) == 1


def test_pickles_are_refused_and_never_read(tmp_path: Path) -> None:
    for type_ in ("pkl", "pickle", "pyd", "pth", "pt"):
        path = make_tar(
            tmp_path / f"{type_}.tar",
            [("a.json", b"{}"), (f"a.0.{type_}", b"cos\nsystem\n"), ("b.json", b"{}")],
        )
        assert index_shard(path).problems == {"forbidden member": 1}
        assert problem_of(path) == "forbidden member"
        assert Shard(path).record(1).key == "b"


def test_an_edited_index_does_not_lead_outside(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", [("a.json", b"{}")])
    index_shard(path)
    index = index_path(path).read_text()
    index_path(path).write_text(index.replace("[512,2]", "[512,99999]"))
    with pytest.raises(ValueError, match="outside"):
        Shard(path).record(0)


def test_names_and_links_that_lead_outside_are_left_out(tmp_path: Path) -> None:
    link = tarfile.TarInfo("a.0.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device = tarfile.TarInfo("a.1.jpg")
    device.type = tarfile.CHRTYPE
    path = make_tar(
        tmp_path / "a.tar",
        [
            ("../../x.json", b"{}"),
            ("/etc/y.json", b"{}"),
            ("n\nl.json", b"{}"),
            ("", link),
            ("", device),
            ("a.json", b"{}"),
        ],
    )
    report = index_shard(path)
    assert report.num_samples == 1 and report.problems == {"unsafe name": 3, "not a plain file": 2}
    assert Shard(path).record(0).media == ()


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.jpg", jpeg())], "no facts"),
        ([("a.json", b"{}"), ("b.json", b"{}"), ("a.json", b"{}")], "duplicate member"),
        ([("a.json", b"[1]")], "unreadable facts"),
        ([("a.json", b"{")], "unreadable facts"),
        ([("a.json", b'{"x": NaN}')], "unreadable facts"),
        ([("a.json", b'{"x": "\\ud800"}')], "unreadable facts"),
        ([("a.txt", b"\xff\xfe")], "unreadable facts"),
        ([("a.json", b"[" * 100_000)], "facts too deep"),
        ([("a.json", b'{"x": ' + b"[" * 70 + b"]" * 70 + b"}")], "facts too deep"),
        ([("a.json", b'{"media": [{"modality": "image", "member": "0.jpg"}]}')], "missing member"),
        ([("a.json", b'{"media": [{"modality": "smell", "member": null}]}')], "unreadable media list"),
        ([("a.json", b'{"media": "0.jpg"}')], "unreadable media list"),
        ([("a.json", b"{}"), ("a.jpg", jpeg()[:20])], "undecodable image"),
    ],
)
def test_bad_samples_are_reported_and_refused(tmp_path: Path, members: list[tuple[str, bytes]], reason: str) -> None:
    path = make_tar(tmp_path / "a.tar", members)
    assert index_shard(path, header_of).problems == {reason: 1}
    assert problem_of(path) == reason


def test_facts_have_a_size_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_tar(tmp_path / "a.tar", [("a.json", json.dumps({"x": "y" * 2000}).encode())])
    index_shard(path)
    monkeypatch.setattr("mmchat.data.shards.MAX_JSON_BYTES", 1000)
    assert problem_of(path) == "facts too large"


def cut(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path


def test_truncated_tars_are_refused_wherever_they_are_cut(tmp_path: Path) -> None:
    for name, size in (
        ("inside", 2 * 1024 + 512 + 100),
        ("padding", 2 * 1024 + 512 + 700),
        ("boundary", 2 * 1024),
    ):
        path = cut(make_tar(tmp_path / f"{name}.tar", [(f"{i}.json", b'{"a": 1}') for i in range(20)]), size)
        with pytest.raises(ValueError, match="cut") as caught:
            index_shard(path)
        assert str(path) in str(caught.value)
        assert not index_path(path).exists()


def test_a_cut_at_any_byte_is_noticed(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", [(f"{i}.json", b'{"a": 1}') for i in range(4)])
    whole, end = path.read_bytes(), 4 * 1024 + 1024
    for size in [*range(0, end, 37), end - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=str(path)):
            index_shard(path)
    path.write_bytes(whole[:end])  # only the record's padding is gone
    assert index_shard(path).num_samples == 4


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8 * 512), st.binary(min_size=1, max_size=8)), max_size=4))
def test_damage_never_ends_in_anything_but_an_error_or_an_index(damage: list[tuple[int, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        long = tarfile.TarInfo("x" * 120 + ".json")  # a name of two headers
        path = make_tar(Path(folder) / "a.tar", [("a.json", b"{}"), ("", long), ("b.jpg", b"xyz")])
        data = bytearray(path.read_bytes())
        for place, bad in damage:
            data[place : place + len(bad)] = bad
        path.write_bytes(data)
        try:
            index_shard(path)
        except ValueError:
            assert not index_path(path).exists()
            return
        shard = Shard(path)
        for i in range(shard.num_samples):
            with contextlib.suppress(SampleError):
                shard.record(i)


def test_a_negative_size_is_damage(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a.json")
    member.size = -1024
    path = tmp_path / "a.tar"
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
    with pytest.raises(ValueError, match="negative size"):
        index_shard(path)


def test_damaged_and_joined_tars_are_refused(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", [(f"{i}.json", b"{}") for i in range(3)])
    whole = path.read_bytes()
    path.write_bytes(whole[:1024] + b"\x55" * 512 + whole[1536:])
    with pytest.raises(ValueError, match="at byte 1024"):
        index_shard(path)
    path.write_bytes(whole + whole)
    with pytest.raises(ValueError, match="behind the end"):
        index_shard(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        index_shard(path)


def test_a_shard_that_changed_is_refused(tmp_path: Path) -> None:
    (path,) = write_shards(records(3), tmp_path).shards
    size = path.stat().st_size
    cut(path, size - 5000)
    with pytest.raises(ValueError, match=rf"{size - 5000} bytes, but {size} .*index_shards.py"):
        Shard(path)


def test_a_missing_or_broken_index_is_refused(tmp_path: Path) -> None:
    (path,) = write_shards(records(3), tmp_path).shards
    index = index_path(path).read_text()
    index_path(path).unlink()
    with pytest.raises(ValueError, match=r"python data_prep/index_shards.py .*000000.tar"):
        Shard(path)
    for broken in ("", "{}\n", "[]\n", index.replace('"format":1', '"format":9')):
        index_path(path).write_text(broken)
        with pytest.raises(ValueError, match=r"make it anew: python data_prep/index_shards.py"):
            Shard(path)
    index_path(path).write_text("".join(index.splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="has 2 entries, its header says 3"):
        Shard(path).record(0)
    with pytest.raises(ValueError, match="does not exist"):
        Shard(tmp_path / "other.tar")


def test_expand_shards(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"{i:03d}.tar").touch()
        (tmp_path / f"{i:03d}.tar.index.jsonl").touch()
    paths = [tmp_path / f"{i:03d}.tar" for i in range(12)]
    assert expand_shards(f"{tmp_path}/{{000..011}}.tar") == paths
    assert expand_shards(f"{tmp_path}/0{{0..0}}{{8..9}}.tar") == paths[8:10]
    assert expand_shards(f"{tmp_path}/*") == expand_shards(str(tmp_path)) == paths
    assert expand_shards([str(paths[3]), str(paths[1])]) == [paths[3], paths[1]]
    with pytest.raises(ValueError, match=r"012.tar\n.*013.tar\n.*none-\*.tar"):
        expand_shards([f"{tmp_path}/{{010..013}}.tar", f"{tmp_path}/none-*.tar"])
    with pytest.raises(ValueError, match="more than once"):
        expand_shards([str(tmp_path), str(paths[0])])
    with pytest.raises(ValueError, match="must rise"):
        expand_shards("{0..99999999999}.tar")
    for empty in ([], "pipe:cat x.tar"):
        with pytest.raises(ValueError, match=r"no (such )?shards"):
            expand_shards(empty)


def test_keys_that_are_not_ascii_come_back(tmp_path):
    """Their names take more than one tar header, which moves all offsets after them."""
    keys = ["a", "na\u00efve_\u6f22", "b", "c"]
    records = [Record(key, {"caption": key}, (MediaRef("image", jpeg()),)) for key in keys]
    (path,) = write_shards(records, tmp_path / "out").shards
    shard = Shard(path)
    found = [shard.record(i) for i in range(4)]
    assert [record.key for record in found] == [record.facts["caption"] for record in found] == keys
    assert all(record.media[0].read() == jpeg() for record in found)


def test_a_damaged_index_line_is_one_bad_sample(tmp_path):
    (path,) = write_shards([Record(k, {"caption": k}) for k in "abc"], tmp_path / "out").shards
    index = index_path(path)
    lines = index.read_bytes().splitlines(keepends=True)
    lines[2] = b"x" * (len(lines[2]) - 1) + b"\n"
    index.write_bytes(b"".join(lines))
    shard = Shard(path)
    assert shard.record(0).key == "a" and shard.record(2).key == "c"
    with pytest.raises(SampleError, match=r"damaged index.*index_shards\.py"):
        shard.record(1)
