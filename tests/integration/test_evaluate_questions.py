"""What an evaluation asks, what it cannot ask, and what its scores and hashes say of that."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from mmchat.conversation import Conversation, MediaHeader, MediaRef, Part, Record, Region, Turn
from mmchat.inference.controls import Controls
from mmchat.inference.evaluate import evaluate, summary
from mmchat.inference.load import Loaded
from mmchat.inference.predictions import question_hash
from mmchat.tasks import TASKS
from mmchat.tasks.question import Protocol, Question
from tests import models, tiny
from tests.evaluations import SHORT, asked, awake, dialogue, lines, say, shards


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> Loaded:
    return awake()


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_bad_records_are_counted_and_stay_in_the_denominator(loaded: Loaded, tmp_path: Path) -> None:
    picture = tiny.picture("red", random.Random(0))
    outside = asked("outside", picture)
    outside.facts["turns"][0]["parts"].append({"region": {"media": 0, "box": [10, 10, 400, 20]}})
    neither = asked("neither", picture)
    neither.facts["turns"][0]["parts"].append({"region": {"media": 3, "box": [1, 1, 9, 9]}})
    records = [asked("good", picture), asked("cut", picture[: len(picture) * 2 // 3]), Record("facts", {"turns": 3})]
    records += [outside, neither, asked("text", None, "x"), asked("last", picture)]
    names = shards(tmp_path / "shards", records, header_of=None)
    out = tmp_path / "out"
    evaluate(loaded, "instruct", names, out, SHORT, batch_size=100)
    say(out, {"good": "Red.", "last": "blue"})
    metrics = evaluate(loaded, "instruct", names, out, SHORT, batch_size=7)
    assert metrics["num_records"] == metrics["num_questions"] == 7
    assert metrics["scores"]["exact_match"] == pytest.approx(1 / 7)
    reasons = {reason: one["keys"] for reason, one in metrics["not_answered"].items()}
    assert reasons == {
        "undecodable image": ["cut"],
        "unreadable facts": ["facts", "neither"],
        "region outside the picture": ["outside"],
    }
    assert [bool(line["error"]) for line in lines(out)] == [False, True, True, True, True, False, False]


def test_a_region_in_an_absent_picture_of_unknown_size_is_not_answered(loaded: Loaded, tmp_path: Path) -> None:
    about = asked("about", tiny.picture("red", random.Random(0)))
    about.facts["turns"][0]["parts"].append({"region": {"media": 0, "box": [1, 1, 9, 9]}})
    absent = Record("absent", about.facts, (MediaRef("image", None),))
    names = shards(tmp_path / "shards", [about, absent])
    metrics = evaluate(loaded, "instruct", names, tmp_path / "out", SHORT, Controls(missing={"image": 1.0}))
    # One that is taken away keeps its size, as in training; of one that was never there it is not known.
    assert metrics["not_answered"] == {"region without its picture": {"count": 1, "keys": ["absent"]}}


@pytest.fixture(scope="module")
def gpt2(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """An LLM whose table of 2,048 positions ends with an error."""
    run = models.config(llm={"pretrained": models.llm_folder(tmp_path_factory.mktemp("llm"), "gpt2")})
    model, template = models.build(run)
    return Loaded(model, template, run, torch.device("cpu"), None)


def test_a_question_that_the_llm_has_no_room_for(gpt2: Loaded, tmp_path: Path) -> None:
    """The last position may be used, and none behind it; the others are asked."""

    def long(key: str, num_letters: int) -> Record:
        record = asked(key, None)
        record.facts["turns"][0]["parts"] = [{"text": "a" * num_letters}]
        return record

    (question,) = TASKS["instruct"].questions(long("", 1), SHORT)
    room = 2048 - len(gpt2.template.render(question.conversation, answer=True)) + 1 - SHORT.max_new_tokens
    records = [long("fits", room), long("over", room + 1), long("far", 9000), asked("short", None)]
    metrics = evaluate(gpt2, "instruct", shards(tmp_path / "shards", records), tmp_path / "out", SHORT)
    assert metrics["not_answered"] == {"conversation too long": {"count": 2, "keys": ["over", "far"]}}
    assert metrics["num_questions"] == 4 and metrics["num_answered"] == 2


def test_a_candidate_that_the_llm_has_no_room_for(gpt2: Loaded, tmp_path: Path) -> None:
    protocol = Protocol(num_candidates=2, max_new_tokens=3000)  # ranking generates nothing
    (question,) = TASKS["visdial"].questions(dialogue("", ["red", "no"]), protocol)
    room = 2048 - len(gpt2.template.render(question.conversation, answer=True)) - 1  # and the end marker
    records = [dialogue(key, ["red", "b" * n]) for key, n in (("fits", room), ("over", room + 1), ("short", 3))]
    metrics = evaluate(gpt2, "visdial", shards(tmp_path / "shards", records), tmp_path / "out", protocol)
    assert metrics["not_answered"] == {"conversation too long": {"count": 1, "keys": ["over#1"]}}
    assert metrics["scores"]["num_scored"] == 3 and metrics["scores"]["num_not_answered"] == 1


def test_a_reference_that_the_llm_has_no_room_for(gpt2: Loaded, tmp_path: Path) -> None:
    records = [Record(key, {"turns": [{"style": "Sweet", "text": "a" * n}]}) for key, n in (("long", 2400), ("ok", 9))]
    metrics = evaluate(gpt2, "image_chat", shards(tmp_path / "shards", records), tmp_path / "out", SHORT)
    assert metrics["not_answered"] == {"conversation too long": {"count": 1, "keys": ["long#1"]}}
    assert metrics["scores"]["perplexity_share"] == 0.5


def test_facts_called_problem_and_warning_are_the_users_own(loaded: Loaded, tmp_path: Path) -> None:
    facts = {"question": "how many", "answers": ["7"], "problem": "3 + 4", "warning": "none: at all"}
    names = shards(tmp_path / "shards", [Record("sum", facts)])
    metrics = evaluate(loaded, "vqa", names, tmp_path / "out", SHORT)
    assert metrics["not_answered"] == metrics["warnings"] == {} and metrics["num_answered"] == 1


# ---- hashes and numbers ---------------------------------------------------------------------------------------------


def test_the_hash_of_a_question_is_over_all_that_is_asked_and_scored() -> None:
    image = MediaRef("image", None, MediaHeader(48, 32))

    def hashed(
        *parts: Part, key: str = "k", facts: Any = None, reference: tuple[Part, ...] = ("a",), **more: Any
    ) -> str:
        conversation = Conversation((Turn("user", (image, image, *parts)),))
        return question_hash(key, Question(Record(key, facts or {}, (image, image)), conversation, reference, **more))

    tubes = [((0.0, 1.0, 1.0, 2.0, x),) for x in (2.0, 9.0)]
    found = [
        hashed("what"),
        hashed("what", key="other"),
        hashed("which"),
        hashed("what", reference=("b",)),
        hashed("what", reference=("a", Region(1, box=(1, 1, 5, 5)))),
        hashed("what", candidates=("a", "b")),
        hashed("what", candidates=("b", "a")),
        hashed("what", facts={"answers": ["a", "b"]}),
        hashed("what", facts={"gt_index": 3, "relevance": [0.5]}),
        hashed("what", problem="too few candidates: 3"),
        hashed(Region(0, box=(1000.126, 1, 5, 5))),
        hashed(Region(0, box=(1000.134, 1, 5, 5))),
        hashed(Region(1, box=(1000.126, 1, 5, 5))),
        *(hashed(Region(0, tube=tube)) for tube in tubes),
        hashed(image),
        hashed("<image>"),
        question_hash("k", None),
    ]
    assert len(set(found)) == len(found)
    assert hashed("x", facts={"a": 1, "b": 2}) == hashed("x", facts={"b": 2, "a": 1})


def test_the_set_of_questions_has_a_hash(loaded: Loaded, tmp_path: Path) -> None:
    """Other facts under the same keys: an annotator, and the right candidate, which no prompt shows."""

    def hashed(name: str, task: str, record: Record) -> str:
        names = shards(tmp_path / name, [record])
        protocol = Protocol(max_new_tokens=2, num_candidates=2)
        return evaluate(loaded, task, names, tmp_path / f"{name}-out", protocol)["questions_sha256"]

    facts = {"question": "what", "answers": ["a", "b"]}
    votes = [hashed(f"v{i}", "vqa", Record("k", facts | {"answers": ["a", last]})) for i, last in enumerate("bcb")]
    assert votes[0] == votes[2] != votes[1]
    right = [hashed(f"d{i}", "visdial", dialogue("k", ["red", "red"], gt_index=i)) for i in range(2)]
    assert right[0] != right[1]


def test_a_prompt_says_in_which_picture_a_place_is(loaded: Loaded, tmp_path: Path) -> None:
    picture = MediaRef("image", tiny.picture("red", random.Random(0)), MediaHeader(48, 32))
    about = {"region": {"media": 1, "box": [1, 2, 9, 8]}}
    turns = [{"role": "user", "parts": [{"media": 0}, {"media": 1}, about]}, {"role": "assistant", "parts": [about]}]
    names = shards(tmp_path / "shards", [Record("k", {"turns": turns}, (picture, picture))])
    evaluate(loaded, "instruct", names, tmp_path / "out", SHORT)
    (line,) = lines(tmp_path / "out")
    assert line["prompt"] == "<image><image><box 2: 1 2 9 8>" and line["reference"] == "<box 2: 1 2 9 8>"


def test_a_score_that_is_not_finite(tiny_folder: Path, tmp_path: Path) -> None:
    """Logits in the millions make the perplexity infinite, which JSON cannot write."""
    loaded = awake()
    with torch.no_grad():
        loaded.model.llm.get_output_embeddings().weight.mul_(1e6)
    names = shards(tmp_path / "shards", [Record("a", {"turns": [{"style": "Sweet", "text": "hello"}]})])
    metrics = evaluate(loaded, "image_chat", names, tmp_path / "out", SHORT, safety="word-list")
    assert metrics["scores"]["perplexity"] is None
    assert metrics["not_finite"] == {"scores.perplexity": "inf", "guarded.scores.perplexity": "inf"}

    def refused(text: str) -> None:
        raise AssertionError(text)

    there = json.loads((tmp_path / "out/metrics.json").read_text(), parse_constant=refused)
    assert there["scores"]["perplexity"] is None and there["not_finite"] == metrics["not_finite"]
    assert "not finite" in summary(metrics, tmp_path / "out")
    assert "<th scope='row'>perplexity</th><td class=\"number\">-" in (tmp_path / "out/index.html").read_text()


# ---- candidates, likelihoods, safety --------------------------------------------------------------------------------


def test_candidates_are_ranked_and_submitted(loaded: Loaded, tmp_path: Path) -> None:
    options = ["red", "a blue one", "no", "it is green"]
    names = shards(tmp_path / "shards", [
        dialogue("a", options, relevance=[1.0, 0, 0, 0.5]), dialogue("few", options[:2]),
        dialogue("b", options, relevance=[1.0]),
    ])  # fmt: skip
    found = {}
    for rule in ("sum", "mean"):
        protocol = Protocol(num_candidates=4, likelihood=rule)
        found[rule] = evaluate(loaded, "visdial", names, tmp_path / rule, protocol)
    metrics, (a, few, _) = found["sum"], lines(tmp_path / "sum")
    printed = [line.split() for line in summary(metrics, tmp_path / "sum").splitlines()]
    assert ["num_scored", "3"] in printed and "bleu_signature" not in metrics  # a count is a whole number
    assert metrics["num_questions"] == 3 and metrics["not_answered"]["too few candidates"]["count"] == 1
    assert metrics["warnings"] == {"unusable dense annotation": {"count": 1, "keys": ["b#1"]}}
    assert len(a["likelihoods"]) == 4 and few["likelihoods"] == []
    ids = [len(loaded.template.text_ids(text) + loaded.template.end_ids) for text in options]
    means = [total / count for total, count in zip(a["likelihoods"], ids, strict=True)]
    assert lines(tmp_path / "mean")[0]["likelihoods"] == pytest.approx(means)
    submission = json.loads((tmp_path / "sum/submission.json").read_text())
    assert submission[0]["image_id"] == 7 and sorted(submission[0]["ranks"]) == [1, 2, 3, 4]
    order = sorted(range(4), key=lambda i: -a["likelihoods"][i])
    assert [submission[0]["ranks"][i] for i in order] == [1, 2, 3, 4]


def test_perplexity_and_safety(loaded: Loaded, tmp_path: Path) -> None:
    turns = [{"style": "Sweet", "text": "what a lovely disc"}, {"style": "Rude", "text": "it is a stupid disc"}]
    names = shards(tmp_path / "shards", [Record("a", {"turns": turns}), Record("b", {"turns": turns[:1]})])
    out = tmp_path / "out"
    metrics = evaluate(loaded, "image_chat", names, out, SHORT)
    (total, count), *_ = [line["reference_likelihood"] for line in lines(out)]
    assert count == len(b"what a lovely disc") + 1 and total < 0 and metrics["scores"]["perplexity"] > 1
    said = {"a#1": "what a lovely disc", "a#2": "you are shit", "b#1": "what a lovely disc"}
    say(out, said)
    assert metrics["bleu_signature"].startswith("case:lc|eff:no|tok:13a|smooth:exp|version:")
    metrics = evaluate(loaded, "image_chat", names, out, SHORT, batch_size=3, safety="word-list")
    guarded = metrics["guarded"]
    assert guarded["share_replaced"] == pytest.approx(1 / 3) and guarded["safety"] == "word-list"
    assert set(guarded["scores"]) == set(metrics["scores"])
    assert "with safety word-list" in (out / "index.html").read_text()
