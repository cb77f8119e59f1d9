"""Ask a trained model.

    python infer.py chat CHECKPOINT [--image F] [--audio F] [--video F] [--ask TEXT]
    python infer.py answer CHECKPOINT --shards S --task T --out F

CHECKPOINT is a checkpoint's folder, a run's or stage's folder (its newest is taken), or a configuration file for the
untrained model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("checkpoint")
    common.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    common.add_argument("--max-new-tokens", type=_positive, default=256, metavar="N")
    common.add_argument("--temperature", type=_not_negative, default=0.0, help="0 (default) takes the likeliest token")
    common.add_argument("--top-p", type=_share, default=1.0, help="sample among the likeliest tokens of this mass")
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    chat = commands.add_parser("chat", parents=[common], help="talk, in the terminal or with one question")
    for modality in ("image", "audio", "video"):
        chat.add_argument(f"--{modality}", action="append", default=[], metavar="F", help="may be given several times")
    chat.add_argument("--ask", metavar="TEXT", help="ask this and stop; without it, type")
    chat.add_argument("--system", metavar="TEXT", help="said first")

    answer = commands.add_parser("answer", parents=[common], help="answer the questions of shards")
    answer.add_argument("--shards", required=True, nargs="+", help="paths, globs or ranges like {000000..000012}.tar")
    answer.add_argument("--task", required=True)
    answer.add_argument("--out", required=True, type=Path, metavar="F", help="JSON lines; F.summary.json beside it")
    answer.add_argument("--batch-size", type=_positive, default=16, metavar="N")
    answer.add_argument("--limit", type=_positive, metavar="N", help="first N records only")
    answer.add_argument("--swap", choices=["image", "video", "audio"], help="control: media of another record")
    arguments = parser.parse_args()

    from mmchat.models.llm import hide_progress_bars

    hide_progress_bars()
    try:
        return {"chat": _chat, "answer": _answer}[arguments.command](arguments)
    except (ValueError, RuntimeError, OSError) as error:
        if arguments.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
        return 130


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"wanted 1 or more, found {text}")
    return value


def _not_negative(text: str) -> float:
    if (value := float(text)) < 0:
        raise argparse.ArgumentTypeError(f"wanted 0 or more, found {text}")
    return value


def _share(text: str) -> float:
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"wanted more than 0 and at most 1, found {text}")
    return value


def _decoding(arguments: argparse.Namespace) -> Any:
    from mmchat.inference.generate import Decoding

    return Decoding(arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed)


def _chat(arguments: argparse.Namespace) -> int:
    from mmchat.conversation import MediaRef
    from mmchat.errors import SampleError
    from mmchat.inference.chat import ChatSession
    from mmchat.inference.load import load

    media: list[Any] = []
    for modality in ("image", "audio", "video"):
        media += [MediaRef(modality, Path(path).read_bytes()) for path in getattr(arguments, modality)]
    session = ChatSession(load(arguments.checkpoint, arguments.dtype), _decoding(arguments), arguments.system)

    def say(text: str) -> bool:
        try:
            for piece in session.ask([*media, text]):
                print(piece, end="", flush=True)
            print(flush=True)
            media.clear()
        except SampleError as error:
            media.clear()
            print(f"error: {error}. The question was not asked; its files are dropped", file=sys.stderr)
            return False
        return True

    if arguments.ask is not None:
        return 0 if say(arguments.ask) else 1
    print("Type a question. /image F, /audio F, /video F adds a file to it; /new starts over; /quit ends.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return 0
        command, _, path = line.partition(" ")
        if command in ("/quit", "/exit"):
            return 0
        if command == "/new":
            session, media = ChatSession(session.loaded, session.decoding, arguments.system), []
        elif command in ("/image", "/audio", "/video"):
            try:
                media.append(MediaRef(command[1:], Path(path.strip()).read_bytes()))  # type: ignore[arg-type]
            except OSError as error:
                print(f"error: {error}", file=sys.stderr)
        elif command.startswith("/"):
            print(
                f"unknown command {command}; there are /image, /audio, /video, /new and /quit",
                file=sys.stderr,
            )
        elif line:
            say(line)


def _answer(arguments: argparse.Namespace) -> int:
    from mmchat.inference.answer import answer_shards
    from mmchat.inference.load import load

    summary = answer_shards(
        load(arguments.checkpoint, arguments.dtype),
        arguments.task,
        arguments.shards,
        arguments.out,
        _decoding(arguments),
        arguments.batch_size,
        arguments.limit,
        arguments.swap,
        arguments.seed,
    )
    report = {
        "checkpoint": str(arguments.checkpoint),
        "task": arguments.task,
        "swap": arguments.swap,
        "records": summary.num_records,
        "scores": summary.scores,
        "not_answered": summary.bad,
    }
    Path(f"{arguments.out}.summary.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
