"""The schema of configs/directed_speech.yaml: every strength of every cue in the corpus of device-directed speech."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from data_prep.packages import ROOT
from data_prep.rooms import NOISES
from data_prep.voices import Voice, voices
from mmchat.schema import Schema

CONFIG = ROOT / "configs" / "directed_speech.yaml"
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

# Raised when the same configuration gives other clips.
VERSION = 1

Share = Annotated[float, Field(ge=0, le=1)]
Pair = tuple[float, float]


class Sentences(Schema):
    """What is said. The shares are explained in the YAML."""

    split_share: dict[Split, Share]
    commands: dict[Split, Annotated[int, Field(gt=0)]]
    polite: Share
    max_characters: Annotated[int, Field(ge=20)]
    literal: Share
    addressed: Share
    dialogue: Share
    background: Share
    background_commands: Share
    chat: Share

    @model_validator(mode="after")
    def _whole(self) -> Sentences:
        for what, shares in (
            ("split_share", list(self.split_share.values())),
            (
                "literal, addressed, dialogue and background",
                [self.literal, self.addressed, self.dialogue, self.background],
            ),
        ):
            if abs(sum(shares) - 1) > 1e-6:
                raise ValueError(f"{what} add up to {sum(shares):g}; wanted 1")
        return self


class Manner(Schema):
    """How somebody speaks: mean and spread; the distance as median and spread of the logarithm."""

    distance_m: Pair
    facing_deg: Pair
    effort_db: Pair
    rate: Pair
    pitch: Pair


class Acoustics(Schema):
    """Where it is said and how it is heard."""

    rooms: dict[Split, Annotated[int, Field(gt=0)]]
    decay_s: Pair
    level_dbfs: float
    directed: Manner
    to_person: Manner
    background: Manner
    noises: dict[str, Share]
    noise_dbfs: Pair
    noise_range_dbfs: Pair
    loudspeaker_hz: tuple[Pair, Pair]
    background_music: Share
    pause_s: Pair

    @model_validator(mode="after")
    def _noises(self) -> Acoustics:
        if not self.noises.keys() <= set(NOISES) or abs(sum(self.noises.values()) - 1) > 1e-6:
            raise ValueError(f"noises are shares of {', '.join(NOISES)} that add up to 1; found {self.noises}")
        return self


class Words(Schema):
    """Words that the packages leave open."""

    names: dict[Split, list[str]]
    address: dict[Split, list[str]]
    polite: list[str]
    lists: dict[str, list[str]]


class DirectedConfig(Schema):
    """The whole corpus."""

    seed: Annotated[int, Field(ge=0)]
    clips: dict[Split, Annotated[int, Field(gt=0)]]
    directed_share: Share
    length_s: Pair
    voices: dict[Split, dict[str, list[float]]]
    sentences: Sentences
    acoustics: Acoustics
    words: Words

    @model_validator(mode="after")
    def _splits(self) -> DirectedConfig:
        lists = [self.clips, self.voices, self.sentences.split_share, self.sentences.commands]
        for found in [*lists, self.acoustics.rooms, self.words.names, self.words.address]:
            if set(found) != set(SPLITS):
                raise ValueError(f"wanted {', '.join(SPLITS)}, found {', '.join(found)}")
        for what, of_split in (("voice", self.voices), ("name", self.words.names), ("address", self.words.address)):
            all_of_them = [one for split in SPLITS for one in set(of_split[split])]
            if twice := sorted({one for one in all_of_them if all_of_them.count(one) > 1}):
                raise ValueError(f"the {what} {', '.join(twice)} is in several splits; wanted each in one")
        return self

    def speakers(self, split: Split) -> list[Voice]:
        """Every base with each of its warps."""
        named = [f"{base}@{warp:g}" for base, warps in self.voices[split].items() for warp in warps]
        return voices(named)

    @property
    def sha256(self) -> str:
        """Of all that the clips follow from but the packages: these values and VERSION."""
        values = {"version": VERSION, **self.model_dump(mode="json")}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def load_directed(path: Path = CONFIG) -> DirectedConfig:
    """Raises ValueError that says which value is wrong."""
    try:
        return DirectedConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:5])
        raise ValueError(f"{path}: {faults}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from None
