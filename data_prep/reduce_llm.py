"""A smaller LLM out of a larger one: python data_prep/reduce_llm.py BASE OUT --layers 0,1,2,29 [--text FILE ...]

Two cuts, none of which changes a kept weight: only the named layers stay, and with --text only the tokens that these
texts need. The width stays. What is left out is missing: without some training on text the result speaks badly, or not
at all.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# A script sees its own folder only: what runs is the checkout that it lies in, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mmchat  # noqa: F401  (repairs torchvision before transformers looks for it)

# isort: split
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mmchat.models.llm import decoder_of, hide_progress_bars, token_embedding

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def reduce_llm(base: str | Path, out: Path, layers: Sequence[int], texts: Iterable[str] | None = None) -> int:
    """Writes the reduced model with its tokenizer to `out`, which must not exist; returns its number of parameters.

    Args:
        layers: numbers of the decoder layers that stay, rising, from 0.
        texts: the vocabulary is cut down to what these need: they become the same tokens as before, and whatever else
            is said becomes smaller pieces, down to bytes. None keeps the vocabulary.
    Raises:
        ValueError: `out` exists, a layer does not, or the tokenizer is not byte-level BPE.
    """
    if out.exists():
        raise ValueError(f"{out} exists; remove it, or name another folder")
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    keep_layers(model, layers)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save_pretrained(partial)
    if texts is not None:
        used = sorted(set(texts))
        description = json.loads((partial / "tokenizer.json").read_text())
        ids = kept_tokens(tokenizer, description, used)
        keep_tokens(model, ids)
        (partial / "tokenizer.json").write_text(json.dumps(cut_tokenizer(description, ids), ensure_ascii=False))
        _check_same(tokenizer, AutoTokenizer.from_pretrained(partial), ids, used)
    model.save_pretrained(partial)
    partial.rename(out)
    return sum(parameter.numel() for parameter in model.parameters())


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Leaves these layers of the decoder, in place; they get their new numbers when the model is loaded again.

    Raises ValueError for layers that the model lacks, or that do not rise.
    """
    decoder: Any = decoder_of(model)
    there = getattr(decoder, "layers", None)
    if not isinstance(there, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no list of `layers`; use a Llama or Qwen type of model")
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= len(there):
        raise ValueError(f"layers {list(layers)}: wanted rising numbers from 0 to {len(there) - 1}")
    decoder.layers = nn.ModuleList(there[i] for i in layers)
    config: Any = model.config
    config.num_hidden_layers = len(layers)
    if config.to_dict().get("layer_types"):
        config.layer_types = [config.layer_types[i] for i in layers]


def kept_tokens(tokenizer: PreTrainedTokenizerBase, description: dict[str, Any], texts: Sequence[str]) -> list[int]:
    """Ids that stay, rising: what the texts use, all pieces that those are merged from, single bytes, special tokens.

    A merge that is left out makes a token that is not kept. No text here goes through it on its way, since merges are
    never undone; so each text becomes the same tokens as before.

    Args:
        description: the tokenizer's own file, tokenizer.json.
    Raises:
        ValueError: it is no BPE without unknown tokens.
    """
    model = description["model"]
    if model["type"] != "BPE" or model.get("unk_token") or model.get("ignore_merges"):
        raise ValueError(f"the tokenizer is {model['type']}; wanted byte-level BPE, such as SmolLM2's or Qwen's")
    made_from: dict[str, set[str]] = {}
    for left, right in _pairs(model):
        made_from.setdefault(left + right, set()).update((left, right))
    used = {token for text in texts for token in tokenizer.tokenize(text)}
    kept = {token for token in model["vocab"] if token not in made_from}
    kept |= {token["content"] for token in description["added_tokens"]}
    waiting = list(used)
    while waiting:
        token = waiting.pop()
        if token not in kept:
            kept.add(token)
            waiting += made_from[token]
    ids = model["vocab"] | {token["content"]: token["id"] for token in description["added_tokens"]}
    return sorted(ids[token] for token in kept)


def cut_tokenizer(description: dict[str, Any], ids: Sequence[int]) -> dict[str, Any]:
    """tokenizer.json with these tokens alone, numbered anew in their order."""
    new = {old: i for i, old in enumerate(ids)}
    model = description["model"]
    vocabulary = {token: new[old] for token, old in model["vocab"].items() if old in new}
    merges = [[a, b] for a, b in _pairs(model) if a in vocabulary and b in vocabulary and a + b in vocabulary]
    added = [token | {"id": new[token["id"]]} for token in description["added_tokens"]]
    return description | {"added_tokens": added, "model": model | {"vocab": vocabulary, "merges": merges}}


def keep_tokens(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Leaves these rows of the embedding and of the head, in place."""
    new = {old: i for i, old in enumerate(ids)}
    embedding, head = token_embedding(model), model.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    for layer in {embedding, head} - {None}:
        layer.weight = nn.Parameter(layer.weight.detach()[list(ids)].clone())
    if is_tied:
        head.weight = embedding.weight
    config: Any = model.config
    config.vocab_size = embedding.num_embeddings = len(ids)
    for settings in (config, model.generation_config):
        for name in SPECIAL_IDS:
            if isinstance(old := settings.to_dict().get(name), int):
                setattr(settings, name, new.get(old))


def _pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges; older files write a pair as one text."""
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return [(left, right) for left, right in pairs]


def _check_same(old: Any, new: Any, ids: Sequence[int], texts: Sequence[str]) -> None:
    for text in texts:
        before, after = old(text, add_special_tokens=False), new(text, add_special_tokens=False)
        if [ids[i] for i in after["input_ids"]] != before["input_ids"]:
            raise ValueError(f"the smaller tokenizer reads {text!r:.200} in another way; this kind is not supported")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="folder or hub name of a causal LM")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--layers", required=True, help="numbers of those that stay, such as 0,1,2,29")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="texts that the vocabulary is cut down to")
    args = parser.parse_args(arguments)
    hide_progress_bars()
    try:
        layers = [int(number) for number in args.layers.split(",")]
        texts = None if args.text is None else [line for path in args.text for line in path.read_text().splitlines()]
        print(f"{args.out}: {reduce_llm(args.base, args.out, layers, texts):,} parameters")
    except (ValueError, OSError) as error:
        print(f"reduce_llm: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
