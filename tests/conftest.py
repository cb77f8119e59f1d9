"""Shared fixtures: tiny pretrained folders and shards, made once, and the hardware marks."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# The two cores of a small machine are shared: spinning OpenMP threads make everything many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from tests import tiny

# A shell's background jobs ignore Ctrl-C, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(min(2, os.cpu_count() or 1))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="not run: needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    """The models and shards that configs/tiny.yaml names."""
    return tiny.build_all()


@pytest.fixture(scope="session")
def heart(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose answers are known, made once; see tests/by_heart.py. Nobody changes it."""
    from tests import by_heart

    return by_heart.checkpoint(tmp_path_factory.mktemp("heart"))


@pytest.fixture(scope="module")
def process_group(tiny_folder: Path) -> Iterator[None]:
    """A process group of one. Its rendezvous leaves the environment again: other tests start processes of their own.

    The group itself stays, because DeepSpeed remembers the first one that it was given.
    """
    from mmchat.training.engine import start_distributed

    before = dict(os.environ)
    start_distributed()
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _in_repository_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in configs are relative to the root, as they are for a user."""
    monkeypatch.chdir(tiny.ROOT)


@pytest.fixture(scope="module")
def whole(loaded: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken evaluation of the first shard by the module's own `loaded`."""
    from mmchat.inference.evaluate import evaluate
    from tests.evaluations import SHARD, SHORT

    out = tmp_path_factory.mktemp("whole")
    evaluate(loaded, "instruct", SHARD, out, SHORT, batch_size=4)
    return out
