"""Records of a fixture as make_shards.py would write them, without shards."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

from mmchat.conversation import Record
from mmchat.errors import SampleError
from mmchat.sources import choose_source, read_source
from mmchat.sources.files import Files
from mmchat.tasks import TASKS
from tests.sources.fixture import Fixture


def records_of(fixture: Fixture, name: str, work: Path | None = None) -> tuple[list[Record], Counter[str]]:
    """Records that the task can phrase, and the others by reason. The format must be told by the files alone.

    Args:
        name: of the fixture: the format's, and after a colon what tells its fixtures apart.
    """
    name = name.partition(":")[0]
    words = dict(zip(fixture.options[::2], fixture.options[1::2], strict=True))
    options = dict([words["--set"].split("=", 1)]) if "--set" in words else {}
    files = Files(fixture.source, [Path(words["--media"])] if "--media" in words else [], work)
    assert choose_source(fixture.task, files, fixture.split) == name or words.get("--format") == name
    good: list[Record] = []
    bad: Counter[str] = Counter()
    for record in read_source(name, files, fixture.split, options):
        try:
            if isinstance(record, SampleError):
                raise record
            TASKS[fixture.task].conversation(record, random.Random(0))
            good.append(record)
        except SampleError as error:
            bad[error.reason] += 1
    return good, bad
