"""Requests that mean a server harm, or come at a bad time: each gets its status, and the next is answered.

The servers are real ones in threads, spoken to over sockets.
"""

from __future__ import annotations

import asyncio
import io
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
import uvicorn
from PIL import Image

from mmchat.inference.load import Loaded, load
from mmchat.serving.engine import Answer, Ask, Engine
from mmchat.serving.limits import Limits
from mmchat.serving.server import Server, Settings, _protocol
from tests import by_heart, odd_media, range_server, serving, tiny
from tests.runs import wait_for
from tests.serving import audio, image, user, video

CHAT = "/v1/chat/completions"
KEY = "a-key-for-tests-0123456789"
TOO_LARGE = 300_000
LIMITS = Limits(
    body_bytes=TOO_LARGE,
    all_bodies_bytes=2 * TOO_LARGE,
    images=2,
    image_pixels=10_000,
    image_aspect=20,
    audio_duration_s=5,
    video_duration_s=5,
    video_frames=50,
    parts=20,
    messages=10,
    characters=2000,
    new_tokens=1500,
    default_new_tokens=8,
    decode_timeout_s=60,
)


@pytest.fixture(scope="module")
def loaded(tiny_folder: Any) -> Loaded:
    return load("configs/tiny.yaml", "float32")


@pytest.fixture(scope="module")
def server(loaded: Loaded) -> Iterator[Server]:
    settings = Settings(port=0, limits=LIMITS, max_running=2, max_waiting=0)
    with serving.in_thread(settings, lambda: loaded) as running:
        assert running.ready.wait(300)
        yield running


def ask(server: Server, *messages: dict, headers: dict[str, str] | None = None, **options: Any) -> requests.Response:
    body = {"messages": list(messages), **options}
    return requests.post(server.url + CHAT, json=body, headers=headers, timeout=120, stream=bool(options.get("stream")))


