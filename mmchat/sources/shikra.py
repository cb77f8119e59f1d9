"""Shikra's own jsonl families (arXiv 2306.15195, github.com/shikras/shikra), each row told by its keys.

Boxes are pixels [x1, y1, x2, y2] of the picture as it is. Only annotations are published: --media names the pictures.
Its llava_*.jsonl and blip_laion_cc_sbu_558k.jsonl are LLaVA's rows, which the format `chat` reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmchat.conversation import MediaRef, Record
from mmchat.errors import SampleError
from mmchat.sources.files import Files
from mmchat.sources.rows import Find, annotated, of_split, records_of
from mmchat.sources.source import Source

_MARKS = (
    "REC_*.jsonl",
    "GC_*.jsonl",
    "CAP_coco*.jsonl",
    "CWB_flickr30k*.jsonl",
    "GPT4GEN_*.jsonl",
    "pointQA_*.jsonl",
    "v7w_pointing*.jsonl",
    "coco_pope_*.jsonl",
    "v2_OpenEnded_mscoco_*.jsonl",
)
_QUESTIONS = {"general": "general_question", "object": "obj_question", "super": "super_question"}
_ANSWERS = ("grounded", "cot", "short")


def read_shikra(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """Rows of one file of the families, which SOURCE names; the split is in the file's name.

    Rows with boxes may state their picture's width and height.
    """

    def read(row: dict[str, Any], key: str, find: Find) -> Record:
        return _record(row, key, find, options)

    names = of_split(files, files.find(*_MARKS), split)
    if len(names) != 1:
        found = f"{', '.join(names[:5])}; name one of them" if names else "none"
        raise ValueError(f"{files}: wanted one file of {', '.join(_MARKS)}, found {found}")
    return records_of(files, names[0], read)


def _record(row: dict[str, Any], key: str, find: Find, options: Mapping[str, str]) -> Record:
    def picture(path: Any) -> MediaRef:
        return annotated(find("image", path), row.get("width"), row.get("height"))

    match row:
        case {"target": dict(target), "conversations": [*said]}:  # what its programs hand on
            return _native(row, key, find, said, target)
        case {"img_path": str(path), "expression": str(text), "bbox": [*box]}:  # REC_*, GC_*
            return Record(key, {"expressions": [text], "boxes": [box]}, (picture(path),))
        case {"img_path": str(path), "caption": str(text)}:  # CAP_*
            return Record(key, {"captions": [text]}, (find("image", path),))
        case {"image_id": number, "sentence": str(text), "boxes": [*boxes], "boxes_seq": [*places]}:  # CWB_flickr30k_*
            facts = _spotted(text, boxes, places)
            return Record(key, facts | {"image_id": number}, (picture(f"{number}.jpg"),))
        case {"img_path": str(path), "cot_with_ans": str(), "boxes": [*boxes]}:  # GPT4GEN_*
            return Record(key, _reasoned(row, boxes, options), (picture(path),))
        case {"file_path": str(path), "question": str(text), "candidates": [*boxes], "answer": [*box]}:  # v7w_*
            if box not in boxes:
                raise SampleError("no answer", f"{box} is none of the candidates {boxes!r:.200}")
            facts = {"question": text, "candidates": boxes, "answer": boxes.index(box)}
            return Record(key, facts, (picture(path),))
        case {"file_path": str(path), "bbox": [*box], "point": [*point], "answer": str(answer)}:  # pointQA_*
            return Record(key, _pointed(row, box, point, answer, options), (picture(path),))
        case {"question": str(text), "annotation": {"multiple_choice_answer": str(answer)}}:  # v2_OpenEnded_*
            item = find("image", row.get("image_path", row.get("image_id")))
            return Record(key, {"question": text, "answers": [answer]}, (item,))
        case {"image": str(path), "text": str(text), "label": str(answer)}:  # coco_pope_*
            return Record(key, {"question": text, "answers": [answer.lower()]}, (find("image", path),))
    raise SampleError("unknown row", f"no family has the keys {sorted(row)!r:.200}")


def _pointed(
    row: Mapping[str, Any], box: list[Any], point: list[Any], answer: str, options: Mapping[str, str]
) -> dict[str, Any]:
    """PointQA: a question of LocalQA, or LookTwiceQA's in one way or in all three, about a point, a box or both."""
    kind = _choice(options, "question", (*_QUESTIONS, "each"))
    shape = _choice(options, "region", ("point", "box", "each"))
    names = list(_QUESTIONS.values()) if kind == "each" else [_QUESTIONS[kind]]
    texts = [row["question"]] if "question" in row else [row.get(name) for name in names]
    places = {"point": point, "box": box}
    first, *more = [
        {"question": text, "answers": [answer], "regions": [{"media": 0, name: places[name]}]}
        for name in (places if shape == "each" else (shape,))
        for text in texts
    ]
    return first | ({"more": more} if more else {})


def _choice(options: Mapping[str, str], name: str, allowed: Sequence[str]) -> str:
    found = options.get(name, allowed[0])
    if found not in allowed:
        raise ValueError(f"--set {name} is {' or '.join(allowed)}, not {found}")
    return found


