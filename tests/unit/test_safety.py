"""The safety stage: what it finds, what it leaves alone, and how it streams."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from mmchat.conversation import Conversation, Record, Region, Turn
from mmchat.inference.safety import (
    REPLACEMENT,
    Guard,
    HubClassifier,
    WordList,
    build_safety,
    guarded,
)
from mmchat.tasks.question import Answer, Question
from tests import tiny

GUARD = build_safety("word-list")

UNSAFE = [
    "Oh shit.",
    "SHIT!",
    "That is bullshit, my friend.",
    "You asshole",
    "what a bunch of bastards",
    "You are stupid.",
    "You\u2019re so ugly!",
    "Go to hell, all of you.",
    "Kill, yourself",
    "kill   yourself",
    "I'll kill you",
    "Here is how to make a bomb: take",
]  # fmt: skip
OBFUSCATED = [
    "sh1t", "$h!t", "5h1t", "a55hole", "b@stard", "sh|t",
    "shiiiiit", "shitttt", "SSSHHHIIITTT", "asssss",
    "sh*t", "b*st*rd", "f**k",
    "s.h.i.t", "s-h-i-t", "s_h_i_t", "'shit'", "**shit**", "b.a.s.t.a.r.d",
    "s h i t", "what a s h i t day", "S H I T !",
    "sh\u00edt", "s\u200bh\u200bi\u200bt", "\uff53\uff48\uff49\uff54", "\u0455hit", "b\u0430stard", "k1ll yours3lf",
]  # fmt: skip
SAFE = [
    "", " ", "...", "?!", "\U0001f600",
    "A dog runs over the grass.",
    "Scunthorpe, Penistone, Essex and Sussex",
    "We assess the class: bass, brass and glass pass; assets, assassins and assessments amass.",
    "Shiitake mushrooms; a cockerel crows; Dickens wrote it; cocktail analysis; a raccoon.",
    "The retardant slows the fire.",
    "Did you hurt yourself? Never kill time, kill the engine.",
    "He is 455 m up, at 5.5 % and 50 $, 5 * 4 * 3.",
    "c l a s s", "I a m s o happy", "A, B, C and D",
    "push-it", "this-hit", "**bold** and *italic*", "A** rating", "a ** b", "bob@example.org", "http://a.b.c/d-e?f=g_h",
    "P\u0159\u00edli\u0161 \u017elu\u0165ou\u010dk\u00fd k\u016f\u0148 \u00fap\u011bl \u010f\u00e1belsk\u00e9 \u00f3dy",
    "Er a\u00df ein Ma\u00df",
    "\u044d\u0442\u043e \u0445\u043e\u0440\u043e\u0448\u0430\u044f \u0441\u043e\u0431\u0430\u043a\u0430",
    "\u732b\u304c\u3044\u307e\u3059\u3002",
    "\uac15\uc544\uc9c0\uac00 \ub2ec\ub9b0\ub2e4", "\u0643\u0644\u0628 \u0635\u063a\u064a\u0631",
]  # fmt: skip


@pytest.mark.parametrize("text", [*UNSAFE, *OBFUSCATED])
def test_the_word_list_finds(text: str) -> None:
    assert GUARD.classifier.unsafe(text) == 1.0
    assert GUARD.said(text) == REPLACEMENT


@pytest.mark.parametrize("text", SAFE)
def test_the_word_list_leaves_alone(text: str) -> None:
    assert GUARD.classifier.unsafe(text) == 0.0
    assert GUARD.said(text) == text


@pytest.mark.timeout(10)
def test_texts_made_to_be_slow_are_not() -> None:
    for text in ("m" + "*" * 20000, "f" * 20000, "fu" * 10000, "a " * 10000, "m.o.t.h.e." * 2000, "you are so " * 2000):
        assert GUARD.classifier.unsafe(text) == 0.0


def test_a_list_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("# ours\n\ngadget*\nDon't look\n")
    words = WordList(path)
    assert [words.unsafe(text) for text in ("Gadgets!", "dont look", "do look", "a gad")] == [1.0, 1.0, 0.0, 0.0]
    path.write_text("# nothing\n")
    with pytest.raises(ValueError, match="has no word"):
        WordList(path)
    with pytest.raises(ValueError, match="wanted word-list or the name"):
        build_safety(" ")


# ---- streaming ------------------------------------------------------------------------------------------------------


def pieces_of(text: str, size: int = 3) -> Iterator[str]:
    return (text[i : i + size] for i in range(0, len(text), size))


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_harmless_answer_is_streamed_whole(size: int) -> None:
    text = 'One dog. "Two dogs!" It is 3.5 m long\nThree\u2026 \u732b\u3002\u72ac\u3002The end'
    shown = list(GUARD.stream(pieces_of(text, size)))
    assert "".join(shown) == text
    if size < 100:
        assert shown[:3] == ["One dog. ", '"Two dogs!" ', "It is 3.5 m long\n"]
    assert list(GUARD.stream([])) == []


def test_no_part_of_an_unsafe_sentence_is_shown() -> None:
    read = []

    def pieces() -> Iterator[str]:
        for piece in pieces_of("A dog. Oh sh" + "it, no. And more. And more."):
            read.append(piece)
            yield piece

    assert list(GUARD.stream(pieces())) == ["A dog. ", REPLACEMENT]
    assert "more" not in "".join(read)
    assert list(GUARD.stream(pieces_of("Well. You are stupid"))) == ["Well. ", REPLACEMENT]
    assert list(GUARD.stream(pieces_of("Kill. Yourself."))) == ["Kill. ", REPLACEMENT]  # what came before counts


# ---- classifiers of the hub -----------------------------------------------------------------------------------------


class Half:
    """Finds everything as unsafe as its number."""

    def __init__(self, score: float) -> None:
        self.score = score

    def unsafe(self, text: str) -> float:
        return self.score


def test_the_threshold_and_what_cannot_be_judged() -> None:
    assert Guard(Half(0.5)).said("x") == REPLACEMENT and Guard(Half(0.49)).said("x") == "x"
    assert Guard(Half(0.5), threshold=0.6).said("x") == "x"
    assert Guard(Half(float("nan")), replacement="no").said("x") == "no"


def classifier(folder: Path, labels: list[str], problem_type: str | None = None) -> str:
    """A BERT of one layer that gives every text the same logits: 0, 1, 2, ..."""
    config = BertConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=34, num_labels=len(labels), problem_type=problem_type,
    )  # fmt: skip
    config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.arange(len(labels)).float())
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_model_with_one_label_a_text(tmp_path: Path) -> None:
    name = classifier(tmp_path / "one", ["Non-Toxic", "toxic", "hate"])
    expected = 1 - float(torch.tensor([0.0, 1.0, 2.0]).softmax(0)[0])
    assert HubClassifier(name).unsafe("a dog") == pytest.approx(expected, rel=1e-5)
    assert HubClassifier(name, safe_labels=["hate"]).unsafe("a dog") == pytest.approx(
        float(torch.tensor([0.0, 1.0, 2.0]).softmax(0)[:2].sum()), rel=1e-5
    )
    assert HubClassifier(name).unsafe("  ") == 0.0
    assert build_safety(name).said("a dog") == REPLACEMENT


def test_a_model_with_several_labels_a_text(tmp_path: Path) -> None:
    name = classifier(tmp_path / "several", ["toxic", "insult", "neutral"], "multi_label_classification")
    assert HubClassifier(name).unsafe("a dog") == pytest.approx(float(torch.tensor(1.0).sigmoid()), rel=1e-5)


def test_a_long_text_is_judged_to_its_end(tmp_path: Path) -> None:
    """A model that finds one letter unsafe, which stands behind what fits into its positions."""
    name = classifier(tmp_path / "letter", ["safe", "unsafe"])
    model = BertForSequenceClassification.from_pretrained(name)
    letter = tiny.tokenizer()("Z")["input_ids"][-1]
    with torch.no_grad():  # the pooled state is that of the first token alone: attention and layers are passed by
        for parameter in model.bert.encoder.parameters():
            parameter.zero_()
        for layer in (
            model.bert.embeddings.LayerNorm,
            *(m for m in model.bert.encoder.modules() if "Norm" in str(type(m))),
        ):
            layer.weight.fill_(1.0)
        model.bert.embeddings.position_embeddings.weight.zero_()
        model.bert.embeddings.token_type_embeddings.weight.zero_()
        model.bert.embeddings.word_embeddings.weight.zero_()
        model.bert.embeddings.word_embeddings.weight[:, 0] = -1.0
        model.bert.embeddings.word_embeddings.weight[letter, 0] = 1.0
        model.bert.pooler.dense.weight.copy_(torch.eye(16))
        model.bert.pooler.dense.bias.zero_()
        model.classifier.bias.zero_()
        model.classifier.weight[1, 0] = 10.0
    model.save_pretrained(name)
    judge = HubClassifier(name).unsafe
    assert judge("Z") > 0.9 and judge("a") < 0.1
    assert judge("a" * 28 + "Z" * 60) > 0.9 and judge("a" * 88) < 0.1


def test_a_model_that_cannot_be_used(tmp_path: Path) -> None:
    name = classifier(tmp_path / "unknown", ["LABEL_0", "LABEL_1"])
    with pytest.raises(ValueError, match="labels LABEL_0, LABEL_1; none is known to mean harmless"):
        HubClassifier(name).unsafe("a dog")
    with pytest.raises(ValueError, match=r"no text classifier .*could be loaded"):
        HubClassifier(str(tmp_path / "missing")).unsafe("a dog")


# ---- what it costs --------------------------------------------------------------------------------------------------


def question(reference: str, *candidates: str) -> Question:
    asked = Conversation((Turn("user", ("?",)),))
    return Question(Record("k", {}), asked, (reference,), candidates)


def test_guarded_answers_lose_their_text_and_regions_alone() -> None:
    place = Region(0, box=(0.0, 0.0, 1.0, 1.0))
    answers = [
        Answer("a dog", regions=(place,)),
        Answer("oh shit", regions=(place,), num_failed=2, reference_likelihood=(-1.0, 3)),
        Answer(error="not read"),
        Answer(likelihoods=(1.0, 2.0)),
    ]
    said, replaced = guarded(answers, GUARD)
    assert replaced == 1 and [said[i] for i in (0, 2, 3)] == [answers[i] for i in (0, 2, 3)]
    assert said[1] == Answer(REPLACEMENT, reference_likelihood=(-1.0, 3))
