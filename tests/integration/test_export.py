"""Exports answer as the model that was trained, in a process that has no mmchat; what does not fit is refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import SiglipVisionConfig, SiglipVisionModel

from mmchat.conversation import Conversation, MediaRef, Turn
from mmchat.inference.chat import ChatSession
from mmchat.inference.export import export_llava, export_merged
from mmchat.inference.generate import Decoding
from mmchat.inference.import_llava import import_llava
from mmchat.inference.llava_check import differences, hear
from mmchat.inference.llava_folder import IMAGE_TOKEN, fusion_obstacles, obstacles
from mmchat.inference.load import load
from tests import exports, models, tiny
from tests.runs import ENVIRONMENT

QUESTION = "What colour is it?"
FLORA = {"kind": "flora", "rank": 4, "alpha": 8}
LORA = {"kind": "lora", "rank": 4, "alpha": 8}


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture whose sides are odd, as a file."""
    file = tmp_path_factory.mktemp("picture") / "red.png"
    file.write_bytes(tiny.picture("red", random.Random(2), (61, 43)))
    return file


def said(path: Path, picture: Path) -> tuple[str, torch.Tensor]:
    """What mmchat answers, and its logits of the prompt."""
    loaded = load(path, "float32")
    ref = MediaRef("image", picture.read_bytes())
    session = ChatSession(loaded, Decoding(max_new_tokens=24))
    text = "".join(session.ask((ref, QUESTION)))
    heard = hear(loaded, [Conversation((Turn("user", (ref, QUESTION)),))], image_id=0)
    return text.strip(), heard[0].logits


def cases(tmp_path: Path) -> list[dict[str, Any]]:
    """Models that are LLaVAs, each another way."""
    siglip = exports.IMAGE["encoder"] | {"pretrained": str(tiny_siglip(tmp_path / "siglip"))}
    class_token = exports.IMAGE["encoder"] | {"layer": -1, "drop_class_token": False}
    return [
        {"fusion": LORA},
        {
            "llm": {"pretrained": models.llm_folder(tmp_path, "qwen2")},  # its head is its own
            "fusion": {"kind": "early"},
            "image": exports.IMAGE | {"encoder": siglip, "resize": "squash", "connector": {"kind": "linear"}},
        },
        {"fusion": FLORA, "image": exports.IMAGE | {"encoder": class_token, "resize": "crop"}},
    ]


def tiny_siglip(folder: Path) -> Path:
    """A SigLIP vision tower of 32 pixels; half grey is its mean."""
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
    )
    SiglipVisionModel(config).save_pretrained(folder)
    return folder


def test_plain_transformers_answers_the_same(tiny_folder, tmp_path, picture):
    folders, answers = [], []
    for i, case in enumerate(cases(tmp_path)):
        path = exports.checkpoint(tmp_path / f"checkpoint{i}", {"system": "Be brief."}, **case)
        assumed = "image" if case["fusion"]["kind"] == "flora" else None
        folders.append(tmp_path / f"llava{i}")
        export_llava(path, folders[-1], assumed, "float32", picture.read_bytes(), QUESTION)
        answers.append(said(path, picture))
    found = exports.plain(folders, picture, QUESTION)
    assert len(found) == len(folders)
    for folder, answer, (text, logits) in zip(folders, found, answers, strict=True):
        theirs = torch.load(f"{folder}.pt", weights_only=True)
        assert answer["model"] == "LlavaForConditionalGeneration" and answer["text"].strip() == text != ""
        torch.testing.assert_close(theirs[:, : logits.shape[1]], logits, rtol=0, atol=1e-4)
        assert theirs[:, logits.shape[1] :].max() < logits.max()  # the picture's token is never said
    import_llava(str(folders[1]), tmp_path / "back", picture=picture.read_bytes())  # compares, and would refuse
    assert load(tmp_path / "back", "float32").config.model.modalities.image.resize == "squash"


