"""A stage at a constant rate may be lengthened or cut; one whose rate falls may not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from mmchat.checkpoint import open_checkpoint
from tests import runs

CONSTANT = "stages.align.schedule={min_ratio: 1}"


def losses(folder: Path, stage: str) -> list[float]:
    return [line["loss"] for line in runs.log(folder, stage)]


def _rewrite(config: Path, text: str) -> None:
    """Another text in a checkpoint, with the hashes that go with it."""
    config.write_text(text)
    manifest = json.loads((config.parent / "manifest.json").read_text())
    manifest["files"][config.name] = {"size": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (config.parent / "manifest.json").write_text(json.dumps(manifest))


def test_a_constant_stage_is_lengthened_as_if_it_had_been_longer_from_the_start(tmp_path: Path) -> None:
    for steps in (2, 4):
        runs.train(tmp_path / "grown", CONSTANT, f"stages.align.steps={steps}", "--stage", "align")
    runs.train(tmp_path / "long", CONSTANT, "stages.align.steps=4", "stages.instruct.steps=1")
    assert losses(tmp_path / "grown", "align") == losses(tmp_path / "long", "align")
    again = (CONSTANT, "stages.align.steps=6", "stages.instruct.steps=1")
    refused = runs.train(tmp_path / "long", *again, check=False)  # `instruct` came from step 4
    assert refused.returncode == 1 and "Remove that folder" in refused.stdout + refused.stderr


def test_a_constant_stage_is_cut_at_its_last_save(tmp_path: Path) -> None:
    shared = (CONSTANT, "stages.align.save_every=1", "stages.instruct.steps=1")
    process = runs.start(tmp_path, *shared, "stages.align.steps=500")
    runs.kill_at(process, "step-000002 in")
    reached = len(losses(tmp_path, "align"))
    refused = runs.train(
        tmp_path, *shared, "stages.align.steps=500", "stages.align.schedule={min_ratio: 0}", check=False
    )
    assert refused.returncode == 1 and "another configuration" in refused.stdout + refused.stderr
    done = runs.train(tmp_path, *shared, "stages.align.steps=1")
    newest = max((tmp_path / "tiny/align").glob("step-*[0-9]"))
    assert reached >= 2 and f"done already: {newest}, which is past its 1 steps" in done.stdout
    assert f"instruct   starts from {newest}" in done.stdout and len(losses(tmp_path, "instruct")) == 1


def test_a_lengthened_stage_is_not_finished_before_it_is_trained(tmp_path: Path) -> None:
    runs.train(tmp_path, CONSTANT, "stages.align.steps=1", "--stage", "align")
    later = (CONSTANT, "stages.instruct.steps=1", "--stage", "instruct")
    refused = runs.train(tmp_path, "stages.align.steps=2", *later, check=False)
    assert refused.returncode == 1 and "it has 1 of 2 steps); train that stage first" in refused.stdout + refused.stderr
    assert "step-000001" in runs.train(tmp_path, "stages.align.steps=1", *later).stdout


def test_a_stage_whose_rate_falls_keeps_its_number_of_steps(tmp_path: Path) -> None:
    runs.train(tmp_path, "stages.align.steps=2", "stages.instruct.steps=1")
    refused = runs.train(tmp_path, "stages.align.steps=3", "stages.instruct.steps=1", check=False)
    assert refused.returncode == 1 and "steps: was 2, is 3" in refused.stdout + refused.stderr


def test_a_run_from_before_a_key_was_there_goes_on(tmp_path: Path) -> None:
    runs.train(tmp_path, CONSTANT, "stages.align.steps=1", "--stage", "align")
    config = tmp_path / "tiny/align/step-000001/config.yaml"
    text = config.read_text()
    assert "output_scale" in text and "region_decimals" in text
    older = [line for line in text.splitlines(True) if "output_scale" not in line and "region_decimals" not in line]
    _rewrite(config, "".join(older))
    assert "output_scale" not in open_checkpoint(config.parent).config_text
    runs.train(tmp_path, CONSTANT, "stages.align.steps=2", "--stage", "align")
    assert len(losses(tmp_path, "align")) == 2
