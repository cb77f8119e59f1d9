"""Every source: its fixture ▶ shards ▶ check ▶ one training step ▶ an answer."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import yaml

from data_prep import check_shards, make_shards
from mmchat.config import RunConfig, SourceConfig, load_config
from mmchat.data.lanes import SampleId
from mmchat.data.mixture import Mixture
from mmchat.inference.evaluate import evaluate
from mmchat.inference.load import load
from mmchat.sources import SOURCES
from mmchat.tasks.question import Protocol
from mmchat.training.stage import StopRequest, train_stage
from tests import tiny
from tests.sources.fixture import Fixtures

FIXTURES: Fixtures = {}
for file in sorted((tiny.ROOT / "tests/sources").glob("fixtures_*.py")):
    FIXTURES |= importlib.import_module(f"tests.sources.{file.stem}").FIXTURES


pytestmark = pytest.mark.usefixtures("process_group")


def run_config(folder: Path, task: str, shards: Path) -> tuple[RunConfig, Path]:
    """configs/tiny.yaml with these shards, one step, and room for long dialogues; and its file."""
    batch = "{lanes: 1, tokens: 4096, patches: 32768, lookahead: 2}"
    source = f"[{{name: only, task: {task}, shards: '{shards}'}}]"
    overrides = [f"checkpoints={folder}", f"stages.instruct.data={source}", f"stages.instruct.batch={batch}"]
    overrides += ["stages.instruct.steps=1", "stages.instruct.schedule={}"]
    config = load_config("configs/tiny.yaml", overrides)
    config = config.model_copy(update={"stages": [config.stages[1]]})
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return config, path


def test_every_source_has_a_fixture() -> None:
    assert {name.partition(":")[0] for name in FIXTURES} == set(SOURCES)


@pytest.mark.parametrize("name", FIXTURES)
def test_a_source_from_files_to_an_answer(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "source").mkdir()
    made = FIXTURES[name](tmp_path / "source")
    shards = tmp_path / "shards"

    arguments = [made.task, str(made.source), str(shards), "--split", made.split, "--workers", "1", *made.options]
    assert make_shards.main(arguments) == 0, capsys.readouterr()
    mixture = Mixture([SourceConfig(name="only", task=made.task, shards=str(shards))])
    num_samples = mixture.sources[0].num_samples
    report = json.loads((shards / "report.json").read_text())
    skipped = {one["reason"]: one["count"] for one in report["skipped"]}
    assert num_samples == made.num_samples and skipped == made.skipped, report

    for task in (made.task, *made.other_tasks):
        folder = tmp_path / task
        folder.mkdir()
        config, path = run_config(folder, task, shards)
        assert check_shards.main(["--config", str(path)]) == 0, capsys.readouterr().out
        assert train_stage(config, config.stages[0], None, StopRequest()) == "done"
        log = (config.folder / "instruct/log.jsonl").read_text().splitlines()
        (step,) = [line for line in map(json.loads, log) if "event" not in line]
        assert step["loss"] > 0
        protocol = Protocol(max_new_tokens=4, num_candidates=1)
        metrics = evaluate(load(config.folder), task, str(shards), folder / "answers", protocol, limit=2)
        said = [json.loads(line) for line in (folder / "answers/predictions.jsonl").read_text().splitlines()]
        assert metrics["num_records"] == min(2, num_samples) and metrics["num_questions"] == len(said), said
        assert said[0]["key"].startswith(mixture.record(SampleId("only", 0, 0)).key) and said[0]["prompt"]
        assert set(metrics["not_answered"]) <= {"no right candidate"} and metrics["scores"], metrics  # made-up lists
