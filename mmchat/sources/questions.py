"""Questions with short answers: VQAv2 on pictures; ActivityNet-QA, MSRVTT-QA and MSVD-QA on videos."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from mmchat.conversation import MediaRef, Record
from mmchat.errors import SampleError
from mmchat.sources.files import Files
from mmchat.sources.rows import GROUPED, UNREADABLE, grouped, is_grouped, problem
from mmchat.sources.source import Read, Source

VIDEO_TYPES = ("mp4", "mkv", "webm", "avi")
SOUND = {"sound": "yes: a video's sound is shown beside it, read from the same file (default: no)"}
MISSING = {
    "missing": "count: a question whose video is missing is kept, and counts as wrong (default but for train), or skip"
}
_MAPPING = ("youtube_mapping.txt", "*/youtube_mapping.txt")
_VQA_SUBSETS = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test-dev2015"}


def _vqa2(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """VQAv2 (visualqa.org): v2_OpenEnded_mscoco_SUBSET_questions.json and v2_mscoco_SUBSET_annotations.json.

    The most common answer comes first, then the other annotators' (ten in all, repeated as they were given, as the
    metric counts them). Test subsets have no answers, so that there is nothing to learn from: they are refused.
    """
    subset = _VQA_SUBSETS.get(split, split)
    questions = files.one(
        f"v2_OpenEnded_mscoco_{subset}_questions.json", f"*/v2_OpenEnded_mscoco_{subset}_questions.json"
    )
    names = files.beside(f"v2_mscoco_{subset}_annotations.json", f"*/v2_mscoco_{subset}_annotations.json")
    if not names:
        raise ValueError(f"{files} has no v2_mscoco_{subset}_annotations.json; test sets have no answers")
    folder = "test2015" if subset.startswith("test") else subset
    for pair in _joined(files.items(questions, "questions.item"), files.items(names[0], "annotations.item")):
        try:
            match _both(pair):
                case {
                    "question_id": int(number),
                    "image_id": int(image),
                    "question": str(question),
                    "multiple_choice_answer": str(answer),
                    "answers": [*given],
                }:
                    others = [one.get("answer") for one in given if isinstance(one, dict)]
                    facts = {"question": question, "answers": [answer, *others], "image_id": image}
                    facts |= {name: pair[1][name] for name in ("question_type", "answer_type") if name in pair[1]}
                    file = f"COCO_{folder}_{image:012d}.jpg"
                    item = files.media("image", f"{folder}/{file}", file, f"images/{folder}/{file}")
                    yield Record(f"{number}", facts, (item,))
                case found:
                    raise SampleError("unreadable row", f"wanted image_id, question, answers; {found!r:.200}")
        except UNREADABLE as error:
            yield problem(error, f"question_id {pair[0].get('question_id')!r:.80}")


def _activitynet_qa(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """ActivityNet-QA (github.com/MILVLG/activitynet-qa): SPLIT_q.json and SPLIT_a.json, joined by question_id.

    question_type: 0 motion, 1 spatial, 2 temporal, 3 yes/no, 4 colour, 5 object, 6 location, 7 number, 8 other.
    Videos are files v_NAME or NAME, of any of the usual types.
    """
    questions = files.one(f"{split}_q.json", f"*/{split}_q.json")
    answers = files.beside(f"{split}_a.json", f"*/{split}_a.json")
    if not answers:
        raise ValueError(f"{files} has no {split}_a.json beside {questions}")
    for pair in _joined(files.rows(questions), files.rows(answers[0])):
        try:
            match _both(pair):
                case {
                    "question_id": str(key),
                    "video_name": str(name),
                    "question": str(question),
                    "answer": str(answer),
                    "type": int(kind),
                }:
                    facts = {"question": _asked(question), "answers": [answer], "question_type": kind}
                    media, missing = clip(files, split, options, f"v_{name}", name)
                    yield Record(key, facts | {"video_name": name} | missing, media)
                case found:
                    raise SampleError("unreadable row", f"wanted video_name, question, answer and type; {found!r:.200}")
        except UNREADABLE as error:
            yield problem(error, f"question_id {pair[0].get('question_id')!r:.80}")


def _msrvtt_qa(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """MSRVTT-QA (github.com/xudejing/video-question-answering): SPLIT_qa.json; videos videoN.mp4."""
    return _video_qa(files, split, lambda number: clip(files, split, options, f"video{number}"))


def _msvd_qa(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """MSVD-QA, of the same makers: SPLIT_qa.json, and youtube_mapping.txt of lines "NAME vidN" for videos NAME.avi."""
    found = files.beside(*_MAPPING)
    if not found:
        raise ValueError(f"{files} has no youtube_mapping.txt beside its questions")
    names = {}
    for line_number, line in enumerate(files.text(found[0]).splitlines(), 1):
        if not (words := line.split()):
            continue
        if len(words) != 2:
            raise ValueError(f"{found[0]} line {line_number}: wanted NAME vidN, found {line!r:.200}")
        names[words[1]] = words[0]

    def find(number: int) -> tuple[tuple[MediaRef, ...], dict[str, str]]:
        return clip(files, split, options, names.get(f"vid{number}", f"vid{number}"))

    return _video_qa(files, split, find)


def _video_qa(
    files: Files, split: str, find: Callable[[int], tuple[tuple[MediaRef, ...], dict[str, str]]]
) -> Iterator[Record | SampleError]:
    name = files.one(f"{split}_qa.json", f"*/{split}_qa.json")
    for number, row in enumerate(files.rows(name)):
        try:
            match row:
                case {"id": int(key), "video_id": int(shown), "question": str(question), "answer": str(answer)}:
                    media, missing = find(shown)
                    facts = {"question": _asked(question), "answers": [answer], "video_id": shown} | missing
                    yield Record(f"{key:08d}", facts, media)
                case SampleError():
                    raise row
                case _:
                    raise SampleError("unreadable row", f"wanted id, video_id, question, answer; {row!r:.200}")
        except UNREADABLE as error:
            yield problem(error, f"{name} row {number}")


def video(files: Files, *stems: str) -> MediaRef:
    """The video of one of these names, in the folder or in videos/. Raises SampleError."""
    names = [f"{folder}{stem}.{type_}" for folder in ("", "videos/") for stem in stems for type_ in VIDEO_TYPES]
    return files.media("video", names[0], *names[1:])


def clip(
    files: Files, split: str, options: Mapping[str, str], *stems: str
) -> tuple[tuple[MediaRef, ...], dict[str, str]]:
    """The video of one of these names, with its sound where `--set sound=yes` says so, and what facts say of it.

    The sound is an item of its own that reads the same file. A video that is missing is an absent item under
    `missing=count`, and the facts have its name under "missing_video". Raises SampleError.
    """
    facts: dict[str, str] = {}
    try:
        item = video(files, *stems)
    except SampleError as error:
        if error.reason != "missing media" or not _counts_missing(options, split):
            raise
        item, facts = MediaRef("video", None), {"missing_video": stems[-1]}
    return with_sound(item, options), facts


def with_sound(item: MediaRef, options: Mapping[str, str]) -> tuple[MediaRef, ...]:
    """A video, and its sound as an item of its own where `--set sound=yes` says so. Raises ValueError."""
    if (found := options.get("sound", "no")) not in ("yes", "no"):
        raise ValueError(f"--set sound is yes or no, not {found}")
    return (item, MediaRef("audio", item.data)) if found == "yes" else (item,)


def _counts_missing(options: Mapping[str, str], split: str) -> bool:
    """Whether questions about missing videos are kept. Raises ValueError."""
    found = options.get("missing", "skip" if split.startswith("train") or is_grouped(options, split) else "count")
    if found not in ("skip", "count"):
        raise ValueError(f"--set missing is skip or count, not {found}")
    if found == "count" and is_grouped(options, split):
        raise ValueError("--set missing=count counts each question: wanted --set grouped=no beside it")
    return found == "count"


def _asked(question: str) -> str:
    """The question with its mark, which the video sets leave out."""
    return question if question.rstrip().endswith("?") else f"{question.rstrip()}?"


def _joined(questions: Iterable[Any], answers: Iterable[Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Questions with their answers by question_id, in the order of the questions.

    Answers that come before their question wait in memory: none, where both files have the same order. A question
    without an answer comes with an empty one. A question without a question_id is passed on as it is.
    """
    waiting: dict[Any, dict[str, Any]] = {}
    rest = iter(answers)
    for question in questions:
        key = _question_id(question)
        while key is not None and key not in waiting:
            answer = next(rest, None)
            if answer is None:
                break
            if (number := _question_id(answer)) is not None:
                waiting[number] = answer
        yield (question if isinstance(question, dict) else {"row": question}), waiting.pop(key, {})


