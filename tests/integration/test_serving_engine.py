"""The engine: whatever else runs, every answer is the one that its question gets alone."""

from __future__ import annotations

import asyncio
import random
import threading
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmchat.conversation import Conversation, MediaRef, Region, Turn
from mmchat.data.pack import collate, load_media
from mmchat.errors import SampleError
from mmchat.inference import slots
from mmchat.inference.generate import Decoding, generate
from mmchat.inference.load import Loaded
from mmchat.models.llm import decoder_of
from mmchat.serving import engine as engine_module
from mmchat.serving.engine import Ask, Engine, EngineError, EngineFull, Piece
from mmchat.serving.media_cache import MediaCache
from mmchat.serving.prefixes import PrefixStore
from mmchat.serving.prompt import Reader
from tests import models, tiny

DECODING = Decoding(max_new_tokens=12)
FUSIONS = [
    {"kind": "flora", "rank": 4},
    {"kind": "flora", "rank": 4, "scope": "own_tokens"},
    {"kind": "late", "num_heads": 4},
]


def _loaded(run):
    model, template = models.build(run)
    models.wake(model)
    return Loaded(model, template, run, torch.device("cpu"), None)


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    return _loaded(models.config(fusion=FUSIONS[0]))


@contextmanager
def _running(loaded, **settings):
    engine = Engine(loaded, **settings)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture
def engine(loaded):
    with _running(loaded) as engine:
        yield engine


def _picture(seed):
    rng = random.Random(seed)
    return MediaRef("image", tiny.picture(rng.choice(list(tiny.COLOURS)), rng, (40 + seed, 30)))


def _asked(*parts):
    return Conversation((Turn("user", parts),))


def _mixed(count):
    """Different pictures, sounds, clips and texts of different lengths."""
    kinds = [Conversation(c.turns[:-1]) for c in models.conversations()]
    return [
        Conversation((*kinds[i % len(kinds)].turns[:-1], Turn("user", (_picture(i), f"And {'so ' * i}what is it?"))))
        if i % 3 == 0
        else Conversation((*kinds[i % len(kinds)].turns, Turn("assistant", ("So.",)), Turn("user", (f"Number {i}?",))))
        for i in range(count)
    ]


def _alone(loaded, conversation, decoding=DECODING):
    sample = loaded.template.render(conversation, answer=True)
    media = load_media(sample, loaded.template)
    return generate(loaded.model, loaded.template, [sample], [media], loaded.device, decoding)[0]


async def _pieces(answer):
    return [piece async for piece in answer]


def _answer(engine, ask):
    """The whole answer as one piece, and its handle."""
    answer = engine.submit(ask)
    return _joined(asyncio.run(_pieces(answer))), answer


def _answers(engine, asks):
    async def all_of_them():
        return await asyncio.gather(*(_pieces(engine.submit(ask)) for ask in asks), return_exceptions=True)

    return [found if isinstance(found, Exception) else _joined(found) for found in asyncio.run(all_of_them())]


def _joined(pieces):
    text = "".join(piece.text for piece in pieces)
    return Piece(text, sum((piece.tokens for piece in pieces), ()), pieces[-1].finish if pieces else None)


def _check_mixed(loaded, monkeypatch, count=16):
    """Few slots, small chunks and little headroom: rows join, leave and move all the time."""
    monkeypatch.setattr(slots, "HEADROOM", 4)
    monkeypatch.setattr(engine_module, "_MIN_CHUNK_ALONE", 16)
    monkeypatch.setattr(engine_module, "_MAX_CHUNK", 32)
    asks = [Ask(c, Decoding(max_new_tokens=4 + 5 * i % 21)) for i, c in enumerate(_mixed(count))]
    mixed = []
    monkeypatch.setattr(engine_module, "MixedCache", lambda *caches: mixed.append(1) or slots.MixedCache(*caches))
    with _running(loaded, max_running=5) as engine:
        together = [piece.text for piece in _answers(engine, asks)]
        assert engine.stats()["running"] == 0
    # Late fusion looks at media by rows.
    assert bool(mixed) == (loaded.model.late is None)
    assert engine._slots.num_bytes == 0
    assert together == [_alone(loaded, ask.conversation, ask.decoding) for ask in asks]
    assert len(set(together)) > count // 2


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: "-".join(str(v) for v in f.values()))
def test_sixteen_at_once_are_each_as_alone(tiny_folder, monkeypatch, fusion):
    _check_mixed(_loaded(models.config(fusion=fusion)), monkeypatch)


