"""What is said in the corpus of device-directed speech: commands, the same to a person, and lines of dialogues.

Commands come from the templates of home-assistant-intents (Apache-2.0), whose open lists configs/directed_speech.yaml
fills; dialogues from ChatterBot's corpus (BSD) and the game Fish Fillets (GPL-2). A template, a dialogue and a level of
the game is in one split only, and a sentence that a split has is kept out of the next ones.

Texts are in lower case without punctuation, as a recogniser writes them, so that spelling tells no class.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data_prep.directed_config import SPLITS, DirectedConfig, Split
from data_prep.open_data import SETS, folder
from data_prep.packages import DOWNLOADS

_CHATTERBOT = (
    "computers", "conversations", "emotion", "food", "greetings", "health", "history", "humor", "literature", "money",
    "movies", "psychology", "science", "sports", "trivia",
)  # fmt: skip
_LUA_ENGLISH = re.compile(r'dialogId\("(?:[^"\\]|\\.)*",\s*"font_\w+",\s*"((?:[^"\\]|\\.)*)"\)')
# Lists for {name} by the domain that a template is for; where it is for several, the first counts.
_NAMES = {
    "light": "light_name", "cover": "cover_name", "lock": "lock_name", "media_player": "media_name",
    "fan": "fan_name", "climate": "climate_name", "scene": "scene_name", "todo": "list_name", "vacuum": "vacuum_name",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """Something to say, and the package it is from."""

    text: str
    source: str


@dataclass(frozen=True)
class Sentences:
    """What one split can say."""

    commands: tuple[Line, ...]
    dialogue: tuple[Line, ...]
    names: tuple[str, ...]
    address: tuple[str, ...]

    def addressed(self, command: str, rng: np.random.Generator) -> str:
        """The command as it is said to somebody who is called by name."""
        pattern, name = (str(rng.choice(some)) for some in (self.address, self.names))
        return pattern.format(name=name, command=command)


def load_sentences(config: DirectedConfig, cache: Path = DOWNLOADS) -> dict[str, Sentences]:
    """Of each split. Raises PackageError where a package cannot be had, ValueError where it holds too little."""
    chatterbot, fillets = (folder(SETS[name].parts[0], cache) for name in ("chatterbot", "fillets"))
    lines = [*chatterbot_lines(chatterbot), *fillets_lines(fillets)]
    from home_assistant_intents import get_intents

    return split_sentences(config, get_intents("en"), lines)


def split_sentences(
    config: DirectedConfig, intents: dict[str, Any], lines: Iterable[tuple[str, Line]]
) -> dict[str, Sentences]:
    """Of each split.

    Args:
        intents: as home_assistant_intents.get_intents gives them.
        lines: of dialogues, each with the name of what it belongs to, which is kept together.
    """
    rules, seen = config.sentences, set[str]()
    templates: dict[str, dict[str, list[Template]]] = {split: {} for split in SPLITS}
    for template in all_templates(intents):
        templates[_split_of(template.text, config)].setdefault(template.intent, []).append(template)
    spoken: dict[str, dict[str, Line]] = {split: {} for split in SPLITS}
    for group, line in lines:
        spoken[_split_of(group, config)].setdefault(line.text, line)
    found: dict[str, Sentences] = {}
    for split in SPLITS:
        filler = Filler(intents, config.words.lists)
        rng = np.random.default_rng([config.seed, zlib.crc32(f"commands/{split}".encode())])
        commands: dict[str, Line] = {}
        names = sorted(templates[split])
        weights = np.sqrt([len(templates[split][name]) for name in names])
        for _ in range(200 * rules.commands[split]):
            if len(commands) == rules.commands[split]:
                break
            of_intent = templates[split][str(rng.choice(names, p=weights / weights.sum()))]
            text = filler.fill(of_intent[int(rng.integers(len(of_intent)))], rng)
            if rng.random() < rules.polite:
                text = str(rng.choice(config.words.polite)).format(command=text)
            text = plain(text)
            if text not in seen and is_speakable(text, rules.max_characters):
                commands[text] = Line(text, "home-assistant-intents")
        else:
            raise ValueError(
                f"the templates of {split} give {len(commands)} different commands; "
                f"wanted {rules.commands[split]}: lower sentences.commands in the configuration"
            )
        seen |= commands.keys()
        dialogue = [
            line
            for text, line in sorted(spoken[split].items())
            if text not in seen and is_speakable(text, rules.max_characters)
        ]
        seen |= {line.text for line in dialogue}
        if not dialogue:
            raise ValueError(f"no line of a dialogue is left for {split}")
        found[split] = Sentences(
            tuple(commands.values()),
            tuple(dialogue),
            tuple(config.words.names[split]),
            tuple(config.words.address[split]),
        )
    return found


def plain(text: str) -> str:
    """In lower case, numbers in words, without punctuation but for apostrophes."""
    text = re.sub(r"\d+(?:\.\d+)?", lambda number: f" {_in_words(number[0])} ", text.lower().replace("\u2019", "'"))
    text = text.replace("%", " percent ").replace("°", " degrees ")
    text = re.sub(r"(?<![a-z])'|'(?![a-z])", " ", re.sub(r"[^a-z' ]", " ", text))
    return " ".join(text.split())


def is_speakable(text: str, max_characters: int) -> bool:
    """Whether a plain text is a short sentence: two words at least, none without a vowel."""
    words = text.split()
    return (
        len(words) >= 2
        and len(text) <= max_characters
        and all(re.search("[aeiouy]", word) or word == "tv" for word in words)
    )


def spoken_form(text: str) -> str:
    """What a voice is given for a plain text: the same mark at the end of each, so that none is a question."""
    text = re.sub(r"\bi\b", "I", text).replace("tv", "T V")
    return f"{text[0].upper()}{text[1:]}."


def _in_words(number: str) -> str:
    from unicode_rbnf import RbnfEngine

    whole, _, fraction = number.partition(".")
    engine = RbnfEngine.for_language("en")
    said = engine.format_number(int(whole)).text
    return f"{said} point {' '.join(engine.format_number(int(digit)).text for digit in fraction)}" if fraction else said


def _split_of(name: str, config: DirectedConfig) -> Split:
    """By the name alone, so that other names leave it where it is."""
    at = zlib.crc32(f"{config.seed}/{name}".encode()) / 2**32
    for split in SPLITS:
        at -= config.sentences.split_share[split]
        if at < 0:
            return split
    return SPLITS[-1]


# --- Dialogues


def chatterbot_lines(corpus: Path) -> Iterator[tuple[str, Line]]:
    """The lines of ChatterBot's English dialogues, with the dialogue that each belongs to."""
    for name in _CHATTERBOT:
        found = yaml.safe_load((corpus / "english" / f"{name}.yml").read_text(encoding="utf-8"))
        for number, turns in enumerate(found["conversations"]):
            for turn in turns:
                # Of the longer ones each sentence is a line.
                for sentence in re.split(r"(?<=[.!?])\s+", str(turn)):
                    yield f"{name}/{number}", Line(plain(sentence), "chatterbot-corpus")


