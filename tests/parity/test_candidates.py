"""Answers behind a shared prompt, or each in a whole conversation of its own: the same likelihoods."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn import functional as F

from mmchat.batch import IGNORE
from mmchat.conversation import Conversation, MediaHeader, MediaRef, Record, Region, Turn
from mmchat.data.pack import collate, load_media
from mmchat.errors import SampleError
from mmchat.inference import score
from mmchat.inference.load import Loaded
from mmchat.inference.score import answer_ids, candidate_likelihoods, likelihoods, reference_likelihood
from mmchat.sources import read_source
from mmchat.sources.files import Files
from mmchat.tasks.question import Answer, Protocol
from mmchat.tasks.visdial import VisDial
from tests import models, tiny
from tests.sources.fixtures_dialogues import FIXTURES

FUSIONS = [
    {"kind": "flora", "rank": 4},
    {"kind": "flora", "rank": 4, "scope": "own_tokens"},
    {"kind": "lora", "rank": 4},
    {"kind": "early"},
    {"kind": "full"},
    {"kind": "late", "num_heads": 4},
]
CANDIDATES = ["yes", "no", "", "a", "<|im_end|>", "Two, and there is a long red one behind the other two. " * 4, "yes"]


def _loaded(run, dtype=torch.float32):
    model, template = models.build(run)
    models.wake(model)
    return Loaded(model.to(dtype), template, run, torch.device("cpu"), None)


@pytest.fixture(scope="module", params=FUSIONS, ids=lambda f: "-".join(str(v) for v in f.values()))
def loaded(request, tiny_folder):
    return _loaded(models.config(fusion=request.param))


def _prompt(template, conversation):
    sample = template.render(conversation, "k", answer=True)
    return sample, load_media(sample, template)


def _alone(loaded, conversation, parts):
    """The answer as the last turn of a whole conversation, without a cache, through the full logits."""
    sample = loaded.template.render(Conversation((*conversation.turns, Turn("assistant", parts, learn=True))))
    batch = collate([sample], [load_media(sample, loaded.template)])
    asked = len(loaded.template.render(conversation, answer=True))
    labels = batch.labels[0].clone()
    labels[: asked - 1] = IGNORE  # answers of the history are learned too
    with torch.no_grad():
        logits = loaded.model.logits(batch)[0].double()
    return -F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum").item(), int((labels != IGNORE).sum())


def _agree(loaded, conversation):
    found = candidate_likelihoods(loaded, *_prompt(loaded.template, conversation), CANDIDATES)
    for text, (total, count) in zip(CANDIDATES, found, strict=True):
        wanted, number = _alone(loaded, conversation, (text,))
        assert count == number == len(text.encode()) + 1  # a token a byte, and the end marker
        assert abs(total - wanted) < 1e-4
    assert len({round(total, 3) for total, _ in found}) == len({total for total, _ in found}) == len(set(CANDIDATES))


def test_a_shared_prompt_equals_each_alone(loaded):
    for conversation in models.conversations():
        _agree(loaded, Conversation(conversation.turns[:-1]))


def test_the_picture_counts(loaded):
    """Else the agreement above would not show that candidates see it."""
    first, second = (
        Conversation((Turn("user", (MediaRef("image", tiny.picture(c, random.Random(0))), "What?")),))
        for c in ("red", "blue")
    )
    found = [candidate_likelihoods(loaded, *_prompt(loaded.template, c), ["yes"])[0][0] for c in (first, second)]
    assert abs(found[0] - found[1]) > 1e-3


@pytest.mark.parametrize("budget", [1, 500])
def test_chunks_change_nothing(tiny_folder, monkeypatch, budget):
    loaded = _loaded(models.config())
    conversation = Conversation(models.conversations()[0].turns[:-1])
    prompt = _prompt(loaded.template, conversation)
    whole = candidate_likelihoods(loaded, *prompt, CANDIDATES)
    monkeypatch.setattr(score, "CHUNK_TOKENS", budget)
    parts = candidate_likelihoods(loaded, *prompt, CANDIDATES)
    assert [count for _, count in parts] == [count for _, count in whole]
    assert [total for total, _ in parts] == pytest.approx([total for total, _ in whole], abs=1e-4)


def test_chunks_keep_within_their_tokens(monkeypatch):
    monkeypatch.setattr(score, "CHUNK_TOKENS", 1000)
    lengths = [random.Random(i).randint(1, 60) for i in range(200)]
    chunks = list(score._chunks(lengths, prompt_length=90))
    assert sorted(i for chunk in chunks for i in chunk) == [i for i, length in enumerate(lengths) if length > 1]
    assert all(len(chunk) * (90 + max(lengths[i] for i in chunk)) <= 1000 for chunk in chunks)
    assert len(chunks) < 40  # and are not smaller than they must be
    # A prompt beyond the limit leaves one answer a chunk.
    assert {len(chunk) for chunk in score._chunks(lengths, prompt_length=2000)} == {1}


def test_positions_end(tiny_folder, tmp_path):
    """Rotary positions go on for ever and would be scored without a word, a table of them ends with an error."""
    conversation = Conversation((Turn("user", ("What?",)),))
    for kind in ("llama", "gpt2"):
        loaded = _loaded(models.config(llm={"pretrained": models.llm_folder(tmp_path / kind, kind)}))
        prompt = _prompt(loaded.template, conversation)
        room = 2048 - len(prompt[0]) - 1  # for the end marker
        ((total, count),) = candidate_likelihoods(loaded, *prompt, ["a" * room])
        assert count == room + 1 and total < 0
        with pytest.raises(SampleError, match=r"conversation too long: k: .* 2048 positions"):
            candidate_likelihoods(loaded, *prompt, ["yes", "a" * (room + 1)])
        with pytest.raises(SampleError, match="conversation too long"):
            reference_likelihood(loaded, *prompt, conversation, ("a" * 2400,))


@pytest.mark.parametrize("kind", ["gemma3", "gpt2", "qwen3"])
def test_other_llms(tiny_folder, tmp_path, kind):
    """Gemma's windows are shorter than the prompt, and its logits are capped."""
    loaded = _loaded(models.config(llm={"pretrained": models.llm_folder(tmp_path, kind)}))
    for conversation in models.conversations()[:1] + models.conversations()[3:]:
        _agree(loaded, Conversation(conversation.turns[:-1]))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_attention(tiny_folder, attention):
    run = models.config(llm={"pretrained": str(tiny.FOLDER / "llm"), "attention": attention})
    _agree(_loaded(run), Conversation(models.conversations()[0].turns[:-1]))


