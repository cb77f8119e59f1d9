"""What cells need before they can run: the LLMs of each size, and the encoder's features of all recordings, once.

Everything lies below the grid's `work` and is found again; a name with a hash in it belongs to one grid.yaml and one
set of shards. The LLMs that cells start from after the text-only cell are made there too.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.flora.grid import STAGE, Cell, Grid, digest
from data_prep.cache_features import cache_features, feature_maker
from data_prep.reduce_llm import reduce_llm
from mmchat.config import RunConfig, SourceConfig, parse_config
from mmchat.conversation import Conversation, Record
from mmchat.data.chat_format import CHATML
from mmchat.data.lanes import SampleId
from mmchat.data.mixture import Mixture
from mmchat.data.shard_writer import write_shards
from mmchat.errors import SampleError
from mmchat.inference.load import load
from mmchat.models.fusion import merge
from mmchat.models.llm import decoder_of, load_tokenizer
from mmchat.tasks.directed import CANDIDATES, QUESTIONS, TRANSCRIPTS
from mmchat.training.stage import StopRequest, train_stage


class Stopped(Exception):
    """A stop was requested; the same command continues."""


class Workshop:
    """Makes, and finds again, what is below `work`.

    Attributes:
        data_sha256: of the contents of all shards that the grid names.
    """

    def __init__(self, grid: Grid, stop: StopRequest) -> None:
        self.grid, self.stop = grid, stop
        self.speech = {split: _mixture("directed", [shards]) for split, shards in _splits(grid).items()}
        self.text = _mixture("instruct", grid.data.text) if grid.data.text else None
        hashes = [mixture.fingerprint() for mixture in [*self.speech.values(), *([self.text] if self.text else [])]]
        self.data_sha256 = digest(hashes)
        self._features: dict[str, str] = {}

    def features(self, split: str) -> str:
        """The folder of a split's shards of features."""
        if split not in self._features:
            self._features[split] = self._cached(split)
        return self._features[split]

    def _cached(self, split: str) -> str:
        out = self.grid.work / f"features-{split}-{self._key(self.grid.audio, self.grid.features_dtype)}"
        audio = {**self.grid.audio, "stored_features": False}
        values = {**_RUN, "model": {"llm": {"pretrained": self.grid.llm}, "modalities": {"audio": audio}}}
        maker = feature_maker(parse_config(values, "the grid's audio"), "audio", self.grid.features_dtype)
        count = cache_features(maker, _splits(self.grid)[split], out)
        problems = ", ".join(f"{number} x {reason}" for reason, number in maker.problems.items())
        _say(f"{out}: features of {count:,} recordings" + (f"; not encoded: {problems}" if problems else ""))
        return str(out)

    def llm(self, size: str) -> str:
        """The folder of a size's LLM: the base itself, or what is left of it, healed on text."""
        layers = self.grid.sizes[size].layers
        if layers is None:
            return self.grid.llm
        key = self._key(self.grid.size_values(size))
        cut, healed = self.grid.work / f"llm-{size}-{key}-cut", self.grid.work / f"llm-{size}-{key}"
        if healed.exists():
            return str(healed)
        if not cut.exists():
            _say(f"{cut}: {reduce_llm(self.grid.llm, cut, layers, self._texts()):,} parameters")
        steps = self.grid.sizes[size].heal_steps
        if not steps:
            cut.rename(healed)
            return str(healed)
        config = self._healing(size, str(cut), steps, f"heal-{size}-{key}")
        train(config, self.stop)
        save_llm(config.folder, healed)
        shutil.rmtree(config.folder)
        return str(healed)

    def base(self, cell: Cell) -> str:
        """The folder of the LLM that a cell starts from; the text-only cell's is trained again where it is gone."""
        if self.grid.methods[cell.method].base == "raw":
            return self.llm(cell.size)
        text = self.grid.text_cell(cell)
        folder = self.text_base(text)
        if not folder.exists():
            _say(f"{text.name} is trained again: its LLM is not in {self.grid.work}")
            self.keep_base(text, train(self.run(text), self.stop))
        return str(folder)

    def run(self, cell: Cell) -> RunConfig:
        """A cell's configuration, under a name that no other configuration or data shares."""
        config = self.grid.config(cell, self.base(cell), self._train_shards(cell))
        return config.model_copy(update={"run": f"{cell.name}-{self._key(self.grid.config_sha256(cell))}"})

    def keep_base(self, text: Cell, checkpoint: Path) -> None:
        """Keeps the text-only cell's LLM, its pairs merged, for the cells that start from it."""
        if not self.text_base(text).exists():
            save_llm(checkpoint, self.text_base(text))

    def text_base(self, text: Cell) -> Path:
        return self.grid.work / f"llm-{text.name}-{self._key(self.grid.config_sha256(text))}"

    def _train_shards(self, cell: Cell) -> str:
        return self.features("train") if self.grid.methods[cell.method].hears else self.grid.data.train

    def _key(self, *values: Any) -> str:
        return digest([self.data_sha256, *values])[:8]

    def _texts(self) -> Iterator[str]:
        """All that is said in training, and the fixed words around it; no test text."""
        yield from (*QUESTIONS, *CANDIDATES, *(text.format("") for text in TRANSCRIPTS))
        yield from (*CHATML.user, *CHATML.assistant, *(CHATML.system or ()), self.grid.chat.get("system") or "")
        for record in self._text_records():
            yield from (part["text"] for turn in record.facts["turns"] for part in turn["parts"])

    def _text_records(self) -> Iterator[Record]:
        """Transcripts and dialogues as plain text, every turn learned; nothing says what is directed at whom."""
        for number, record in enumerate(_records(self.speech["train"])):
            if isinstance(text := record.facts.get("text"), str) and text.strip():
                yield Record(f"speech-{number:06d}", {"turns": [_turn("user", text)]})
        for number, record in enumerate(_records(self.text) if self.text else []):
            try:
                conversation = self.text.tasks[_NAME].conversation(record, random.Random(0)) if self.text else None
            except SampleError:
                continue
            assert isinstance(conversation, Conversation)
            turns = [_turn(turn.role, "".join(map(str, turn.parts))) for turn in conversation.turns]
            if not conversation.media:
                yield Record(f"text-{number:06d}", {"turns": turns})

    def _healing(self, size: str, llm: str, steps: int, name: str) -> RunConfig:
        shards = self.grid.work / f"text-{self._key()}"
        if not shards.exists():
            partial = shards.with_name(shards.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            write_shards(self._text_records(), partial)
            partial.rename(shards)
        stage = {
            "name": "heal",
            "data": [{"name": "text", "task": "instruct", "shards": str(shards)}],
            **self.grid.heal,
        }
        values = {
            **_RUN,
            "run": name,
            "checkpoints": str(self.grid.work / "cells"),
            "model": {"llm": {"pretrained": llm}, "fusion": {"kind": "full"}},
            "chat": self.grid.chat,
            "stages": [{**stage, "steps": steps}],
            "log": {"every": max(1, steps // 8)},
        }
        return parse_config(values, f"healing of {size}")


def train(config: RunConfig, stop: StopRequest) -> Path:
    """Trains a run of one stage as train.py does, or continues it; returns the run's folder. Raises Stopped."""
    (stage,) = config.stages
    if train_stage(config, stage, None, stop) != "done":
        raise Stopped
    return config.folder


def save_llm(checkpoint: Path, out: Path) -> None:
    """The LLM of a checkpoint as a folder of transformers; a plain LoRA pair is merged into it, which is exact."""
    loaded = load(checkpoint, "float32")
    if loaded.model.gates is not None:
        merge(decoder_of(loaded.model.llm), None)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    loaded.model.llm.save_pretrained(partial)
    load_tokenizer(loaded.config.model.llm).save_pretrained(partial)
    partial.rename(out)


_NAME = "data"  # of the one source of each mixture
# What RunConfig wants of every run and healing does not use.
_RUN: dict[str, Any] = {
    "run": "prepare",
    "stages": [
        {"name": STAGE, "train": {"fusion": 1.0}, "data": [{"name": "x", "task": "instruct", "shards": ""}], "steps": 1,
         "batch": {"lanes": 1, "tokens": 1}}
    ],
}  # fmt: skip


def _splits(grid: Grid) -> dict[str, str]:
    return {"train": grid.data.train, "test": grid.data.test}


def _mixture(task: str, shards: list[str]) -> Mixture:
    try:
        return Mixture([SourceConfig(name=_NAME, task=task, shards=shards)])
    except ValueError as error:
        raise ValueError(f"{error}\ndocs/flora_results.md has the commands that make the grid's shards") from error


def _records(mixture: Mixture) -> Iterator[Record]:
    for i in range(mixture.sources[0].num_samples):
        try:
            yield mixture.record(SampleId(_NAME, 0, i))
        except SampleError:
            continue


def _turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "parts": [{"text": text}], "learn": True}


def _say(text: str) -> None:
    print(text, flush=True)
