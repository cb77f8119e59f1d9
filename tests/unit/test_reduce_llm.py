"""Smaller LLMs: what stays computes what it did, and texts that the vocabulary was cut down to read as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data_prep.reduce_llm import main, reduce_llm
from tests import tiny

TRAINED_ON = ["the cat sat on the mat", "turn on the light in the kitchen", "lower the lights", "it is later"] * 9
TEXTS = ["turn on the light", "the cat"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of six layers with a BPE tokenizer that has learned merges."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=tiny.SPECIAL, initial_alphabet=alphabet)
    backend.train_from_iterator(TRAINED_ON, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=tiny.SPECIAL[1], eos_token=tiny.SPECIAL[2], pad_token=tiny.SPECIAL[0]
    )
    tokenizer.chat_template = tiny.CHATML
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=len(tokenizer), num_hidden_layers=6, bos_token_id=1, eos_token_id=2,
                         pad_token_id=0, tie_word_embeddings=True)  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def opened(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


@torch.no_grad()
def test_kept_layers_and_tokens_compute_what_they_did(base, tmp_path):
    count = reduce_llm(base, tmp_path / "small", [0, 2, 5], TEXTS)
    (large, old), (small, new) = opened(base), opened(tmp_path / "small")
    assert count == sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in large.parameters()) / 1.5
    assert small.config.num_hidden_layers == 3 and len(new) < len(old)
    # The large model with three of its layers is the same function on the kept tokens.
    large.model.layers = torch.nn.ModuleList(large.model.layers[i] for i in (0, 2, 5))
    for number, layer in enumerate(large.model.layers):
        layer.self_attn.layer_idx = number
    before, after = (tokenizer(TEXTS[0], return_tensors="pt").input_ids for tokenizer in (old, new))
    ids = old.convert_tokens_to_ids(new.convert_ids_to_tokens(range(len(new))))
    torch.testing.assert_close(small(after).logits, large(before).logits[..., ids])


def test_texts_read_as_before_and_others_in_smaller_pieces(base, tmp_path):
    reduce_llm(base, tmp_path / "small", [0], TEXTS)
    old, new = opened(base)[1], opened(tmp_path / "small")[1]
    for text in TEXTS:
        assert new.tokenize(text) == old.tokenize(text)
    other = "later, in the kitchen: ünï 9"
    assert new.decode(new(other).input_ids) == other
    assert len(new.tokenize("kitchen")) > len(old.tokenize("kitchen"))
    assert new.eos_token_id == new.convert_tokens_to_ids("<|im_end|>") and new.chat_template == old.chat_template
    assert "<|im_end|>" in new.tokenize("a<|im_end|>")


def test_without_texts_the_vocabulary_stays(base, tmp_path):
    reduce_llm(base, tmp_path / "small", [0, 5])
    assert len(opened(tmp_path / "small")[1]) == len(opened(base)[1])


@pytest.mark.parametrize("layers", ["3,1", "0,6", "-1", "1,1", "x"])
def test_layers_that_are_not_there_are_refused(base, tmp_path, capsys, layers):
    assert main([str(base), str(tmp_path / "small"), f"--layers={layers}"]) == 1
    assert "reduce_llm:" in capsys.readouterr().err and not (tmp_path / "small").exists()
