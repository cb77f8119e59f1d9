"""One training step of mmchat beside transformers' Trainer and TRL's SFTTrainer: same weights, same data, same losses.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/step.py
    python benchmarks/step.py --device cuda

On a CPU a tiny LLaVA learns (LLM and connector; the vision tower is frozen) from the same eight samples a step in every
contender, through their real training loops, in turns, several times over. Losses and gradients are compared before
anything is timed. On a GPU only mmchat runs, at the size of a 1.5B LLM, in packs of 16k tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mmchat  # noqa: F401  (repairs torchvision before transformers looks for it)

# isort: split
import torch
import transformers
import trl
from datasets import Dataset
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.llava import (
    BATCH_SIZE,
    MAX_TEXT,
    Example,
    batched,
    build_llava,
    build_mmchat,
    compare,
    facts_of,
    large_llava,
    make_examples,
    pack,
    pad,
    picture_side,
    processor,
    tiny_llava,
)
from benchmarks.measure import gemm_rates, machine, say, spread
from mmchat.batch import Batch
from mmchat.config import StageConfig
from mmchat.models.mmchat import MMChat
from mmchat.training.engine import Engine, start_distributed
from mmchat.training.flops import FlopCounter, peak_flops
from mmchat.training.trainable import select

RESULTS = Path(__file__).resolve().parent / "results"
WARM_UP_STEPS, GPU_WARM_UP_STEPS = 1, 3  # the latter compile attention
RATE, BETAS, MAX_GRAD_NORM = 1e-4, (0.9, 0.999), 1.0
TARGETS = {"trainer": 4.0, "trl_learned": 1.5}
NAMES = {
    "mmchat": "mmchat, packs",
    "trainer": "transformers Trainer, padded",
    "trl": "TRL SFTTrainer, padded, as it is on a CPU (scores every position)",
    "trl_learned": "TRL SFTTrainer, padded, learned positions only (as it is on a GPU)",
}
OURS, *PEERS = NAMES


# ---- contenders -----------------------------------------------------------------------------------------------------


@dataclass
class Steps:
    """CPU seconds (forward, backward, clipping, update) and mean loss of each step."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def build_engine(model: MMChat, tokens: int, dtype: torch.dtype) -> Engine:
    is_fp32 = dtype == torch.float32
    stage = StageConfig.model_validate(
        {
            "name": "benchmark", "train": {"connectors": RATE, "fusion": RATE}, "steps": 1, "betas": BETAS,
            "max_grad_norm": MAX_GRAD_NORM, "zero": 0 if is_fp32 else 1, "dtype": "float32" if is_fp32 else "bfloat16",
            "data": [{"name": "synthetic", "task": "instruct", "shards": "none"}],
            "batch": {"lanes": 1, "tokens": tokens},
        }
    )  # fmt: skip
    return Engine(model, select(model, stage, is_full=True), stage, num_micro_batches=1)


def run_mmchat(engine: Engine, packs: list[Batch]) -> Steps:
    engine.set_moments(None, 0)  # as in the peers, whose loops begin with a new optimizer
    steps = Steps()
    for batch in packs:
        learned = batch.num_learned
        started = time.process_time()
        result = engine.train_step([batch], learned, rate_factor=1.0, seed=0)
        steps.seconds.append(time.process_time() - started)
        steps.losses.append(result.loss_sum / learned)
    return steps


class Watch(TrainerCallback):
    """Reads a peer's clock around each of its steps, and its loss from its log."""

    def __init__(self) -> None:
        self.steps = Steps()
        self.started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.seconds.append(time.process_time() - self.started)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.steps.losses.append(logs["loss"])