def _pieces(text: str, mark: str, boxes: Sequence[Any], places: Sequence[Any]) -> list[str | list[Any]]:
    """Text, and behind each mark its boxes. Raises SampleError where marks and places do not match."""
    parts = text.split(mark)
    if len(parts) - 1 != len(places):
        raise SampleError("unmatched boxes", f"{len(parts) - 1} {mark} for {len(places)} lists of boxes: {text!r:.200}")
    pieces: list[str | list[Any]] = [parts[0]]
    for indexes, part in zip(places, parts[1:], strict=True):
        try:
            pieces += [[boxes[i] for i in indexes if _is_place(i, boxes)], part]
        except TypeError as error:
            raise SampleError("unmatched boxes", f"{indexes!r:.100} names no boxes") from error
    return pieces


def _is_place(i: Any, boxes: Sequence[Any]) -> bool:
    if not isinstance(i, int) or not 0 <= i < len(boxes):
        raise SampleError("unmatched boxes", f"box {i!r:.50} of {len(boxes)}")
    return True


def _spotted(text: str, boxes: list[Any], places: list[Any]) -> dict[str, Any]:
    """A caption with `<ph_st>phrase<ph_ed>` as plain caption and phrases."""
    caption, phrases = "", []
    for piece in _pieces(text, "<ph_ed>", boxes, places):
        if isinstance(piece, str):
            before, mark, phrase = piece.partition("<ph_st>")
            caption += before
            start = len(caption)
            caption += phrase if mark else ""
        else:
            phrases.append({"start": start, "end": len(caption), "boxes": piece})
    return {"caption": caption, "phrases": phrases}


def _reasoned(row: Mapping[str, Any], boxes: list[Any], options: Mapping[str, str]) -> dict[str, Any]:
    """Shikra-RD: a question about regions, and its answer: grounded reasoning, the same without boxes, or short."""
    kind = _choice(options, "answer", _ANSWERS)
    asked = [{"media": 0}, *_parts(_plain(row["question"]), "<ph_ed>", boxes, row.get("question_boxes_seq"))]
    if kind == "grounded":
        said = _parts(_plain(row["cot_with_ans"]), "<ph_ed>", boxes, row.get("answer_boxes_seq"))
    else:
        text = row["answer"] if kind == "short" else _plain(row["cot_with_ans"]).replace("<ph_ed>", "")
        said = [{"text": text}]
    return {"turns": [{"role": "user", "parts": asked}, {"role": "assistant", "parts": said}]}


def _plain(text: str) -> str:
    return text.replace("<ph_st>", "")


def _parts(text: str, mark: str, boxes: Sequence[Any], places: Any, shape: str = "box") -> list[dict[str, Any]]:
    """Parts of a turn as `instruct` has them; regions of one mark are a blank apart."""
    parts: list[dict[str, Any]] = []
    for piece in _pieces(text, mark, boxes, places or []):
        if isinstance(piece, str):
            parts += [{"text": piece}] if piece else []
        else:
            for number, box in enumerate(piece):
                parts += [*([{"text": " "}] if number else []), {"region": {"media": 0, shape: box}}]
    return parts


def _native(row: dict[str, Any], key: str, find: Find, said: list[Any], target: Mapping[str, Any]) -> Record:
    """Turns with `<image>`, `<boxes>` and `<points>`, whose k-th mark is the k-th list of boxes_seq or points_seq."""
    turns = []
    for turn in said:
        match turn:
            case {"from": "human" | "gpt" as role, "value": str(text)}:
                parts: list[dict[str, Any]] = []
                boxes, points = iter(turn.get("boxes_seq") or []), iter(turn.get("points_seq") or [])
                for piece in re.split(r"(<image>|<boxes>|<points>)", text):
                    if piece == "<image>":
                        parts.append({"media": 0})
                    elif piece in ("<boxes>", "<points>"):
                        shape, places = ("box", boxes) if piece == "<boxes>" else ("point", points)
                        where = target.get(f"{shape}es" if shape == "box" else f"{shape}s", [])
                        parts += _parts(piece, piece, where, [next(places, None)], shape)
                    elif piece:
                        parts.append({"text": piece})
                if next(boxes, None) is not None or next(points, None) is not None:
                    raise SampleError("unmatched boxes", f"more lists of places than marks: {text!r:.200}")
                turns.append({"role": "user" if role == "human" else "assistant", "parts": parts})
            case _:
                raise SampleError("unreadable turn", f"{turn!r:.200}")
    item = annotated(find("image", row.get("image")), target.get("width"), target.get("height"))
    return Record(key, {"turns": turns}, (item,))


SOURCES = {
    "shikra": Source(
        ("rec", "reg", "refer", "caption", "spot", "ground", "instruct", "vqa", "point"),
        _MARKS,
        read_shikra,
        {
            "answer": "of GPT4GEN rows: grounded (default), cot or short",
            "question": "of pointQA_twice rows: general (default), object, super or each",
            "region": "of pointQA rows: point (default), box or each",
        },
    ),
}