@pytest.mark.parametrize("kind", ["gemma3", "gpt2"])
def test_other_llms(tiny_folder, tmp_path, monkeypatch, kind):
    """Gemma's layers look at the last 16 tokens in turns, GPT-2 has learned positions."""
    _check_mixed(_loaded(models.config(llm={"pretrained": models.llm_folder(tmp_path, kind)})), monkeypatch, count=8)


def test_one_joins_while_another_speaks(engine, loaded):
    first, second = _mixed(2)
    long = Decoding(max_new_tokens=60)

    async def both():
        pieces = []
        async for piece in engine.submit(Ask(first, long)):
            if not pieces:
                other = asyncio.create_task(_pieces(engine.submit(Ask(second, DECODING))))
            pieces.append(piece)
        return _joined(pieces).text, _joined(await other).text

    assert asyncio.run(both()) == (_alone(loaded, first, long), _alone(loaded, second))


def test_prompts_are_those_of_training(loaded):
    reader = Reader(loaded, MediaCache(1 << 20))
    region = Turn("user", (_picture(1), "What is ", Region(0, box=(2.0, 2.0, 20.0, 20.0)), "?"))
    whole = [*models.conversations(), Conversation((region, Turn("assistant", ("A circle.",))))]
    for conversation in whole:
        trained = loaded.template.fit(conversation, "key", "seed", 10_000, 10_000)
        prompt = reader.read(Conversation(conversation.turns[:-1]))
        assert prompt.token_ids == trained.token_ids[: len(prompt)]
        assert np.array_equal(prompt.gates, trained.gates[: len(prompt)])
        assert trained.labels[len(prompt) - 1] != -100 and set(trained.labels[: len(prompt) - 1]) <= {-100} | set(
            trained.token_ids
        )


def test_a_later_question_reads_only_what_is_new(engine, loaded):
    image = _picture(3)
    question = Turn("user", (image, "What is it?"))
    first, handle = _answer(engine, Ask(Conversation((question,)), DECODING))
    assert handle.cached_tokens == 0 and handle.prompt_tokens > 30

    turns = (question, Turn("assistant", (first.text,)), Turn("user", ("Are you sure?",)))
    second, again = _answer(engine, Ask(Conversation(turns), DECODING))
    assert again.cached_tokens >= handle.prompt_tokens
    assert second.text == _alone(loaded, Conversation(turns))

    # The picture is the same by its bytes, wherever it comes from, also in a new conversation.
    copied = _asked(MediaRef("image", bytes(bytearray(image.data))), "Which colour has it?")
    third, anew = _answer(engine, Ask(copied, DECODING))
    assert anew.cached_tokens > 16  # its placeholders
    assert third.text == _alone(loaded, copied)

    # A sound opens its gates on the earlier tokens too, so that none of them is as it was.
    heard = Conversation((*turns[:2], Turn("user", (MediaRef("audio", tiny.tone(300.0, 0.5)), "And this?"))))
    fourth, fresh = _answer(engine, Ask(heard, DECODING))
    assert fresh.cached_tokens == 0
    assert fourth.text == _alone(loaded, heard)


