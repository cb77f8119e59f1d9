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
        read: (files, split, options) to records in the source's order, keys unique in the whole source (a
            key that came before is skipped and counted). What cannot be used is
            yielded as the SampleError that says why. Where boxes are in pixels of a size that the set states, the
            picture has it (see rows.annotated). Raises ValueError where a file is missing or broken.
        options: name to one line of help, of what `--set name=value` may say.
        companions: globs, one of which must match beside, where the marks alone could be another format's too.
    """

    tasks: tuple[str, ...]
    marks: tuple[str, ...]
    read: Read
    options: Mapping[str, str] = field(default_factory=dict)
    companions: tuple[str, ...] = ()

    def is_in(self, files: Files, split: str) -> bool:
        if self.companions and not files.beside(*self.companions):
            return False
        return any(files.find(mark.format(split=split)) for mark in self.marks)
