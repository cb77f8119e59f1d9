"""A LLaVA of transformers becomes a checkpoint that answers the same, and a LLaVA again."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from data_prep.make_shards import media_header
from mmchat.config import parse_config
from mmchat.conversation import Conversation, MediaRef, Turn
from mmchat.data.build import build_template
from mmchat.data.shard_writer import write_shards
from mmchat.inference.chat import ChatSession
from mmchat.inference.export import export_llava
from mmchat.inference.generate import Decoding
from mmchat.inference.import_llava import import_llava
from mmchat.inference.llava_check import hear, load_llava, load_processor, messages
from mmchat.inference.load import load
from mmchat.training.stage import StopRequest, train_stage
from tests import tiny
from tests.runs import ENVIRONMENT

QUESTION = "What is it?"
# What LLaVA-1.5's own template writes: pictures first, blanks between turns, no end behind an answer.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
          "image_size": 32, "patch_size": 8}  # fmt: skip


def llama_tokenizer(blank_before: str = "always") -> PreTrainedTokenizerFast:
    """Of Llama's build: blanks as part of words, bytes for what is unknown.

    blank_before: `always`, each piece of text; `first`, only the beginning of a prompt, as transformers 5 builds it.
    """
    special = ["<unk>", "<s>", "</s>"]
    tokens = special + [f"<0x{i:02X}>" for i in range(256)] + ["▁"] + [chr(i) for i in range(33, 127)]
    merges = [("▁", "W"), ("▁W", "h"), ("▁", "A"), ("▁", "U"), ("▁", "▁"), ("a", "t"), ("i", "s")]
    tokens += ["".join(merge) for merge in merges]
    backend = Tokenizer(BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True))
    if blank_before == "always":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in [*special, "<image>"]])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA in the form of llava-hf/llava-1.5-7b-hf: CLIP, mlp, Llama, pictures cropped."""
    return write_llava(tmp_path_factory.mktemp("llava") / "tiny")


