"""Training through train.py: the same numbers for every split, distribution and interruption."""

from __future__ import annotations

import shutil
import signal

import pytest
import torch

from mmchat.checkpoint import checkpoints_in, open_checkpoint
from tests import runs


def _weights(folder, stage="align"):
    return open_checkpoint(checkpoints_in(folder / "tiny" / stage)[-1]).weights()


def _same(a, b):
    return [(line["loss"], line["grad_norm"], line["samples_hash"], line["learned"]) for line in a] == [
        (line["loss"], line["grad_norm"], line["samples_hash"], line["learned"]) for line in b
    ]


def _assert_bitwise(folder, reference, stage):
    assert _same(runs.log(folder, stage), runs.log(reference, stage))
    found, expected = _weights(folder, stage), _weights(reference, stage)
    assert found.keys() == expected.keys() and len(expected) > 5
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.fixture(scope="module")
def reference(tiny_folder, tmp_path_factory):
    """Twenty unbroken steps: ten of each stage."""
    folder = tmp_path_factory.mktemp("reference")
    runs.train(folder, "log.every=1")
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_20_steps_equal_10_and_a_kill_and_10(reference, tmp_path, workers):
    """Killed in the middle of each stage; continued with another number of workers."""
    for stage in ("align", "instruct"):
        process = runs.start(tmp_path, "log.every=1")
        runs.kill_at(process, f"{stage:<10} step 7/10")
        assert process.returncode == -signal.SIGKILL
        assert checkpoints_in(tmp_path / "tiny" / stage)[-1].name == "step-000005"
    runs.train(tmp_path, "log.every=1", f"stages.align.workers={workers}", f"stages.instruct.workers={workers}")
    for stage in ("align", "instruct"):
        assert [line["step"] for line in runs.log(tmp_path, stage)] == list(range(1, 11))
        _assert_bitwise(tmp_path, reference, stage)


def test_sigterm_ends_the_step_saves_and_exits(reference, tmp_path):
    process = runs.start(tmp_path, "log.every=1", "stages.align.save_every=100")
    output = runs.kill_at(process, "step 3/10", signal.SIGTERM)
    assert process.returncode == 0 and "stopped by request after step" in output
    (saved,) = checkpoints_in(tmp_path / "tiny" / "align")
    assert 3 <= open_checkpoint(saved).step <= 5
    runs.train(tmp_path, "log.every=1", "stages.align.save_every=100")
    for stage in ("align", "instruct"):
        _assert_bitwise(tmp_path, reference, stage)


def test_a_finished_run_is_left_alone(reference):
    before = {p: p.stat().st_mtime_ns for p in reference.rglob("*") if p.is_file()}
    assert runs.train(reference, "log.every=1").stdout.count("done already") == 2
    assert before == {p: p.stat().st_mtime_ns for p in reference.rglob("*") if p.is_file()}


def test_preflight_changes_nothing_and_stops(reference, tmp_path):
    done = runs.train(tmp_path, "--preflight")
    assert "preflight: largest of" in done.stdout and "peak memory" in done.stdout
    assert not checkpoints_in(tmp_path / "tiny" / "align")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_every_zero_level_and_rank_count_trains_to_the_same_losses(reference, tmp_path, zero, ranks):
    """With 2 ranks, steps in which one rank has no picture, sound or clip occur; see the assertion on the plan."""
    runs.train(tmp_path, "log.every=1", f"stages.align.zero={zero}", f"stages.instruct.zero={zero}", ranks=ranks)
    for stage in ("align", "instruct"):
        found, expected = runs.log(tmp_path, stage), runs.log(reference, stage)
        assert [x["samples_hash"] for x in found] == [x["samples_hash"] for x in expected]
        for a, b in zip(found, expected, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-4), (stage, a["step"])
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3, abs=1e-3)
        ours, theirs = _weights(tmp_path, stage), _weights(reference, stage)
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-4, msg=name)


def test_some_step_leaves_a_rank_without_a_picture(tiny_folder):
    """What the test above relies on: among the steps of two ranks, one rank lacks a modality that the other has."""
    from mmchat.config import load_config
    from mmchat.data.build import build_template
    from mmchat.data.loader import Loader

    config = load_config("configs/tiny.yaml")
    template = build_template(config)
    lonely = {"image": 0, "audio": 0, "video": 0}
    for stage in config.stages:
        loaders = [Loader(stage, config.seed, template, rank, 2) for rank in range(2)]
        for _ in range(stage.steps):
            first, second = (loader.next_step().batches for loader in loaders)
            for a, b in zip(first, second, strict=True):
                for modality in lonely:
                    lonely[modality] += (modality in a.media) != (modality in b.media)
    assert all(count > 0 for count in lonely.values()), lonely


