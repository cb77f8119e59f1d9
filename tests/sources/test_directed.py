"""Device-directed speech."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmchat.conversation import Record
from mmchat.sources import read_source
from mmchat.sources.files import Files
from tests.sources.fixtures_directed import FIXTURES, ROWS
from tests.sources.made import records_of


def test_rows_keep_their_facts(tmp_path: Path) -> None:
    good, bad = records_of(FIXTURES["directed_speech"](tmp_path), "directed_speech")
    assert [record.key for record in good] == ["test-000000", "test-000001", "test-000002"]
    assert bad == {"missing media": 1, "unreadable row": 1}
    assert good[1].facts == ROWS[1] and good[1].facts["directed"] is False
    assert [item.modality for item in good[0].media] == ["audio"]


def test_one_class_alone(tmp_path: Path) -> None:
    FIXTURES["directed_speech"](tmp_path)

    def keys(**options: str) -> list[str]:
        found = read_source("directed_speech", Files(tmp_path), "test", options)
        return [one.key for one in found if isinstance(one, Record)]

    assert keys(directed="yes") == ["test-000000"]
    assert keys(directed="no") == ["test-000001", "test-000002"]
    with pytest.raises(ValueError, match="directed is yes, no or any, not maybe"):
        keys(directed="maybe")
