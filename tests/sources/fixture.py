"""What a fixture of a source says of itself; each family has its own in fixtures_FAMILY.py, as FIXTURES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fixture:
    """A small source in the true schema, with its quirks and one malformed record.

    Attributes:
        task: which make_shards.py is asked for; other_tasks can phrase the same shards.
        source: what is named as SOURCE.
        split: the split to make.
        options: further arguments of make_shards.py, such as --media or --set.
        num_samples: samples that must be written.
        skipped: reason to count, of the records that must not be written.
    """

    task: str
    source: Path
    num_samples: int
    skipped: dict[str, int]
    split: str = "train"
    options: tuple[str, ...] = ()
    other_tasks: tuple[str, ...] = ()


# Name of the format to the function that writes its fixture into an empty folder.
Fixtures = dict[str, Callable[[Path], Fixture]]
