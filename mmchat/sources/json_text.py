"""What stands between a JSON file and its parser: depth, encoding, and words that a person can use."""

from __future__ import annotations

from typing import BinaryIO

import ijson

_MAX_JSON_DEPTH = 64
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class Shallow:
    """A file of JSON, read as long as its lists and objects do not lie too deep: ijson's time and memory grow with the
    square of that. Raises ijson.JSONError.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._depth = 0
        self._is_in_string = False
        self._escape = b""

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        text = (self._escape + data).replace(rb"\\", b"").replace(rb"\"", b"")
        self._escape = b"\\" if text.endswith(b"\\") else b""
        parts = text.split(b'"')
        brackets = b"".join(parts[self._is_in_string :: 2]).translate(None, _NO_BRACKETS)
        self._is_in_string ^= len(parts) % 2 == 0
        num_layers = 0
        while (inner := brackets.replace(b"[]", b"").replace(b"{}", b"")) != brackets and num_layers <= _MAX_JSON_DEPTH:
            brackets = inner
            num_layers += 1
        num_opened = brackets.count(b"[") + brackets.count(b"{")
        self._depth += num_opened - (len(brackets) - num_opened)
        if max(self._depth, num_layers) > _MAX_JSON_DEPTH:
            raise ijson.JSONError(f"lists or objects lie more than {_MAX_JSON_DEPTH} deep")
        return data


def json_fault(error: Exception) -> str:
    """The parser's words without the lines that point at the place."""
    said = str(error).strip().partition("\n")[0][:200]
    if "UTF" in said or isinstance(error, UnicodeDecodeError):
        return "it has bytes that are not UTF-8, which is wanted: convert it"
    if "premature" in said.lower() or "incomplete" in said.lower():
        return f"{said}. Was it cut short? Fetch it again"
    return said


def not_utf8(what: str) -> str:
    return f"{what} is not UTF-8, which is wanted: convert it (iconv -t UTF-8, with -f UTF-16, LATIN1 or what it is)"
