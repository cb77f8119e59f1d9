"""When frames are shown, as text before their tokens or in the tokens; and how many tokens a clip has."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from mmchat.batch import IGNORE
from mmchat.config import ConfigError, RunConfig, parse_config
from mmchat.conversation import Conversation, MediaRef, Turn
from mmchat.data.chat_template import ChatTemplate
from mmchat.data.pack import collate, join, load_media
from mmchat.models.connector import LinearConfig, MLPConfig, PoolConfig, SpatioTemporalConfig
from tests import models, tiny

KINDS: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear"},
    "mlp": {"kind": "mlp"},
    "pool": {"kind": "pool", "window": [2, 2, 2]},
    "spatio_temporal": {"kind": "spatio_temporal"},
}


def _config(connector: dict[str, Any], frame_times: str = "text", num_frames: int = 5, **model: Any) -> RunConfig:
    video = {"connector": connector, "sample": {"kind": "num_frames", "num_frames": num_frames}}
    values = models.config(video=video, **model).model_dump(mode="json")
    values["chat"]["frame_times"] = frame_times
    return parse_config(values, "test")


def _template(config: RunConfig) -> ChatTemplate:
    from mmchat.data.build import build_template

    return build_template(config)


def _talk(num_frames: int = 8, *more: Turn) -> Conversation:
    clip = MediaRef("video", tiny.clip("left", num_frames))
    return Conversation((Turn("user", ("See ", clip, "Which way?")), Turn("assistant", ("left",)), *more))


@pytest.mark.parametrize("kind", KINDS)
def test_each_moment_has_its_time_before_its_tokens(tiny_folder, kind):
    plain = _template(_config(KINDS[kind], "none")).render(_talk())
    template = _template(_config(KINDS[kind]))
    sample = template.render(_talk())
    (item,) = sample.media
    # 5 frames of one second, 4 x 4 patches each.
    times = ["0.1", "0.3", "0.5", "0.7", "0.9"]
    runs = {"linear": [16] * 5, "mlp": [16] * 5, "pool": [4] * 3, "spatio_temporal": [1] * 4 + [17]}[kind]
    if kind == "pool":  # two frames a token: the mean of their times
        times = ["0.2", "0.6", "0.9"]
    assert [count for _, count in item.runs] == runs and item.num_placeholders == plain.media[0].num_placeholders
    text, position = "", 0
    for start, count in [*item.runs, (len(sample), 0)]:
        text += template.tokenizer.decode(sample.token_ids[position:start]) + "|" * bool(count)
        position = start + count
    assert "See " + "".join(f"@{time}s|" for time in times) + "\nWhich way?" in text
    # Without its marks it is the sample without times, and no mark is learned.
    is_placeholder = np.isin(np.arange(len(sample)), item.places)
    assert [t for t in sample.labels if t != IGNORE] == [t for t in plain.labels if t != IGNORE]
    assert len(sample) - len(plain) == sum(len(f"@{time}s") for time in times)  # a byte is a token
    assert is_placeholder.sum() == item.num_placeholders == sum(runs) and item.end == item.places[-1] + 1


def test_without_times_nothing_changes(tiny_folder):
    template = _template(_config(KINDS["linear"], "none"))
    (item,) = template.render(_talk()).media
    assert item.offsets == () and item.runs == [(item.start, 80)]
    assert list(item.places) == [*range(item.start, item.end)]
    default = _template(models.config())
    for conversation in models.conversations():
        for item in default.render(conversation).media:
            assert item.offsets == () and len(item.runs) == 1


@pytest.mark.parametrize("kind", ["linear", "spatio_temporal"])
def test_media_tokens_land_on_their_places(tiny_folder, kind):
    """The same tokens as without times, each where the template says; a pack equals its conversations alone."""
    config = _config(KINDS[kind], fusion={"kind": "flora", "rank": 2, "scope": "own_tokens"})
    model, template = models.build(config)
    models.wake(model)
    talks = [_talk(8), *models.conversations()[:2], _talk(3)]
    batch = models.pack(template, talks)
    with torch.no_grad():
        tokens = model.media_tokens(batch)
        spliced = model.embed(batch, tokens)[0]
        whole = model.logits(batch)[0]
        alone = torch.cat([model.logits(one)[0] for one in models.singles(template, talks)])
    media = batch.media["video"]
    assert len(media.times_s) == 2 and [len(times) for times in media.times_s] == [5, 3]
    torch.testing.assert_close(spliced[media.index], tokens["video"])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-4)
    # The gates of a video are open at its own tokens, not at the marks between them.
    is_open = batch.presence[0, :, 1].nonzero()[:, 0]
    assert is_open.tolist() == media.index.tolist()


def test_a_chat_continues_behind_a_clip_with_times(tiny_folder):
    """The cache of a first question serves the second: the same answer as a fresh prompt."""
    from mmchat.inference.chat import ChatSession
    from mmchat.inference.generate import Decoding
    from mmchat.inference.load import Loaded

    config = _config(KINDS["linear"])
    model, template = models.build(config)
    loaded = Loaded(model, template, config, torch.device("cpu"), None)
    clip = MediaRef("video", tiny.clip("left"))
    one = ChatSession(loaded, Decoding(max_new_tokens=4))
    first = "".join(one.ask([clip, "Which way?"]))
    second = "".join(one.ask(["Sure?"]))
    other = ChatSession(loaded, Decoding(max_new_tokens=4))
    other.turns = one.turns[:2]
    assert "".join(other.ask(["Sure?"])) == second and first == one.turns[1].parts[0]


@pytest.mark.parametrize("num_frames", [2, 3, 7])
def test_a_short_clip_has_t_plus_n_tokens_and_no_padding(tiny_folder, num_frames):
    """Video-ChatGPT pads to a fixed number of frames and attends to the zeros; here no padding exists."""
    config = _config(KINDS["spatio_temporal"], "none", num_frames=7)
    model, template = models.build(config)
    sample = template.render(_talk(num_frames))
    assert sample.media[0].plan.shape == (num_frames, 4, 4) and sample.media[0].num_placeholders == num_frames + 16
    batch = collate([sample], [load_media(sample, template)])
    assert batch.token_ids.shape == (1, len(sample)) and int(batch.segment_ids.min()) == 0
    tokens = model.media_tokens(batch)["video"]
    assert tokens.shape[0] == num_frames + 16 == len(batch.media["video"].index)
    # Beside a longer clip in one pack it has the same tokens, and its answer does not feel the other's.
    long = template.render(_talk(8))
    both = join([batch, collate([long], [load_media(long, template)])])
    with torch.no_grad():
        assert both.token_ids.shape[1] == len(sample) + len(long)
        torch.testing.assert_close(model.media_tokens(both)["video"][: num_frames + 16], tokens)
        torch.testing.assert_close(model.logits(both)[0, : len(sample)], model.logits(batch)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("connector", "frame_times", "model", "message"),
    [
        ({"kind": "resampler", "num_queries": 4}, "text", {}, "each token of connector resampler reads all frames"),
        (KINDS["linear"], "text", {"fusion": {"kind": "late"}}, "fusion: late"),
        ({"kind": "resampler", "times": True}, "none", {}, "each of its tokens reads all frames"),
        (KINDS["linear"], "seconds", {}, "frame_times"),
    ],
)
def test_what_cannot_have_times_is_refused_at_once(connector, frame_times, model, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        _config(connector, frame_times, **model)


def test_only_videos_have_times():
    values = models.config().model_dump(mode="json")
    values["model"]["modalities"]["image"]["connector"] = {"kind": "linear", "times": True}
    with pytest.raises(ConfigError, match="only the frames of videos have times"):
        parse_config(values, "test")
    values = models.config().model_dump(mode="json")
    values["model"]["modalities"]["video"] = None
    values["chat"]["frame_times"] = "text"
    with pytest.raises(ConfigError, match=r"needs model\.modalities\.video"):
        parse_config(values, "test")


# ---- times in the tokens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        LinearConfig(times=True),
        MLPConfig(times=True, places=True),
        PoolConfig(window=(2, 2, 2), times=True),
        SpatioTemporalConfig(times=True),
    ],
    ids=lambda config: config.kind,
)
def test_tokens_tell_the_seconds_of_their_frames(config):
    torch.manual_seed(0)
    connector, shapes = config.build(6, 8, 0.1), ((3, 4, 4), (5, 2, 2))
    features = torch.randn(sum(map(math.prod, shapes)), 6)
    times = ((0.5, 1.5, 2.5), (0.1, 0.2, 0.3, 0.4, 0.5))
    without = connector(features, shapes, tuple((0.0,) * shape[0] for shape in shapes))
    added = connector(features, shapes, times) - without
    assert without.shape == (sum(config.num_tokens(shape) for shape in shapes), 8)
    moments = config.moments(shapes[0])
    groups = added[: moments.tokens * math.ceil(3 / moments.frames)].view(-1, moments.tokens, 8)
    # All tokens of a moment tell the same, other moments something else, and the tokens of no moment nothing.
    assert torch.allclose(groups, groups[:, :1].expand_as(groups), atol=1e-6)
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in pairwise(groups))
    rest = added[len(groups) * moments.tokens : config.num_tokens(shapes[0])]
    assert len(rest) == moments.rest and torch.equal(rest, torch.zeros_like(rest))
    # An equal time in another clip, of another length and rate, is told alike.
    later = connector(features, shapes, ((0.5, 1.5, 2.5), (0.5,) * 5)) - without
    first = later[config.num_tokens(shapes[0])]
    wanted = {1: groups[0, 0], 2: (connector(features, shapes, ((0.5,) * 3, times[1])) - without)[0]}[moments.frames]
    torch.testing.assert_close(first, wanted, rtol=1e-4, atol=1e-5)


def test_times_are_learned_and_stand_in_clips_have_some(tiny_folder):
    """A step with and without a video runs the same modules, as several ranks need it."""
    model, template = models.build(_config({"kind": "linear", "times": True}, "none"))
    model.train()
    learned = model.connectors["video"].times.project.weight.requires_grad_()
    for talks, is_shown in (([_talk()], True), ([models.conversations()[4]], False)):
        learned.grad = None
        model(models.pack(template, talks)).sum.backward()
        assert learned.grad is not None and bool(learned.grad.abs().sum() > 0) is is_shown


def test_periods_reach_from_half_a_second_to_half_an_hour():
    torch.manual_seed(0)
    connector = LinearConfig(times=True).build(4, 16, 1.0)
    grid = [0.0, 0.05, 0.2, 0.25, 1.0, 7.0, 60.0, 600.0, 1200.0]
    features = torch.zeros(len(grid), 4)
    tokens = connector(features, ((len(grid), 1, 1),), (grid,))
    distance = torch.cdist(tokens, tokens) + torch.eye(len(grid)) * 9
    assert float(distance.detach().min()) > 0.05
