"""Ask a trained model.

    python infer.py chat CHECKPOINT [--image F] [--audio F] [--video F] [--ask TEXT] [--draw F] [--save-seen DIR]
    python infer.py evaluate CHECKPOINT --shards S --task T --out FOLDER
    python infer.py judge FOLDER --endpoint URL --model NAME --protocol F
    python infer.py release CHECKPOINT OUT [--dtype float16]

CHECKPOINT is a checkpoint's folder, a run's or stage's folder (its newest is taken), or a configuration file for the
untrained model.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


_PLACES = """In a question, <box:x1,y1,x2,y2> and <point:x,y> are places in pixels of the picture as it is shown: \
'What is in <box:120,80,240,200>?'. Of several pictures, the number comes first: <box:2:120,80,240,200>. --draw and \
/draw F mark the places of question (dashed) and answer; those in picture 2 go to a file F-2."""


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

    chat = commands.add_parser(
        "chat", parents=[common], help="talk, in the terminal or with one question", epilog=_PLACES
    )
    for modality in ("image", "audio", "video"):
        chat.add_argument(f"--{modality}", action="append", default=[], metavar="F", help="may be given several times")
    chat.add_argument("--ask", metavar="TEXT", help="ask this and stop; without it, type")
    chat.add_argument("--draw", metavar="F", help="with --ask: draw the places named into a png, jpg or webp")
    chat.add_argument(
        "--save-seen",
        metavar="DIR",
        help="save what the model is given: frames with their times, sounds and their spectrograms, and a page of them",
    )
    chat.add_argument("--system", metavar="TEXT", help="said first")
    chat.add_argument(
        "--safety", metavar="NAME", help="judge each sentence before it is shown: word-list, or a text classifier"
    )

    _add_evaluate(commands)
    _add_judge(commands)

    release = commands.add_parser("release", help="make a checkpoint small: trained weights alone, in half precision")
    release.add_argument("checkpoint")
    release.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    release.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    release.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()

    from mmchat.errors import SampleError
    from mmchat.models.llm import hide_progress_bars

    hide_progress_bars()
    try:
        commands_by_name = {"chat": _chat, "evaluate": _evaluate, "judge": _judge, "release": _release}
        return commands_by_name[arguments.command](arguments)
    except (ValueError, RuntimeError, OSError, SampleError) as error:
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
    if not 0 <= (value := float(text)) < math.inf:  # also of nan, this is false
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
    from mmchat.inference.chat import ChatSession, read_question
    from mmchat.inference.load import load
    from mmchat.inference.safety import build_safety
    from mmchat.inference.seen import Seen, check_folder
    from mmchat.inference.terminal import Terminal, check_drawing, read_media

    # What can be refused is refused before the model is loaded, which takes a while.
    media = [read_media(m, path) for m in ("image", "audio", "video") for path in getattr(arguments, m)]
    sources = [*arguments.image, *arguments.audio, *arguments.video]
    out = None
    if arguments.draw is not None:
        if arguments.ask is None or not arguments.image:
            raise ValueError("--draw needs --image and --ask; where you type, /draw F draws the last answer")
        out = check_drawing(arguments.draw, sources, range(1, len(arguments.image) + 1))
    if arguments.ask is not None:
        read_question(arguments.ask, media)
    seen_folder = check_folder(arguments.save_seen) if arguments.save_seen is not None else None

    guard = build_safety(arguments.safety) if arguments.safety is not None else None
    if guard is not None:
        guard.is_unsafe("Hello.")  # loads a classifier, or fails
    loaded = load(arguments.checkpoint, arguments.dtype)
    session = ChatSession(loaded, _decoding(arguments), arguments.system, guard)
    seen = Seen(seen_folder, loaded.template) if seen_folder is not None else None
    terminal = Terminal(session, media, sources, seen)
    if arguments.ask is None:
        terminal.talk()
        return 0
    if not terminal.ask(arguments.ask):
        return 1
    if out is not None:
        terminal.draw(out)
    return 0


def _release(arguments: argparse.Namespace) -> int:
    from mmchat.inference.release import release

    size, change = release(arguments.checkpoint, arguments.out, arguments.dtype)
    print(f"{arguments.out}: {size / 1e6:.1f} MB in {arguments.dtype}")
    print(f"logits of the probe change by {change:.2%} of their spread at most")
    return 0


def _add_evaluate(commands: Any) -> None:
    modalities = ["image", "video", "audio"]
    evaluate = commands.add_parser(
        "evaluate",
        help="ask a task's questions about shards, and score the answers",
        description="Writes predictions.jsonl, metrics.json and index.html. The same command continues a run that was "
        "stopped. docs/evaluation.md has the protocols, metrics and controls.",
    )
    evaluate.add_argument("checkpoint")
    evaluate.add_argument("--task", required=True)
    evaluate.add_argument("--shards", required=True, nargs="+", help="paths, globs or ranges like {000000..000012}.tar")
    evaluate.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    evaluate.add_argument("--protocol", type=Path, metavar="F", help="a YAML file such as those in configs/protocols")
    evaluate.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of the protocol, such as iou=0.7"
    )
    evaluate.add_argument("--seed", type=int, help="of the phrasing, where that is drawn, and of the controls")
    evaluate.add_argument(
        "--missing", action="append", default=[], metavar="MODALITY=SHARE", help="control: without it in that share"
    )
    evaluate.add_argument(
        "--swap", action="append", default=[], choices=modalities, help="control: that of another record"
    )
    evaluate.add_argument(
        "--blank", action="append", default=[], choices=modalities, help="control: grey pictures, silent sounds"
    )
    evaluate.add_argument("--safety", metavar="NAME", help="score also what a safety stage lets through")
    evaluate.add_argument("--batch-size", type=_positive, default=16, metavar="N")
    evaluate.add_argument("--limit", type=_positive, metavar="N", help="first N records only")
    evaluate.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    evaluate.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _evaluate(arguments: argparse.Namespace) -> int:
    from mmchat.config import parse
    from mmchat.inference.controls import Controls, parse_missing
    from mmchat.inference.evaluate import evaluate, load_protocol, summary
    from mmchat.inference.load import load

    seed = [] if arguments.seed is None else [f"seed={arguments.seed}"]
    protocol = load_protocol(arguments.protocol, [*arguments.set, *seed])
    controls = {
        "swap": arguments.swap,
        "blank": arguments.blank,
        "missing": parse_missing(arguments.missing),
        "seed": protocol.seed,
    }
    metrics = evaluate(
        load(arguments.checkpoint, arguments.dtype),
        arguments.task,
        arguments.shards,
        arguments.out,
        protocol,
        parse(Controls, controls, "controls"),
        arguments.limit,
        arguments.batch_size,
        arguments.safety,
    )
    print(summary(metrics, arguments.out))
    if not metrics["num_answered"]:
        raise ValueError("not one question was answered, so the scores say nothing; the reasons stand above")
    return 0


def _add_judge(commands: Any) -> None:
    judge = commands.add_parser(
        "judge",
        help="have the answers of an evaluation judged by a language model",
        description="Reads what `evaluate` wrote, asks any OpenAI-compatible endpoint, and writes judge.json and "
        "verdicts.jsonl. The same command continues a run that was stopped. docs/judge.md says what a judge is not.",
    )
    judge.add_argument("folder", type=Path, help="the --out of infer.py evaluate")
    judge.add_argument("--endpoint", required=True, metavar="URL", help="such as http://localhost:8000/v1")
    judge.add_argument("--model", required=True, metavar="NAME", help="the judge, by the id of one version")
    judge.add_argument("--protocol", required=True, type=Path, metavar="F", help="a configs/judges/*.yaml")
    judge.add_argument("--api-key-file", type=Path, metavar="F", help="a file with the key and nothing else")
    judge.add_argument("--out", type=Path, metavar="DIR", help="default: FOLDER/PROTOCOL-MODEL")
    judge.add_argument("--cache", type=Path, metavar="DIR", help="of replies; default: ~/.cache/mmchat/verdicts")
    judge.add_argument("--limit", type=_positive, metavar="N", help="first N answers, or pairs of them, only")
    judge.add_argument("--parallel", type=_positive, default=4, metavar="N", help="requests at a time (default: 4)")
    judge.add_argument("--timeout", type=_positive, default=60, metavar="S", help="of one request (default: 60 s)")
    judge.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _judge(arguments: argparse.Namespace) -> int:
    from mmchat.inference.judge import CACHE, default_out, judge_answers, load_judge_protocol, summary
    from mmchat.inference.judge_endpoint import Endpoint, read_key

    key = read_key(arguments.api_key_file) if arguments.api_key_file is not None else None
    endpoint = Endpoint(arguments.endpoint, arguments.model, key, arguments.timeout)
    out = arguments.out or default_out(arguments.folder, arguments.protocol, arguments.model)
    metrics = judge_answers(
        arguments.folder,
        endpoint,
        load_judge_protocol(arguments.protocol),
        out,
        arguments.cache or CACHE,
        arguments.limit,
        arguments.parallel,
    )
    print(summary(metrics, out))
    if not metrics["num_judged"]:
        raise ValueError("there is not one verdict, so the scores say nothing; the reasons stand above")
    return 0


if __name__ == "__main__":
    sys.exit(main())
