"""Public formats: one file a family, its table merged below. A source reads facts and media; a task phrases them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping

from mmchat.conversation import Record
from mmchat.errors import SampleError
from mmchat.sources import (
    captions,
    chat,
    coco,
    dialogues,
    directed_speech,
    flickr30k,
    hf_dataset,
    open_data,
    pointing,
    questions,
    refcoco,
    shikra,
    sounds,
    speech,
    spoken,
    tracks,
    video_instruct,
    visual_genome,
)
from mmchat.sources.files import Files
from mmchat.sources.source import Source

# Where a folder looks like several formats, the first counts; the most general one stands last.
SOURCES: dict[str, Source] = {
    **shikra.SOURCES,
    **refcoco.SOURCES,
    **coco.SOURCES,
    **flickr30k.SOURCES,
    **visual_genome.SOURCES,
    **pointing.SOURCES,
    **dialogues.SOURCES,
    **questions.SOURCES,
    **speech.SOURCES,
    **directed_speech.SOURCES,
    **spoken.SOURCES,
    **sounds.SOURCES,
    **tracks.SOURCES,
    **video_instruct.SOURCES,
    **hf_dataset.SOURCES,
    **open_data.SOURCES,
    **captions.SOURCES,
    **chat.SOURCES,
}


# It stands in file names and in globs.
_SPLIT = re.compile(r"[^/\\*?\[\]\0]+(?:/[^/\\*?\[\]\0]+)?")


def choose_source(task: str, files: Files, split: str, name: str | None = None) -> str:
    """The format named, or the first that the files look like. Raises ValueError where there is none."""
    if not _SPLIT.fullmatch(split) or ".." in split:
        raise ValueError(f"{split!r} is no name of a split: wanted one as train, val2017 or a folder/name, no pattern")
    fitting = {key: source for key, source in SOURCES.items() if task in source.tasks}
    if name is not None:
        if name not in fitting:
            near = difflib.get_close_matches(name, fitting, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"task {task} has no format {name}, it has {', '.join(fitting)}{hint}")
        return name
    for key, source in fitting.items():
        if source.is_in(files, split):
            return key
    wanted = "\n".join(f"  {key}: {', '.join(source.marks)}" for key, source in fitting.items())
    others = [key for key, source in SOURCES.items() if key not in fitting and source.is_in(files, split)]
    # A mark as *.json fits almost anything: it counts where nothing else does.
    others = [key for key in others if not any(mark.startswith("*.") for mark in SOURCES[key].marks)] or others
    hint = f" It looks like {' or '.join(f'{key}, of task {SOURCES[key].tasks[0]}' for key in others)}." * bool(others)
    raise ValueError(
        f"{files} looks like no format of task {task} for split {split}.{hint} "
        "Name one with --format, or a folder with:\n" + wanted.replace("{split}", split)
    )


def read_source(
    name: str, files: Files, split: str, options: Mapping[str, str] | None = None
) -> Iterator[Record | SampleError]:
    """The records of a format. Raises ValueError for an option that it does not have, or a file that it cannot read."""
    source, options = SOURCES[name], options or {}
    if unknown := sorted(options.keys() - source.options.keys()):
        known = "\n".join(f"  {key}: {text}" for key, text in source.options.items()) or "  none"
        raise ValueError(f"format {name} has no option {', '.join(unknown)}; its options:\n{known}")
    return _guarded(name, files, source.read(files, split, options))


def _guarded(name: str, files: Files, found: Iterator[Record | SampleError]) -> Iterator[Record | SampleError]:
    """What is found; a fault that no reader expects names the file and the place."""
    number = 0
    try:
        for one in found:
            number += 1
            yield one
    except (ValueError, OSError):
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error!s:.300}"
        raise ValueError(f"{files}: format {name} stopped behind record {number}: {what}") from error