def test_another_picture_behind_the_same_words_is_not_shared(engine, loaded):
    one, other = (_asked("Look: ", _picture(seed), "What is it?") for seed in (1, 2))
    place = loaded.template.render(one, answer=True).media[0].start
    assert _answer(engine, Ask(one, DECODING))[0].text == _alone(loaded, one)
    text, handle = _answer(engine, Ask(other, DECODING))
    assert handle.cached_tokens == place
    assert text.text == _alone(loaded, other)


def test_prefixes_and_media_are_bounded(loaded):
    with _running(loaded, cache_tokens=200, media_bytes=10_000) as engine:
        for seed in range(8):
            _answer(engine, Ask(_asked(_picture(seed), "?"), Decoding(max_new_tokens=2)))
        found = engine.stats()
    assert 0 < found["prefix_tokens"] <= 200 and 0 < found["media_bytes"] <= 10_000


def test_a_prefix_that_is_too_long_leaves_its_beginning():
    store, marks = PrefixStore(10), np.arange(12)[:, None]
    store.put(marks[:8], ())
    store.put(marks, ())
    assert store.longest(marks)[0] == store.num_tokens == 8


def test_stop_texts_and_lengths(engine, loaded):
    asked = _asked(_picture(5), "What is it?")
    long = Decoding(max_new_tokens=40)
    text = _alone(loaded, asked, long)
    stop = text[len(text) // 2 :][:2]
    found, handle = _answer(engine, Ask(asked, long, stop=("never said", stop), top_logprobs=0))
    assert (found.text, found.finish) == (text[: text.find(stop)].rstrip(), "stop")
    assert handle.completion_tokens < 40 and len(found.tokens) <= handle.completion_tokens
    found, handle = _answer(engine, Ask(asked, DECODING))
    assert found.finish == "length" and handle.completion_tokens == 12


def test_sampling_is_a_function_of_the_seed_whoever_runs_beside(engine, loaded):
    asked = _asked(_picture(6), "Well?")
    decodings = [Decoding(12, temperature=1.0, top_p=0.9, seed=seed) for seed in (1, 2, 1)]
    asks = [Ask(asked, decoding) for decoding in decodings] + [Ask(c, DECODING) for c in _mixed(4)]
    found = [piece.text for piece in _answers(engine, asks)]
    assert found[:3] == [_alone(loaded, asked, decoding) for decoding in decodings]
    assert found[0] == found[2] != found[1]


def test_log_likelihoods_are_those_of_a_direct_forward(engine, loaded):
    asked = _asked(_picture(7), "What?")
    others = [Ask(c, DECODING) for c in _mixed(3)]
    found = _answers(engine, [Ask(asked, replace(DECODING, temperature=0.7, seed=4), top_logprobs=5), *others])[0]
    ids = [score.token_id for score in found.tokens]
    assert len(ids) == 12
    sample = loaded.template.render(asked, answer=True)
    longer = replace(
        sample,
        token_ids=[*sample.token_ids, *ids],
        labels=[-100] * (len(sample) + len(ids)),
        gates=np.concatenate([sample.gates, *([sample.gates[-1:]] * len(ids))]),
    )
    with torch.no_grad():
        logits = loaded.model.logits(collate([longer], [load_media(sample, loaded.template)]))[0]
    wanted = logits[len(sample) - 1 : -1].log_softmax(-1)
    decoded = loaded.template.tokenizer.decode
    for score, row in zip(found.tokens, wanted, strict=True):
        assert score.logprob == pytest.approx(float(row[score.token_id]), abs=1e-4)
        values, likeliest = row.topk(5)
        assert [value for _, value in score.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert [text for text, _ in score.top] == [decoded([i]) for i in likeliest.tolist()]
        assert score.text == decoded([score.token_id])


def test_a_cancelled_answer_frees_its_place(loaded):
    wanted = _alone(loaded, _asked("Hello"))
    with _running(loaded, max_running=1) as engine:
        long = Ask(_asked(_picture(1), "Tell me all."), Decoding(max_new_tokens=1900))

        async def cancelled():
            running = engine.submit(long)
            async for _ in running:
                waiting = engine.submit(long)
                next_one = asyncio.create_task(_pieces(engine.submit(Ask(_asked("Hello"), DECODING))))
                running.cancel()
                waiting.cancel()
            assert await _pieces(waiting) == []
            return _joined(await next_one).text, running

        text, running = asyncio.run(cancelled())
        assert text == wanted and running.completion_tokens < 1900
        for _ in range(30):
            engine.submit(long).cancel()
        _answer(engine, Ask(_asked("Hello"), DECODING))
        found = engine.stats()
        assert (found["running"], found["waiting"], found["cancelled_total"]) == (0, 0, 32)
    assert engine._slots.num_bytes == 0


def test_a_reader_that_goes_away_cancels(loaded):
    with _running(loaded) as engine:

        async def leaves():
            task = asyncio.create_task(_pieces(engine.submit(Ask(_asked("Go on."), Decoding(max_new_tokens=1900)))))
            while not engine.stats()["running"]:
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(leaves())
        _answer(engine, Ask(_asked("Hello"), DECODING))
        assert engine.stats()["cancelled_total"] == 1


def test_more_than_may_wait_are_refused(loaded):
    wanted = [_alone(loaded, _asked(text)) for text in ("One", "Two")]
    engine = Engine(loaded, max_running=1, max_waiting=1)
    answers = [engine.submit(Ask(_asked(text), DECODING)) for text in ("One", "Two")]
    with pytest.raises(EngineFull) as full:
        engine.submit(Ask(_asked("Three"), DECODING))
    assert full.value.retry_after_s >= 1
    assert not engine.is_ready
    engine.start()
    try:
        assert engine.is_ready
        assert [_joined(asyncio.run(_pieces(answer))).text for answer in answers] == wanted
        _answer(engine, Ask(_asked("Three"), DECODING))
    finally:
        engine.close()
    assert not engine.is_ready
    with pytest.raises(EngineFull):
        engine.submit(Ask(_asked("Four"), DECODING))


def test_what_cannot_be_read_is_its_own_requests_error(engine, loaded):
    good = _asked(_picture(1), "What?")
    bad = _asked(MediaRef("image", b"no picture"), "What?")
    endless = _asked("long " * 500)
    found = _answers(engine, [Ask(bad, DECODING), Ask(good, DECODING), Ask(endless, DECODING)])
    assert isinstance(found[0], SampleError) and found[0].reason == "undecodable image"
    assert found[1].text == _alone(loaded, good)
    assert isinstance(found[2], SampleError) and found[2].reason == "conversation too long"


def test_a_failing_step_ends_the_running_and_no_more(engine, loaded):
    asks = [Ask(_asked(_picture(i), "What?"), DECODING) for i in range(3)]
    before = [piece.text for piece in _answers(engine, asks)]

    def fail(module, args, kwargs):
        if len(kwargs["inputs_embeds"]) > 1:
            raise RuntimeError("planted")

    hook = decoder_of(loaded.model.llm).register_forward_pre_hook(fail, with_kwargs=True)
    try:
        found = _answers(engine, [Ask(a.conversation, Decoding(max_new_tokens=1000)) for a in asks])
    finally:
        hook.remove()
    assert sum(isinstance(answer, EngineError) for answer in found) >= 2
    assert not any("planted" in str(answer) for answer in found)
    assert engine.is_ready
    assert [piece.text for piece in _answers(engine, asks)] == before


def test_prompts_that_take_too_much_memory_do_not_end_the_service(engine, loaded):
    def fail(module, args, kwargs):
        raise torch.OutOfMemoryError("planted")

    hook = decoder_of(loaded.model.llm).register_forward_pre_hook(fail, with_kwargs=True)
    try:
        failed = [_answers(engine, [ask])[0] for ask in [Ask(_asked("Hello"), DECODING)] * 4]
    finally:
        hook.remove()
    assert all(isinstance(found, EngineError) for found in failed) and engine.is_ready
    assert _answer(engine, Ask(_asked("Hello"), DECODING))[0].text == _alone(loaded, _asked("Hello"))


def test_steps_have_all_threads_and_pictures_few(loaded):
    before, found = torch.get_num_threads(), {}
    model = loaded.model
    hooks = [
        module.register_forward_pre_hook(lambda *_, who=who: found.update({who: torch.get_num_threads()}))
        for who, module in (("steps", decoder_of(model.llm)), ("pictures", model.encoders["image"]))
    ]
    torch.set_num_threads(4)
    try:
        with _running(loaded) as engine:
            _answer(engine, Ask(_asked(_picture(77), "What?"), DECODING))
            assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
        for hook in hooks:
            hook.remove()
    assert found == {"steps": 4, "pictures": 1}


def test_numbers_that_are_none_end_one_answer(engine, loaded):
    def poison(module, args, kwargs, output):
        if kwargs["position_ids"].shape == (2, 1):
            output.last_hidden_state[1] = torch.nan
        return output

    hook = decoder_of(loaded.model.llm).register_forward_hook(poison, with_kwargs=True)

    async def both():
        first = engine.submit(Ask(_asked("Go on."), Decoding(max_new_tokens=1900)))
        second = None
        async for _ in first:
            second = second or asyncio.create_task(_pieces(engine.submit(Ask(_asked(_picture(1)), DECODING))))
            if second.done():
                break
        first.cancel()
        return await asyncio.gather(second, return_exceptions=True)

    try:
        (found,) = asyncio.run(both())
    finally:
        hook.remove()
    assert isinstance(found, EngineError)
    assert _answer(engine, Ask(_asked(_picture(1)), DECODING))[0].text == _alone(loaded, _asked(_picture(1)))


def test_a_slow_reader_gets_all_of_it_in_one_piece(engine, loaded):
    slow = engine.submit(Ask(_asked("Take your time."), Decoding(max_new_tokens=30)))
    text, _ = _answer(engine, Ask(_asked("Quick."), Decoding(max_new_tokens=100)))
    while (now := engine.stats())["running"] or now["waiting"]:
        _answer(engine, Ask(_asked("Quick."), DECODING))
    assert text.text == _alone(loaded, _asked("Quick."), Decoding(max_new_tokens=100))
    (piece,) = asyncio.run(_pieces(slow))
    assert piece == Piece(_alone(loaded, _asked("Take your time."), Decoding(max_new_tokens=30)), (), "length")


class _Stuck:
    """A preprocess that hangs until it is let go; copies are the same one."""

    def __init__(self, inner):
        self.inner = inner
        self.go_on = threading.Event()

    def __deepcopy__(self, memo):
        return self

    def header(self, data):
        assert self.go_on.wait(60)
        return self.inner.header(data)

    def plan(self, header, shrink=0):
        return self.inner.plan(header, shrink)

    def __call__(self, data, plan):
        return self.inner(data, plan)


def test_a_hanging_decoder_stops_no_other(tiny_folder):
    loaded = _loaded(models.config())
    stuck = _Stuck(loaded.template.preprocesses["audio"])
    loaded.template.preprocesses = {**loaded.template.preprocesses, "audio": stuck}
    heard = _asked(MediaRef("audio", tiny.tone(440.0, 0.5)), "What?")
    seen = _asked(_picture(1), "What?")
    wanted = _alone(loaded, seen)
    with _running(loaded) as engine:
        hanging = [engine.submit(Ask(heard, DECODING)) for _ in range(6)]
        found = _answer(engine, Ask(seen, DECODING))[0].text
        stuck.go_on.set()
        assert found == wanted
        texts = {_joined(asyncio.run(_pieces(answer))).text for answer in hanging}
    assert texts == {_alone(loaded, heard)}
