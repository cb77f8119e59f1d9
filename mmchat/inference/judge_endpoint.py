"""A judge behind an OpenAI-compatible endpoint: one chat completion a question, with time limits and back-off.

The standard library's HTTP client is enough for it. Redirects are not followed, so that a key goes nowhere else.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from mmchat.errors import SampleError

MAX_REPLY_BYTES = 4 * 2**20
MAX_ERROR_LENGTH = 200  # characters of an endpoint's error that are shown
MAX_WAIT_S = 60.0
AGAIN = {408, 409, 425, 429}  # and all 5xx
# Of these, the next question would get the same. Others, such as 400 for a text that is too long, are one question's.
STOP = {
    401: "the API key is missing or wrong; see --api-key-file",
    402: "the endpoint wants to be paid first",
    404: "is the URL right (it mostly ends with /v1), and has the endpoint this model?",
    405: "is the URL right? It mostly ends with /v1",
    407: "the proxy wants a password",
}


@dataclass(frozen=True)
class Reply:
    """What an endpoint answered.

    Attributes:
        model: the id of the model that answered, as the endpoint says; "" where it says nothing.
        finish_reason: "length" where the text was cut.
        prompt_tokens, completion_tokens: as the endpoint counts them; None where it does not.
    """

    text: str
    model: str = ""
    finish_reason: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Judge(Protocol):
    """Whoever gives verdicts. `ask` is called from several threads.

    Attributes:
        model: the pinned id; part of what a verdict is cached by.
        place: where it is, for the result.
        num_requests: how often something was sent so far, second attempts included.
    """

    model: str
    place: str
    num_requests: int

    def ask(self, request: dict[str, Any]) -> Reply:
        """The reply to `messages` and further fields of a chat completion.

        Raises SampleError where this question gets none, ValueError where no question will.
        """

    def stop(self) -> None:
        """Makes calls of `ask` that wait for another attempt give up."""


class _Again(Exception):
    """An attempt that failed and may succeed later; `after_s` is how long the endpoint wants one to wait."""

    def __init__(self, reason: str, detail: str, after_s: float = 0.0) -> None:
        super().__init__(reason, detail)
        self.problem = SampleError(reason, detail)
        self.after_s = after_s


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None  # the redirect then arrives as an HTTPError


class Endpoint:
    """Any server with OpenAI's /chat/completions: OpenAI's own, vLLM, llama.cpp, Ollama and others."""

    def __init__(
        self,
        url: str,
        model: str,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        attempts: int = 6,
        first_wait_s: float = 1.0,
    ) -> None:
        """url: of the API, as https://HOST/v1. timeout_s: of one attempt, from the connection to the last byte.

        first_wait_s: before the second attempt; each further wait is twice as long, up to a minute, or as long as the
        endpoint says. Raises ValueError for a URL that cannot be used.
        """
        self.place = _checked(url)
        self.model, self.num_requests = model, 0
        self._url = self.place if self.place.endswith("/chat/completions") else f"{self.place}/chat/completions"
        self._key, self._timeout_s = api_key, timeout_s
        # JSON may escape a slash with a backslash.
        self._secret = re.compile(r"\\?".join(map(re.escape, api_key))) if api_key else None
        self._attempts, self._first_wait_s = attempts, first_wait_s
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._stopped, self._lock = threading.Event(), threading.Lock()

    def ask(self, request: dict[str, Any]) -> Reply:
        """See `Judge`. Statuses 408, 409, 425, 429 and 5xx, timeouts and broken connections are tried again."""
        body = json.dumps({"model": self.model, **request}).encode()
        wait_s, attempt = self._first_wait_s, 1
        while True:
            try:
                return self._once(body)
            except _Again as again:
                # Between half and all of it, so that parallel requests do not come back together.
                pause_s = min(max(again.after_s, wait_s * random.uniform(0.5, 1)), MAX_WAIT_S)
                if attempt == self._attempts or self._stopped.wait(pause_s):
                    raise again.problem from again
            wait_s, attempt = 2 * wait_s, attempt + 1

    def stop(self) -> None:
        self._stopped.set()

    def _once(self, body: bytes) -> Reply:
        """One attempt. Raises _Again, SampleError or ValueError."""
        headers = {"Content-Type": "application/json", "User-Agent": "mmchat"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        with self._lock:
            self.num_requests += 1
        deadline = time.monotonic() + self._timeout_s
        try:
            request = urllib.request.Request(self._url, body, headers)
            with self._opener.open(request, timeout=self._timeout_s) as response:
                return self._reply(_read(response, deadline).decode("utf-8", "replace"))
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error, deadline) from None
        except (OSError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise ValueError(f"{self.place} has no valid certificate: {cause.verify_message}") from None
            if isinstance(cause, TimeoutError):
                raise _Again("timeout", f"no whole reply within {self._timeout_s:g} s") from None
            raise _Again("broken connection", f"{cause!s:.{MAX_ERROR_LENGTH}}") from None

    def _hidden(self, text: str) -> str:
        """Without the key where the endpoint repeats it."""
        return text if self._secret is None else self._secret.sub("***", text)

    def _reply(self, text: str) -> Reply:
        """Raises _Again for what is no chat completion, such as a proxy's page."""
        try:
            found = json.loads(text)
            choice = found["choices"][0]
            said = choice["message"]["content"]
            if said is not None and not isinstance(said, str):
                raise TypeError(f"content is {said!r:.80}")
            usage = found.get("usage") or {}
            tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            detail = (
                f"wanted a chat completion ({type(error).__name__}), found {self._hidden(text)!r:.{MAX_ERROR_LENGTH}}"
            )
            raise _Again("unreadable reply", detail) from None
        names = [found.get("model"), choice.get("finish_reason")]
        model, finish_reason = (self._hidden(_clean(name)) if isinstance(name, str) else "" for name in names)
        prompt, completion = (count if type(count) is int else None for count in tokens)
        # A refusal has no content: a reply all the same, in which there is no verdict.
        return Reply(self._hidden(_clean(said or "")), model, finish_reason, prompt, completion)

    def _refusal(self, error: urllib.error.HTTPError, deadline: float) -> Exception:
        """What a status other than success means."""
        try:
            body = self._hidden(_read(error, deadline).decode("utf-8", "replace"))
        except (OSError, http.client.HTTPException):
            body = ""
        said = " ".join(body.split())[:MAX_ERROR_LENGTH]
        if error.code in AGAIN or error.code >= 500:
            return _Again(f"http {error.code}", said, _after_s(error.headers.get("Retry-After")))
        if error.code in STOP:
            return ValueError(f"{self.place} answers {error.code}: {STOP[error.code]}. It says: {said}")
        if 300 <= error.code < 400:
            target = self._hidden(str(error.headers.get("Location")))[:MAX_ERROR_LENGTH]
            return ValueError(f"{self.place} sends one on to {target!r}, which is not followed; name the right URL")
        return SampleError(f"http {error.code}", said)


