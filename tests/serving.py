"""Servers for tests: the real one in a thread, and `infer.py serve` as a process."""

from __future__ import annotations

import base64
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mmchat.inference.load import Loaded
from mmchat.serving.fetch import Address, is_public
from mmchat.serving.server import Server, Settings
from tests import tiny
from tests.runs import ENVIRONMENT


@contextmanager
def in_thread(
    settings: Settings, load_model: Callable[[], Loaded], is_allowed: Callable[[Address], bool] = is_public
) -> Iterator[Server]:
    """A server of its own in a thread, begun at once; its model may not be loaded yet."""
    server = Server(settings, load_model, is_allowed)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        server.stop()
        thread.join(60)
        assert not thread.is_alive(), "the server does not end"


@contextmanager
def as_process(*arguments: object) -> Iterator[tuple[str, list[str]]]:
    """`infer.py serve ... --port 0`: its URL, and the lines that it has logged. Ends by SIGTERM, with status 0."""
    command = [sys.executable, "infer.py", "serve", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(command, cwd=tiny.ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    is_ready = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if "is ready" in line:
                is_ready.set()
        is_ready.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        is_ready.wait(300)
        found = re.search(r"(http://\S+) is ready", "".join(lines))
        assert found, "".join(lines)
        yield found[1], lines
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, "".join(lines)
    finally:
        process.kill()
        process.wait()
        reader.join()


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_uri(data)}}


def video(data: bytes) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": data_uri(data, "video/mp4")}}


def audio(data: bytes) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def user(*parts: dict[str, Any] | str) -> dict[str, Any]:
    return {"role": "user", "content": [text(part) if isinstance(part, str) else part for part in parts]}