def run_peer(name: str, llava: LlavaForConditionalGeneration, examples: list[Example], folder: str) -> Steps:
    """A whole train() of the peer's own loop."""
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # of mmchat's group of one, for which a peer wraps its model
        os.environ.pop(variable, None)
    settings: dict[str, Any] = {
        "output_dir": folder, "per_device_train_batch_size": BATCH_SIZE, "num_train_epochs": 1, "learning_rate": RATE,
        "lr_scheduler_type": "constant", "adam_beta1": BETAS[0], "adam_beta2": BETAS[1], "weight_decay": 0.0,
        "max_grad_norm": MAX_GRAD_NORM, "train_sampling_strategy": "sequential", "remove_unused_columns": False,
        "save_strategy": "no", "report_to": "none", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    watch = Watch()
    # Rows are numbers, and `images` is how TRL knows a vision dataset: decoding is no part of the step.
    rows = Dataset.from_dict({"row": list(range(len(examples))), "images": [[] for _ in examples]})
    common: dict[str, Any] = {
        "model": llava, "data_collator": lambda rows: pad([examples[row["row"]] for row in rows]),
        "train_dataset": rows, "callbacks": [watch],
    }  # fmt: skip
    if name == "trainer":
        trainer = Trainer(args=TrainingArguments(**settings), **common)
    else:
        # TRL's own defaults, bf16 and activation checkpointing, would be slower here.
        arguments = trl.SFTConfig(**settings, bf16=False, gradient_checkpointing=False, max_length=None)
        llava.__dict__.pop("forward", None)  # the head that the last run's trainer put there
        trainer = trl.SFTTrainer(args=arguments, processing_class=processor(llava.config), **common)
    trainer.remove_callback(PrinterCallback)
    learned_only = patch("trl.trainer.utils._use_triton", lambda device: True)
    with learned_only if name == "trl_learned" else nullcontext():
        trainer.train()
    assert trainer.model_wrapped is llava, "the peer's model was wrapped, which costs time"
    return watch.steps


# ---- limits ---------------------------------------------------------------------------------------------------------


def products_of(model: MMChat, batch: Batch) -> list[tuple[int, torch.Size]]:
    """Rows and weight shape of the LLM's matrix products in one step."""
    layers, head = model.llm.get_decoder().layers, model.llm.get_output_embeddings()
    products = [(batch.token_ids.numel(), weight.shape) for weight in layers.parameters() if weight.dim() == 2]
    return [*products, (batch.num_learned, head.weight.shape)]


def flops_of(counter: FlopCounter, batch: Batch, chosen: list[Example]) -> dict[str, float]:
    """Matrix-product FLOPs of one step as each contender does it, from shapes; mmchat's are the useful ones."""
    ours, rows, longest = counter.count(batch), len(chosen), max(len(example.ids) for example in chosen)
    token, head, pair = 6 * sum(size for size, _ in counter.decoder), 6 * counter.head[0], 3 * counter.attention
    real, learned, padded = batch.token_ids.numel(), batch.num_learned, rows * longest
    pairs = sum(len(example.ids) * (len(example.ids) + 1) / 2 for example in chosen)
    rest = ours - token * real - head * learned - pair * pairs  # encoder and connector
    trunk = rest + token * padded + pair * rows * longest**2  # a dense mask: all pairs
    # TRL projects every scored position a second time in the backward pass.
    return {
        OURS: ours, "trainer": trunk + head * padded, "trl": trunk + head * padded * 4 / 3,
        "trl_learned": trunk + head * learned * 4 / 3,
    }  # fmt: skip


# ---- runs -----------------------------------------------------------------------------------------------------------


def run_cpu(repetitions: int, num_steps: int, num_checked: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    config = tiny_llava()
    side, steps = picture_side(config), WARM_UP_STEPS + num_steps
    examples = make_examples(512, config, seed=0)
    data = facts_of(examples)
    say("data: " + ", ".join(f"{name} {value:.4g}" for name, value in data.items()))
    start_distributed()
    llava = build_llava(config, torch.float32, "cpu")
    engine = build_engine(build_mmchat(llava, torch.float32), MAX_TEXT * BATCH_SIZE, torch.float32)
    equality = compare(engine.model, llava, examples[: num_checked * BATCH_SIZE])
    say("equal to transformers' LLaVA: " + ", ".join(f"{name} {value:.1e}" for name, value in equality.items()))

    peers = {name: copy.deepcopy(llava) for name in PEERS}
    counter = FlopCounter(engine.model)
    timed: dict[str, list[float]] = {name: [] for name in NAMES}
    counted: dict[str, list[float]] = {name: [] for name in NAMES}
    rates: list[tuple[float, float]] = []
    tokens = drift = 0.0
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for repetition in range(repetitions):
            chosen = examples[repetition * steps * BATCH_SIZE :][: steps * BATCH_SIZE]
            packs = [pack(batch, side) for batch in batched(chosen)]
            rates.append(gemm_rates(products_of(engine.model, packs[-1])))
            runs = {OURS: run_mmchat(engine, packs)}
            runs |= {name: run_peer(name, peers[name], chosen, folder) for name in PEERS}
            flops = [flops_of(counter, *pair) for pair in zip(packs, batched(chosen), strict=True)][WARM_UP_STEPS:]
            tokens += sum(batch.token_ids.numel() for batch in packs[WARM_UP_STEPS:])
            for name, run in runs.items():
                assert len(run.seconds) == len(run.losses) == steps
                timed[name].append(sum(run.seconds[WARM_UP_STEPS:]))
                counted[name].append(sum(step[name] for step in flops))
                drift = max(drift, *(abs(a / b - 1) for a, b in zip(run.losses, runs[OURS].losses, strict=True)))
            left = (time.perf_counter() - begun) / (repetition + 1) * (repetitions - repetition - 1)
            seconds = ", ".join(f"{name} {timed[name][-1]:.2f}" for name in NAMES)
            say(f"repetition {repetition + 1}/{repetitions}: CPU s of {num_steps} steps: {seconds}; {left:.0f} s left")
    engine.close()
    assert drift < 1e-3, f"the losses of the contenders went apart: {drift}"

    figures: dict[str, dict[str, Any]] = {}
    for name in NAMES:
        figures[name] = {
            "cpu_s": timed[name], "tokens_per_s": tokens / sum(timed[name]),
            "times_mmchat": spread([a / b for a, b in zip(timed[name], timed[OURS], strict=True)]),
            "times_mmchat_by_flops": sum(counted[name]) / sum(counted[OURS]), "target": TARGETS.get(name),
        }  # fmt: skip
    shares = [flops / peak / s for flops, (peak, _), s in zip(counted[OURS], rates, timed[OURS], strict=True)]
    limit = {
        "gflops_peak": spread([peak / 1e9 for peak, _ in rates]),
        "gflops_same_products": spread([same / 1e9 for _, same in rates]),
        "limit_s": spread([flops / peak for flops, (peak, _) in zip(counted[OURS], rates, strict=True)]),
        "mmchat_share": spread(shares),
    }
    report(figures, limit)
    say(f"largest relative difference in the losses of all {steps * repetitions} steps: {drift:.1e}")
    return {"data": data, "equality": equality, "loss_difference": drift, "steps_timed": num_steps,
            "contenders": figures, "limit": limit, "cuda": "not run"}  # fmt: skip


def report(figures: dict[str, dict[str, Any]], limit: dict[str, dict[str, float]]) -> None:
    say(f"\n{'':<67} {'CPU s':>14} {'tokens/s':>9} {'times mmchat':>21} {'by FLOPs':>9}  target")
    for name, title in NAMES.items():
        row = figures[name]
        cpu, times, target = spread(row["cpu_s"]), row["times_mmchat"], row["target"]
        line = f"{title:<67} {cpu['median']:>5.2f} +-{cpu['iqr'] / 2:<6.2f} {row['tokens_per_s']:>9.0f} "
        line += f"{times['median']:>7.2f} ({times['min']:.2f}-{times['max']:.2f}) {row['times_mmchat_by_flops']:>9.2f}"
        met = "" if target is None else f"  {target:g}: {'met' if times['median'] >= target else 'NOT met'}"
        say(line + met)
    say(
        f"limit: useful matrix products at {limit['gflops_peak']['median']:.1f} GFLOP/s, the best of these shapes "
        f"alone ({limit['gflops_same_products']['median']:.1f} over all of the LLM's), "
        f"{limit['limit_s']['median']:.2f} s; "
        f"mmchat reaches {limit['mmchat_share']['median']:.0%} of it"
    )


def run_alone(config: LlavaConfig, device: str, num_steps: int, num_tokens: int, checkpointing: bool) -> dict[str, Any]:
    """mmchat by itself in real time, one pack a step."""
    on_gpu = device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    side, steps = picture_side(config), GPU_WARM_UP_STEPS + num_steps
    start_distributed()
    model = build_mmchat(build_llava(config, dtype, device), dtype, checkpointing)
    engine, attention = build_engine(model, num_tokens, dtype), model.llm.config._attn_implementation
    size = sum(p.numel() for p in model.parameters()) / 1e9
    say(f"{size:.2f} B parameters, attention {attention}, packs of {num_tokens} tokens")
    packs: list[Batch] = []
    waiting: list[Example] = []
    while len(packs) < steps:
        for example in make_examples(64, config, seed=len(packs)):
            if sum(len(e.ids) for e in [*waiting, example]) > num_tokens:
                packs.append(pack(waiting, side))
                waiting = []
            waiting.append(example)
    packs, counter, peak, seconds = packs[:steps], FlopCounter(model), peak_flops(), []
    for number, batch in enumerate(packs):
        if on_gpu and number == GPU_WARM_UP_STEPS:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        result = engine.train_step([batch], batch.num_learned, rate_factor=1.0, seed=0)  # returns a number: has waited
        seconds.append(time.perf_counter() - started)
        left = statistics.median(seconds) * (steps - number - 1)
        loss = result.loss_sum / batch.num_learned
        say(f"step {number + 1}/{steps}: {seconds[-1]:.2f} s, loss {loss:.3f}; {left:.0f} s left")
    engine.close()
    timed, taken = packs[GPU_WARM_UP_STEPS:], sum(seconds[GPU_WARM_UP_STEPS:])
    figures = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "attention": attention,
        "seconds": spread(seconds[GPU_WARM_UP_STEPS:]),
        "tokens_per_s": sum(batch.token_ids.numel() for batch in timed) / taken,
        "learned_per_s": sum(batch.num_learned for batch in timed) / taken,
        "mfu": sum(counter.count(batch) for batch in timed) / taken / peak if peak else "not known: peak",
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else "not run",
    }
    say("\n".join(f"{name}: {value}" for name, value in figures.items()))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repetitions", type=int, default=5, help="cpu: interleaved runs; cuda: timed steps")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of 8 samples in a run, after a warm-up (cpu)")
    parser.add_argument("--checked", type=int, default=3, help="batches whose loss and gradients are compared (cpu)")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of a pack (cuda)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="cuda: where memory is short")
    parser.add_argument("--out", type=Path, help="where the figures go; benchmarks/results/step_<device>.json")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("not run: this machine has no CUDA device")
    if arguments.device == "cpu" and arguments.repetitions * (WARM_UP_STEPS + arguments.steps) * BATCH_SIZE > 512:
        parser.error("repetitions * (steps + 1) * 8 exceeds the 512 samples")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if arguments.device == "cpu":
        figures = run_cpu(arguments.repetitions, arguments.steps, arguments.checked)
    else:
        checkpointing = arguments.gradient_checkpointing
        figures = run_alone(large_llava(), "cuda", arguments.repetitions, arguments.tokens, checkpointing)
    out = arguments.out or RESULTS / f"step_{arguments.device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", *sys.argv])
    out.write_text(json.dumps({"command": command, "machine": machine(transformers, trl), **figures}, indent=1) + "\n")
    say(f"written to {out}")


if __name__ == "__main__":
    main()
