"""One process that serves: sockets with time limits, a model loaded behind them, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mmchat.inference.load import Loaded, load
from mmchat.models.packed import pack
from mmchat.serving.access import Access, is_loopback, load_key
from mmchat.serving.app import build_app
from mmchat.serving.engine import Engine
from mmchat.serving.fetch import Address, Fetcher, is_public
from mmchat.serving.limits import Limits
from mmchat.serving.service import Service, tightened

_LOG = logging.getLogger("mmchat.serving")
_HEAD_BYTES = 64 * 1024


@dataclass(frozen=True)
class Settings:
    """How a server is run.

    Attributes:
        key_file: holds the key that clients must have.
        is_open: serve other machines without a key.
        domains: that media may be fetched from. hosts: names that the server is reached by.
        name: of the model, for clients; by default that of its run.
        temperature: where a request names none.
        drain_s: how long running answers may go on once the server is told to end.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    key_file: Path | None = None
    is_open: bool = False
    domains: Collection[str] = ()
    hosts: Collection[str] = ()
    name: str | None = None
    temperature: float = 0.0
    max_running: int = 16
    max_waiting: int = 64
    drain_s: float = 30.0
    limits: Limits = field(default_factory=Limits)


def read_access(settings: Settings) -> Access:
    """Raises ValueError for a key that cannot be used, and where other machines would be served without one."""
    key = None
    if settings.key_file is not None:
        key, warnings = load_key(settings.key_file)
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
    elif not is_loopback(settings.host) and not settings.is_open:
        raise ValueError(
            f"on {settings.host} every machine that reaches this one could use the model. Give --api-key-file F, or "
            "--no-key-needed if that is what you want, or --host 127.0.0.1"
        )
    named = () if is_loopback(settings.host) else (settings.host,)
    return Access(key, (*settings.hosts, *named))


class Server:
    """Listens from the beginning, loads the model beside that, and ends when it is told to.

    Args:
        load_model: called in a thread; what it raises ends the server.
        is_allowed: judges the addresses that media is fetched from.
    Raises:
        ValueError: settings that do not go together, or a port that is taken.
    """

    def __init__(
        self, settings: Settings, load_model: Callable[[], Loaded], is_allowed: Callable[[Address], bool] = is_public
    ) -> None:
        # More answers to one request than there are places would never begin.
        choices = min(settings.limits.choices, settings.max_running + settings.max_waiting)
        limits = settings.limits.model_copy(update={"choices": choices})
        self.settings = replace(settings, limits=limits)
        self.service = Service(read_access(settings), limits, Fetcher(settings.domains, limits, is_allowed))
        self.ready = threading.Event()  # the model is loaded, or has failed to be
        self._load_model = load_model
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._socket = _listen(settings.host, settings.port)
        config = uvicorn.Config(
            build_app(self.service),
            http=_protocol(limits),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=max(1, round(limits.head_timeout_s)),
            timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=_HEAD_BYTES,
        )
        self._uvicorn = _Uvicorn(config, self.stop)

    @property
    def url(self) -> str:
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self) -> None:
        """Serves until it is told to end. Raises what loading the model raised."""
        try:
            asyncio.run(self._serve())
        finally:
            self._socket.close()
            self.service.close()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Begins the end, from any thread: answers that run go on for `drain_s`. The second time, it ends at once."""
        if self._loop is None or self.service.is_draining:
            self._uvicorn.should_exit = self._uvicorn.force_exit = True
            return
        self.service.is_draining = True
        asyncio.run_coroutine_threadsafe(self._drain(), self._loop)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        _LOG.info("%s listens; the model is being loaded", self.url)
        threading.Thread(target=self._load, name="mmchat-load", daemon=True).start()
        await self._uvicorn.serve([self._socket])

    async def _drain(self) -> None:
        _LOG.info("ending: %d answers run; up to %g s for them", self.service.num_running, self.settings.drain_s)
        try:
            async with asyncio.timeout(self.settings.drain_s):
                while self.service.num_running:
                    await asyncio.sleep(0.05)
        except TimeoutError:
            _LOG.warning("ending: %d answers are cut off", self.service.num_running)
        self._uvicorn.should_exit = True

    def _load(self) -> None:
        try:
            loaded = tightened(self._load_model(), self.settings.limits)
            engine = Engine(loaded, self.settings.max_running, self.settings.max_waiting)
            engine.start()
            name = self.settings.name or loaded.config.run
            self.service.open(name, loaded, engine, self.settings.temperature)
            _LOG.info("%s", self.summary())
        except BaseException as error:  # also a library's sys.exit: told by the main thread
            self._error = error
            self._uvicorn.should_exit = True
        finally:
            self.ready.set()

    def summary(self) -> str:
        """Where it is, what answers there, and within which limits."""
        told, limits = self.service.described(), self.settings.limits
        ours = told["mmchat"]
        access = "with a key" if self.service.access.key is not None else "without a key"
        remote = ", ".join(sorted(self.settings.domains)) or "none"
        return (
            f"{self.url} is ready, {access}: {told['id']} (text{''.join(f', {m}' for m in ours['modalities'])}; "
            f"{ours['context_tokens']} tokens of context)\n"
            f"  up to {self.settings.max_running} answers at a time and {self.settings.max_waiting} waiting; "
            f"{limits.new_tokens} tokens an answer; bodies up to {limits.body_bytes / 2**20:.0f} MiB; "
            f"{limits.images} pictures of {limits.image_pixels / 1e6:g} MP, {limits.videos} clips of "
            f"{limits.video_duration_s:g} s, {limits.audios} sounds of {limits.audio_duration_s:g} s; remote media: "
            f"{remote}"
        )


def serve(checkpoint: str, dtype: str | None, settings: Settings) -> None:
    """`infer.py serve`. Raises as `load` and `Server` do."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    _LOG.setLevel(logging.INFO)

    def load_packed() -> Loaded:
        loaded = load(checkpoint, dtype)
        pack(loaded.model)
        return loaded

    Server(settings, load_packed).run()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        why = str(error.strerror).partition(" (")[0]
        raise ValueError(f"cannot listen on {host} port {port}: {why}. Choose another --host or --port") from error


class _Uvicorn(uvicorn.Server):
    """Ends in the order of `stop`, instead of refusing connections at once."""

    def __init__(self, config: uvicorn.Config, stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._stop = stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._stop()


def _protocol(limits: Limits) -> type[H11Protocol]:
    class Protocol(_TimedProtocol):
        limits_ = limits

    return Protocol


class _TimedProtocol(H11Protocol):
    """uvicorn's protocol with clocks for clients that are slow on purpose; what runs out is cut off.

    One clock waits for the client: for a head (or the next request), for a body, or for the end of a closed connection.
    The other waits for it to read.
    """

    limits_: Limits
    _waits_for: Any = None
    _waiting: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits_.connections:
            transport.abort()
            return
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        for clock in (self._waiting, self._writing):
            if clock is not None:
                clock.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(self.limits_.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
        super().resume_writing()

    def _watch(self) -> None:
        """Starts the clock of what the client owes, and stops it when that is there."""
        owed: Any = self.conn.their_state
        if self.transport.is_closing():
            owed = "end"
        if owed == self._waits_for:
            return
        self._waits_for = owed
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
        seconds = {
            h11.IDLE: self.limits_.head_timeout_s,
            # The app answers a slow body at its own limit; this one is for what it does not read.
            h11.SEND_BODY: self.limits_.body_timeout_s + 10,
            "end": self.limits_.write_timeout_s,
        }.get(owed)
        if seconds is not None:
            self._waiting = self.loop.call_later(seconds, self.transport.abort)