def write_llava(folder: Path, vision: Any = None, blank_before: str = "always", **options: Any) -> Path:
    torch.manual_seed(3)
    tokenizer = llama_tokenizer(blank_before)
    text = LlamaConfig(
        vocab_size=len(tokenizer) + 3, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision or CLIPVisionConfig(**VISION),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **options,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02 if "vision" in name else 0.08)
            elif "projector" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=8, vision_feature_select_strategy="default",
        chat_template=TEMPLATE, num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def imported(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By the command, and moved to another place: its base models lie within."""
    folder = tmp_path_factory.mktemp("imported")
    command = [sys.executable, "infer.py", "import", str(llava), str(folder / "first")]
    done = subprocess.run(command, cwd=tiny.ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "chat format llava" in done.stdout
    return (folder / "first").rename(folder / "moved")


@pytest.fixture(scope="module")
def talk() -> Conversation:
    ref = MediaRef("image", tiny.picture("blue", random.Random(4), (48, 40)))
    return Conversation((Turn("user", (ref, QUESTION)),))


def theirs_of(folder: Path, talk: Conversation) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and logits of plain transformers."""
    inputs = load_processor(folder).apply_chat_template(
        messages(talk), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        return inputs["input_ids"][0], load_llava(folder)(**inputs).logits[0]


def test_answers_as_transformers_does(llava, imported, talk):
    ids, logits = theirs_of(llava, talk)
    config = json.loads((llava / "config.json").read_text())
    heard = hear(load(imported, "float32"), [talk], config["image_token_index"])[0]
    assert heard.token_ids.tolist() == ids.tolist()
    torch.testing.assert_close(heard.logits, logits, rtol=0, atol=1e-4)
    assert logits.std() > 0.1


def test_and_back_again(imported, llava, talk, tmp_path):
    export_llava(imported, tmp_path / "again", dtype="float32")
    before, after = theirs_of(llava, talk), theirs_of(tmp_path / "again", talk)
    assert before[0].tolist() == after[0].tolist()
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-5)


def test_a_chat_says_what_transformers_generates(imported, llava, talk):
    inputs = load_processor(llava).apply_chat_template(
        messages(talk), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    theirs = load_llava(llava).generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    loaded = load(imported, "float32")
    text = "".join(ChatSession(loaded, Decoding(max_new_tokens=12)).ask(talk.turns[0].parts))
    assert text.strip() == loaded.template.tokenizer.decode(theirs, skip_special_tokens=True).strip() != ""


def test_a_tokenizer_of_the_newer_build(tmp_path):
    """Import and export compare ids, and would refuse."""
    folder = write_llava(tmp_path / "newer", blank_before="first")
    import_llava(str(folder), tmp_path / "imported")
    assert load(tmp_path / "imported", "float32").config.chat.format == "llava"
    export_llava(tmp_path / "imported", tmp_path / "again", dtype="float32")


def test_training_sees_the_prompt_that_is_asked(imported):
    """Under the joined format, too, what is learned is the answer with its end, and nothing before it."""
    template = build_template(load(imported, "float32").config)
    turns = (Turn("user", ("What is it? <s> ",)), Turn("assistant", ("At is.",)), Turn("user", ("Which?",)))
    whole = template.render(Conversation(turns))
    prompt = template.render(Conversation(turns[:1]), answer=True)
    assert whole.token_ids[: len(prompt)] == prompt.token_ids
    learned = [label for label in whole.labels if label != -100]
    assert template.tokenizer.decode(learned) == "At is.</s>" and learned == [*template.answer_ids("At is."), 2]
    assert prompt.token_ids.count(1) == 1  # what a user types is text, also where it looks like a token


@pytest.mark.parametrize(
    "vision, options, reason",
    [
        (None, {"projector_hidden_act": "relu"}, "projector_hidden_act relu"),
        (None, {"vision_feature_layer": [-1, -2]}, "features of several layers"),
        (None, {"vision_feature_layer": 0}, "wanted a layer from 1 to 3"),
        (None, {"vision_feature_layer": -4}, "wanted a layer from 1 to 3"),
        (SiglipVisionConfig(**VISION), {}, "SigLIP's first patch"),
        (CLIPVisionConfig(**VISION | {"image_size": 64}), {}, "a square of 64 pixels"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, vision, options, reason):
    folder = write_llava(tmp_path / "odd", vision, **options)
    with pytest.raises(ValueError, match="cannot become a checkpoint") as refused:
        import_llava(str(folder), tmp_path / "out")
    assert reason in str(refused.value) and not list(tmp_path.glob("out*"))


def test_an_unknown_template_needs_a_name(llava, tmp_path):
    folder = shutil.copytree(llava, tmp_path / "odd")
    (folder / "chat_template.jinja").write_text(
        TEMPLATE.replace("message['role'].upper() + ': '", "'[' + message['role'] + ']'")
    )
    with pytest.raises(ValueError, match="no chat format here makes the ids"):
        import_llava(str(folder), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    import_llava(str(folder), tmp_path / "out", chat_format="vicuna")
    assert load(tmp_path / "out", "float32").config.chat.format == "vicuna"


def test_damaged_weights_are_named(llava, tmp_path):
    folder = shutil.copytree(llava, tmp_path / "odd")
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="its weights cannot be read"):
        import_llava(str(folder), tmp_path / "out")


@pytest.mark.usefixtures("process_group")
def test_it_learns_to_hear(imported, tiny_folder, tmp_path):
    """FLoRA for sounds beside what it knew: pictures are answered bitwise as before."""
    spoken = [record for record in tiny.records(20) if int(record.key) % 5 in (1, 4)]
    write_shards(spoken, tmp_path / "shards", header_of=media_header)
    values = yaml.safe_load((imported / "config.yaml").read_text())
    values["model"]["llm"]["pretrained"] = str(imported / "llm")
    values["model"]["modalities"]["image"]["encoder"]["pretrained"] = str(imported / "encoder")
    values["model"]["modalities"]["audio"] = {
        "encoder": {"kind": "whisper", "pretrained": ".cache/tiny/whisper"},
        "connector": {"kind": "pool", "window": [10, 1, 1]},
    }
    values["model"]["fusion"] = {"kind": "flora", "rank": 4, "alpha": 8}
    values["stages"][0] |= {
        "train": {"connectors.audio": 1e-2, "fusion.audio": 1e-2}, "steps": 2, "workers": 0,
        "data": [{"name": "sounds", "task": "instruct", "shards": str(tmp_path / "shards/*.tar")}],
        "batch": {"lanes": 2, "tokens": 256, "patches": 4096},
    }  # fmt: skip
    values |= {"run": "hears", "start": str(imported), "checkpoints": str(tmp_path / "runs")}
    config = parse_config(values, "test")
    assert train_stage(config, config.stages[0], None, StopRequest()) == "done"

    before, after = load(imported, "float32"), load(config.folder, "float32")
    assert after.checkpoint is not None and "fusion.audio" in after.checkpoint.manifest["parts"]
    seen = Conversation((Turn("user", (MediaRef("image", tiny.picture("red", random.Random(1))), QUESTION)),))
    assert torch.equal(hear(before, [seen], 0)[0].logits, hear(after, [seen], 0)[0].logits)
    heard = Conversation((Turn("user", (MediaRef("audio", tiny.tone(440.0, 0.5)), QUESTION)),))
    assert hear(after, [heard], 0)[0].logits.isfinite().all()
