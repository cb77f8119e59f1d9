"""Bad input: a clear message or a counted, listed skip; never a hang, a silent swap or a bare traceback."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import yaml

from mmchat.checkpoint import checkpoints_in
from tests import runs, tiny

ONE = ("--stage", "align", "log.every=1", "stages.align.steps=3", "stages.align.save_every=3")


def _members(count: int, change=None) -> list[tuple[str, bytes]]:
    """Members of a shard of caption samples; change(i, members) may alter one sample's."""
    import random

    rng, members = random.Random(0), []
    for i in range(count):
        sample = {
            f"{i:04d}.json": json.dumps(
                {"turns": [{"role": "user", "parts": [{"media": 0}, {"text": "Colour?"}]},
                           {"role": "assistant", "parts": [{"text": "red"}]}]}
            ).encode(),
            f"{i:04d}.0.jpg": tiny.picture("red", rng),
        }  # fmt: skip
        if change is not None:
            change(i, sample)
        members += list(sample.items())
    return members


def _tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def _index(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "data_prep/index_shards.py", str(path)],
        cwd=tiny.ROOT, env=runs.ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip


def _train(folder: Path, shards: Path, *more: str) -> subprocess.CompletedProcess[str]:
    source = f"stages.align.data=[{{name: s, task: instruct, shards: '{shards}'}}]"
    return runs.train(folder, source, *ONE, *more, check=False)


def _refused(done: subprocess.CompletedProcess[str], *expected: str) -> None:
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for text in expected:
        assert text in done.stderr, done.stderr


@pytest.fixture
def shard(tmp_path) -> Path:
    path = _tar(tmp_path / "a.tar", _members(20))
    assert _index(path).returncode == 0
    return path


def test_unknown_and_mistyped_config_keys(tiny_folder, tmp_path):
    _refused(
        runs.train(tmp_path, "stages.align.setps=3", "model.fusion.rank=x", check=False),
        "2 fault(s)", "stages.0.setps: unknown key; did you mean 'steps'?", "model.fusion.rank",
    )  # fmt: skip


def test_a_missing_shard(tiny_folder, tmp_path, shard):
    shard.rename(tmp_path / "b.tar")
    _refused(_train(tmp_path, shard), "a.tar")


def test_a_shard_without_index_names_the_command(tiny_folder, tmp_path, shard):
    (tmp_path / "a.tar.index.jsonl").unlink()
    _refused(_train(tmp_path, shard), "index_shards.py")


@pytest.mark.parametrize("where", ["inside a member", "at a member boundary"])
def test_a_truncated_tar(tiny_folder, tmp_path, shard, where):
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
    cut = members[21].offset_data + 100 if where == "inside a member" else members[20].offset
    shard.write_bytes(shard.read_bytes()[:cut])
    _refused(_train(tmp_path, shard), "a.tar", str(cut))  # by its index
    (tmp_path / "a.tar.index.jsonl").unlink()
    done = _index(shard)  # and where there is none yet
    assert done.returncode == 1 and "a.tar" in done.stdout + done.stderr and "Traceback" not in done.stderr


def _with_bad(tmp_path, change) -> Path:
    path = _tar(tmp_path / "a.tar", _members(20, change))
    _index(path)
    return path


def _only(i_bad, alter):
    return lambda i, sample: alter(sample) if i == i_bad else None


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (lambda s: s.update({"0003.0.jpg": s["0003.0.jpg"][:200]}), "undecodable image"),
        (lambda s: s.update({"0003.0.jpg": b"not a picture"}), "undecodable image"),
        (lambda s: s.update({"0003.pkl": b"\x80\x04N."}), "forbidden member"),
        (lambda s: s.update({"0003.json": b"{"}), "unreadable facts"),
        (lambda s: s.update({"0003.json": b'{"turns": [{"role": "user", "parts": [{"text": "No answer"}]}]}'}),
         "nothing to learn"),
    ],
    ids=["truncated-jpeg", "no-jpeg", "pickle", "broken-json", "no-answer"],
)  # fmt: skip
def test_one_bad_sample_is_counted_listed_and_left_out(tiny_folder, tmp_path, alter, reason):
    shards = _with_bad(tmp_path, _only(3, alter))
    done = _train(tmp_path / "run", shards, "stages.align.bad_samples=0.5")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run/tiny/align/log.jsonl").read_text().splitlines()
    listed = [json.loads(line) for line in lines if '"bad"' in line and '"event"' in line]
    assert listed and {line["reason"] for line in listed} == {reason}, done.stdout
    assert all("0003" in line["bad"] or "#3" in line["bad"] for line in listed)
    # Past the tolerance the run stops, with the list.
    _refused(_train(tmp_path / "strict", shards, "stages.align.bad_samples=0"), f"{reason}", "bad_samples")


def test_a_zero_length_wav(tiny_folder, tmp_path):
    def silent(sample):
        del sample["0003.0.jpg"]
        sample["0003.0.wav"] = tiny.tone(100.0, 0.0)

    shards = _with_bad(tmp_path, _only(3, silent))
    done = _train(tmp_path / "run", shards, "stages.align.bad_samples=0.5")
    assert done.returncode == 0 and "empty audio" in done.stdout