def png(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("1", (width, height)).save(out, "PNG")
    return out.getvalue()


def many_scans() -> bytes:
    """A picture of few bytes that takes a minute to decode in full size."""
    out = io.BytesIO()
    Image.new("L", (64, 64)).save(out, "JPEG", progressive=True)
    data = out.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xc4") : -2] * 50 + data[-2:]


def url_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


SMALL = image(by_heart.picture())
HOSTILE = {
    "a bomb of pixels": ([user(image(png(5000, 5000)))], {}, 400, "picture too large"),
    "one pixel": ([user(image(png(1, 1)))], {}, 400, "picture too small: 1 x 1"),
    "a strip": ([user(image(png(2000, 4)))], {}, 400, "picture too elongated"),
    "no picture": ([user(image(b"GIF89a" + b"\0" * 50))], {}, 400, "undecodable image: found bytes"),
    "many scans": ([user(image(many_scans()))], {}, 400, "too many scans: found a picture that takes too long"),
    "cut off": ([user(image(by_heart.picture("JPEG")[:300]))], {}, 400, "undecodable image"),
    "a picture as sound": ([user(audio(by_heart.picture()))], {}, 400, "audio"),
    "a sound as a clip": ([user(video(tiny.tone(440, 0.2)))], {}, 400, "no video track"),
    "noise as a clip": ([user(video(bytes(range(256)) * 9))], {}, 400, "undecodable video: found bytes"),
    "too long a sound": ([user(audio(odd_media.silent_flac(60)))], {}, 400, "audio too long: 60.000 s"),
    "too many frames": ([user(video(tiny.clip("left", 60, 30)))], {}, 400, "60 frames, wanted up to 50"),
    "too many pictures": ([user(SMALL, SMALL, SMALL)], {}, 400, "found 3 pictures; wanted up to 2"),
    "too many parts": ([user(*["a"] * 21)], {}, 400, "found 21 parts"),
    "too many messages": ([user("a")] * 11, {}, 400, "found 11 messages"),
    "too much text": ([user("a" * 2001)], {}, 400, "found 2001 characters"),
    "a million answers": ([user("a")], {"n": 10**6}, 400, "found 1000000 answers"),
    "more answers than there are places": ([user("a")], {"n": 3}, 400, "found 3 answers; wanted up to 2"),
    "a billion tokens": ([user("a")], {"max_tokens": 10**9}, 400, "found 1000000000 tokens"),
    "too large a body": ([user("a" * TOO_LARGE)], {}, 413, "wanted up to 300000 bytes"),
    "this machine": ([user(url_part("http://127.0.0.1:8000/x.png"))], {}, 400, "this server fetches nothing"),
    "the metadata service": ([user(url_part("http://169.254.169.254/"))], {}, 400, "this server fetches nothing"),
    "a file": ([user(url_part("file:///etc/passwd"))], {}, 400, "wanted data:"),
    "a path": ([user(url_part("/etc/passwd"))], {}, 400, "wanted data:"),
    "data without base64": ([user(url_part("data:image/png,abc"))], {}, 400, "wanted data:TYPE;base64"),
    "bad base64": ([user(url_part("data:image/png;base64,@@@"))], {}, 400, "no valid base64"),
    "no bytes": ([user(url_part("data:image/png;base64,"))], {}, 400, "empty image"),
    "a region of no picture": ([user({"type": "region", "image": 0, "point": [1, 1]})], {}, 400, "picture 0 of 0"),
    "a region outside": (
        [user(SMALL, {"type": "region", "image": 0, "box": [0, 0, 9000, 9]})], {}, 400, "region outside the picture"
    ),
    "a region without a shape": ([user(SMALL, {"type": "region", "image": 0})], {}, 400, "either box or point"),
    "a picture of the system's": ([{**user(SMALL), "role": "system"}, user("a")], {}, 400, "only a user's message"),
    "the system in the middle": ([user("a"), {"role": "system", "content": "b"}, user("a")], {}, 400, "only the first"),
    "the assistant last": ([user("a"), {"role": "assistant", "content": "b"}], {}, 400, "the last message"),
    "an unknown field": ([user("a")], {"top_k": 3}, 400, "top_k: this server does not know it"),
    "a schema": ([user("a")], {"response_format": {"type": "json_schema"}}, 400, "response_format"),
    "biases": ([user("a")], {"logit_bias": {"5": 3}}, 400, "logit_bias"),
    "a temperature of 1e9": ([user("a")], {"temperature": 1e9}, 400, "temperature"),
    "five stops": ([user("a")], {"stop": list("abcde")}, 400, "found 5 texts"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_requests(server: Server, case: str) -> None:
    messages, options, status, said = HOSTILE[case]
    answered = ask(server, *messages, **options)
    error = answered.json()["error"]
    assert answered.status_code == status and said in error["message"], error
    assert error["type"] == "invalid_request_error" and answered.headers["X-Request-Id"].startswith("req_")
    # Nothing of the libraries behind it, of this machine's paths or its memory.
    for inside in ("0x", "site-packages", "mmchat/", "PIL", "Error", "avcodec", "Errno", "<"):
        assert inside not in error["message"]
    assert ask(server, user("Hello"), max_tokens=2).json()["usage"]["completion_tokens"] <= 2


def raw(server: Server, data: bytes) -> socket.socket:
    connection = socket.create_connection((urlsplit(server.url).hostname, urlsplit(server.url).port), timeout=60)
    connection.sendall(data)
    return connection


def read_all(connection: socket.socket) -> bytes:
    found = b""
    with connection:
        while data := connection.recv(65536):
            found += data
    return found


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_bodies_that_are_wrong_as_bytes(server: Server) -> None:
    def status(data: bytes, **headers: str) -> int:
        kinds = {"Content-Type": "application/json", **headers}
        return requests.post(server.url + CHAT, data=data, headers=kinds, timeout=60).status_code

    assert status(b"{") == status(b"\xff") == status(b"[" * 100_000) == status(b"") == status(b"null") == 400
    assert status(b'{"messages": [{"role": "user", "content": "\\ud800"}]}') == 400
    assert status(b"{}", **{"Content-Type": "text/plain"}) == status(b"{}", **{"Content-Encoding": "gzip"}) == 415
    # In chunks, nobody knows the size beforehand.
    endless = raw(server, HEAD + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
    for _ in range(5):
        endless.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
    endless.sendall(b"0\r\n\r\n")
    assert read_all(endless).startswith(b"HTTP/1.1 413")
    asking = raw(server, HEAD + b"Content-Length: 99999999\r\nExpect: 100-continue\r\n\r\n")
    assert asking.recv(100).startswith(b"HTTP/1.1 413")  # without leave to send
    asking.close()
    assert ask(server, user("Hello")).status_code == 200
    assert server.service.holdings.held == 0


def test_clients_that_are_slow_on_purpose(loaded: Loaded) -> None:
    """Half a head, half a body, and nothing at all: each is waited for only so long."""
    settings = Settings(port=0, limits=Limits(head_timeout_s=1, body_timeout_s=1))
    with serving.in_thread(settings, lambda: loaded) as slow:
        assert slow.ready.wait(300)
        head = raw(slow, b"GET /health HTTP/1.1\r\nHost: loc")
        body = raw(slow, HEAD + b"Content-Length: 100\r\n\r\n{")
        silent = raw(slow, b"")
        assert read_all(head) == read_all(silent) == b""
        assert body.recv(100).startswith(b"HTTP/1.1 408")
        body.close()


def test_a_client_that_never_reads_is_dropped() -> None:
    """It gets what the sockets hold, and its connection is cut after the time for writing."""
    is_gone = threading.Event()

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        gone = asyncio.create_task(receive())
        while not gone.done():
            await send({"type": "http.response.body", "body": b" " * 2**20, "more_body": True})
            await asyncio.sleep(0)
        is_gone.set()

    listening = socket.create_server(("127.0.0.1", 0))
    limits = Limits(write_timeout_s=0.5)
    config = uvicorn.Config(endless, http=_protocol(limits), lifespan="off", log_config=None)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, args=([listening],))
    thread.start()
    try:
        client = socket.create_connection(listening.getsockname())
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert is_gone.wait(60)
        client.close()
    finally:
        running.should_exit = True
        thread.join(60)


def test_a_full_server_says_when_to_come_back(server: Server) -> None:
    streams = [ask(server, user("Tell"), max_tokens=1500, stream=True) for _ in range(2)]
    try:
        assert [stream.status_code for stream in streams] == [200, 200]
        full = ask(server, user("Hello"))
        assert full.status_code == 503 and int(full.headers["Retry-After"]) >= 1
        assert full.json()["error"]["code"] == "server_full"
        assert requests.get(f"{server.url}/ready", timeout=60).status_code == 200
    finally:
        for stream in streams:
            stream.close()
    wait_for(lambda: ask(server, user("Hello")).status_code == 200)


def test_who_leaves_is_cancelled(server: Server) -> None:
    stats = server.service.stats
    wait_for(lambda: server.service.num_running == 0 and stats()["running"] == 0)
    before = stats()["cancelled_total"]
    stream = ask(server, user("Tell"), max_tokens=1500, stream=True)
    assert next(stream.iter_lines())
    stream.close()
    whole = json.dumps({"messages": [user("Tell")], "max_tokens": 1500}).encode()
    asking = raw(server, HEAD + b"Content-Length: %d\r\n\r\n" % len(whole) + whole)
    wait_for(lambda: server.service.num_running == 1 and stats()["running"] + stats()["waiting"] >= 1)
    asking.close()
    wait_for(lambda: stats()["cancelled_total"] == before + 2)
    wait_for(lambda: server.service.num_running == 0 and stats()["running"] == 0)
    assert server.service.holdings.held == 0


def test_who_leaves_before_all_is_there_is_not_waited_for(loaded: Loaded, caplog: pytest.LogCaptureFixture) -> None:
    """While a file is fetched from a server that never answers, and in the middle of the form of the login page."""
    silent = socket.create_server(("127.0.0.1", 0))
    domain = f"localhost:{silent.getsockname()[1]}"
    settings = Settings(port=0, domains=(domain,), limits=Limits(fetch_timeout_s=3000))
    with serving.in_thread(settings, lambda: loaded, is_allowed=lambda address: True) as running:
        assert running.ready.wait(300)
        body = json.dumps({"messages": [user(url_part(f"http://{domain}/x.png"), "What?")]}).encode()
        asking = raw(running, HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        fetching, _ = silent.accept()
        asking.close()
        wait_for(lambda: running.service.num_running == 0)
        assert fetching.recv(1000).startswith(b"GET /x.png") and fetching.recv(1000) == b""
        running.service.access.key = KEY
        raw(running, b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nkey").close()
        counted = running.service.metrics.requests.labels("/login", "499")
        wait_for(lambda: counted._value.get() == 1)
    assert "Traceback" not in caplog.text
    silent.close()


def test_hosts_and_origins(server: Server) -> None:
    """A page of another site reaches a server on this machine through the user's browser."""
    refused = ask(server, user("a"), headers={"Host": "evil.example:8000"})
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "host_not_allowed"
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        refused = ask(server, user("a"), headers=headers)
        assert refused.status_code == 403, headers
    assert ask(server, user("a"), headers={"Origin": server.url}).status_code == 200
    options = requests.options(server.url + CHAT, headers={"Origin": "https://evil.example"}, timeout=60)
    assert not any(name.lower().startswith("access-control") for name in options.headers)


def test_the_page_loads_its_own_files_alone(server: Server) -> None:
    page = requests.get(server.url, timeout=60)
    policy = page.headers["Content-Security-Policy"]
    assert page.status_code == 200 and "default-src 'none'" in policy and "unsafe" not in policy
    assert "script-src 'self';" in policy and page.headers["X-Content-Type-Options"] == "nosniff"
    for name in ("..%2f..%2fapp.py", "%2e%2e/app.py", "app.py", "..%5capp.py"):
        assert requests.get(f"{server.url}/page/{name}", timeout=60).status_code == 404


def test_a_picture_of_an_allowed_domain(loaded: Loaded, tmp_path: Any) -> None:
    (tmp_path / "picture.png").write_bytes(by_heart.picture())
    with range_server.serving(tmp_path) as media:
        domain = f"localhost:{media.server_port}"
        url = f"http://{domain}/picture.png"
        settings = Settings(port=0, domains=(domain,))
        with serving.in_thread(settings, lambda: loaded, is_allowed=lambda address: True) as running:
            assert running.ready.wait(300)
            answered = ask(running, user(url_part(url), "What?"), max_tokens=1)
            sent = ask(running, user(image(by_heart.picture()), "What?"), max_tokens=1)
            assert answered.json()["usage"]["prompt_tokens"] == sent.json()["usage"]["prompt_tokens"]
            other = ask(running, user(url_part(url.replace("localhost", "127.0.0.1")), "What?"))
            assert other.status_code == 400 and other.json()["error"]["code"] == "domain_not_allowed"
            assert running.service.holdings.held == 0
        with serving.in_thread(settings, lambda: loaded) as running:
            assert running.ready.wait(300)
            private = ask(running, user(url_part(url), "What?"))
            assert private.status_code == 400 and private.json()["error"]["code"] == "address_not_allowed"


class _Failing(Engine):
    def submit(self, ask: Ask) -> Answer:
        raise RuntimeError("a secret at /root/somewhere 0x7f00")


def test_a_fault_of_ours_is_an_id_and_a_log_entry(loaded: Loaded, caplog: pytest.LogCaptureFixture) -> None:
    with serving.in_thread(Settings(port=0), lambda: loaded) as running:
        assert running.ready.wait(300)
        failing = _Failing(loaded)
        failing.start()
        running.service.close()
        running.service.open("tiny", loaded, failing)
        answered = ask(running, user("Hello"))
    message = answered.json()["error"]["message"]
    assert answered.status_code == 500 and "secret" not in message
    assert answered.headers["X-Request-Id"] in message and answered.headers["X-Request-Id"] in caplog.text
    assert "RuntimeError: a secret" in caplog.text


def test_with_a_key_every_route_but_health_needs_it(loaded: Loaded, tmp_path: Any) -> None:
    path = tmp_path / "key"
    path.write_text(KEY)
    with serving.in_thread(Settings(port=0, key_file=path, hosts=("chat.example",)), lambda: loaded) as running:
        assert running.ready.wait(300)
        url, chat = running.url, {"json": {"messages": [user("a")], "max_tokens": 1}}
        for route in ("/", "/page/index.html", "/ready", "/metrics", "/openapi.json", "/v1/models", "/nothing"):
            assert requests.get(url + route, timeout=60).status_code == 401, route
        assert requests.get(f"{url}/health", timeout=60).status_code == 200
        for wrong in ("Bearer", "Bearer ", f"Bearer {KEY[:-1]}", f"Basic {KEY}", f"Bearer {KEY} x"):
            assert ask(running, user("a"), headers={"Authorization": wrong}).status_code == 401
        assert ask(running, user("a"), headers={"Authorization": f"Bearer {KEY}"}).status_code == 200

        with requests.Session() as browser:
            form = browser.get(url, timeout=60)
            assert 'action="/login"' in form.text and "<script" not in form.text
            assert browser.post(f"{url}/login", {"key": "wrong"}, timeout=60).status_code == 401
            assert browser.post(f"{url}/login", {str(i): "x" for i in range(99)}, timeout=60).status_code == 401
            came = browser.post(f"{url}/login", {"key": KEY}, allow_redirects=False, timeout=60)
            said = came.headers["Set-Cookie"]
            assert came.status_code == 303 and "HttpOnly" in said and "SameSite=Strict" in said and KEY not in said
            assert browser.get(url, timeout=60).status_code == 200
            for origin, status in ((url, 200), ("https://chat.example", 200), ("https://evil.example", 403)):
                answered = browser.post(url + CHAT, headers={"Origin": origin}, timeout=60, **chat)
                assert answered.status_code == status, origin
            assert browser.post(url + CHAT, timeout=60, **chat).status_code == 403  # nothing says which page asks
        forged = said.partition("=")[2].partition(";")[0]
        for value in (f"9{forged}", f"{forged}0", "1.a", "", "a" * 4000):
            headers = {"Cookie": f"mmchat={value}"}
            assert requests.get(f"{url}/v1/models", headers=headers, timeout=60).status_code == 401


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (None, {"host": "0.0.0.0"}, "Give --api-key-file F, or --no-key-needed"),
        ("", {}, "wanted an API key on one line"),
        ("two words", {}, "wanted an API key on one line"),
    ],
)
def test_refusals_at_the_start(tmp_path: Any, content: str | None, settings: dict, message: str) -> None:
    if content is not None:
        (tmp_path / "key").write_text(content)
        settings = {**settings, "key_file": tmp_path / "key"}
    with pytest.raises(ValueError, match=message):
        Server(Settings(port=0, **settings), lambda: pytest.fail("no model is needed"))


def test_loading_and_ending(loaded: Loaded) -> None:
    """It lives before its model is there; told to end, it finishes what runs and sends others away."""
    is_loaded = threading.Event()

    def load_late() -> Loaded:
        assert is_loaded.wait(300)
        return loaded

    limits = Limits(ping_s=0.001)  # shorter than a step: comments stand between the events, and before the first
    with serving.in_thread(Settings(port=0, limits=limits, drain_s=500), load_late) as running:
        assert requests.get(f"{running.url}/health", timeout=60).json() == {"status": "ok"}
        assert requests.get(f"{running.url}/ready", timeout=60).status_code == 503
        early = ask(running, user("a"))
        assert early.status_code == 503 and early.json()["error"]["code"] == "model_loading"
        assert early.headers["Retry-After"]
        is_loaded.set()
        assert running.ready.wait(300)
        assert requests.get(f"{running.url}/ready", timeout=60).json() == {"status": "ready"}

        stream = ask(running, user("Tell"), max_tokens=800, stream=True)
        lines = stream.iter_lines()
        assert next(lines)
        running.stop()
        late = ask(running, user("a"))
        assert late.status_code == 503 and late.json()["error"]["code"] == "server_ending"
        assert requests.get(f"{running.url}/ready", timeout=60).status_code == 503
        said = list(lines)
        assert said[-2] == b"data: [DONE]" and b": ping" in said
        assert any(b'"finish_reason": "length"' in line for line in said)


def test_what_loading_raises_ends_the_server() -> None:
    def fail() -> Loaded:
        raise ValueError("there is no checkpoint")

    running = Server(Settings(port=0), fail)
    with pytest.raises(ValueError, match="there is no checkpoint"):
        running.run()
