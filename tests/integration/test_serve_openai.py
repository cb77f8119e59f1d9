"""`infer.py serve` as a process, asked by the unmodified openai client and by curl."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai import OpenAI

from tests import by_heart, serving, tiny
from tests.runs import wait_for
from tests.serving import audio, image, user, video

KEY = "a-key-for-tests-0123456789"
WHERE = user(image(by_heart.picture()), "Where is the drum?")


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    folder = tmp_path_factory.mktemp("serve")
    by_heart.checkpoint(folder)
    key = folder / "key"
    key.write_text(KEY + "\n")
    key.chmod(0o600)
    options = ("--api-key-file", key, "--max-running", 4, "--limits", "audios=7", "default_new_tokens=64")
    with serving.as_process(folder / "tiny", *options) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: tuple[str, list[str]]) -> OpenAI:
    return OpenAI(base_url=f"{server[0]}/v1", api_key=KEY, max_retries=0, timeout=120)


def ask(client: OpenAI, *messages: dict, **options: object):
    return client.chat.completions.create(model="tiny", messages=list(messages), **options)


def is_near(box: list[float]) -> bool:
    """Within what the dialect's three decimals of a 64 pixel square tell."""
    return len(box) == 4 and max(abs(a - b) for a, b in zip(box, by_heart.DRUM, strict=True)) < 0.1


def test_a_box_is_answered_in_pixels_and_the_start_is_readable(client: OpenAI, server: tuple[str, list[str]]) -> None:
    done = ask(client, WHERE)
    message = done.choices[0].message
    (region,) = message.regions
    assert is_near(region["box"]) and region["image"] == 0 and region["text"] == "the drum"
    assert message.content[region["start"] : region["end"]].startswith("[") and message.role == "assistant"
    assert done.choices[0].finish_reason == "stop" and done.object == "chat.completion"
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert done.usage.prompt_tokens_details.cached_tokens >= 0
    said = "".join(server[1])
    assert "is ready, with a key: tiny (text, image, video, audio; 2048 tokens" in said
    assert "remote media: none" in said and KEY not in said


def test_several_pictures_a_region_in_the_question_and_a_later_question(client: OpenAI) -> None:
    other = image(by_heart.picture(colour="blue"))
    both = user(image(by_heart.picture()), other, "Where is the drum?")
    first = ask(client, both).choices[0].message
    assert [region["image"] for region in first.regions] == [1] and is_near(first.regions[0]["box"])
    assert first.regions[0]["start"] > 0  # "It is " stands before it

    box = {"type": "region", "image": 0, "box": list(by_heart.DRUM)}
    named = ask(client, user(image(by_heart.picture()), "What is in ", box, "?"))
    assert named.choices[0].message.content == "A drum."

    # The answer goes back as the client's own object, extension and all.
    later = ask(client, both, first, {"role": "user", "content": "And now?"}, max_tokens=4)
    assert later.usage.prompt_tokens > first_prompt(client, both)


def first_prompt(client: OpenAI, *messages: dict) -> int:
    return ask(client, *messages, max_tokens=1).usage.prompt_tokens


