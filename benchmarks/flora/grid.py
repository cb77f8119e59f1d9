"""The grid as grid.yaml has it: which cells there are, the run's configuration of each, and where its result lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mmchat.config import RunConfig, parse, parse_config, read_values
from mmchat.schema import Schema

Count = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
STAGE = "directed"


class Data(Schema):
    """Folders of shards: directed speech to learn from and to be tested on; `text` are dialogues for healing."""

    train: str
    test: str
    text: list[str] = Field(default_factory=list)


class Size(Schema):
    """An LLM: layers of the base model that stay (None: all of them and the whole vocabulary, nothing to heal).

    tokens_per_s: expected while training, until cells have been measured. test_s: the same of one test question.
    """

    layers: list[int] | None = None
    heal_steps: Annotated[int, Field(ge=0)] = 0
    tokens_per_s: float = Field(gt=0)
    test_s: float = Field(gt=0)


class Method(Schema):
    """What is compared.

    base: `text` starts from the LLM of the text-only cell of the same size and seed, its pairs merged; `raw` from the
    LLM itself. fusion, train: as in a run's configuration, without rank, alpha and scope.
    """

    label: str
    task: Literal["directed", "directed_audio", "directed_text"] = "directed"
    base: Literal["raw", "text"] = "text"
    fusion: dict[str, Any]
    train: dict[str, float]

    @property
    def has_rank(self) -> bool:
        return self.fusion["kind"] in ("lora", "flora")

    @property
    def has_scope(self) -> bool:
        return self.fusion["kind"] == "flora"

    @property
    def hears(self) -> bool:
        return self.task != "directed_text"


class Batch(Schema):
    """Cells in a row: every size with every seed, method, rank and scope; without rank or scope, the usual ones."""

    sizes: list[str]
    methods: list[str]
    seeds: list[int]
    ranks: list[Count] = Field(default_factory=list)
    scopes: list[Literal["segment", "own_tokens"]] = Field(default_factory=list)


class Claim(Schema):
    """What the paper says, and the rule by which it counts as reproduced here.

    metric `of` a method at a share of missing audio is compared with that of `than`: at most `ratio` times it (below
    it, where that is 1), or at most `difference` above it. metric `share`: of trained parameters, at most `value`.
    not_comparable: why there is nothing to compare.
    """

    paper: str
    rule: str = ""
    metric: Literal["eer", "far_at_frr_10", "share"] = "eer"
    of: str = ""
    than: str = ""
    missing: Share = 0.0
    ratio: float | None = None
    difference: float | None = None
    value: float | None = None
    not_comparable: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Claim:
        if self.not_comparable:
            return self
        compares = self.metric != "share"
        limits = [self.ratio, self.difference] if compares else [self.value]
        if not self.of or bool(self.than) != compares or sum(limit is not None for limit in limits) != 1:
            raise ValueError(
                f"claim {self.paper!r}: wanted `of`, `than` and ratio or difference; or of a share, a value"
            )
        return self


@dataclass(frozen=True)
class Cell:
    """One training and its evaluation."""

    size: str
    method: str
    rank: int | None
    scope: str | None
    seed: int

    @property
    def name(self) -> str:
        rank = f"r{self.rank}" if self.rank else ""
        return "-".join(filter(None, (self.size, self.method, rank, self.scope, f"s{self.seed}")))


class Grid(Schema):
    """grid.yaml. Paths are relative to the working directory.

    work: features, models, checkpoints and predictions; it may be removed when all is done. stage, heal: a stage's
    configuration without what the harness fills in. num_test: records of the test shards that are asked.
    """

    work: Path
    results: Path
    llm: str
    data: Data
    features_dtype: Literal["float32", "float16"] = "float16"
    missing: list[Share]
    num_test: Count
    rank: Count
    scope: Literal["segment", "own_tokens"]
    audio: dict[str, Any]
    chat: dict[str, Any]
    stage: dict[str, Any]
    heal: dict[str, Any]
    sizes: dict[str, Size]
    methods: dict[str, Method]
    cells: list[Batch]
    claims: list[Claim]

    @model_validator(mode="after")
    def _consistent(self) -> Grid:
        named = {size for batch in self.cells for size in batch.sizes} - self.sizes.keys()
        named |= {method for batch in self.cells for method in batch.methods} - self.methods.keys()
        named |= {m for claim in self.claims for m in (claim.of, claim.than) if m} - self.methods.keys()
        if named:
            raise ValueError(f"cells and claims name {sorted(named)}, which are no sizes or methods here")
        if {0.0, 1.0} - set(self.missing) or {claim.missing for claim in self.claims} - set(self.missing):
            raise ValueError("missing: wanted 0, 1 and every share that a claim names")
        text = self.methods.get("text")
        needs_text = any(method.base == "text" for method in self.methods.values())
        if needs_text and (text is None or text.base != "raw" or text.task != "directed_text" or not text.has_rank):
            raise ValueError("methods: base: text needs a method `text`: directed_text, base: raw, fusion kind lora")
        return self

    def all_cells(self) -> list[Cell]:
        """Most informative first; the text-only cell that others start from stands before them."""
        found: dict[str, Cell] = {}
        for batch in self.cells:
            for cell in self._of(batch):
                if self.methods[cell.method].base == "text":
                    text = self.text_cell(cell)
                    found.setdefault(text.name, text)
                found.setdefault(cell.name, cell)
        return list(found.values())

    def chosen(self, pattern: str) -> list[Cell]:
        """Cells whose name fits a pattern such as `small-*-s0`, and those that they start from. Raises ValueError."""
        cells = self.all_cells()
        names = {cell.name for cell in cells if fnmatchcase(cell.name, pattern)}
        if not names:
            raise ValueError(f"no cell fits {pattern!r}; the first are {', '.join(cell.name for cell in cells[:8])}")
        picked = [cell for cell in cells if cell.name in names]
        bases = {self.text_cell(cell).name for cell in picked if self.methods[cell.method].base == "text"}
        return [cell for cell in cells if cell.name in names | bases]

    def cell(self, size: str, method: str, seed: int, rank: int | None = None, scope: str | None = None) -> Cell:
        """With the usual rank and scope where none is given; without, where the method has none."""
        has = self.methods[method]
        return Cell(
            size,
            method,
            (rank or self.rank) if has.has_rank else None,
            (scope or self.scope) if has.has_scope else None,
            seed,
        )

    def text_cell(self, cell: Cell) -> Cell:
        """The text-only cell whose LLM this one starts from."""
        return self.cell(cell.size, "text", cell.seed)

    def result(self, cell: Cell) -> Path:
        return self.results / f"{cell.name}.json"

    def config(self, cell: Cell, llm: str, train: str) -> RunConfig:
        """The run of a cell, as train.py takes it.

        Args:
            llm, train: where the LLM that it starts from and the shards of features lie.
        """
        values = self.values(cell, llm, train)
        return parse_config({**values, "run": cell.name, "checkpoints": str(self.work / "cells")}, f"cell {cell.name}")

    def values(self, cell: Cell, llm: str, train: str) -> dict[str, Any]:
        """The same before it is parsed, without its name and place."""
        method = self.methods[cell.method]
        fusion = dict(method.fusion)
        if cell.rank is not None:
            fusion |= {"rank": cell.rank, "alpha": 2.0 * cell.rank}
        if cell.scope is not None:
            fusion |= {"scope": cell.scope}
        audio = {"audio": self.audio} if method.hears else {}
        source = {"name": "speech", "task": method.task, "shards": train}
        stage = {"name": STAGE, "train": method.train, "data": [source], **self.stage}
        return {
            "seed": cell.seed,
            "model": {"llm": {"pretrained": llm}, "modalities": audio, "fusion": fusion},
            "chat": self.chat,
            "stages": [stage],
            "log": {"every": max(1, int(stage["steps"]) // 4)},
        }

    def config_sha256(self, cell: Cell) -> str:
        """Over all that a result depends on but the data: the run, the LLM's making, the test; not where files lie."""
        values = self.values(cell, "", "")
        values |= {"size": self.size_values(cell.size), "test": [self.num_test, self.features_dtype]}
        if self.methods[cell.method].base == "text":
            values["text"] = self.config_sha256(self.text_cell(cell))
        return digest(values)

    def size_values(self, size: str) -> dict[str, Any]:
        """What the LLM of a size depends on."""
        found = self.sizes[size]
        heal = {**self.heal, "steps": found.heal_steps} if found.layers is not None else None
        return {"llm": Path(self.llm).name, "layers": found.layers, "heal": heal}

    def expected_s(self, cell: Cell) -> float:
        """Seconds that a cell should take, by the figures of its size."""
        size, batch = self.sizes[cell.size], self.stage["batch"]
        tokens = self.stage["steps"] * batch["lanes"] * batch["tokens"]
        num_asked = self.num_test * (2 if self.methods[cell.method].hears else 1)
        return float(tokens / size.tokens_per_s + num_asked * size.test_s)

    def _of(self, batch: Batch) -> Iterator[Cell]:
        ranks: list[int | None] = [*batch.ranks] or [None]
        scopes: list[str | None] = [*batch.scopes] or [None]
        for seed, size, method in product(batch.seeds, batch.sizes, batch.methods):
            for rank, scope in product(ranks, scopes):
                yield self.cell(size, method, seed, rank, scope)


def load_grid(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Grid:
    """Reads grid.yaml; `a.b.c=value` overrides as train.py takes them. Raises ConfigError."""
    return parse(Grid, read_values(path, overrides), str(path))


def digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_result(path: Path) -> dict[str, Any] | None:
    """A finished cell's result; None where it has none. Raises ValueError for a file that is none."""
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        found["cell"]["name"], found["config_sha256"], found["missing"]
        return found
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of a cell ({error!r}); remove it to run the cell again") from error
