"""A public format: how it is recognised, which tasks can phrase its facts, and how it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from mmchat.conversation import Record
from mmchat.errors import SampleError
from mmchat.sources.files import Files

Read = Callable[[Files, str, Mapping[str, str]], Iterator[Record | SampleError]]


@dataclass(frozen=True)
class Source:
    """One public format.

    Attributes:
        tasks: names of the tasks that phrase its facts; the usual one first.
        marks: globs of file names, relative to SOURCE, any of which tells this format; {split} is filled in.
        read: (files, split, options) to records in the source's order, keys unique. What cannot be used is
            yielded as the SampleError that says why. Raises ValueError where a file is missing or broken.
        options: name to one line of help, of what `--set name=value` may say.
    """

    tasks: tuple[str, ...]
    marks: tuple[str, ...]
    read: Read
    options: Mapping[str, str] = field(default_factory=dict)

    def is_in(self, files: Files, split: str) -> bool:
        return any(files.find(mark.format(split=split)) for mark in self.marks)