def fillets_lines(game: Path) -> Iterator[tuple[str, Line]]:
    """The English lines of Fish Fillets, with their level."""
    for file in sorted(game.glob("script/*/*dialogs_cs.lua")):
        for found in _LUA_ENGLISH.finditer(file.read_text(encoding="utf-8", errors="replace")):
            for sentence in re.split(r"(?<=[.!?])\s+", found[1].replace('\\"', '"')):
                yield file.parent.name, Line(plain(sentence), "fillets-ng")


# --- Commands


@dataclass(frozen=True)
class Template:
    """A sentence template of an intent, and the domains of what {name} may stand for."""

    text: str
    intent: str
    domains: tuple[str, ...]


def all_templates(intents: dict[str, Any]) -> list[Template]:
    """Each once, in order."""
    found: dict[str, Template] = {}
    for intent, about in sorted(intents["intents"].items()):
        for block in about["data"]:
            domains = (block.get("requires_context") or {}).get("domain", ())
            domains = (domains,) if isinstance(domains, str) else tuple(domains)
            for text in block["sentences"]:
                found.setdefault(text, Template(text, intent, domains))
    return list(found.values())


class Filler:
    """Makes a sentence of a template: one of its alternatives, one value of each list, drawn at random."""

    def __init__(self, intents: dict[str, Any], lists: Mapping[str, Sequence[str]]) -> None:
        self.rules, self.own, self.lists = intents["expansion_rules"], intents["lists"], lists
        self.parsed: dict[str, Any] = {}

    def fill(self, template: Template, rng: np.random.Generator) -> str:
        """Raises ValueError for a list that neither the package nor the configuration has."""
        return self._said(self._parsed(template.text), template, rng)

    def _said(self, part: Any, template: Template, rng: np.random.Generator) -> str:
        from hassil import expression as kinds

        match part:
            case kinds.TextChunk():
                return part.original_text
            case kinds.Alternative():
                # What people say most stands first: "in", "the", "turn".
                is_usual = not part.is_optional and rng.random() < 0.5
                return self._said(part.items[0 if is_usual else int(rng.integers(len(part.items)))], template, rng)
            case kinds.Permutation():
                order = rng.permutation(len(part.items))
                return " ".join(self._said(part.items[int(number)], template, rng) for number in order)
            case kinds.Group():
                return "".join(self._said(item, template, rng) for item in part.items)
            case kinds.RuleReference():
                return self._said(self._parsed(self.rules[part.rule_name]), template, rng)
            case kinds.ListReference():
                return self._value(part.list_name, template, rng)
        raise ValueError(f"{template.text!r} holds {part!r:.100}, which hassil has only in other versions")

    def _parsed(self, text: str) -> Any:
        from hassil.parse_expression import parse_sentence

        if text not in self.parsed:
            self.parsed[text] = parse_sentence(text).expression
        return self.parsed[text]

    def _value(self, name: str, template: Template, rng: np.random.Generator) -> str:
        if name == "name":
            name = next((_NAMES[domain] for domain in template.domains if domain in _NAMES), name)
        if name in self.lists:
            return str(rng.choice(self.lists[name]))
        own = self.own.get(name, {})
        if "range" in own:
            first, last, step = own["range"]["from"], own["range"]["to"], own["range"].get("step", 1)
            # Mostly round numbers, as people say them.
            step = max(step, 5) if rng.random() < 0.7 and last - first >= 50 else step
            return str(int(rng.choice(np.arange(first + step, last + 1, step))))
        if "values" in own:
            value = own["values"][int(rng.integers(len(own["values"])))]
            return self._said(self._parsed(value["in"] if isinstance(value, dict) else value), template, rng)
        raise ValueError(f"{template.text!r} wants the list {name}; name its words under words.lists")