def test_the_command_writes_half_precision_and_a_card(tiny_folder, tmp_path, picture):
    path = exports.checkpoint(tmp_path / "checkpoint", fusion=LORA)
    metrics = {"task": "vqa", "scores": {"accuracy": 0.5}, "num_questions": 4, "protocol_sha256": "ab"}
    metrics |= {"controls": {"blank": ["image"]}, "checkpoint_sha256": "cd"}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    command = [sys.executable, "infer.py", "export", str(path), str(tmp_path / "out"), "--format", "hf-llava"]
    command += ["--dtype", "bfloat16", "--evaluation", str(tmp_path / "metrics.json"), "--image", str(picture)]
    done = subprocess.run(command, cwd=tiny.ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "weights in bfloat16: logits change by up to" in done.stdout and "the same ids and pixels" in done.stdout
    weights = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\n") and "pipeline_tag: image-text-to-text" in card
    assert "| vqa | accuracy | 0.5000 | 4 | pictures blank | ab | another, cd |" in card
    assert "kind: lora" in card and str(tmp_path) not in card
    with pytest.raises(ValueError, match="is not empty"):
        export_merged(path, tmp_path / "out")
    command[4:] = [str(tmp_path / "other"), "--format", "merged", "--licence", "mit"]
    done = subprocess.run(command, cwd=tiny.ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "--licence is of --format hf-llava or hub; leave it out" in done.stderr


def test_what_answers_otherwise_is_left_beside(tiny_folder, tmp_path, picture, monkeypatch):
    """A template whose ids are not the model's: nothing appears in OUT, nothing is deleted."""
    path = exports.checkpoint(tmp_path / "checkpoint", chat={"media_suffix": {"image": " "}}, fusion=LORA)
    other = "{% for part in messages[0]['content'] if part['type'] == 'image' %}<image>{% endfor %}What?"
    monkeypatch.setattr("mmchat.inference.llava_folder.jinja_template", lambda *_: other)
    with pytest.raises(ValueError, match="token ids differ from position 0"):
        export_llava(path, tmp_path / "out", dtype="float32", picture=picture.read_bytes())
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial/config.json").exists()


def test_a_changed_weight_is_found(tiny_folder, tmp_path, picture):
    path = exports.checkpoint(tmp_path / "checkpoint", fusion={"kind": "early"})
    export_llava(path, tmp_path / "out", dtype="float32")
    loaded = load(path, "float32")
    with torch.no_grad():
        loaded.model.connectors["image"].projection[2].bias += 0.01
    talk = Conversation((Turn("user", (MediaRef("image", picture.read_bytes()), QUESTION)),))
    found, largest = differences(tmp_path / "out", hear(loaded, [talk], image_id=len(tiny.tokenizer())))
    assert len(found) == 1 and "logits differ" in found[0] and largest > 1e-4


def test_every_reason_is_named_at_once(tiny_folder, tmp_path):
    """The tiny model: three modalities and FLoRA; and connectors and a late fusion that LLaVA has not."""
    path = exports.checkpoint(
        tmp_path / "checkpoint",
        fusion=FLORA,
        image=exports.IMAGE | {"connector": {"kind": "resampler", "num_queries": 4, "norm_output": True}},
        audio=models.config().model.modalities.audio.model_dump(mode="json"),
    )
    with pytest.raises(ValueError, match="does not fit --format hf-llava") as refused:
        export_llava(path, tmp_path / "out")
    for reason in ("audio: LLaVA has pictures alone", "connector: kind resampler", "--assume-present", "--format hub"):
        assert reason in str(refused.value)
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(ValueError, match="does not fit --format merged"):
        export_merged(path, tmp_path / "out")


@pytest.mark.parametrize(
    "fusion, assumed, reason",
    [
        (FLORA, None, "--assume-present image"),
        (FLORA, "audio", "the model has no such modality"),
        (FLORA | {"scope": "own_tokens"}, "image", "own_tokens"),
        ({"kind": "late"}, None, "late keeps media out"),
        (LORA, "image", "does not depend on presence"),
    ],
)
def test_fusions_that_cannot_be_merged(tiny_folder, tmp_path, fusion, assumed, reason):
    loaded = load(exports.checkpoint(tmp_path / "checkpoint", fusion=fusion), "float32")
    assert not obstacles(loaded)
    found = fusion_obstacles(loaded, assumed)
    assert len(found) == 1 and reason in found[0]


@pytest.mark.parametrize("fusion, assumed", [(LORA, None), (FLORA, "image")], ids=["lora", "flora"])
def test_a_merged_llm_is_one_of_transformers(tiny_folder, tmp_path, picture, fusion, assumed):
    from transformers import AutoModelForCausalLM

    path = exports.checkpoint(tmp_path / "checkpoint", fusion=fusion)
    export_merged(path, tmp_path / "out", assumed, "float32")
    merged, trained = load(tmp_path / "out", "float32"), load(path, "float32")
    assert merged.config.model.fusion.kind == "early" and merged.model.gates is None
    assert merged.checkpoint is not None and merged.checkpoint.manifest["parts"] == ["connectors.image"]
    assert said(tmp_path / "out", picture)[0] == said(path, picture)[0]
    torch.testing.assert_close(said(tmp_path / "out", picture)[1], said(path, picture)[1], rtol=0, atol=1e-4)

    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "out/llm", dtype=torch.float32)
    talk = Conversation((Turn("user", ("Say 3.",)),))
    heard = hear(trained, [talk], image_id=0)[0]
    theirs = llm(input_ids=heard.token_ids[None]).logits[0]
    change = float((theirs - heard.logits).detach().abs().max())
    assert change < 1e-4 if assumed is None else change > 1e-2  # without a picture, FLoRA is the base LLM


def test_a_token_for_pictures_is_taken_where_there_is_one(tiny_folder, tmp_path, picture):
    """An LLM of another vocabulary that has the token: nothing grows."""
    llm = tiny.build_llm(tmp_path / "llm", "qwen2")
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.save_pretrained(llm)
    from transformers import AutoModelForCausalLM

    grown = AutoModelForCausalLM.from_pretrained(llm)
    grown.resize_token_embeddings(len(tokenizer) + 5)
    grown.save_pretrained(llm)
    path = exports.checkpoint(tmp_path / "checkpoint", llm={"pretrained": str(llm)}, fusion={"kind": "early"})
    export_llava(path, tmp_path / "out", dtype="float32", picture=picture.read_bytes())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["text_config"]["vocab_size"] == len(tokenizer) + 5
    assert config["image_token_index"] == tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