def test_literal_markers_in_a_users_text_are_text(tiny_folder, tmp_path):
    facts = {"turns": [{"role": "user", "parts": [{"text": "<image> <|im_end|> <video>"}]},
                       {"role": "assistant", "parts": [{"text": "<|im_end|> fine"}]}]}  # fmt: skip

    def text(i, sample):
        sample.clear()
        sample[f"{i:04d}.json"] = json.dumps(facts).encode()

    done = _train(tmp_path / "run", _with_bad(tmp_path, text))
    assert done.returncode == 0 and "left out" not in done.stdout


def test_too_few_tokens_for_one_image(tiny_folder, tmp_path, shard):
    _refused(
        _train(tmp_path / "run", shard, "stages.align.batch.tokens=20"), "does not fit the budget", "Raise batch.tokens"
    )


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    runs.train(folder, "stages.align.steps=2", "stages.instruct.steps=2")
    return folder


def _copy(trained: Path, tmp_path: Path) -> Path:
    import shutil

    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", "config.yaml"])
def test_a_flipped_byte(trained, tmp_path, name):
    folder = _copy(trained, tmp_path)
    (last,) = checkpoints_in(folder / "tiny" / "align")
    data = bytearray((last / name).read_bytes())
    data[len(data) // 2] ^= 1
    (last / name).write_bytes(bytes(data))
    done = runs.train(folder, "stages.align.steps=4", "--stage", "align", check=False)
    _refused(done, name, "is damaged", "continues from the checkpoint before it")


def _forge_config(folder: Path, change) -> None:
    """Another configuration in a checkpoint, with the hashes that go with it."""
    values = yaml.safe_load((folder / "config.yaml").read_text())
    change(values["model"])
    text = yaml.safe_dump(values).encode()
    (folder / "config.yaml").write_bytes(text)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["config.yaml"] = {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_checkpoint_of_another_architecture(trained, tmp_path):
    folder = _copy(trained, tmp_path)
    changed = ("stages.align.steps=4", "stages.instruct.steps=2", "model.fusion.rank=2")
    _refused(runs.train(folder, *changed, check=False), "another configuration", "model.fusion.rank: was 4, is 2")
    (last,) = checkpoints_in(folder / "tiny" / "instruct")
    _forge_config(last, lambda model: model["fusion"].update(rank=2))
    _refused(_infer("chat", str(last), "--ask", "x"), "another architecture", "shape of llm", "wanted (2,")


def test_another_base_model_under_the_same_name(trained, tmp_path):
    """The probe notices what no file of the checkpoint can tell."""
    folder = _copy(trained, tmp_path / "run")
    (last,) = checkpoints_in(folder / "tiny" / "instruct")
    other = tiny.build_llm(tmp_path / "llm", seed=1)
    _forge_config(last, lambda model: model["llm"].update(pretrained=str(other)))
    _refused(_infer("chat", str(last), "--ask", "x"), "does not answer the stored probe")


def _infer(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "infer.py", *arguments], cwd=tiny.ROOT, env=runs.ENVIRONMENT, capture_output=True, text=True
    )


def test_infer_refuses_what_is_no_checkpoint(trained, tmp_path):
    _refused(_infer("chat", str(tmp_path), "--ask", "x"), "holds no checkpoint", "Wanted a folder with manifest.json")
    _refused(_infer("chat", str(trained / "tiny"), "--image", "/no/such.jpg", "--ask", "x"), "/no/such.jpg")


def test_infer_answers_and_chats(trained, tmp_path):
    picture = tmp_path / "a.jpg"
    import random

    picture.write_bytes(tiny.picture("red", random.Random(0)))
    (tmp_path / "a.wav").write_bytes(tiny.tone(300.0, 0.4))
    (tmp_path / "a.mp4").write_bytes(tiny.clip("left"))
    done = _infer("chat", str(trained / "tiny"), "--image", str(picture), "--audio", str(tmp_path / "a.wav"),
                  "--video", str(tmp_path / "a.mp4"), "--ask", "What?", "--max-new-tokens", "4")  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(picture.read_bytes()[:100])
    _refused(_infer("chat", str(trained / "tiny"), "--image", str(broken), "--ask", "What?"), "undecodable image")
    out = tmp_path / "answers"
    done = _infer("evaluate", str(trained / "tiny/instruct"), "--shards", ".cache/tiny/shards/000000.tar", "--task",
                  "instruct", "--out", str(out), "--set", "max_new_tokens=4", "--swap", "image")  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 20 and all(line["prompt"] and line["reference"] and not line["error"] for line in lines)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["num_records"] == 20 and metrics["controls"]["swap"] == ["image"]
    assert "exact_match" in metrics["scores"] and "pictures swapped between records" in done.stdout


def test_not_finite_steps_are_skipped_and_then_stop_the_run(tiny_folder, tmp_path):
    """A base model with an infinite embedding: every step that meets the token is skipped, on all ranks alike."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny.FOLDER / "llm", tmp_path / "llm")
    weights = load_file(tmp_path / "llm/model.safetensors")
    letter = tiny.tokenizer()("W", add_special_tokens=False)["input_ids"][0]  # in "What colour?", "Which way?"
    weights["model.embed_tokens.weight"][letter] = torch.inf
    save_file(weights, tmp_path / "llm/model.safetensors", metadata={"format": "pt"})
    done = runs.train(tmp_path / "run", f"model.llm.pretrained={tmp_path / 'llm'}", *ONE, check=False)
    _refused(done, "not finite")
