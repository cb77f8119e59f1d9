"""The JSON of a chat completion, field by field; answers' places; keys and cookies."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from mmchat.conversation import Conversation, MediaHeader, MediaRef, Region, Turn
from mmchat.errors import SampleError
from mmchat.serving.access import Access, load_key
from mmchat.serving.errors import ApiError, of_sample
from mmchat.serving.limits import Limits
from mmchat.serving.requests import parse_request, stops
from mmchat.serving.responses import regions_of
from tests import models

HI = [{"role": "user", "content": "Hi"}]


def parse(**body: Any) -> Any:
    return parse_request(json.dumps({"messages": HI, **body}).encode(), Limits())


def refused(**body: Any) -> tuple[str | None, str | None, str]:
    with pytest.raises(ApiError) as error:
        parse(**body)
    assert error.value.status == 400
    return error.value.param, error.value.code, error.value.message


def test_what_says_what_happens_anyway_is_accepted() -> None:
    parse(
        tools=[], tool_choice="auto", response_format={"type": "text"}, logit_bias={}, presence_penalty=0.0, n=1,
        frequency_penalty=0, modalities=["text"], user="u", metadata={"a": "b"}, store=False, temperature=1,
        stream=True, stream_options={"include_usage": True}, reasoning_effort="none", max_tokens=None,
    )  # fmt: skip
    assert stops(parse(stop="a")) == ("a",) and stops(parse(stop=["a", "b"])) == ("a", "b") and stops(parse()) == ()


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"tools": [{}]}, "tools", "unsupported_parameter"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "unsupported_parameter"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_parameter"),
        ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
        ({"best_of": 3}, "best_of", "unknown_parameter"),
        ({"temperature": "1"}, "temperature", "invalid_value"),
        ({"temperature": 2.5}, "temperature", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"stop": [1]}, "stop", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"stream_options": {}}, "stream_options", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [*HI, {"role": "user"}]}, "messages[1].content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "file"}]}]},
            "messages[0].content[0].type",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 3}}]}]},
            "messages[0].content[0].image_url.url",
            "invalid_value",
        ),
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "messages[0].tool_calls",
         "unsupported_parameter"),
    ],
)  # fmt: skip
def test_a_refusal_names_its_field(body: dict, param: str, code: str) -> None:
    found = refused(**body)
    assert found[:2] == (param, code) and found[2].startswith(f"{param}: ")


def test_a_small_body_of_many_values_is_not_read() -> None:
    with pytest.raises(ApiError) as error:
        parse_request(b'{"messages": [' + b"[]," * 200_000 + b"[]]}", Limits())
    assert error.value.code == "too_many_values"


def test_faults_by_the_hundred_thousand_are_not_told_one_by_one() -> None:
    param, code, message = refused(**{f"field{i}": 1 for i in range(1000)})
    assert (param, code) == (None, "invalid_value") and "found 1000 fields" in message
    param, code, message = refused(**{"x" * 100_000: 1})
    assert code == "unknown_parameter" and param is not None and len(param) + len(message) < 1000


def test_places_of_an_answer_stand_where_they_are_read() -> None:
    _, template = models.build(models.config())
    sound = MediaRef("audio", b"", MediaHeader(sample_rate_hz=16_000, duration_s=1.0))
    first, second = (MediaRef("image", b"", MediaHeader(size, size)) for size in (100, 200))
    asked = Conversation((Turn("user", (first, sound, second, "Where is the drum?")),))
    text = "[9 A drum #1[0.100,0.200,0.300,0.400] and a ball #2[0.100,0.200;0.500,0.500][0.9 #2[0.250,0.750]."
    found = regions_of(text, asked, template)
    assert [(one["image"], one.get("box") or one["point"]) for one in found] == [
        (0, [10.0, 20.0, 30.0, 40.0]),
        (1, [20.0, 40.0]),
        (1, [100.0, 100.0]),
        (1, [50.0, 150.0]),
    ]
    marks = [text[one["start"] : one["end"]] for one in found]
    assert marks[0] == "#1[0.100,0.200,0.300,0.400]" and marks[1] == marks[2] == "#2[0.100,0.200;0.500,0.500]"
    assert marks[3] == "#2[0.250,0.750]" and [one["text"] for one in found][:3] == ["A drum", "a ball", "a ball"]
    assert regions_of("Nothing is named.", asked, template) == []


def test_what_a_decoder_says_is_not_passed_on() -> None:
    leak = SampleError("undecodable image", "SyntaxError: broken at <_io.BytesIO object at 0x7f12>")
    told = of_sample(leak, "messages[0].content[0]")
    assert "0x7f12" not in told.message and told.message.startswith("messages[0].content[0]: undecodable image: found")
    unknown = of_sample(SampleError("another fault", "/root/x.py"))
    assert unknown.message == "another fault" and unknown.code == "another_fault"
    ours = of_sample(SampleError("picture too small", "1 x 1 pixels, the shorter side is below 2"))
    assert ours.message.endswith("the shorter side is below 2")


def test_what_takes_long_to_match_is_not_matched() -> None:
    """Both took many seconds, in which nobody else is answered: a cookie of backslashes, and an answer of blanks."""
    begun_s = time.process_time()
    with pytest.raises(ApiError):
        Access("the-key-of-this-server").check_key({"cookie": 'mmchat="' + "\\" * 60_000 + '"'})
    _, template = models.build(models.config())
    asked = Conversation((Turn("user", (MediaRef("image", b"", MediaHeader(100, 100)), "Where is the drum?")),))
    (found,) = regions_of("The" + " " * 8000 + "drum is at [0.100,0.200,0.300,0.400].", asked, template)
    assert found["text"].endswith("drum") and time.process_time() - begun_s < 5


def test_a_login_ends_by_itself() -> None:
    access = Access("the-key-of-this-server")
    other = Access("another-key")

    def headers(cookie: str) -> dict[str, str]:
        return {"cookie": f"other=1; {cookie.partition(';')[0]}"}

    assert access.check_key(headers(access.cookie(is_secure=True)))
    assert "; Secure" in access.cookie(is_secure=True) and "; Secure" not in access.cookie(is_secure=False)
    for cookie in (access.cookie(False, now_s=0.0), other.cookie(False), "mmchat=1", ""):
        with pytest.raises(ApiError) as error:
            access.check_key(headers(cookie))
        assert error.value.status == 401 and error.value.headers()["WWW-Authenticate"] == "Bearer"
    assert not access.check_key({"authorization": "bearer the-key-of-this-server"})


def test_a_key_that_others_can_read_or_guess_is_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("0123456789abcdef\n")
    path.chmod(0o600)
    assert load_key(path) == ("0123456789abcdef", [])
    path.write_text("short")
    path.chmod(0o644)
    key, (readable, guessed) = load_key(path)
    assert key == "short" and "chmod 600" in readable and "has 5 characters" in guessed
    with pytest.raises(ValueError, match="cannot be read"):
        load_key(tmp_path / "absent")


def test_regions_of_a_clip_have_times() -> None:
    _, template = models.build(models.config())
    clip = MediaRef("video", b"", MediaHeader(100, 100, 8, 8.0, 1.0))
    asked = Conversation((Turn("user", (clip, "Where does it go?")),))
    (found,) = regions_of("It goes @0.5s[0.100,0.200,0.300,0.400].", asked, template)
    assert found["video"] == 0 and found["time_s"] == 0.5 and found["box"] == [10.0, 20.0, 30.0, 40.0]
    assert "image" not in found and isinstance(Region(0, box=tuple(found["box"])), Region)
