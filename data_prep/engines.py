"""Runs one function over many items: in processes of this machine, or as tasks of a Ray cluster.

Only so many items are under way at a time, so the memory that they take does not grow with their number. Results come
in the order in which they are finished.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent

T = TypeVar("T")
R = TypeVar("R")


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def run_local(function: Callable[[T], R], items: Iterable[T], num_workers: int) -> Generator[R]:
    """The results; with one worker from this process, else from forked ones, which end with this one.

    Raises what the function raises, and ValueError where a process is killed.
    """
    if num_workers == 1:
        yield from map(function, items)
        return
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(os.getpid(),)) as pool:
        pending: set[Future[R]] = set()
        try:
            for item in items:
                pending.add(pool.submit(function, item))
                # One more than there are workers: none waits for the next item to be read.
                done, pending = wait(pending, None if len(pending) > num_workers else 0, FIRST_COMPLETED)
                yield from (future.result() for future in done)
            while pending:
                done, pending = wait(pending, None, FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool as error:
            raise ValueError(
                f"one of {num_workers} processes was killed; is there enough memory? Try fewer --workers"
            ) from error
        except BaseException:
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)  # the parent was killed: nobody is left who would ask for anything

    threading.Thread(target=end_with_parent, daemon=True).start()


def run_on_ray(
    function: Callable[[T], R], items: Iterable[T], num_workers: int | None, address: str | None, shared: Sequence[Path]
) -> Generator[R]:
    """The results of Ray tasks of one core each. Ray does a task again whose process or node dies.

    Args:
        function: it and what it returns are pickled; its module is imported from this checkout's path on every node.
        num_workers: tasks under way; None for the cores of the cluster.
        address: of a running cluster, such as "auto" or "10.0.0.1:6379"; None starts one on this machine.
        shared: paths that every node must see.

    Raises what the function raises, and ValueError where Ray, the cluster or a path on a node is missing.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read at the import: nothing is reported to anybody
    try:
        import ray
    except ImportError as error:
        raise ValueError("--engine ray needs the package ray: pip install 'mmchat[ray]'") from error
    options: dict[str, Any] = {"address": address}
    if address is None:
        options = {"address": "local", "num_cpus": num_workers or num_cores(), "include_dashboard": False}
    try:
        if address is not None and ":" in address:  # Ray itself tries for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(
            **options,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"the Ray cluster {address or 'of this machine'} cannot be used: {error}") from error
    try:
        _check_nodes(ray, shared)
        limit = num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        task: Any = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(lambda item: function(item))
        pending: list[Any] = []
        for item in items:
            pending.append(task.remote(item))
            done, pending = ray.wait(pending, num_returns=1, timeout=None if len(pending) > limit else 0)
            yield from map(ray.get, done)
        while pending:
            done, pending = ray.wait(pending, num_returns=1)
            yield from map(ray.get, done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error  # what the function raised
    except ray.exceptions.RayError as error:
        raise ValueError(f"the Ray cluster gave up: {error}") from error
    finally:
        ray.shutdown()


def _check_nodes(ray: Any, shared: Sequence[Path]) -> None:
    """Raises ValueError that names the nodes that do not see a path."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def unseen(paths: Sequence[str]) -> list[str]:  # local, so that it is sent as it is and not imported there
        return [path for path in paths if not Path(path).exists()]

    task = ray.remote(num_cpus=0)(unseen)
    asked = {
        node["NodeManagerAddress"] + " " + node["NodeID"][:8]: task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote([str(path) for path in (ROOT, *shared)])
        for node in ray.nodes()
        if node["Alive"]
    }
    found = [f"  node {node}: {', '.join(missing)}" for node, ref in asked.items() if (missing := ray.get(ref))]
    if found:
        raise ValueError(
            "--engine ray needs the checkout, SOURCE, --media and OUT on storage that every node of the cluster sees "
            "under the same path. Not seen:\n" + "\n".join(found)
        )
