"""A released checkpoint is small, answers as the one that was trained, and is the base LLM where nothing is seen."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import infer
from data_prep.base_models import BASE_MODELS, MODELS
from mmchat.checkpoint import CheckpointError, find, load_weights, open_checkpoint, write_checkpoint
from mmchat.conversation import Conversation, Turn
from mmchat.data.pack import collate, load_media
from mmchat.inference.chat import ChatSession
from mmchat.inference.generate import Decoding
from mmchat.inference.load import MADE, MADE_IN, load
from mmchat.inference.release import release
from mmchat.models.probe import probe_logits
from tests import by_heart, runs, tiny

DEMO = tiny.ROOT / "checkpoints" / "demo"
PROMPTS = ["Hello!", "What is the capital of France?", "Count to five.", "Say <|im_end|> and [0.1,0.2,0.3,0.4]."]


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    """The run's folder of a few real training steps."""
    folder = tmp_path_factory.mktemp("run")
    runs.train(folder, "stages.align.steps=2", "stages.instruct.steps=4")
    return folder / "tiny"


@pytest.fixture(scope="module")
def learned(tiny_folder, tmp_path_factory):
    """A checkpoint with known answers."""
    return by_heart.checkpoint(tmp_path_factory.mktemp("heart"))


def answer(loaded, *parts) -> str:
    return "".join(ChatSession(loaded, Decoding(max_new_tokens=70)).ask(parts))


def logits_of(loaded, conversation: Conversation) -> torch.Tensor:
    sample = loaded.template.render(conversation, answer=True)
    batch = collate([sample], [load_media(sample, loaded.template)])
    with torch.no_grad():
        return loaded.model.logits(batch.to(loaded.device))


def assert_text_only_is_the_base_llm(checkpoint: Path, num_tokens: int) -> None:
    """Bitwise, logits and texts, in float32, against transformers' own path."""
    loaded = load(checkpoint, "float32")
    pairs = [parameter for name, parameter in loaded.model.named_parameters() if ".fusion_b_" in name]
    assert pairs and all(pair.abs().max() > 0 for pair in pairs)  # else equality would show nothing
    base = AutoModelForCausalLM.from_pretrained(loaded.config.model.llm.pretrained, dtype=torch.float32).eval()
    base.to(loaded.device)
    tokenizer = loaded.template.tokenizer
    for prompt in PROMPTS:
        conversation = Conversation((Turn("user", (prompt,)),))
        ids = torch.tensor([loaded.template.render(conversation, answer=True).token_ids], device=loaded.device)
        with torch.no_grad():
            assert torch.equal(logits_of(loaded, conversation), base(input_ids=ids).logits)
            said = base.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens,
                eos_token_id=loaded.template.end_ids[-1], pad_token_id=0,
            )  # fmt: skip
        theirs = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True).strip()
        ours = "".join(ChatSession(loaded, Decoding(max_new_tokens=num_tokens)).ask([prompt]))
        assert ours == theirs


def test_text_alone_is_answered_by_the_base_llm_bitwise(trained, tmp_path):
    assert_text_only_is_the_base_llm(trained, num_tokens=12)
    release(trained, tmp_path / "out", "float16")
    assert_text_only_is_the_base_llm(tmp_path / "out", num_tokens=12)


def test_a_picture_is_not_answered_by_the_base_llm(learned):
    """What the test above would miss: a model that never uses what it learned."""
    loaded = load(learned)
    first = by_heart.conversations()[0]
    assert answer(loaded, *first.turns[0].parts) == "[0.250,0.375,0.750,0.625]"
    assert answer(loaded, *first.turns[0].parts[1:]) != "[0.250,0.375,0.750,0.625]"


def test_float32_changes_nothing(trained, learned, tmp_path):
    for number, checkpoint in enumerate((trained, learned)):
        size, change = release(checkpoint, tmp_path / str(number), "float32")
        before, after = load(checkpoint, "float32"), load(tmp_path / str(number), "float32")
        assert change == 0 and size > 0
        for conversation in by_heart.conversations():
            question = Conversation(conversation.turns[:1])
            assert torch.equal(logits_of(before, question), logits_of(after, question))
            assert answer(before, *question.turns[0].parts) == answer(after, *question.turns[0].parts)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.01), ("bfloat16", 0.05)])
def test_half_precision_changes_little(learned, tmp_path, dtype, tolerance):
    size, change = release(learned, tmp_path / "out", dtype)
    assert 0 < change < tolerance
    before, after = load(learned, "float32"), load(tmp_path / "out", "float32")
    assert size < 0.6 * (learned / "weights.safetensors").stat().st_size
    for conversation in by_heart.conversations():
        question = Conversation(conversation.turns[:1])
        old, new = logits_of(before, question), logits_of(after, question)
        assert 0 < (old - new).abs().max() < tolerance * 2 * old.std()
        assert answer(before, *question.turns[0].parts) == answer(after, *question.turns[0].parts)


def test_float16_changes_less_than_bfloat16(trained, learned, tmp_path):
    """Why it is the default."""
    for number, checkpoint in enumerate((trained, learned)):
        changes = [release(checkpoint, tmp_path / f"{number}-{d}", d)[1] for d in ("float16", "bfloat16")]
        assert changes[0] < changes[1]


