"""Text of tokens as they come: the same as of all of them at once, whole characters, and cut at stop texts."""

from __future__ import annotations

import copy
import random

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from mmchat.inference.generate import decode
from mmchat.inference.text_stream import TextStream
from tests import models

TEXT = "  Grüße, 你好! 🦊🦊 done.\n\nThe end \u00a0"


@pytest.fixture(scope="module")
def template(tiny_folder):
    return models.build(models.config())[1]


@pytest.fixture(scope="module")
def pieces_template(template):
    """Words with a blank in front, and bytes for what is no word: as Llama 2's tokenizer has them."""
    words = ["<s>", "▁The", "▁fox", "x", "es"] + [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(tokenizer_models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    other = copy.copy(template)
    other.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    other.end_ids = [0]
    return other


def _pieces(template, ids, stop=()):
    stream = TextStream(template, stop)
    found = [stream.feed(token_id) for token_id in ids]
    return [*found, stream.finish()], stream


def test_pieces_are_whole_characters_and_add_up(template):
    ids = template.text_ids(TEXT)
    pieces, stream = _pieces(template, ids)
    assert "".join(pieces) == decode(template, ids) == TEXT.strip()
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.length == len(TEXT)


@pytest.mark.parametrize("seed", range(5))
def test_bytes_that_are_no_text_add_up_too(template, seed):
    rng = random.Random(seed)
    lead = template.text_ids("🦊")
    ids = []
    for _ in range(60):
        ids += rng.choice([lead[:3], lead, lead[1:2] * 20, template.text_ids("a b"), [rng.randrange(3, 259)]])
    assert "".join(_pieces(template, ids)[0]) == decode(template, ids)


def test_what_waits_for_its_character_is_bounded(template):
    """A model that says nothing but broken bytes must not make every token dearer than the one before."""
    stream = TextStream(template)
    byte = template.text_ids("🦊")[1]
    for _ in range(200):
        stream.feed(byte)
        assert len(stream._decoder._waiting) <= 17


def test_blanks_and_bytes_of_word_pieces(pieces_template):
    ids = [1, 2, 4, 2, *(5 + byte for byte in "你🦊".encode()), 3, 2]
    pieces, _ = _pieces(pieces_template, ids)
    assert "".join(pieces) == "The foxes fox你🦊x fox" == decode(pieces_template, ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_end_marker_and_what_begins_like_it(template):
    other = copy.copy(template)
    other.end_ids = template.text_ids("###")
    ids = template.text_ids("a ## b #c####d")
    pieces, stream = _pieces(other, ids)
    assert "".join(pieces) == "a ## b #c" == decode(other, ids)
    assert stream.is_over
    assert "".join(_pieces(other, template.text_ids("a ##"))[0]) == "a ##"


@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("one two three", ("two",), "one"),
        ("one two three", ("three", "o t"), "one tw"),
        ("aab aaab", ("aaab",), "aab"),
        ("one\n\ntwo", ("\n\n",), "one"),
        ("\n\ntwo", ("\n\n",), ""),
        ("one tw", ("two",), "one tw"),
        ("🦊 and 🦊!", ("🦊!",), "🦊 and"),
    ],
)
def test_stop_texts(template, text, stop, wanted):
    pieces, stream = _pieces(template, template.text_ids(text), stop)
    assert "".join(pieces) == wanted
    assert stream.sent == stream.length