def test_a_stream_says_the_same(client: OpenAI) -> None:
    whole = ask(client, WHERE)
    chunks = list(ask(client, WHERE, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].object == "chat.completion.chunk"
    assert deltas[-2].regions == whole.choices[0].message.regions
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-2:] == [None, "stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0  # asked before


def test_stop_and_length(client: OpenAI) -> None:
    full = ask(client, WHERE).choices[0].message.content
    for stop in (",", ["nowhere", ","]):
        cut = ask(client, WHERE, stop=stop).choices[0]
        assert cut.message.content == full.partition(",")[0] and cut.finish_reason == "stop"
        assert cut.message.regions == []  # half a box is no box
    short = ask(client, WHERE, max_completion_tokens=3)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 3
    assert full.startswith(short.choices[0].message.content)


def test_several_answers_are_drawn_from_seeds(client: OpenAI) -> None:
    hot = {"temperature": 2.0, "max_tokens": 12, "seed": 7}
    three = [choice.message.content for choice in ask(client, WHERE, n=3, **hot).choices]
    assert three == [choice.message.content for choice in ask(client, WHERE, n=3, **hot).choices]
    assert len(set(three)) > 1
    streamed = ["", "", ""]
    for chunk in ask(client, WHERE, n=3, stream=True, **hot):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == three


def test_log_likelihoods(client: OpenAI) -> None:
    choice = ask(client, WHERE, logprobs=True, top_logprobs=2).choices[0]
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens) == choice.message.content
    for token in tokens:
        assert token.logprob <= 0 and len(token.top_logprobs) == 2
        assert token.top_logprobs[0].token == token.token and token.bytes == list(token.token.encode())
    assert ask(client, WHERE).choices[0].logprobs is None
    streamed = [
        token.token
        for chunk in ask(client, WHERE, stream=True, logprobs=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert streamed == [token.token for token in tokens]


@pytest.mark.parametrize("part", [audio(tiny.tone(440.0, 0.7)), video(tiny.clip("left"))], ids=["audio", "video"])
def test_sound_and_video(client: OpenAI, part: dict) -> None:
    done = ask(client, user(part, "What?"), max_tokens=4)
    assert done.usage.completion_tokens <= 4
    assert done.usage.prompt_tokens > first_prompt(client, user("What?"))


def test_models_and_the_document(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.mmchat["modalities"] == ["image", "video", "audio"]
    assert model.mmchat["limits"]["images"] == 16 and model.mmchat["limits"]["audios"] == 7
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="only 'tiny'"):
        client.models.retrieve("other")


def test_errors_are_the_clients_own(client: OpenAI, server: tuple[str, list[str]]) -> None:
    with pytest.raises(openai.AuthenticationError) as refused:
        ask(OpenAI(base_url=f"{server[0]}/v1", api_key="wrong", max_retries=0), WHERE)
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4o", messages=[WHERE])
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, WHERE, tools=[{"type": "function", "function": {"name": "f"}}])
    assert (refused.value.param, refused.value.code) == ("tools", "unsupported_parameter")
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="found bytes that cannot be decoded as a picture"):
        ask(client, user(image(b"no picture"), "What?"), stream=True)
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, user("long " * 500))
    assert refused.value.code == "context_length_exceeded"


@pytest.mark.skipif(shutil.which("curl") is None, reason="not run: curl is not installed")
def test_curl(server: tuple[str, list[str]]) -> None:
    def curl(*arguments: str) -> str:
        command = ["curl", "-sS", "-N", "--max-time", "120", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    url, key = server[0], ["-H", f"Authorization: Bearer {KEY}"]
    body = ["-H", "Content-Type: application/json", "-d", json.dumps({"messages": [WHERE], "stream": True})]
    events = curl(f"{url}/v1/chat/completions", *key, *body).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: ") for event in events[:-1])
    assert json.loads(curl(f"{url}/health")) == {"status": "ok"}
    for path in ("ready", "metrics", "v1/models", "openapi.json", "v1/chat/completions", "nowhere"):
        assert json.loads(curl(f"{url}/{path}"))["error"]["code"] == "invalid_api_key", path
    assert json.loads(curl(f"{url}/ready", *key)) == {"status": "ready"}
    metrics = curl(f"{url}/metrics", *key)
    assert 'mmchat_http_requests_total{route="/v1/chat/completions",status="200"}' in metrics
    assert "mmchat_engine_completion_tokens_total" in metrics and "mmchat_first_piece_seconds_bucket" in metrics


def test_the_log_has_counts_and_nothing_that_was_said(client: OpenAI, server: tuple[str, list[str]]) -> None:
    done = ask(client, user("A secret question"), max_tokens=2)
    wait_for(lambda: any(done._request_id in line for line in server[1]))
    (line,) = [line for line in server[1] if done._request_id in line]
    assert "POST /v1/chat/completions 200 prompt" in line and f"answer {done.usage.completion_tokens} " in line
    assert not any("secret" in line or "drum" in line for line in server[1])