def _question_id(row: Any) -> int | str | None:
    found = row.get("question_id") if isinstance(row, dict) else None
    return found if isinstance(found, int | str) else None


def _both(pair: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    """Both rows as one. Raises SampleError where the answer is missing, or is for another picture."""
    question, answer = pair
    if not answer:
        raise SampleError("no answer", "no annotation has this question_id")
    if "image_id" in question and question["image_id"] != answer.get("image_id"):
        raise SampleError("unlike rows", f"image {question['image_id']} asked, {answer.get('image_id')!r} answered")
    return {**answer, **question}


def _grouping(read: Read) -> Read:
    """The same reader, which joins the neighbouring questions about one picture or video where it is told to."""

    def grouping(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
        _counts_missing(options, split)  # a wrong option is told at once, not at the first missing video
        found = read(files, split, options)
        return grouped(found) if is_grouped(options, split) else found

    return grouping


def _source(read: Read, name: str, companions: tuple[str, ...] = ()) -> Source:
    return Source(("video_qa",), (name, f"*/{name}"), _grouping(read), GROUPED | SOUND | MISSING, companions)


_VQA2 = "v2_OpenEnded_mscoco_*_questions.json"
SOURCES = {
    "vqa2": Source(("vqa",), (_VQA2, f"*/{_VQA2}"), _grouping(_vqa2), GROUPED),
    "activitynet_qa": _source(_activitynet_qa, "{split}_q.json"),
    "msvd_qa": _source(_msvd_qa, "{split}_qa.json", _MAPPING),
    "msrvtt_qa": _source(_msrvtt_qa, "{split}_qa.json"),
}
