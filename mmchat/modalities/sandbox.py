"""Decoding in a child process that can be killed: what hangs or crashes there costs one sample, not the run.

The child is a plain program (`decode.py`) behind two pipes: DataLoader workers are daemonic and may not use
multiprocessing. It is started by path, because importing `mmchat.modalities` would load torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import weakref
from typing import Any

from pydantic import Field

from mmchat.errors import SampleError
from mmchat.modalities import decode
from mmchat.schema import Schema

_START_TIMEOUT_S = 60.0


class SandboxLimits(Schema):
    """What decoding one item may take: time, the child's address space (None: any), encoded size."""

    decode_timeout_s: float = Field(default=60.0, gt=0)
    decode_memory_bytes: int | None = Field(default=None, gt=0)
    max_file_bytes: int = Field(default=1 << 30, ge=1)


class Sandbox:
    """A persistent child that decodes one item at a time; started on first use and after its death.

    Threads take turns. A forked or unpickled copy starts a child of its own.
    """

    def __init__(self, limits: SandboxLimits) -> None:
        self.limits = limits
        self._child: subprocess.Popen[bytes] | None = None
        self._adopt()

    def __reduce__(self) -> tuple[type[Sandbox], tuple[SandboxLimits]]:
        return type(self), (self.limits,)

    def call(self, command: str, data: bytes, **arguments: Any) -> tuple[dict[str, Any], bytes]:
        """Runs a command of decode.py. Returns its facts and its raw bytes; raises SampleError."""
        if len(data) > self.limits.max_file_bytes:
            raise SampleError("file too large", f"{len(data)} bytes, above max_file_bytes {self.limits.max_file_bytes}")
        if self._owner != os.getpid():
            self._adopt()  # after a fork the child, and perhaps a held lock, belong to the parent
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._child = self._start()
            answer, payload = self._exchange(self._child, command, data, arguments)
        if "refused" in answer:
            raise SampleError(*answer["refused"])
        return answer, payload

    def close(self) -> None:
        """Ends the child; the next call starts a new one."""
        if self._owner == os.getpid() and self._child is not None:
            _end(self._child)
            self._child = None

    def _adopt(self) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._child = None

    def _start(self) -> subprocess.Popen[bytes]:
        limits = [str(self.limits.decode_timeout_s), str(self.limits.decode_memory_bytes or 0)]
        # -P: the modules beside decode.py must not be importable as top-level names.
        child = subprocess.Popen(
            [sys.executable, "-P", decode.__file__, *limits], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        # Starting is not on the item's clock.
        late = threading.Timer(_START_TIMEOUT_S, child.kill)
        late.start()
        try:
            assert child.stdout is not None
            decode.read_message(child.stdout)
        except EOFError:
            _end(child)
            raise RuntimeError(
                f"the decoding process ended with status {child.returncode} before it was ready; see stderr"
            ) from None
        finally:
            late.cancel()
        weakref.finalize(self, _end_own, os.getpid(), child)
        return child

    def _exchange(
        self, child: subprocess.Popen[bytes], command: str, data: bytes, arguments: dict[str, Any]
    ) -> tuple[dict[str, Any], bytes]:
        assert child.stdin is not None and child.stdout is not None
        late = threading.Event()

        def kill() -> None:
            late.set()
            child.kill()

        timer = threading.Timer(self.limits.decode_timeout_s, kill)
        timer.start()
        is_done = False
        try:
            decode.write_message(child.stdin, {"command": command, "arguments": arguments}, data)
            message = decode.read_message(child.stdout)
            is_done = True
            return message
        except (EOFError, BrokenPipeError):
            _end(child)
            if late.is_set():
                raise SampleError(
                    "decoding timed out", f"{command} took over {self.limits.decode_timeout_s:g} s"
                ) from None
            raise SampleError(
                "decoder crashed", f"{command} ended its process with status {child.returncode}"
            ) from None
        finally:
            timer.cancel()
            timer.join()
            if not is_done or late.is_set():  # also when interrupted: half an answer must not meet the next item
                _end(child)
                self._child = None


def _end_own(owner: int, child: subprocess.Popen[bytes]) -> None:
    if owner == os.getpid():
        _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        assert pipe is not None
        try:
            pipe.close()
        except OSError:  # unsent bytes have nobody left to read them
            continue
