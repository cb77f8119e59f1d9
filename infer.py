"""Ask a trained model.

    python infer.py chat CHECKPOINT [--image F] [--audio F] [--video F] [--ask TEXT] [--draw F] [--save-seen DIR]
    python infer.py evaluate CHECKPOINT --shards S --task T --out FOLDER
    python infer.py judge FOLDER --endpoint URL --model NAME --protocol F
    python infer.py serve CHECKPOINT [--host H] [--port P] [--api-key-file F]
    python infer.py release CHECKPOINT OUT [--dtype float16]
    python infer.py export CHECKPOINT OUT --format hf-llava | merged | hub
    python infer.py import LLAVA OUT

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
    _add_serve(commands)

    release = commands.add_parser("release", help="make a checkpoint small: trained weights alone, in half precision")
    release.add_argument("checkpoint")
    release.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    release.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    release.add_argument("--debug", action="store_true", help="show the traceback of an error")
    _add_export(commands)
    arguments = parser.parse_args()

    from mmchat.errors import SampleError
    from mmchat.models.llm import hide_progress_bars

    if arguments.command not in ("export", "import"):  # of a large model, these take minutes
        hide_progress_bars()
    try:
        commands_by_name = {"chat": _chat, "evaluate": _evaluate, "judge": _judge, "serve": _serve, "release": _release}
        commands_by_name |= {"export": _export, "import": _import}
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
    from mmchat.inference.media_input import read_media
    from mmchat.inference.safety import build_safety
    from mmchat.inference.seen import Seen, check_folder
    from mmchat.inference.terminal import Terminal, check_drawing

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
    evaluate.add_argument(
        "--shuffle", action="append", default=[], choices=["video"], help="control: frames in any order"
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
    from mmchat.models.packed import pack

    seed = [] if arguments.seed is None else [f"seed={arguments.seed}"]
    protocol = load_protocol(arguments.protocol, [*arguments.set, *seed])
    controls = {
        "swap": arguments.swap,
        "blank": arguments.blank,
        "missing": parse_missing(arguments.missing),
        "shuffle": arguments.shuffle,
        "seed": protocol.seed,
    }
    loaded = load(arguments.checkpoint, arguments.dtype)
    pack(loaded.model)
    metrics = evaluate(
        loaded,
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


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="answer over HTTP, as OpenAI's API and on a chat page",
        description="One process. docs/serving.md has the routes, the limits and what clients may send.",
    )
    serve.add_argument("checkpoint")
    serve.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    serve.add_argument("--api-key-file", type=Path, metavar="F", help="a file with the key and nothing else")
    serve.add_argument("--no-key-needed", action="store_true", help="serve other machines without a key")
    serve.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="a name it is reached by")
    serve.add_argument(
        "--allow-media-domains", metavar="A,B", help="fetch pictures and clips from these hosts (default: from none)"
    )
    serve.add_argument("--model-name", metavar="NAME", help="what clients call the model (default: its run)")
    serve.add_argument(
        "--temperature", type=_not_negative, default=0.0, help="where a request names none (default: 0, the likeliest)"
    )
    serve.add_argument("--max-running", type=_positive, default=16, metavar="N", help="answers at a time (default: 16)")
    serve.add_argument("--max-waiting", type=_positive, default=64, metavar="N", help="beyond these (default: 64)")
    serve.add_argument("--limits", nargs="+", default=[], metavar="NAME=VALUE", help="such as images=4 new_tokens=512")
    serve.add_argument("--drain", type=_not_negative, default=30.0, metavar="S", help="for answers that run at the end")
    serve.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _serve(arguments: argparse.Namespace) -> int:
    try:
        from mmchat.serving.server import Settings, serve
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed; wanted: pip install -e '.[serve]'") from error
    from mmchat.config import override, parse
    from mmchat.serving.fetch import read_domains
    from mmchat.serving.limits import Limits

    settings = Settings(
        host=arguments.host,
        port=arguments.port,
        key_file=arguments.api_key_file,
        is_open=arguments.no_key_needed,
        domains=read_domains(arguments.allow_media_domains) if arguments.allow_media_domains is not None else (),
        hosts=arguments.allow_host,
        name=arguments.model_name,
        temperature=arguments.temperature,
        max_running=arguments.max_running,
        max_waiting=arguments.max_waiting,
        drain_s=arguments.drain,
        limits=parse(Limits, override({}, arguments.limits), "--limits"),
    )
    serve(arguments.checkpoint, arguments.dtype, settings)
    return 0


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="write the model for other programs, after comparing what it answers",
        description="hf-llava: a LLaVA that transformers and vLLM load. merged: a checkpoint whose LLM holds what was "
        "learned in plain weights. hub: the whole model as a folder for mmchat.load. docs/export.md says what fits.",
    )
    export.add_argument("checkpoint")
    export.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    export.add_argument("--format", required=True, choices=["hf-llava", "merged", "hub"])
    export.add_argument("--with-base", action="store_true", help="hub: with the base models inside")
    export.add_argument("--licence", metavar="NAME", help="of the trained weights, such as apache-2.0")
    export.add_argument(
        "--assume-present",
        choices=["image", "video", "audio"],
        help="merge this modality's FLoRA pairs: every prompt will have it",
    )
    export.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: that of the LLM's folder)"
    )
    export.add_argument(
        "--evaluation", action="append", default=[], type=Path, metavar="F", help="a metrics.json, for the model card"
    )
    export.add_argument("--image", metavar="F", help="hf-llava: what is compared with (default: a drawn picture)")
    export.add_argument("--ask", metavar="TEXT", help="hf-llava: what is asked when comparing")
    export.add_argument("--debug", action="store_true", help="show the traceback of an error")

    taken = commands.add_parser(
        "import",
        help="make a checkpoint of a LLaVA, to ask and to fine-tune",
        description="Takes a LlavaForConditionalGeneration with CLIP or SigLIP, compares the answers, and writes a "
        "checkpoint with its base models inside. docs/export.md says how training goes on from it.",
    )
    taken.add_argument("llava", metavar="LLAVA", help="a folder, or a name on the hub: llava-hf/llava-1.5-7b-hf")
    taken.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    taken.add_argument(
        "--chat-format",
        choices=["llava", "auto", "chatml", "vicuna", "plain"],
        help="how prompts are written (default: the one that makes the ids of its own template)",
    )
    taken.add_argument("--image", metavar="F", help="what is compared with (default: a drawn picture)")
    taken.add_argument("--ask", metavar="TEXT", help="what is asked when comparing")
    taken.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _export(arguments: argparse.Namespace) -> int:
    from mmchat.inference.export import QUESTION, export_hub, export_llava, export_merged

    path, out, assumed = arguments.checkpoint, arguments.out, arguments.assume_present
    taken = {
        "hf-llava": ("assume_present", "dtype", "licence", "evaluation", "image", "ask"),
        "merged": ("assume_present", "dtype"),
        "hub": ("with_base", "licence", "evaluation"),
    }
    for option in dict.fromkeys(name for names in taken.values() for name in names):
        if getattr(arguments, option) and option not in taken[arguments.format]:
            of = " or ".join(form for form, names in taken.items() if option in names)
            raise ValueError(f"--{option.replace('_', '-')} is of --format {of}; leave it out")
    if arguments.format == "hub":
        export_hub(path, out, arguments.with_base, arguments.licence, arguments.evaluation, _say)
    elif arguments.format == "merged":
        export_merged(path, out, assumed, arguments.dtype, _say)
    else:
        picture = Path(arguments.image).read_bytes() if arguments.image else None
        question = arguments.ask or QUESTION
        export_llava(
            path, out, assumed, arguments.dtype, picture, question, arguments.evaluation, arguments.licence, _say
        )
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from mmchat.inference.export import QUESTION
    from mmchat.inference.import_llava import import_llava

    picture = Path(arguments.image).read_bytes() if arguments.image else None
    import_llava(arguments.llava, arguments.out, arguments.chat_format, picture, arguments.ask or QUESTION, _say)
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
