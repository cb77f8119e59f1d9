"""The loader: every sample exactly once, the same for any number of workers and ranks, O(1) to continue."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch

from mmchat.config import load_config
from mmchat.data.build import build_template
from mmchat.data.loader import Loader
from tests import runs, tiny


def _stage(**changes):
    config = load_config("configs/tiny.yaml", [f"stages.align.{k}={v}" for k, v in changes.items()])
    return config, config.stages[0], build_template(config)


def _take(loader: Loader, steps: int):
    return [loader.next_step() for _ in range(steps)]


def _same(a, b) -> bool:
    return a.numbers == b.numbers and all(
        torch.equal(x.token_ids, y.token_ids)
        and torch.equal(x.labels, y.labels)
        and torch.equal(x.presence, y.presence)
        and all(torch.equal(x.media[m].data, y.media[m].data) for m in x.media)
        for x, y in zip(a.batches, b.batches, strict=True)
    )


def test_workers_do_not_change_what_comes(tiny_folder):
    config, stage, template = _stage()
    alone = _take(Loader(stage, config.seed, template), 6)
    for workers in (1, 3, 8):
        _, several, _ = _stage(workers=workers)
        for a, b in zip(alone, _take(Loader(several, config.seed, template), 6), strict=True):
            assert _same(a, b) and a.states == b.states


def test_it_continues_from_its_states_without_replay(tiny_folder):
    config, stage, template = _stage()
    whole = _take(Loader(stage, config.seed, template), 8)
    states = json.loads(json.dumps(whole[3].states))  # as a checkpoint stores them
    assert len(json.dumps(states)) < 4000
    again = Loader(stage, config.seed, template, states={int(k): v for k, v in states.items()})
    for a, b in zip(whole[4:], _take(again, 4), strict=True):
        assert _same(a, b)


def test_packs_keep_to_their_budgets_and_fill_them(tiny_folder):
    config, stage, template = _stage()
    steps = _take(Loader(stage, config.seed, template), 15)
    batches = [batch for step in steps for batch in step.batches]
    assert all(batch.token_ids.numel() <= stage.batch.tokens for batch in batches)
    assert sum(step.num_tokens for step in steps) / sum(step.capacity for step in steps) > 0.9
    assert len({batch.keys for batch in batches}) > len(batches) / 2


def consume(out: Path) -> None:
    """In each of several processes: draws until every own lane has finished its first epoch, and writes what came."""
    from mmchat import distributed
    from mmchat.training.engine import start_distributed

    start_distributed()
    config, stage, template = _stage(workers=2)
    loader = Loader(stage, config.seed, template, distributed.rank(), distributed.world_size())
    drawn = []
    while True:
        step = loader.next_step()
        drawn += [list(number) for number in step.numbers]
        sources = [state["lane"]["sources"]["tiny"] for state in step.states.values()]
        waiting = [number for state in step.states.values() for number in state["waiting"] if number[1] == 0]
        if all(epoch >= 1 for epoch, _ in sources) and not waiting:
            break
    everyone = distributed.gather_to_main(drawn)
    if distributed.is_main():
        out.write_text(json.dumps({"ranks": everyone}))
    distributed.barrier()


def test_two_gloo_ranks_consume_every_key_exactly_once(tiny_folder, tmp_path):
    out = tmp_path / "drawn.json"
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, str(out)],
        cwd=tiny.ROOT, env={**runs.ENVIRONMENT, "PYTHONPATH": str(tiny.ROOT)}, check=True, timeout=120,
    )  # fmt: skip
    ranks = json.loads(out.read_text())["ranks"]
    assert len(ranks) == 2 and all(ranks)
    first_epoch = Counter(index for rank in ranks for _, epoch, index in rank if epoch == 0)
    assert first_epoch == Counter(range(60))
    assert not {tuple(n) for n in ranks[0]} & {tuple(n) for n in ranks[1]}


if __name__ == "__main__":
    os.chdir(tiny.ROOT)
    consume(Path(sys.argv[1]))
    os._exit(0)  # the loader's workers are not waited for
