"""Text out of tokens as they come: whole characters only, up to the end marker or a stop text, at a constant cost."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from mmchat.data.chat_template import ChatTemplate

# What decoders write for bytes that are no character, or not yet one.
_BROKEN = "\ufffd"
# So many tokens may wait for the rest of a character. It has at most four bytes, so that more of them are no text.
_MAX_WAITING = 16
_MAX_BYTES = 4


class TextStream:
    """The text of one answer, token by token; together it is what `decode` makes of all of them.

    Blanks at either end are left out, and those in between come with the word behind them.

    Attributes:
        is_over: the end marker or a stop text has been said; what follows is not looked at.
        length: characters that the tokens so far make, blanks at the ends and what is held back included.
        sent: how many of these have been returned, or left out for good.
    """

    def __init__(self, template: ChatTemplate, stop: Sequence[str] = ()) -> None:
        """stop: texts that end the answer; it is cut before the first of them."""
        self.end_ids = template.end_ids
        self.stop = tuple(stop)
        self.is_over = False
        self.length = 0
        self.sent = 0
        self._decoder = _Decoder(template.tokenizer)
        self._maybe_end: list[int] = []  # tokens that may be the beginning of the end marker
        self._held = ""  # text that may be the beginning of a stop text, and blanks
        self._has_begun = False

    def feed(self, token_id: int) -> str:
        """Takes a token and returns the text that is certain by now, often none."""
        if self.is_over:
            return ""
        self._maybe_end.append(token_id)
        text = ""
        while self._maybe_end and self._maybe_end != self.end_ids[: len(self._maybe_end)]:
            text += self._decoder.feed(self._maybe_end.pop(0))
        if self._maybe_end == self.end_ids:
            self._maybe_end = []
            return self._said(text + self._decoder.rest(), is_last=True)
        return self._said(text, is_last=False) if text else ""

    def finish(self) -> str:
        """The text that was still held back, when no token follows."""
        if self.is_over:
            return ""
        text = "".join(self._decoder.feed(token_id) for token_id in self._maybe_end)
        return self._said(text + self._decoder.rest(), is_last=True)

    def _said(self, text: str, is_last: bool) -> str:
        self.length += len(text)
        text = self._held + text
        found = [place for place in map(text.find, self.stop) if place >= 0]
        if found:
            self.length += min(found) - len(text)
            text = text[: min(found)]
        self.is_over = is_last or bool(found)
        known = text if self.is_over else text[: len(text) - self._beginning_of_stop(text)]
        known = known.rstrip()
        self._held = text[len(known) :]
        self.sent = self.length if self.is_over else self.length - len(self._held)
        if not self._has_begun:
            known = known.lstrip()
            self._has_begun = bool(known)
        return known

    def _beginning_of_stop(self, text: str) -> int:
        """How long the longest end of `text` is that begins a stop text."""
        longest = max(map(len, self.stop), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self.stop)), 0)


class _Decoder:
    """Tokens to text, a few at a time: those of the last text are decoded again, because a blank may hang on them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._before: list[int] = []  # tokens of the last text
        self._waiting: list[int] = []  # tokens whose text is not known yet

    def feed(self, token_id: int) -> str:
        self._waiting.append(token_id)
        text = self._text(len(self._waiting))
        if text.endswith(_BROKEN):
            return self._cut() if len(self._waiting) > _MAX_WAITING else ""
        if not text:  # a special token, which says nothing
            self._waiting.pop()
            return ""
        return self._take(len(self._waiting), text)

    def rest(self) -> str:
        return self._take(len(self._waiting), self._text(len(self._waiting)))

    def _cut(self) -> str:
        """Text of bytes that are none; the last ones stay, as they may become a character."""
        whole = self._text(len(self._waiting))
        latest = len(self._waiting) - _MAX_BYTES
        for length in range(latest, latest - _MAX_BYTES, -1):
            text = self._text(length)
            if text + self._decode(self._waiting[length:]) == whole:  # no character lies across
                return self._take(length, text)
        return self._take(latest, self._text(latest))

    def _take(self, length: int, text: str) -> str:
        if length:
            self._before, self._waiting = self._waiting[:length], self._waiting[length:]
        return text

    def _text(self, length: int) -> str:
        """What the first waiting tokens add to those before them."""
        return self._decode(self._before + self._waiting[:length])[len(self._decode(self._before)) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""
