"""With a cache or without, alone or in a batch, in one go or turn by turn: the same answers."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmchat.conversation import Conversation, MediaRef, Turn
from mmchat.data.pack import collate, load_media
from mmchat.errors import SampleError
from mmchat.inference.chat import ChatSession
from mmchat.inference.generate import Decoding, TokenStream, decode, generate, pad_left
from mmchat.inference.load import Loaded
from tests import models, tiny

DECODING = Decoding(max_new_tokens=12)
FUSIONS = [
    {"kind": "flora", "rank": 4},
    {"kind": "flora", "rank": 4, "scope": "own_tokens"},
    {"kind": "lora", "rank": 4},
    {"kind": "late", "num_heads": 4},
]


def _loaded(run):
    model, template = models.build(run)
    models.wake(model)
    return Loaded(model, template, run, torch.device("cpu"), None)


@pytest.fixture(scope="module", params=FUSIONS, ids=lambda f: "-".join(str(v) for v in f.values()))
def loaded(request, tiny_folder):
    return _loaded(models.config(fusion=request.param))


def _prompts(template):
    asked = [Conversation(c.turns[:-1]) for c in models.conversations()]
    samples = [template.render(c, answer=True) for c in asked]
    return samples, [load_media(s, template) for s in samples]


def _without_cache(loaded, sample, media, steps):
    """Greedy decoding that reads the whole conversation again for every token."""
    ids = []
    for _ in range(steps):
        longer = replace(
            sample,
            token_ids=[*sample.token_ids, *ids],
            labels=[-100] * (len(sample) + len(ids)),
            gates=np.concatenate([sample.gates, *([sample.gates[-1:]] * len(ids))]),
        )
        with torch.no_grad():
            ids.append(int(loaded.model.logits(collate([longer], [media]))[0, -1].argmax()))
        if ids[-1] == loaded.template.end_ids[0]:
            break
    return ids


def test_cache_equals_no_cache(loaded):
    for sample, media in zip(*_prompts(loaded.template), strict=True):
        stream = TokenStream(loaded.model, collate([sample], [media]), None, loaded.template.end_ids, DECODING)
        assert [int(t) for t in stream] == _without_cache(loaded, sample, media, DECODING.max_new_tokens)


def test_a_batch_equals_each_alone(loaded):
    samples, media = _prompts(loaded.template)
    together = generate(loaded.model, loaded.template, samples, media, loaded.device, DECODING)
    alone = [
        generate(loaded.model, loaded.template, [s], [m], loaded.device, DECODING)[0]
        for s, m in zip(samples, media, strict=True)
    ]
    assert together == alone and len(set(together)) > 1


def test_padded_logits_equal_packed_ones(loaded):
    samples, media = _prompts(loaded.template)
    batch, mask = pad_left(samples, media)
    with torch.no_grad():
        padded = loaded.model.hidden(batch, attention_mask=mask)
        packed = loaded.model.hidden(collate(samples, media))
    start = 0
    for row, sample in enumerate(samples):
        torch.testing.assert_close(
            padded[row, -len(sample) :], packed[0, start : start + len(sample)], rtol=1e-4, atol=1e-5
        )
        start += len(sample)


def test_a_session_turn_by_turn_equals_the_whole_conversation_at_once(loaded):
    """Also when a modality appears in a later turn, which opens its gates on the earlier tokens."""
    rng = random.Random(2)
    image, other = (MediaRef("image", tiny.picture(c, rng)) for c in ("red", "green"))
    audio = MediaRef("audio", tiny.tone(300.0, 0.5))
    questions = [(image, "What?"), ("And now?",), (audio, "What do you hear?"), (other, "This?"), ("Bye.",)]
    session = ChatSession(loaded, DECODING)
    turns = ()
    for parts in questions:
        turns = (*turns, Turn("user", parts))
        sample = loaded.template.render(Conversation(turns), answer=True)
        expected = _without_cache(loaded, sample, load_media(sample, loaded.template), DECODING.max_new_tokens)
        said = "".join(session.ask(parts))
        assert said.strip() == decode(loaded.template, expected)
        turns = (*turns, Turn("assistant", (session.turns[-1].parts[0],)))


def test_the_second_question_reads_only_what_is_new(tiny_folder):
    loaded = _loaded(models.config())
    session = ChatSession(loaded, Decoding(max_new_tokens=1))
    image = MediaRef("image", tiny.picture("red", random.Random(0)))
    list(session.ask((image, "What is this?")))
    seen, encoded = [], []
    hidden, tokens = loaded.model.hidden, loaded.model.media_tokens
    loaded.model.hidden = lambda batch, *a: seen.append(batch.token_ids.shape[1]) or hidden(batch, *a)
    loaded.model.media_tokens = lambda batch: encoded.append(len(batch.media)) or tokens(batch)
    try:
        list(session.ask(("And?",)))
    finally:
        del loaded.model.hidden, loaded.model.media_tokens
    assert encoded == [0]
    assert seen[0] < 45 and set(seen[1:]) <= {1}


def test_an_unusable_picture_leaves_the_conversation_as_it_was(tiny_folder):
    session = ChatSession(_loaded(models.config()), DECODING)
    first = "".join(session.ask(("Hello",)))
    with pytest.raises(SampleError):
        list(session.ask((MediaRef("image", b"no picture"), "What?")))
    assert len(session.turns) == 2
    again = ChatSession(session.loaded, DECODING)
    assert "".join(again.ask(("Hello",))) == first
    assert "".join(session.ask(("More?",))) == "".join(again.ask(("More?",)))


def test_a_failed_question_leaves_no_pixels_behind(tiny_folder):
    """Python gives a freed object's id to the next one: what was decoded must not be found by it."""
    loaded = _loaded(models.config())
    rng = random.Random(3)
    for _ in range(20):
        session = ChatSession(loaded, Decoding(max_new_tokens=2))
        with pytest.raises(SampleError):
            list(session.ask((MediaRef("image", tiny.picture("red", rng)), MediaRef("image", b"bad"), "q")))
        fresh = MediaRef("image", tiny.picture("blue", rng))
        list(session.ask((fresh, "q")))
        (ref, tensor), *_ = session._decoded
        expected = load_media(loaded.template.render(Conversation((Turn("user", (fresh, "q")),))), loaded.template)[0]
        assert ref is fresh and torch.equal(tensor, expected)


@pytest.mark.parametrize("kind", ["gemma3", "gpt2"])
def test_other_llms_turn_by_turn(tiny_folder, tmp_path, kind):
    """Gemma's sliding windows forget what a cut cache would need."""
    loaded = _loaded(models.config(llm={"pretrained": models.llm_folder(tmp_path, kind)}))
    test_a_session_turn_by_turn_equals_the_whole_conversation_at_once(loaded)


def test_sampling_is_a_function_of_the_seed(tiny_folder):
    loaded = _loaded(models.config())
    samples, media = _prompts(loaded.template)

    def said(seed, temperature=1.0, top_p=0.9):
        decoding = Decoding(12, temperature, top_p, seed)
        return generate(loaded.model, loaded.template, samples, media, loaded.device, decoding)

    assert said(1) == said(1) != said(2)
    greedy = generate(loaded.model, loaded.template, samples, media, loaded.device, DECODING)
    assert said(3, top_p=1e-9) == greedy