def test_bfloat16(tiny_folder):
    loaded = _loaded(models.config(), torch.bfloat16)
    conversation = Conversation(models.conversations()[0].turns[:-1])
    for text, (total, _) in zip(
        CANDIDATES, candidate_likelihoods(loaded, *_prompt(loaded.template, conversation), CANDIDATES), strict=True
    ):
        assert total == pytest.approx(_alone(loaded, conversation, (text,))[0], rel=0.02, abs=0.1)


def test_a_reference_with_regions(tiny_folder):
    loaded = _loaded(models.config())
    image = MediaRef("image", tiny.picture("red", random.Random(0)), MediaHeader(48, 32))
    conversation = Conversation((Turn("user", (image, "Where?")),))
    parts = ("Here: ", Region(0, box=(4, 4, 20, 20)), ".")
    ids = answer_ids(loaded.template, conversation, parts)
    text = loaded.template.tokenizer.decode(ids)
    assert text.startswith("Here: [") and text.endswith("].<|im_end|>")
    prompt = _prompt(loaded.template, conversation)
    total, count = reference_likelihood(loaded, *prompt, conversation, parts)
    wanted, number = _alone(loaded, conversation, parts)
    assert count == number == len(ids) and total == pytest.approx(wanted, abs=1e-4)
    assert likelihoods(loaded, *prompt, []) == []


def test_a_reference_that_cannot_be_said(tiny_folder):
    loaded = _loaded(models.config())
    image = MediaRef("image", tiny.picture("red", random.Random(0)), MediaHeader(48, 32))
    conversation = Conversation((Turn("user", (image, "Where?")),))
    for parts, reason in (
        ((Region(1, box=(4, 4, 20, 20)),), "region without its picture"),
        ((image, "this"), "media in an answer"),
    ):
        with pytest.raises(SampleError, match=reason):
            reference_likelihood(loaded, *_prompt(loaded.template, conversation), conversation, parts)


def test_the_picture_is_encoded_once(tiny_folder):
    loaded = _loaded(models.config())
    conversation = Conversation(models.conversations()[0].turns[:-1])
    sample, media = _prompt(loaded.template, conversation)
    calls = []
    loaded.model.encoders["image"].register_forward_hook(lambda *_: calls.append("encoder"))
    loaded.model.llm.register_forward_pre_hook(lambda *_: calls.append("llm"))
    loaded.model.llm.get_decoder().register_forward_pre_hook(lambda *_: calls.append("decoder"))
    candidate_likelihoods(loaded, sample, media, ["yes", "not", "one"])
    assert calls == ["encoder", "decoder", "decoder"]  # the prompt, and all three
    calls.clear()
    candidate_likelihoods(loaded, sample, media, CANDIDATES)
    assert calls.count("encoder") == 1 and calls.count("decoder") < len(CANDIDATES)


def test_a_visual_dialog_is_ranked_by_a_real_model(tiny_folder, tmp_path):
    FIXTURES["visdial"](tmp_path)
    loaded, task, protocol = _loaded(models.config()), VisDial(), Protocol()
    records = [one for one in read_source("visdial", Files(tmp_path), "val") if isinstance(one, Record)]
    questions = [question for record in records for question in task.questions(record, protocol)]
    answers = []
    for question in questions:
        found = candidate_likelihoods(loaded, *_prompt(loaded.template, question.conversation), question.candidates)
        answers.append(Answer(likelihoods=tuple(total for total, _ in found)))
    scores = task.score(answers, questions, protocol)
    assert scores["num_scored"] == 4 and scores["num_not_answered"] == 0 and scores["num_ndcg_rounds"] == 1
    assert 1 <= scores["mean_rank"] <= 100 and len(set(answers)) == 4
    assert len(task.submission(answers, questions)) == 4
