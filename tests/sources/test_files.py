"""Files of a source: folders and archives in place, names that lead elsewhere, and long lists that are broken."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmchat.conversation import MediaRef
from mmchat.errors import SampleError
from mmchat.sources.files import Files

WORDS = b"the same words again and again, " * 40


def tar(path: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in (("./in/a.txt", WORDS), ("in/rows.json", b'[{"n": 1}, {"n": 2}]')):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("in/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return path


def zipped(path: Path, method: int) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("in/", b"")
        archive.writestr("in/a.txt", WORDS)
        archive.writestr("in/rows.json", '[{"n": 1}, {"n": 2}]')
    return path


def archive_of(kind: str, folder: Path) -> Path:
    match kind:
        case "stored":
            return zipped(folder / "x.zip", zipfile.ZIP_STORED)
        case "deflated":
            return zipped(folder / "x.zip", zipfile.ZIP_DEFLATED)
        case "tar":
            return tar(folder / "x.tar")
    return tar(folder / "x.tar.gz", "w:gz")


@pytest.mark.parametrize("kind", ["stored", "deflated", "tar", "tar.gz"])
@pytest.mark.parametrize("place", ["source", "media", "inside"])
def test_members_are_read_in_place(tmp_path: Path, kind: str, place: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    archive = archive_of(kind, folder if place == "inside" else tmp_path)
    if place == "inside" and kind == "tar.gz":
        assert Files(folder, work=tmp_path / "work").stored("in/a.txt") is None  # needs a copy, so it must be named
        return
    named = Files(archive, work=tmp_path / "work") if place == "source" else None
    files = named or Files(folder, [archive] if place == "media" else [], tmp_path / "work")
    assert files.media("image", "in/a.txt").read() == WORDS
    assert files.media("image", "./in/a.txt").read() == WORDS
    assert files.text("in/a.txt").encode() == WORDS
    assert files.find("in/*.json") == ["in/rows.json"] and list(files.rows("in/rows.json")) == [{"n": 1}, {"n": 2}]
    with pytest.raises(SampleError, match="missing media"):
        files.media("image", "in/link.txt")
    assert [path.name for path in tmp_path.rglob("a.txt")] == []


def test_a_compressed_tar_is_copied_once_and_only_where_there_is_room(tmp_path: Path) -> None:
    archive = tar(tmp_path / "x.tgz", "w:gz")
    Files(archive, work=tmp_path / "work").text("in/a.txt")
    (copy,) = (tmp_path / "work").iterdir()
    before = copy.stat().st_mtime_ns
    Files(archive, work=tmp_path / "work").text("in/a.txt")
    assert copy.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="decompress it first"):
        Files(archive).stored("in/a.txt")


def test_compressed_tars_of_one_name_are_not_confused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "x.tar.gz", "w:gz") as archive:
            info = tarfile.TarInfo(f"{name}.txt")
            info.size = 1
            archive.addfile(info, io.BytesIO(name.encode()))
    files = Files(tmp_path, [tmp_path / "a/x.tar.gz", tmp_path / "b/x.tar.gz"], tmp_path / "work")
    assert [files.media("image", f"{name}.txt").read() for name in ("a", "b")] == [b"a", b"b"]


def test_a_file_in_a_folder_comes_before_one_in_an_archive(tmp_path: Path) -> None:
    zipped(tmp_path / "x.zip", zipfile.ZIP_STORED)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_bytes(b"newer")
    assert Files(tmp_path).media("image", "in/a.txt").read() == b"newer"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../secret.txt", "media outside of the source"),
        ("a/../../secret.txt", "media outside of the source"),
        ("/etc/passwd", "media outside of the source"),
        ("{folder}/../secret.txt", "media outside of the source"),
        ("nothing.txt", "missing media"),
        ("sub", "missing media"),
        ("", "unreadable media path"),
        (["a.txt"], "unreadable media path"),
        ("x" * 400, "unreadable media path"),
        ("https://example.org/a.jpg", "media not local"),
        ("s3://bucket/a.jpg", "media not local"),
        ("data:image/png;base64,%%", "unreadable media path"),
    ],
)
def test_names_that_are_refused(tmp_path: Path, name: Any, reason: str) -> None:
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret.txt").write_bytes(b"secret")
    if isinstance(name, str):
        name = name.replace("{folder}", str(folder))
    with pytest.raises(SampleError) as caught:
        Files(folder).media("image", name)
    assert caught.value.reason == reason


def test_names_that_are_allowed(tmp_path: Path) -> None:
    data, media = tmp_path / "data", tmp_path / "media"
    data.mkdir()
    media.mkdir()
    (media / "a.txt").write_bytes(b"a")
    (data / "link").symlink_to(media)
    files = Files(data, [media])
    for name in ("a.txt", "link/a.txt", str(media / "a.txt"), "data:text/plain;base64,YQ=="):
        assert files.media("image", name).read() == b"a"
    assert files.media("image", "b.txt", "a.txt").read() == b"a"
    assert files.media("image", None).data is None


def test_members_that_cannot_be_read_are_named_with_the_reason(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1) + 8] |= 1  # marks in/a.txt as encrypted
    path.write_bytes(data)
    with pytest.raises(SampleError, match=r"unreadable media: in/a\.txt in .*x\.zip is encrypted"):
        Files(path).media("image", "in/a.txt")
    with zipfile.ZipFile(tmp_path / "y.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.txt", WORDS)
    with pytest.raises(SampleError, match="is compressed by lzma; wanted stored or deflated"):
        Files(tmp_path / "y.zip").media("image", "a.txt")
    with pytest.raises(ValueError, match="is compressed by lzma; wanted stored or deflated"):
        Files(tmp_path / "y.zip").text(Files(tmp_path / "y.zip").one("a.txt"))


@pytest.mark.parametrize("kind", ["stored", "deflated"])
def test_a_truncated_zip_is_named(tmp_path: Path, kind: str) -> None:
    path = archive_of(kind, tmp_path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"x\.zip cannot be read as an archive"):
        Files(path).find("*")


def test_a_truncated_tar_is_named(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar")
    path.write_bytes(path.read_bytes()[: 512 + len(WORDS) // 2])
    with pytest.raises(ValueError, match=r"x\.tar: .* It is cut short"):
        Files(path).find("*")


@pytest.mark.parametrize("compressed", [False, True])
def test_a_tar_cut_between_members_is_named(tmp_path: Path, compressed: bool) -> None:
    data = tar(tmp_path / "x.tar").read_bytes()
    cut = 512 + -(-len(WORDS) // 512) * 512
    (tmp_path / "x.tar").write_bytes(data[:cut])
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(data[:cut]))
    path = tmp_path / ("x.tar.gz" if compressed else "x.tar")
    with pytest.raises(ValueError, match=rf"{path}: no end-of-archive mark at byte {cut}: .* cut short"):
        Files(path, work=tmp_path / "work").find("*")


def test_an_archive_that_only_lies_in_the_folder_may_be_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04")
    zipped(tmp_path / "good.zip", zipfile.ZIP_STORED)
    files = Files(tmp_path)
    assert files.find("*.json") == ["a.json", "in/rows.json"] and files.find("*.json")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "passed over" in said and "broken.zip" in said
    with pytest.raises(ValueError, match=r"broken\.zip cannot be read"):
        Files(tmp_path, [tmp_path / "broken.zip"]).find("*")


def test_an_archive_that_was_replaced_is_copied_again(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar.gz", "w:gz")
    assert Files(path, work=tmp_path / "work").text("in/a.txt").encode() == WORDS
    data = tar(tmp_path / "y.tar").read_bytes().replace(b"same", b"SAME")
    path.write_bytes(gzip.compress(data))
    assert "SAME" in Files(path, work=tmp_path / "work").text("in/a.txt")
    assert not list((tmp_path / "work").glob("*.partial"))


def test_names_count_from_inside_of_the_one_top_folder(tmp_path: Path) -> None:
    files = Files(zipped(tmp_path / "x.zip", zipfile.ZIP_DEFLATED))
    for name in ("in/a.txt", "a.txt"):
        assert files.media("image", name).read() == files.text(name).encode() == WORDS
    assert files.find("rows.json") == ["rows.json"] and list(files.rows("rows.json")) == [{"n": 1}, {"n": 2}]
    assert files.find("*/rows.json") == ["in/rows.json"]
    with zipfile.ZipFile(tmp_path / "x.zip", "a") as archive:
        archive.writestr("__MACOSX/in/._a.txt", b"what macOS keeps")
        archive.writestr("in/._a.txt", b"what macOS keeps")
    assert Files(tmp_path / "x.zip").find("*") == ["in/a.txt", "in/rows.json"]
    assert Files(tmp_path / "x.zip").text("a.txt").encode() == WORDS
    with zipfile.ZipFile(tmp_path / "x.zip", "a") as archive:
        archive.writestr("other/b.txt", b"b")
    with pytest.raises(ValueError, match=r"a\.txt is not in"):
        Files(tmp_path / "x.zip").text("a.txt")


def test_what_lies_beside_an_annotation_file(tmp_path: Path) -> None:
    for name in ("a.json", "b.json", "._b.json"):
        (tmp_path / name).write_text("[]")
    files = Files(tmp_path / "a.json")
    assert files.find("*.json") == ["a.json"] and files.beside("*.json") == ["a.json", "b.json"]
    assert Files(tmp_path).find("*.json") == Files(tmp_path).beside("*.json") == ["a.json", "b.json"]


@pytest.mark.parametrize("start", ["[" * 100_000, '[{"a":' * 50_000, '["[[[\\\\\\"", ' + "[" * 70])
def test_a_list_too_deep_is_refused_at_once(tmp_path: Path, start: str) -> None:
    (tmp_path / "list.json").write_text(start)
    with pytest.raises(ValueError, match=r"list\.json in .* more than 64 deep"):
        list(Files(tmp_path).rows("list.json"))


def test_long_reading_is_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.json").write_text('[{"a": 1}]')
    archive = tar(tmp_path / "x.tar")
    assert list(Files(tmp_path).items("rows.json", "item")) == [{"a": 1}]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("mmchat.sources.archives._LONG_BYTES", 10)
    assert list(Files(tmp_path).rows("rows.json")) == [{"a": 1}]
    assert "reading rows.json (0.0 MB) ..." in capsys.readouterr().err
    Files(archive).find("*")
    assert f"listing {archive}" in capsys.readouterr().err


def test_brackets_in_strings_are_not_depth(tmp_path: Path) -> None:
    rows = [{"a": "[" * n + '"\\' * (n % 5), "b": [[["\\"]]]} for n in range(2000)]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    assert list(Files(tmp_path).rows("list.json")) == rows


def test_integers_of_any_size(tmp_path: Path) -> None:
    rows = [{"n": 1}, {"n": 2**63 - 1}, {"n": 2**200}, {"n": 1.5}]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    assert list(Files(tmp_path).rows("list.json")) == rows
    assert dict(Files(tmp_path).pairs("list.json", "item")) == {"n": 1.5}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('[{"a": 1}]'.encode("utf-16"), "is not UTF-8, which is wanted"),
        ('[{"a": "\u00fc"}]'.encode("latin-1"), "not UTF-8, which is wanted: convert it"),
        (b'{\n "a": 1,\n "b": 2\n}\n', "one JSON object over several lines; wanted a list"),
        (b'[{"a": 1}, {"a', "Was it cut short. Fetch it again"),
        (b"[1 2]", "is no whole JSON"),
    ],
)
def test_files_that_are_no_rows_say_what_is_wanted(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "rows.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"rows\.json in .*" + message) as caught:
        list(Files(tmp_path).rows("rows.json"))
    assert "\n" not in str(caught.value) and "^" not in str(caught.value)


def test_lines_that_are_not_utf8_or_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmchat.sources.files._MAX_LINE_BYTES", 100)
    lines = [b'{"a": 1}', '{"a": "\u00fc"}'.encode("latin-1"), b'{"a": "' + b"x" * 300 + b'"}', b'{"a": 2}']
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    first, latin, long, last = Files(tmp_path).rows("rows.jsonl")
    assert (first, last) == ({"a": 1}, {"a": 2})
    assert isinstance(latin, SampleError) and "line 2 is not UTF-8" in latin.detail
    assert isinstance(long, SampleError) and "line 3 has more than 100 bytes" in long.detail


def test_a_compressed_tar_cut_short_is_named(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar.gz", "w:gz")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"x\.tar\.gz cannot be read as an archive"):
        Files(path, work=tmp_path / "work").find("*")
    assert not list((tmp_path / "work").glob("*.tar"))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", b"\xef\xbb\xbf \n"])
def test_rows_of_a_list_and_of_lines(tmp_path: Path, mark: bytes) -> None:
    rows = [{"a": 1.5}, {"b": "ü"}, [1, 2]]
    (tmp_path / "list.json").write_bytes(mark + json.dumps(rows, indent=1).encode())
    (tmp_path / "lines.jsonl").write_bytes(mark + b"\r\n\r\n".join(json.dumps(row).encode() for row in rows[:2]))
    files = Files(tmp_path)
    assert list(files.rows("list.json")) == rows
    assert list(files.rows("lines.jsonl")) == rows[:2]
    assert list(files.items("list.json", "item.a")) == [1.5]


@pytest.mark.parametrize("data", [b'[{"a": 1}, {"a": ', b'[{"a": 1}', b'[{"a": 1}, {"a": "\xff"}]', b"[1 2]"])
def test_a_list_cut_short_gives_what_is_whole_and_then_stops(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "list.json").write_bytes(data)
    found = []
    with pytest.raises(ValueError, match=r"list\.json in .* is no whole JSON"):
        for row in Files(tmp_path).rows("list.json"):
            found.append(row)
    assert found in ([{"a": 1}], [1], [])


def test_a_line_that_is_no_json_is_one_sample_lost(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_bytes(b'{"a": 1}\n{"a": \n{"a": 2}\n' + b"[" * 100_000 + b"\n")
    first, broken, second, deep = Files(tmp_path).rows("lines.jsonl")
    assert first == {"a": 1} and second == {"a": 2}
    assert isinstance(broken, SampleError) and "line 2" in broken.detail
    assert isinstance(deep, SampleError)


def test_find_and_one(tmp_path: Path) -> None:
    for name in ("a.json", "b.json", "c.txt"):
        (tmp_path / name).write_text("[]")
    files = Files(tmp_path)
    assert files.find("*.json", "a.*") == ["a.json", "b.json"]
    assert files.one("d.json", "*.txt") == "c.txt"
    with pytest.raises(ValueError, match=r"holds 2 files \*\.json: a\.json, b\.json; name one"):
        files.one("*.json")
    with pytest.raises(ValueError, match=r"holds none of \*\.csv"):
        files.one("*.csv")
    assert Files(tmp_path / "a.json").one("*.json") == "a.json"
    with pytest.raises(ValueError, match="does not exist"):
        Files(tmp_path / "nowhere")


def test_picture_size_is_as_displayed(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (40, 30)).save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0broken")
    files = Files(tmp_path)
    assert files.picture_size(files.media("image", "turned.jpg")) == (30, 40)
    for item in (files.media("image", "broken.jpg"), MediaRef("image", b"")):
        with pytest.raises(SampleError, match="undecodable image"):
            files.picture_size(item)
