"""A chat-completions server on this machine that gives known verdicts, and faults on demand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class JudgeServer(ThreadingHTTPServer):
    """Answers POST /v1/chat/completions.

    Attributes:
        says: what the judge says of the JSON object in the user's message; a dict is the whole body of the reply.
        requests: (headers, body) of everything that was asked.
        faults: statuses, with headers and body, that the next requests get.
        always: the status of every request; 0 for none.
        wait_s: before each reply; drip: whether its bytes come one by one, with that wait before each.
        key: what the Authorization header must be.
        num_said: replies that were sent whole.
    """

    daemon_threads = True

    def __init__(self, says: Callable[[dict[str, str]], str | dict[str, Any]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.says = says
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.faults: list[tuple[int, dict[str, str], str]] = []
        self.always, self.wait_s, self.drip = 0, 0.0, False
        self.key: str | None = None
        self.num_said = self.num_at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def shown(self) -> list[dict[str, str]]:
        """What the judge was shown, in the order of the requests."""
        return [json.loads(body["messages"][-1]["content"]) for _, body in self.requests]

    def handle_error(self, request: Any, client_address: Any) -> None:
        return  # a client that did not wait


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: JudgeServer

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((dict(self.headers), body))
            server.num_at_once += 1
            server.most_at_once = max(server.most_at_once, server.num_at_once)
            fault = server.faults.pop(0) if server.faults else None
        try:
            self._answer(body, fault)
        finally:
            with server.lock:
                server.num_at_once -= 1

    def _answer(self, body: dict[str, Any], fault: tuple[int, dict[str, str], str] | None) -> None:
        server, given = self.server, self.headers.get("Authorization")
        if self.path != "/v1/chat/completions":
            self._send(404, "no such page")
        elif server.key is not None and given != server.key:
            self._send(401, json.dumps({"error": {"message": f"Incorrect API key: {given}. " + "x" * 500}}))
        elif fault is not None:
            self._send(fault[0], fault[2], fault[1])
        elif server.always:
            self._send(server.always, "out of order")
        else:
            time.sleep(0 if server.drip else server.wait_s)
            said = server.says(json.loads(body["messages"][-1]["content"]))
            if isinstance(said, str):
                choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
                usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
                said = {"model": body["model"], "choices": [choice], "usage": usage}
            self._send(200, json.dumps(said))
            server.num_said += 1

    def _send(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        data = text.encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        for piece in [data[i : i + 1] for i in range(len(data))] if self.server.drip else [data]:
            self.wfile.write(piece)
            time.sleep(self.server.wait_s if self.server.drip else 0)

    def log_message(self, *_: object) -> None:
        return


@contextmanager
def judging(says: Callable[[dict[str, str]], str | dict[str, Any]]) -> Iterator[JudgeServer]:
    server = JudgeServer(says)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