class ReplyCache:
    """A file for each reply, by a hash over the model's id and the whole request; processes may share the folder."""

    def __init__(self, folder: Path, model: str) -> None:
        self._folder, self._model = folder, model

    def name(self, request: dict[str, Any]) -> str:
        return json_sha256({"model": self._model, **request})

    def find(self, name: str) -> Reply | None:
        """None where there is none, or a damaged one."""
        try:
            reply = Reply(**json.loads(self._path(name).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return reply if isinstance(reply.text, str) else None

    def keep(self, name: str, reply: Reply) -> None:
        """Seen whole or not at all; one that a crash of the machine takes is asked for again."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(asdict(reply), ensure_ascii=False), encoding="utf-8")
        partial.replace(path)

    def _path(self, name: str) -> Path:
        return self._folder / name[:2] / f"{name}.json"


def json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_key(path: Path) -> str:
    """The API key of a file that holds nothing else. Raises ValueError, which does not show it, and OSError."""
    try:
        key = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        key = ""
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise ValueError(f"{path}: wanted an API key on one line, without blanks, and nothing else")
    return key


def _checked(url: str) -> str:
    """The URL without a slash at its end. Raises ValueError, which does not show what may be a password."""
    parts = urlsplit(url)
    _ = parts.port  # raises ValueError where it is no number
    if parts.scheme not in ("http", "https") or not parts.hostname or not re.fullmatch(r"[\x21-\x7e]+", url):
        raise ValueError("the endpoint must be a URL such as https://HOST/v1 or http://localhost:8000/v1")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError(
            f"the endpoint at {parts.hostname} must be named without user, ? and #; a key goes into --api-key-file"
        )
    return url.rstrip("/")


def _read(response: Any, deadline: float) -> bytes:
    """The whole body. Raises TimeoutError behind the deadline, also where a little comes now and then."""
    data = b""
    while piece := response.read1(2**16):
        data += piece
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(data) > MAX_REPLY_BYTES:
            raise _Again("unreadable reply", f"wanted at most {MAX_REPLY_BYTES:,} bytes, found more")
    return data


def _after_s(header: str | None) -> float:
    """Seconds of a Retry-After header; 0 where there are none. A date in it is not read."""
    return float(header) if header is not None and re.fullmatch(r"\d{1,6}(\.\d+)?", header) else 0.0


def _clean(text: str) -> str:
    """Without halves of characters, which JSON can hold and a file cannot."""
    return text.encode("utf-8", "replace").decode()
