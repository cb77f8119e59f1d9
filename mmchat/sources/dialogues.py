"""Dialogue about one picture or clip: Visual Dialog v1.0, AVSD (DSTC7), Image-Chat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mmchat.conversation import MediaRef, Record
from mmchat.errors import SampleError
from mmchat.sources.files import Files
from mmchat.sources.questions import video
from mmchat.sources.rows import UNREADABLE, problem
from mmchat.sources.source import Source

_AVSD_SPLITS = {"val": "valid"}


def read_visdial(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """Visual Dialog v1.0 (visualdialog.org): visdial_1.0_SPLIT.json, with dense annotations where they lie beside.

    The set's questions and answers, which dialogues name by number, are held in memory (100 MB for train). Candidates
    are kept outside of train, or as `--set candidates=yes|no` says. Pictures: COCO train2014 and val2014 for train,
    VisualDialog_val2018 and VisualDialog_test2018 for the others. Of a dense annotation that fits no round the
    dialogue stays, and of candidates that name nothing the round, without them: both count where it is evaluated.
    """
    name = files.one(f"visdial_1.0_{split}.json", f"*/visdial_1.0_{split}.json")
    if (candidates := options.get("candidates", "no" if split == "train" else "yes")) not in ("yes", "no"):
        raise ValueError(f"--set candidates is yes or no, not {candidates}")
    with_candidates = candidates == "yes"
    questions, answers = (list(files.items(name, f"data.{kind}.item")) for kind in ("questions", "answers"))
    dense: dict[tuple[int, int], list[Any]] = {}
    for file in files.beside(f"visdial_1.0_{split}_dense*.json", f"*/visdial_1.0_{split}_dense*.json"):
        for row in files.rows(file):
            match row:
                case {"image_id": int(image), "round_id": int(place)} if isinstance(
                    relevance := row.get("gt_relevance", row.get("relevance")), list
                ):
                    dense[image, place] = relevance
                case SampleError():
                    yield row
                case _:
                    yield SampleError("unreadable dense annotation", f"{file}: {row!r:.200}")
    for number, dialog in enumerate(files.items(name, "data.dialogs.item")):
        try:
            match dialog:
                case {"image_id": int(image), "caption": str(caption), "dialog": [_, *_] as rounds}:
                    said = [_round(one, questions, answers, with_candidates) for one in rounds]
                    for place, one in enumerate(said, 1):
                        num_options = len(one.get("options", []))
                        if not num_options or (relevance := dense.pop((image, place), None)) is None:
                            continue
                        if len(relevance) == num_options:
                            one["relevance"] = relevance
                        else:
                            where = f"image {image} round {place}"
                            found = f"{where}: {len(relevance)} relevances of {num_options} candidates"
                            yield SampleError("unlike rows", found)
                    facts = {"caption": caption, "rounds": said, "image_id": image}
                    yield Record(f"{image:012d}", facts, (_visdial_picture(files, image, split),))
                case _:
                    raise SampleError("unreadable row", f"wanted image_id, caption and dialog; {dialog!r:.200}")
        except UNREADABLE as error:
            yield problem(error, f"{name} dialog {number}")
    if with_candidates:
        for image, place in dense:
            yield SampleError("dense annotation of no round", f"{name} has no usable round {place} of image {image}")


def _round(one: Any, questions: list[str], answers: list[str], with_candidates: bool) -> dict[str, Any]:
    """A round in words. Raises SampleError for numbers that name nothing."""
    try:
        said: dict[str, Any] = {"question": questions[_index(one["question"])]}
        if "answer" in one:
            said["answer"] = answers[_index(one["answer"])]
        if with_candidates and "answer_options" in one:
            if "gt_index" in one:
                said["gt_index"] = one["gt_index"]
            try:
                said["options"] = [answers[_index(i)] for i in one["answer_options"]]
            except (IndexError, TypeError):
                said["options"] = []
        return said
    except (KeyError, IndexError, TypeError) as error:
        raise SampleError("unreadable round", f"{error!r} in {one!r:.200}") from error


def _index(found: Any) -> int:
    if not isinstance(found, int) or found < 0:
        raise TypeError(f"{found!r} is no index")
    return found


def _visdial_picture(files: Files, image: int, split: str) -> MediaRef:
    folders = ("train2014", "val2014") if split == "train" else (f"VisualDialog_{split}2018",)
    names = []
    for folder in folders:
        file = f"{'COCO_' if split == 'train' else ''}{folder}_{image:012d}.jpg"
        names += [f"{folder}/{file}", file, f"images/{folder}/{file}"]
    return files.media("image", names[0], *names[1:])


def read_avsd(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """AVSD of DSTC7 (arXiv 1806.00525): SPLIT_set4DSTC7-AVSD.json; videos of Charades, IMAGE_ID.mp4.

    The test set's "__UNDISCLOSED__" answers are left out, so that its last round has none.
    """
    part = _AVSD_SPLITS.get(split, split)
    name = files.one(f"{part}_set4DSTC7-AVSD.json", f"*/{part}_set4DSTC7-AVSD.json")
    for number, dialog in enumerate(files.items(name, "dialogs.item")):
        try:
            match dialog:
                case {"image_id": str(clip), "caption": str(caption), "dialog": [_, *_] as rounds}:
                    said = [
                        {key: x for key, x in one.items() if key in ("question", "answer") and x != "__UNDISCLOSED__"}
                        for one in rounds
                    ]
                    facts = {"caption": caption, "rounds": said, "image_id": clip}
                    if isinstance(dialog.get("summary"), str):
                        facts["summary"] = dialog["summary"]
                    yield Record(f"{number:08d}", facts, (video(files, clip),))
                case _:
                    raise SampleError("unreadable row", f"wanted image_id, caption and dialog; {dialog!r:.200}")
        except UNREADABLE as error:
            yield problem(error, f"{name} dialog {number}")


def read_image_chat(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """Image-Chat (arXiv 1811.00945, ParlAI): SPLIT.json; pictures yfcc_images/HASH.jpg.

    The hundred candidates of a turn are kept where the file has them (valid and test), the thousand are not.
    """
    part = {"val": "valid"}.get(split, split)
    name = files.one(f"{part}.json", f"*/{part}.json")
    for number, row in enumerate(files.rows(name)):
        try:
            match row:
                case {"image_hash": str(image), "dialog": [_, *_] as dialog}:
                    facts: dict[str, Any] = {"turns": [_styled(turn) for turn in dialog], "image_hash": image}
                    if isinstance(row.get("candidates"), list):
                        facts["candidates"] = [one["100"] for one in row["candidates"]]
                    item = files.media("image", f"yfcc_images/{image}.jpg", f"{image}.jpg")
                    yield Record(f"{number:08d}", facts, (item,))
                case SampleError():
                    raise row
                case _:
                    raise SampleError("unreadable row", f"wanted image_hash and dialog; {row!r:.200}")
        except UNREADABLE as error:
            yield problem(error, f"{name} row {number}")


def _styled(turn: Any) -> dict[str, str]:
    match turn:
        case [str(style), str(text)]:
            return {"style": style, "text": text}
    raise SampleError("unreadable turn", f"wanted [style, text], found {turn!r:.200}")


SOURCES = {
    "visdial": Source(
        ("visdial",),
        ("visdial_1.0_{split}.json", "*/visdial_1.0_{split}.json"),
        read_visdial,
        {"candidates": "yes or no: keep each round's hundred candidate answers (default: not for train)"},
    ),
    "avsd": Source(("visdial",), ("*_set4DSTC7-AVSD.json", "*/*_set4DSTC7-AVSD.json"), read_avsd),
    "image_chat": Source(("image_chat",), ("personalities.json", "*/personalities.json", "*.json"), read_image_chat),
}
