"""Device-directed speech, as data_prep/directed_speech.py makes it: is somebody talking to the device?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mmchat.conversation import Record
from mmchat.errors import SampleError
from mmchat.sources.files import Files
from mmchat.sources.rows import Find, records_of
from mmchat.sources.source import Source


def read_directed_speech(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """Rows of SPLIT/directed.jsonl: {"id", "audio", "text", "directed", "kind", "speaker", "voice", "source", ...}.

    What else a row holds, such as distance_m, room, noise and snr_db, stays in the facts. The splits are train, val,
    test and real. `--set directed=yes` or `no` takes one class alone.
    """
    if (wanted := options.get("directed", "any")) not in ("yes", "no", "any"):
        raise ValueError(f"--set directed is yes, no or any, not {wanted}")
    for found in records_of(files, files.one(f"{split}/directed.jsonl"), _record):
        if isinstance(found, SampleError) or wanted == "any" or found.facts["directed"] == (wanted == "yes"):
            yield found


def _record(row: dict[str, Any], key: str, find: Find) -> Record:
    match row:
        case {"id": str(name), "audio": audio, "text": str(), "directed": bool(), "kind": str()}:
            facts = {name: value for name, value in row.items() if name not in ("id", "audio")}
            return Record(name, facts, (find("audio", audio),))
    raise SampleError("unreadable row", f"wanted id, audio, text, directed and kind, found {row!r:.200}")


SOURCES = {
    "directed_speech": Source(
        ("directed", "directed_audio", "directed_text", "transcribe"),
        ("{split}/directed.jsonl",),
        read_directed_speech,
        {"directed": "yes, no or any (default)"},
    )
}
