"""A decoder that hangs, crashes or eats memory costs its own item; the next one works again."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from io import BytesIO

import numpy as np
import pytest
import soundfile

from mmchat.errors import SampleError
from mmchat.modalities import decode
from mmchat.modalities.sandbox import Sandbox, SandboxLimits


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    sandbox = Sandbox(SandboxLimits(decode_timeout_s=20))
    yield sandbox
    sandbox.close()


def sound(seconds: float = 0.5) -> bytes:
    file = BytesIO()
    soundfile.write(file, np.zeros(int(16_000 * seconds)), 16_000, format="WAV")
    return file.getvalue()


def works(sandbox: Sandbox) -> bool:
    return sandbox.call("audio_header", sound())[0] == {"sample_rate_hz": 16_000, "duration_s": 0.5}


def child_id(sandbox: Sandbox) -> int:
    assert sandbox._child is not None
    return sandbox._child.pid


def test_one_child_serves_many_items(sandbox: Sandbox) -> None:
    assert works(sandbox)
    first = child_id(sandbox)
    started = time.perf_counter()
    assert all(works(sandbox) for _ in range(20))
    assert child_id(sandbox) == first and (time.perf_counter() - started) / 20 < 0.1
    _, payload = sandbox.call("audio_samples", sound(), sample_rate_hz=16_000, max_duration_s=1)
    assert len(payload) == 4 * 8000


def test_a_hanging_decoder_is_killed(sandbox: Sandbox) -> None:
    assert works(sandbox)  # the child is up, so that only the hang is measured
    hanging, sandbox.limits = child_id(sandbox), SandboxLimits(decode_timeout_s=0.5)
    started = time.perf_counter()
    with pytest.raises(SampleError) as caught:
        sandbox.call("hang", b"x" * 1_000_000)
    assert caught.value.reason == "decoding timed out" and time.perf_counter() - started < 5
    with pytest.raises(ProcessLookupError):
        os.kill(hanging, 0)
    sandbox.limits = SandboxLimits()
    assert works(sandbox)


def test_a_crash_costs_one_item(sandbox: Sandbox) -> None:
    with pytest.raises(SampleError) as caught:
        sandbox.call("crash", b"")
    assert caught.value.reason == "decoder crashed"
    assert works(sandbox)


def test_a_child_that_died_between_items_is_replaced(sandbox: Sandbox) -> None:
    assert works(sandbox) and sandbox._child is not None
    os.kill(child_id(sandbox), signal.SIGKILL)
    sandbox._child.wait()
    assert works(sandbox)


def test_memory_limit() -> None:
    sandbox = Sandbox(SandboxLimits(decode_memory_bytes=2 << 30))
    with pytest.raises(SampleError, match="out of memory"):
        sandbox.call("allocate", b"", size=3 << 30)
    assert sandbox.call("allocate", b"", size=1000)[0] == {"size": 1000}
    sandbox.close()


def test_file_size_limit() -> None:
    with pytest.raises(SampleError, match="file too large"):
        Sandbox(SandboxLimits(max_file_bytes=10)).call("audio_header", sound())


def test_undecodable_bytes_are_refused(sandbox: Sandbox) -> None:
    for command, reason in (("audio_header", "undecodable audio"), ("video_header", "undecodable video")):
        for data in (b"", b"no media"):
            with pytest.raises(SampleError) as caught:
                sandbox.call(command, data)
            assert caught.value.reason == reason


def test_playlists_are_not_opened(sandbox: Sandbox) -> None:
    """FFmpeg's concat and HLS formats name other files; an item must not make us read them."""
    for text in ("ffconcat version 1.0\nfile /etc/hostname\n", "#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n"):
        with pytest.raises(SampleError, match="undecodable video"):
            sandbox.call("video_header", text.encode())


def test_threads_take_turns(sandbox: Sandbox) -> None:
    answers: list[bool] = []
    threads = [threading.Thread(target=lambda: answers.append(works(sandbox))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 4


def test_copies_have_children_of_their_own(sandbox: Sandbox) -> None:
    assert works(sandbox)
    copy = pickle.loads(pickle.dumps(sandbox))
    assert works(copy) and child_id(copy) != child_id(sandbox)
    copy.close()
    forked = os.fork()
    if not forked:
        code = 1
        try:
            original = child_id(sandbox)
            code = int(not (works(sandbox) and child_id(sandbox) != original))
            sandbox.close()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 0
    assert works(sandbox)


def test_the_child_stays_light() -> None:
    code = (
        f"import runpy, sys; runpy.run_path({decode.__file__!r});"
        "print(sorted({'torch', 'mmchat', 'transformers'} & set(sys.modules)))"
    )
    child = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert child.stdout == "[]\n"
