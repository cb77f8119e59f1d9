"""A model as a Python object: asked with what lies in memory or in files, it answers with text, places and pictures."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from PIL import Image

from mmchat.conversation import Conversation, MediaRef, Part, Region
from mmchat.data.chat_template import SEEN, ChatTemplate
from mmchat.errors import SampleError
from mmchat.inference.chat import ChatSession, read_question
from mmchat.inference.draw import draw_answer, named_regions
from mmchat.inference.generate import Decoding
from mmchat.inference.hub import download, is_hub_name
from mmchat.inference.load import Loaded, load
from mmchat.inference.media_input import Picture, Sound, StoredFile, planned, to_media

# The longer side of a picture in a notebook, in pixels: it is stored in the notebook's file.
SHOWN_SIDE = 1024


@dataclass(frozen=True, eq=False)
class Answer:
    """What the model said to one question.

    Attributes:
        text: as the model wrote it, with its places in the model's own dialect.
        regions: places that the text names, in order, in original pixels of item `media` of the conversation, which is
            counted from 0 over all its pictures, videos and sounds. `label` is the words that the place belongs to.
        excerpts: which part of a long video or sound was seen or heard, and by which rule.
        conversation: up to this answer.
    """

    text: str
    regions: tuple[Region, ...]
    excerpts: tuple[str, ...]
    conversation: Conversation = field(repr=False)
    template: ChatTemplate = field(repr=False)

    @cached_property
    def pictures(self) -> dict[int, Image.Image]:
        """Pictures in which question or answer name a place, drawn when they are first asked for.

        By their number, counted from 1 over pictures and videos, as answers count them. Places of the question are
        dashed. Where no place is named, the last picture as it is; nothing in a conversation without one.
        """
        has_picture = any(item.modality == "image" for item in self.conversation.media)
        return draw_answer(self.conversation, self.template) if has_picture else {}

    @property
    def picture(self) -> Image.Image | None:
        """The first of `pictures`; None in a conversation without one."""
        return next(iter(self.pictures.values()), None)

    def __str__(self) -> str:
        return "\n".join([self.text, *(f"  {line}" for line in self._notes())])

    def _repr_html_(self) -> str:
        """How a notebook shows it: the pictures, the text, and the places in pixels. Loads and runs nothing."""
        figures = [
            f'<img src="{_data_uri(image)}" alt="Picture {number} with the places named" style="max-width:100%">'
            for number, image in self.pictures.items()
        ]
        said = f'<p style="white-space:pre-wrap">{html.escape(self.text)}</p>'
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self._notes())
        return f"<div>{''.join(figures)}{said}{f'<ul>{notes}</ul>' if notes else ''}</div>"

    def _notes(self) -> list[str]:
        """A line for each place, and one for each item of which only a part was used."""
        media = self.conversation.media
        shown = [i for i, item in enumerate(media) if item.modality in SEEN]
        lines = []
        for region in self.regions:
            which = f" in picture {shown.index(region.media) + 1}" if len(shown) > 1 else ""
            lines.append(f"{region.label or 'here'}: {_pixels(region)}{which}")
        return [*lines, *self.excerpts]


class Chat:
    """One conversation with a model; each question keeps what was said before.

    Attributes:
        loaded: the model and its template; `Chat(chat.loaded)` is another conversation with the same model.
        answer: the last one; None before the first.
    """

    def __init__(self, loaded: Loaded, system: str | None = None) -> None:
        """system: said to the model before everything else."""
        self.loaded = loaded
        self.answer: Answer | None = None
        self._session = ChatSession(loaded, system=system)

    def ask(
        self,
        question: str | Sequence[str | Region],
        image: Picture | list[Picture] | None = None,
        audio: Sound | list[Sound] | None = None,
        video: StoredFile | list[StoredFile] | None = None,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Answer:
        """The whole answer to one question.

        Args:
            question: text, in which `<box:x1,y1,x2,y2>` and `<point:x,y>` are places in original pixels, as
                `infer.py chat` reads them; or texts and regions in turn, such as those of an earlier answer.
            image: a path, the bytes of a file, a PIL image, an array [height, width(, 3 or 4)] of uint8; a list is
                several. It stays in the conversation, so a later question does not bring it again.
            audio: a path, the bytes of a file, or (samples, sample_rate_hz), samples [n] or [n, channels]; or a list.
            video: a path or the bytes of a file; or a list.
            temperature: 0 takes the likeliest token; above, the smallest set of mass `top_p` is sampled by `seed`.
        Raises:
            ValueError: something that cannot be read or that the model does not take; the conversation is as before.
        """
        pieces = self.stream(
            question,
            image,
            audio,
            video,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        for _ in pieces:
            pass
        assert self.answer is not None
        return self.answer

    def stream(
        self,
        question: str | Sequence[str | Region],
        image: Picture | list[Picture] | None = None,
        audio: Sound | list[Sound] | None = None,
        video: StoredFile | list[StoredFile] | None = None,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """The answer in pieces of text, as they come; when all were taken, `answer` has it whole.

        Takes and raises what `ask` does. An iterator that is left before its end leaves the conversation as it was.
        """
        decoding = Decoding(max_new_tokens, temperature, top_p, seed)
        try:
            given = [*to_media("image", image), *to_media("audio", audio), *to_media("video", video)]
            media = [planned(item, self._template) for item in given]
            items = [item for item, _ in media]
            excerpts = [f"{item.modality}: {one}" for item, plan in media if plan for one in plan.excerpts]
            return self._said([*items, *self._parts(question, items)], decoding, tuple(excerpts))
        except SampleError as error:
            raise ValueError(f"{error}. The question was not asked") from error

    def new(self) -> Chat:
        """Forgets what was said, but for the system text; returns itself: `chat.new().ask(...)`."""
        self._session, self.answer = self._session.afresh(), None
        return self

    @property
    def conversation(self) -> Conversation:
        """What was said, seen and heard so far."""
        return Conversation(self._session.turns)

    def __repr__(self) -> str:
        checkpoint = self.loaded.checkpoint
        name = checkpoint.folder if checkpoint is not None else f"{self.loaded.config.run}, not trained"
        num_answers = sum(turn.role == "assistant" for turn in self._session.turns)
        takes = ", ".join(["text", *self._template.preprocesses])
        return f"<Chat with {name}: takes {takes}; {num_answers} answer{'s' * (num_answers != 1)} so far>"

    @property
    def _template(self) -> ChatTemplate:
        return self.loaded.template

    def _parts(self, question: str | Sequence[str | Region], new: Sequence[MediaRef]) -> list[Part]:
        several = [question] if isinstance(question, str) else question
        if not isinstance(several, list | tuple) or not all(isinstance(part, str | Region) for part in several):
            raise ValueError(f"question: found {question!r:.80}; wanted a text, or a list of texts and regions")
        media = [*self.conversation.media, *new]
        parts: list[Part] = []
        for part in several:
            parts += [part] if isinstance(part, Region) else read_question(part, media)
        return parts

    def _said(self, parts: Sequence[Part], decoding: Decoding, excerpts: tuple[str, ...]) -> Iterator[str]:
        session = self._session
        session.decoding = decoding
        said = ""
        try:
            for piece in session.ask(parts):
                said += piece
                yield piece
        except SampleError as error:
            raise ValueError(f"{error}. The question was not asked") from error
        conversation = Conversation(session.turns)
        named = [one for one in named_regions(conversation, self._template) if not one.is_asked]
        regions = tuple(replace(one.region, label=one.words or None) for one in named)
        self.answer = Answer(said, regions, excerpts, conversation, self._template)


def load_chat(
    checkpoint: str | os.PathLike[str],
    dtype: str | None = None,
    system: str | None = None,
    revision: str | None = None,
) -> Chat:
    """What `mmchat.load` does, which says how it is called."""
    path = Path(checkpoint)
    if not path.exists():
        name = os.fspath(checkpoint)
        if not is_hub_name(name):
            raise ValueError(
                f"there is no {path} (from {Path.cwd()}). Wanted a checkpoint's folder, a run's or stage's folder, a "
                "configuration file (.yaml) for the untrained model, or owner/name of a model on the hub"
            )
        path = download(name, revision)
    elif revision is not None:
        raise ValueError(
            f"found revision {revision!r} and the local {path}; wanted a revision of a model on the hub only"
        )
    return Chat(load(path, dtype), system)


def _pixels(region: Region) -> str:
    """The place in words, in whole pixels."""
    if region.tube is not None:
        return f"a box from {region.tube[0][0]:g} s to {region.tube[-1][0]:g} s"
    kind, values = ("box", region.box) if region.box is not None else ("point", region.point)
    assert values is not None
    at = f" at {region.time_s:g} s" if region.time_s is not None else ""
    return f"{kind} ({', '.join(f'{value:.0f}' for value in values)}){at}"


def _data_uri(image: Image.Image) -> str:
    shown = image.copy()
    shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    out = io.BytesIO()
    shown.save(out, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