@pytest.mark.parametrize(("zero", "ranks"), [(1, 2), (3, 2)])
def test_resume_with_another_number_of_ranks_and_level(reference, tmp_path, zero, ranks):
    """State is whole: five steps on two ranks under ZeRO, the rest on one without."""
    process_overrides = ("log.every=1", f"stages.align.zero={zero}")
    done = runs.train(tmp_path, *process_overrides, "--stage", "align", ranks=ranks)
    assert done.returncode == 0
    for folder in checkpoints_in(tmp_path / "tiny" / "align")[1:]:
        shutil.rmtree(folder)  # as if it had died after step 5
    runs.train(tmp_path, "log.every=1", "stages.align.zero=0", "--stage", "align")
    for a, b in zip(runs.log(tmp_path, "align"), runs.log(reference, "align"), strict=True):
        assert a["samples_hash"] == b["samples_hash"] and a["loss"] == pytest.approx(b["loss"], abs=1e-4)


@pytest.mark.parametrize("joined", [2, 4])
def test_micro_batches_do_not_change_the_step(reference, tmp_path, joined):
    """One micro-batch of four packs, two of two and four of one are the same step."""
    runs.train(tmp_path, "log.every=1", f"stages.align.batch.packs_per_micro_batch={joined}", "--stage", "align")
    for a, b in zip(runs.log(tmp_path, "align"), runs.log(reference, "align"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_bfloat16_with_masters_resumes_bitwise(tiny_folder, tmp_path):
    overrides = ("log.every=1", "stages.align.dtype=bfloat16", "stages.align.zero=2", "--stage", "align")
    runs.train(tmp_path / "whole", *overrides)
    process = runs.start(tmp_path / "broken", *overrides)
    runs.kill_at(process, "step 7/10")
    runs.train(tmp_path / "broken", *overrides)
    _assert_bitwise(tmp_path / "broken", tmp_path / "whole", "align")
    losses = [line["loss"] for line in runs.log(tmp_path / "whole", "align")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("fusion", ["{kind: late, num_heads: 4}", "{kind: full}", "{kind: lora, rank: 2}"])
def test_every_kind_of_fusion_trains_resumes_and_hands_over(tiny_folder, tmp_path, fusion):
    both = [f"stages.{stage}.train={{connectors: 1.0e-3, fusion: 1.0e-3}}" for stage in ("align", "instruct")]
    overrides = (f"model.fusion={fusion}", *both, "log.every=1", "stages.instruct.steps=4")
    process = runs.start(tmp_path, *overrides)
    runs.kill_at(process, "step 7/10")
    runs.train(tmp_path, *overrides)
    losses = [line["loss"] for line in runs.log(tmp_path, "align")]
    assert losses[-1] < losses[0] and len(runs.log(tmp_path, "instruct")) == 4


def test_late_fusion_without_its_layer_is_refused_with_the_reason(tiny_folder, tmp_path):
    done = runs.train(tmp_path, "model.fusion={kind: late, num_heads: 4}", check=False)
    assert done.returncode == 1 and "name `fusion` in this stage's train table" in done.stderr


def test_an_encoder_with_batch_norms_trains_and_resumes_bitwise(tiny_folder, tmp_path):
    encoder = "{kind: timm, model: test_efficientnet, pretrained: false, image_size: 64}"
    overrides = (
        f"model.modalities.image.encoder={encoder}", "stages.align.train={connectors: 1.0e-3, encoders.image: 1.0e-3}",
        "log.every=1", "--stage", "align",
    )  # fmt: skip
    runs.train(tmp_path / "whole", *overrides)
    runs.kill_at(runs.start(tmp_path / "broken", *overrides), "step 7/10")
    runs.train(tmp_path / "broken", *overrides)
    _assert_bitwise(tmp_path / "broken", tmp_path / "whole", "align")
    assert any("running_mean" in name for name in _weights(tmp_path / "whole"))


def test_two_processes_do_not_train_in_one_folder(tiny_folder, tmp_path):
    first = runs.start(tmp_path, "log.every=1", "stages.align.steps=2000")
    assert first.stdout is not None
    for line in first.stdout:
        if "step 1/" in line:
            break
    second = runs.train(tmp_path, check=False)
    first.kill()
    first.communicate()
    assert second.returncode == 1 and "another process is training in" in second.stderr
    assert "Traceback" not in second.stderr


def test_preflight_goes_to_the_first_unfinished_stage(reference, tmp_path):
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "tiny/instruct")
    done = runs.train(tmp_path, "--preflight")
    assert "align      done already" in done.stdout and "instruct   preflight: largest" in done.stdout


def test_a_stage_does_not_start_from_another_configurations_stage(reference, tmp_path):
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "tiny/instruct")
    done = runs.train(tmp_path, "--stage", "instruct", "chat.format=vicuna", check=False)
    assert done.returncode == 1 and "chat.format: was 'auto', is 'vicuna'" in done.stderr


def test_adapter_dropout_does_not_trouble_the_preflight(tiny_folder, tmp_path):
    always = "model.fusion.adapter_dropout={image: 1.0, video: 1.0, audio: 1.0}"
    done = runs.train(tmp_path, always, "stages.align.train={connectors: 1.0e-3, fusion: 1.0e-3}", "--preflight")
    assert "preflight: largest" in done.stdout
