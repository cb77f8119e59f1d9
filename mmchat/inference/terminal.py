"""The terminal's side of a chat: files and questions are read, answers printed and drawn."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmchat.conversation import Conversation, MediaRef
from mmchat.errors import SampleError
from mmchat.inference.chat import ChatSession, read_question
from mmchat.inference.draw import draw_answer
from mmchat.inference.media_input import planned, read_media
from mmchat.inference.seen import Seen, described

DRAWN = (".png", ".jpg", ".jpeg", ".webp")
HELP = """Type a question. /image F, /audio F, /video F adds a file to it; <box:x1,y1,x2,y2> or <point:x,y> in it is a \
place in pixels; /draw F draws the last answer; /new starts over; /quit ends."""


def check_drawing(path: str | Path, sources: Sequence[str], numbers: Iterable[int] = ()) -> Path:
    """Where a drawing can be written.

    Args:
        sources: files that must stay as they are, however they are spelled or linked.
        numbers: of the pictures that may be drawn: `path` is the name of the first, see `numbered`.
    Raises:
        ValueError: an unknown kind of file, one of `sources`, or a place where no file can be written.
    """
    out = Path(path)
    if out.suffix.lower() not in DRAWN:
        raise ValueError(f"cannot draw to {path}: found the ending {out.suffix!r}; wanted one of {', '.join(DRAWN)}")
    for place in dict.fromkeys([out, *(numbered(out, number) for number in numbers)]):
        said = f"cannot draw to {path}" if place == out else f"cannot draw to {path}, which may also write {place}"
        for source in sources:
            if place.exists() and os.path.exists(source) and place.samefile(source):
                raise ValueError(f"{said}: it is {source}, which the conversation uses; wanted another name")
        if fault := _why_not_writable(place):
            raise ValueError(f"{said}: {fault}")
    return out


def numbered(out: Path, number: int) -> Path:
    """The file of one picture: F for the first of the conversation, F-2 for the second, and so on."""
    return out if number == 1 else out.with_stem(f"{out.stem}-{number}")


def _why_not_writable(place: Path) -> str:
    """Why a file cannot be written there; "" where it can. Leaves everything as it was."""
    if place.exists() and not place.is_file():
        return "it is a folder or a device; wanted a file"
    folder = Path(os.path.realpath(place)).parent
    if not folder.is_dir():
        return f"there is no folder {folder}; make it first"
    try:
        # Tried, as permissions do not tell it all: of a read-only disk, or of /proc.
        if place.exists():
            place.open("r+b").close()
        else:
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return f"one cannot write there ({error.strerror}); wanted another folder"
    return ""


@dataclass
class Terminal:
    """A session, the media that the next question will bring, and all files that were read: no drawing replaces one.

    seen: where what the model was given is saved after each answer.
    """

    session: ChatSession
    media: list[MediaRef] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    seen: Seen | None = None

    def ask(self, text: str) -> bool:
        """Prints the answer as it comes; returns False where the question could not be asked."""
        known = Conversation(self.session.turns).media
        try:
            question = read_question(text, [*known, *self.media])
        except SampleError as error:
            print(f"error: {error}. The question was not asked", file=sys.stderr)
            return False
        try:
            media = [self._planned(item, number) for number, item in enumerate(self.media, len(known) + 1)]
            for piece in self.session.ask([*media, *question]):
                print(piece, end="", flush=True)
            print(flush=True)
        except SampleError as error:
            print(f"error: {error}. The question was not asked; its files are dropped", file=sys.stderr)
            return False
        finally:
            self.media = []
        if self.seen is not None:
            self.seen.save(Conversation(self.session.turns))
            print(f"saved: {self.seen.folder / 'index.html'}", file=sys.stderr)
        return True

    def _planned(self, item: MediaRef, number: int) -> MediaRef:
        """The item with its header, read once. Says what of a clip or sound the model gets. Raises SampleError."""
        item, plan = planned(item, self.session.loaded.template)
        if plan is not None and item.modality != "image":
            print(f"{item.modality}-{number}: {described(item, plan)}", file=sys.stderr)
        return item

    def draw(self, out: str | Path) -> None:
        """Draws what the last question and answer name, each picture to its own file. Raises as `check_drawing`."""
        drawn = draw_answer(Conversation(self.session.turns), self.session.loaded.template)
        out = check_drawing(out, self.sources, drawn)  # all of them, before the first is written
        for number, image in drawn.items():
            path = numbered(out, number)
            image.save(path, quality=92)
            print(f"drawn: {path}", file=sys.stderr)

    def talk(self) -> None:
        """Reads lines until the end of the input, or /quit."""
        print(HELP)
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                return
            command, _, path = line.partition(" ")
            if command in ("/quit", "/exit"):
                return
            try:
                self._obey(command, path.strip(), line)
            except (ValueError, OSError, SampleError) as error:
                print(f"error: {error}", file=sys.stderr)

    def _obey(self, command: str, path: str, line: str) -> None:
        match command:
            case "/new":
                self.session, self.media = self.session.afresh(), []
            case "/image" | "/audio" | "/video":
                self.media.append(read_media(command[1:], path))  # type: ignore[arg-type]
                self.sources.append(path)
            case "/draw":
                self.draw(path)
            case _ if command.startswith("/"):
                raise ValueError(f"unknown command {command}; there are /image, /audio, /video, /draw, /new and /quit")
            case _ if line:
                self.ask(line)