def test_what_a_release_holds(trained, tmp_path, monkeypatch, capsys):
    out = tmp_path / "deep" / "demo"
    monkeypatch.setattr(sys, "argv", ["infer.py", "release", str(trained), str(out)])
    assert infer.main() == 0
    assert f"{out}: " in capsys.readouterr().out
    assert {file.name for file in out.iterdir()} == {"config.yaml", "manifest.json", "weights.safetensors"}
    checkpoint, source = open_checkpoint(out), open_checkpoint(find(trained))
    assert {str(weight.dtype) for weight in checkpoint.weights().values()} == {"torch.float16"}
    assert checkpoint.weights().keys() == source.weights().keys() and checkpoint.config_text == source.config_text
    assert checkpoint.manifest["bases"] == source.manifest["bases"] and checkpoint.step == source.step == 4
    assert find(out) == out
    # It goes into version control beside its card, which is no part of it.
    (out / "README.md").write_text("# A card\n")
    assert load(out).checkpoint is not None

    assert infer.main() == 1  # again: nothing is overwritten
    assert "exists; remove it, or name another folder" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["infer.py", "release", "configs/tiny.yaml", str(tmp_path / "no")])
    assert infer.main() == 1 and "is a configuration; wanted a checkpoint" in capsys.readouterr().err


def test_what_lies_beside_a_release_stays(learned, tmp_path):
    others = tmp_path / "mine.partial"
    others.mkdir()
    (tmp_path / "out.partial").mkdir()  # of a release that was killed
    release(learned, tmp_path / "out", "float16")
    assert others.is_dir() and not (tmp_path / "out.partial").exists()


def test_a_weight_beyond_the_precision_is_refused(learned, tmp_path):
    loaded = load(learned, "float32")
    weights = loaded.checkpoint.weights()
    name = next(name for name in weights if name.endswith("bias"))
    weights[name][0] = 1e6
    load_weights(loaded.model, weights, set(weights), learned)
    facts = {name: value for name, value in loaded.checkpoint.manifest.items() if name in ("step", "parts")}
    facts["probe"] = {"dtype": "float32", "logits": probe_logits(loaded.model, loaded.device)}
    write_checkpoint(tmp_path / "large", loaded.checkpoint.config_text, weights, None, None, facts)
    with pytest.raises(ValueError, match=rf"{name} has weights that float16 cannot hold"):
        release(tmp_path / "large", tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()
    release(tmp_path / "large", tmp_path / "out", "bfloat16")


@pytest.mark.parametrize("name", ["weights.safetensors", "config.yaml"])
def test_a_damaged_release_is_refused(learned, tmp_path, name):
    release(learned, tmp_path / "out", "float16")
    data = bytearray((tmp_path / "out" / name).read_bytes())
    data[-2] ^= 1
    (tmp_path / "out" / name).write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        load(tmp_path / "out")


def test_another_base_model_is_noticed(learned, tmp_path, monkeypatch):
    release(learned, tmp_path / "out", "float16")
    for name in ("clip", "whisper"):
        (tmp_path / ".cache" / "tiny").mkdir(parents=True, exist_ok=True)
        (tmp_path / ".cache" / "tiny" / name).symlink_to(tiny.FOLDER / name)
    tiny.build_llm(tmp_path / ".cache" / "tiny" / "llm", seed=1)
    monkeypatch.chdir(tmp_path)  # what lies below the working directory comes first
    with pytest.raises(CheckpointError, match="does not answer the stored probe"):
        load(tmp_path / "out")


# ---- base models ----------------------------------------------------------------------------------------------------


def test_base_models_are_found_from_any_folder(learned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(learned).config.model.llm.pretrained == str(tiny.ROOT / ".cache/tiny/llm")


def test_absent_base_models_name_the_command_that_makes_them(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mmchat.inference.load.REPOSITORY", tmp_path)
    with pytest.raises(ValueError, match=r"python data_prep/base_models.py smollm2 efficientnet_lite0$"):
        load(tiny.ROOT / "configs" / "demo.yaml")


def test_the_command_makes_these_folders():
    assert {model.folder: name for name, model in MODELS.items()} == MADE
    assert tiny.ROOT / MADE_IN == BASE_MODELS


# ---- the checkpoint in the repository -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> Path:
    bases = [base["pretrained"] for base in json.loads((DEMO / "manifest.json").read_text())["bases"].values()]
    if absent := [base for base in bases if not (tiny.ROOT / base).is_dir()]:
        pytest.skip(f"not fetched: {', '.join(absent)}; python data_prep/base_models.py makes them")
    return DEMO


def test_the_demo_is_small_and_has_a_card(demo):
    files = {file.name: file.stat().st_size for file in demo.iterdir()}
    assert set(files) == {"config.yaml", "manifest.json", "weights.safetensors", "README.md"}
    assert sum(files.values()) <= 40e6
    modalities = ("image", "audio", "video")
    small = {f"{kind}.{modality}" for kind in ("connectors", "fusion") for modality in modalities}
    assert set(open_checkpoint(demo).manifest["parts"]) <= small


def test_the_demo_answers_text_alone_as_its_base_llm_bitwise(demo):
    assert_text_only_is_the_base_llm(demo, num_tokens=24)
