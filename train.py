"""Train a model: python train.py configs/demo.yaml [stages.align.steps=20 ...]

Run again, the same command continues where the last checkpoint stands. One process as it is; many with `torchrun` or
`deepspeed` in front of the same line, or under SLURM (configs/launch/).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import NoReturn

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warn in forked workers otherwise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", help="a.b.c=value; list items by name: stages.align.steps=20")
    parser.add_argument("--stage", help="train this stage only; the one before it must be finished")
    parser.add_argument("--preflight", action="store_true", help="check the first stage that is not done, and stop")
    parser.add_argument("--plan", action="store_true", help="print what each stage will consume (no GPU), and stop")
    parser.add_argument("--plan-seconds", type=float, default=60, help="time for planning packs, each stage (60)")
    parser.add_argument("--plan-json", metavar="FILE", help="write the plan there too")
    parser.add_argument("--ranks", type=int, help="with --plan: ranks that memory is estimated for (1, 8 and 64)")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration, and stop")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_intermixed_args()  # overrides may stand after options
    if not arguments.plan_seconds >= 0:
        parser.error(f"--plan-seconds {arguments.plan_seconds:g}: must be 0 or more")

    signal.signal(signal.SIGINT, _stop_importing)
    try:
        from mmchat.config import dump_config, load_config

        config = load_config(arguments.config, arguments.overrides)
        if arguments.stage and arguments.stage not in [stage.name for stage in config.stages]:
            raise ValueError(f"--stage {arguments.stage}: the stages are {[s.name for s in config.stages]}")
        if arguments.print_config:
            print(dump_config(config), end="")
            return 0
        if arguments.plan:
            from mmchat.training.plan import print_plan

            signal.signal(signal.SIGINT, signal.default_int_handler)
            stages = [stage for stage in config.stages if arguments.stage in (None, stage.name)]
            print_plan(config, stages, arguments.plan_seconds, arguments.ranks, arguments.plan_json)
            return 0

        from mmchat.models.llm import hide_progress_bars
        from mmchat.training.engine import start_distributed
        from mmchat.training.resume import claim
        from mmchat.training.stage import StopRequest, train_stage

        signal.signal(signal.SIGINT, signal.default_int_handler)
        hide_progress_bars()
        start_distributed()
        stop, previous = StopRequest(), None
        claimed = claim(config.folder)
        for stage in config.stages:
            if arguments.stage in (None, stage.name):
                outcome = train_stage(config, stage, previous, stop, arguments.preflight)
                if outcome != "done":
                    break
            previous = config.folder / stage.name
        del claimed
        return 0
    except KeyboardInterrupt:
        trains = not (arguments.plan or arguments.print_config or arguments.preflight)
        again = "; run the same command again to continue from the last checkpoint" if trains else ""
        print(f"\nstopped{again}", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        if "CUDA out of memory" in str(error):
            error = ValueError(f"{error}\nLower batch.tokens, batch.patches or packs_per_micro_batch, or raise zero")
        if arguments.debug:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


def _stop_importing(*_: object) -> NoReturn:
    """There is nothing to save yet, and a KeyboardInterrupt raised inside a library's import may be swallowed there."""
    print("\nstopped", file=sys.stderr, flush=True)
    os._exit(130)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code) if code else sys.exit(code)
