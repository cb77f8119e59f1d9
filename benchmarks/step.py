"""One training step of mmchat beside transformers' Trainer and TRL's SFTTrainer: same weights, same data, same losses.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/step.py
    python benchmarks/step.py --device cuda

On a CPU a tiny LLaVA learns (LLM and connector; the vision tower is frozen) from the same eight samples a step in every
contender, through their real training loops, one after the other, several times over. Losses and gradients are compared
before anything is timed. On a GPU only mmchat runs, at the size of a 1.5B LLM, in packs of 16k tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mmchat  # noqa: F401  (repairs torchvision before transformers looks for it)

# isort: split
import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen2Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from mmchat.batch import IGNORE, Batch
from mmchat.config import StageConfig
from mmchat.conversation import MODALITIES, MediaRef
from mmchat.data.chat_template import PlannedMedia, Sample
from mmchat.data.pack import collate
from mmchat.modalities import MediaPlan
from mmchat.models.build import ModelConfig
from mmchat.models.mmchat import MMChat
from mmchat.training.engine import Engine, start_distributed
from mmchat.training.flops import FlopCounter, peak_flops
from mmchat.training.trainable import Part, select

RESULTS = Path(__file__).resolve().parent / "results"
BATCH_SIZE = 8
WARM_UP_STEPS = 1
MAX_TEXT = 597  # a picture's 144 tokens and this are the longest sample, 741
RATE, BETAS, MAX_GRAD_NORM = 1e-4, (0.9, 0.999), 1.0
TOLERANCE = 1e-5  # of the largest gradient, and of the loss
TARGETS = {"trainer": 4.0, "trl_learned": 1.5}
NAMES = {
    "mmchat": "mmchat, packs",
    "trainer": "transformers Trainer, padded",
    "trl": "TRL SFTTrainer, padded, as it is on a CPU (scores every position)",
    "trl_learned": "TRL SFTTrainer, padded, learned positions only (as it is on a GPU)",
}
OURS, *PEERS = NAMES


# ---- the same model twice -------------------------------------------------------------------------------------------


def tiny_llava() -> LlavaConfig:
    """SigLIP, 4 layers of width 192, 144 patches; Qwen2.5-0.5B's proportions at width 256, 4 layers, 32,000 words."""
    vision = SiglipVisionConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=3, image_size=96, patch_size=8,
        vision_use_head=False,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=32000, hidden_size=256, intermediate_size=1392, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=1, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=31999, projector_hidden_act="gelu",
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip


def large_llava() -> LlavaConfig:
    """CLIP-L/14 at 336 pixels, cut behind the last layer but one, and Qwen2.5-1.5B."""
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=151935, projector_hidden_act="gelu"
    )


def build_llava(config: LlavaConfig, dtype: torch.dtype, device: str) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    with torch.device(device):
        llava = LlavaForConditionalGeneration(config).to(dtype)
    llava.model.vision_tower.requires_grad_(False)
    llava.config.use_cache = False
    return llava


def build_mmchat(llava: LlavaForConditionalGeneration, dtype: torch.dtype, checkpointing: bool = False) -> MMChat:
    """MMChat with the weights of `llava`, by way of folders that its configuration names."""
    llm = AutoModelForCausalLM.from_config(llava.config.text_config, dtype=dtype)
    llm.model.load_state_dict(llava.model.language_model.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        llm.save_pretrained(f"{folder}/llm")
        llava.model.vision_tower.save_pretrained(f"{folder}/vision")
        encoder = {"kind": "transformers", "pretrained": f"{folder}/vision", "layer": llava.config.vision_feature_layer}
        config = ModelConfig.model_validate(
            {
                "llm": {"pretrained": f"{folder}/llm", "gradient_checkpointing": checkpointing},
                "modalities": {"image": {"encoder": encoder, "connector": {"kind": "mlp"}}},
                "fusion": {"kind": "full"},
            }
        )
        model = config.build(dtype, seed=0)
    projection, projector = model.connectors["image"].projection, llava.model.multi_modal_projector
    projection[0].load_state_dict(projector.linear_1.state_dict())
    projection[2].load_state_dict(projector.linear_2.state_dict())
    return model.train()


# ---- the same data twice --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A conversation: ids with placeholders, which of them are learned, and its picture or None."""

    ids: list[int]
    learned: list[bool]
    picture: Tensor | None
    picture_start: int = 4

    @property
    def labels(self) -> list[int]:
        """In transformers' way: the label stands on the learned token itself."""
        return [token if learned else IGNORE for token, learned in zip(self.ids, self.learned, strict=True)]


def make_examples(count: int, config: LlavaConfig, num_placeholders: int, seed: int) -> list[Example]:
    """Four in five have a picture; log-normal text whose end, about 44 %, is the answer that is learned."""
    rng, size = random.Random(seed), config.vision_config.image_size
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(count):
        length = min(MAX_TEXT, max(24, round(rng.lognormvariate(4.79, 0.65))))
        answer = max(1, round(length * rng.uniform(0.25, 0.63)))
        ids = [rng.randrange(10, config.image_token_index - 1) for _ in range(length)]
        learned = [False] * (length - answer) + [True] * answer
        picture = None
        if rng.random() < 0.8:
            picture = torch.randn(3, size, size, generator=generator)
            ids[4:4] = [config.image_token_index] * num_placeholders
            learned[4:4] = [False] * num_placeholders
        examples.append(Example(ids, learned, picture))
    return examples


def pack(examples: Iterable[Example], side: int) -> Batch:
    """One row of conversations; a picture has side * side placeholders."""
    samples, pictures = [], []
    for example in examples:
        media: tuple[PlannedMedia, ...] = ()
        if example.picture is not None:
            plan = MediaPlan((1, side, side), side * side)
            media = (PlannedMedia("image", MediaRef("image", None), plan, example.picture_start, side * side),)
        gates = np.zeros((len(example.ids), len(MODALITIES)), np.float32)
        samples.append(Sample("", example.ids, [*example.labels[1:], IGNORE], gates, media))
        pictures.append([example.picture[None]] if example.picture is not None else [])
    return collate(samples, pictures)


def pad(examples: list[Example]) -> dict[str, Tensor]:
    """The peers' batch: rows of equal length, padded on the right."""
    longest = max(len(example.ids) for example in examples)

    def padded(values: Iterable[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in values])

    batch = {
        "input_ids": padded((e.ids for e in examples), 0),
        "attention_mask": padded(([1] * len(e.ids) for e in examples), 0),
        "labels": padded((e.labels for e in examples), IGNORE),
    }
    pictures = [e.picture for e in examples if e.picture is not None]
    return batch | ({"pixel_values": torch.stack(pictures)} if pictures else {})


def batched(examples: list[Example]) -> list[list[Example]]:
    return [examples[start : start + BATCH_SIZE] for start in range(0, len(examples), BATCH_SIZE)]



# ---- contenders -----------------------------------------------------------------------------------------------------


@dataclass
class Steps:
    """CPU seconds (forward, backward, clipping, update) and mean loss of each step."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def build_engine(model: MMChat, tokens: int, dtype: str) -> tuple[Engine, list[Part]]:
    stage = StageConfig.model_validate(
        {
            "name": "benchmark", "train": {"connectors": RATE, "fusion": RATE}, "steps": 1, "betas": BETAS,
            "max_grad_norm": MAX_GRAD_NORM, "zero": 0 if dtype == "float32" else 1, "dtype": dtype,
            "data": [{"name": "synthetic", "task": "instruct", "shards": "none"}],
            "batch": {"lanes": 1, "tokens": tokens},
        }
    )  # fmt: skip
    parts = select(model, stage, is_full=True)
    return Engine(model, parts, stage, num_micro_batches=1), parts


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
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # of mmchat's group of one: a peer would wrap its model for it
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


def processor(config: LlavaConfig) -> LlavaProcessor:
    """TRL wants one to believe that the model sees; nothing is ever processed by it."""
    words = {"<pad>": 0, "</s>": 1, "<image>": config.image_token_index}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<pad>")), pad_token="<pad>", eos_token="</s>",
        chat_template="{{ messages }}",
    )  # fmt: skip
    return LlavaProcessor(SiglipImageProcessor(), tokenizer, patch_size=config.vision_config.patch_size)


# ---- checks and limits ----------------------------------------------------------------------------------------------


def compare(model: MMChat, llava: LlavaForConditionalGeneration, examples: list[Example], side: int) -> dict[str, float]:
    """Largest differences in loss and gradients over batches of the examples; raises AssertionError beyond TOLERANCE.

    gradient: relative to the largest gradient of all. parameter_gradient: to the largest of the same parameter.
    """
    projection = {"linear_1": "projection.0", "linear_2": "projection.2"}
    worst = {"loss": 0.0, "gradient": 0.0, "parameter_gradient": 0.0}
    for chosen in batched(examples):
        padded = pad(chosen)
        learned = int((padded["labels"] != IGNORE).sum())
        theirs = llava(**padded, num_items_in_batch=torch.tensor(learned)).loss
        theirs.backward()
        ours = model(pack(chosen, side))
        assert ours.count == learned
        (ours.sum / learned).backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        wanted = {}
        for name, parameter in llava.named_parameters():
            name = name.replace("model.language_model", "llm.model").removeprefix("model.")
            for old, new in projection.items():
                name = name.replace(f"multi_modal_projector.{old}", f"connectors.image.{new}")
            if parameter.grad is not None:
                wanted[name] = parameter.grad
        assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
        largest = max(float(g.abs().max()) for g in wanted.values())
        worst["loss"] = max(worst["loss"], abs(ours.sum.item() / learned / theirs.item() - 1))
        for name, gradient in wanted.items():
            difference = float((found[name] - gradient).abs().max())
            worst["gradient"] = max(worst["gradient"], difference / largest)
            own = difference / max(float(gradient.abs().max()), 1e-30)
            worst["parameter_gradient"] = max(worst["parameter_gradient"], own)
        model.zero_grad()
        llava.zero_grad()
    assert worst["loss"] < TOLERANCE and worst["gradient"] < TOLERANCE, worst
    return worst


def gemm_rates(model: MMChat, batch: Batch) -> tuple[float, float]:
    """FLOP/s of the step's matrix products alone: of the best shape, and of all the LLM's products together."""
    head = model.llm.get_output_embeddings().weight
    tokens, weights = batch.token_ids.numel(), [p for p in model.llm.model.layers.parameters() if p.dim() == 2]
    timed: dict[tuple[int, ...], tuple[float, float]] = {}
    best = flops = seconds = 0.0
    for weight, rows in [*((w, tokens) for w in weights), (head, batch.num_learned)]:
        shape = (rows, *weight.shape)
        if shape not in timed:
            w, x, y = torch.randn(weight.shape), torch.randn(rows, weight.shape[1]), torch.randn(rows, weight.shape[0])
            outs = [torch.empty_like(tensor) for tensor in (y, x, w)]
            products = ((x, w.t()), (y, w), (y.t(), x))  # forward, gradient of the input, gradient of the weight
            taken = []
            for _ in range(5):
                started = time.process_time()
                for (a, b), out in zip(products, outs, strict=True):
                    torch.mm(a, b, out=out)
                taken.append(time.process_time() - started)
            timed[shape] = 6.0 * rows * weight.numel(), min(taken)
        best = max(best, timed[shape][0] / timed[shape][1])
        flops, seconds = flops + timed[shape][0], seconds + timed[shape][1]
    return best, flops / seconds


# ---- runs -----------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    print(text, flush=True)


def machine() -> dict[str, Any]:
    facts: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts["cpu"] = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), facts["cpu"])
    facts |= {module.__name__: module.__version__ for module in (torch, transformers, trl)}
    return facts | {"python": platform.python_version()}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def run_cpu(repetitions: int, num_steps: int, num_checked: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    config = tiny_llava()
    side = config.vision_config.image_size // config.vision_config.patch_size
    examples = make_examples(512, config, side * side, seed=0)
    lengths, learned = [len(e.ids) for e in examples], sum(sum(e.learned) for e in examples)
    padded = sum(BATCH_SIZE * max(len(e.ids) for e in chosen) for chosen in batched(examples))
    data = {
        "samples": len(examples), "mean_tokens": sum(lengths) / len(examples), "max_tokens": max(lengths),
        "learned_share": learned / sum(lengths), "padded_over_real": padded / sum(lengths),
    }  # fmt: skip
    say("data: " + ", ".join(f"{name} {value:.4g}" for name, value in data.items()))

    start_distributed()
    llava = build_llava(config, torch.float32, "cpu")
    engine, _ = build_engine(build_mmchat(llava, torch.float32), MAX_TEXT * BATCH_SIZE, "float32")
    equality = compare(engine.model, llava, examples[: num_checked * BATCH_SIZE], side)
    say("equal to transformers' LLaVA: " + ", ".join(f"{name} {value:.1e}" for name, value in equality.items()))

    peers = {name: copy.deepcopy(llava) for name in PEERS}
    counter, steps = FlopCounter(engine.model), WARM_UP_STEPS + num_steps
    timed: dict[str, list[float]] = {name: [] for name in NAMES}
    shares: list[dict[str, float]] = []
    tokens = drift = 0.0
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for repetition in range(repetitions):
            chosen = examples[repetition * steps * BATCH_SIZE :][: steps * BATCH_SIZE]
            packs = [pack(batch, side) for batch in batched(chosen)]
            rates = gemm_rates(engine.model, packs[-1])
            losses = {}
            for name in NAMES:
                ours = name == OURS
                run = run_mmchat(engine, packs) if ours else run_peer(name, peers[name], chosen, folder)
                assert len(run.seconds) == len(run.losses) == steps
                timed[name].append(sum(run.seconds[WARM_UP_STEPS:]))
                losses[name] = run.losses
                drift = max(drift, *(abs(a / b - 1) for a, b in zip(run.losses, losses[OURS], strict=True)))
            flops = sum(counter.count(batch) for batch in packs[WARM_UP_STEPS:])
            tokens += sum(batch.token_ids.numel() for batch in packs[WARM_UP_STEPS:])
            shares.append({"peak": flops / rates[0] / timed[OURS][-1], "gflops_peak": rates[0] / 1e9,
                           "gflops_same_products": rates[1] / 1e9, "gflop": flops / 1e9})  # fmt: skip
            left = (time.perf_counter() - begun) / (repetition + 1) * (repetitions - repetition - 1)
            seconds = ", ".join(f"{name} {timed[name][-1]:.2f}" for name in NAMES)
            say(f"repetition {repetition + 1}/{repetitions}: CPU s of {num_steps} steps: {seconds}; {left:.0f} s left")
    engine.close()
    assert drift < 1e-3, f"the losses of the contenders went apart: {drift}"

    ratios = {
        name: spread([a / b for a, b in zip(timed[name], timed[OURS], strict=True)]) for name in PEERS
    }  # fmt: skip
    limit = {key: statistics.median(share[key] for share in shares) for key in shares[0]}
    say(f"\n{'contender':<70} {'CPU s':>6} {'range':>13} {'tokens/s':>9} {'times mmchat':>13}  target")
    for name, title in NAMES.items():
        seconds = spread(timed[name])
        line = f"{title:<70} {seconds['median']:>6.2f} {seconds['min']:>6.2f}-{seconds['max']:<6.2f}"
        line += f" {tokens / sum(timed[name]):>9.0f} {ratios[name]['median'] if name in ratios else 1:>13.2f}"
        say(line + (f"  {TARGETS[name]:g}" if name in TARGETS else ""))
    say(
        f"limit: {limit['gflop']:.0f} GFLOP of useful products at {limit['gflops_peak']:.1f} GFLOP/s, the best of these "
        f"shapes alone ({limit['gflops_same_products']:.1f} over all of them); mmchat is at {limit['peak']:.0%} of it"
    )
    say(f"largest difference in the losses of {steps * repetitions} steps: {drift:.1e}")
    for name, target in TARGETS.items():
        met = ratios[name]["median"] >= target
        say(f"target {target:g} x {name}: {'met' if met else 'NOT met'} ({ratios[name]['median']:.2f})")
    return {"data": data, "equality": equality, "largest_loss_difference": drift, "steps_timed": num_steps,
            "cpu_seconds": timed, "ratios": ratios, "targets": TARGETS, "limit": limit, "cuda": "not run"}  # fmt: skip


def run_cuda(repetitions: int, num_tokens: int, checkpointing: bool, config: LlavaConfig | None = None) -> dict[str, Any]:
    """mmchat alone, wall time of whole steps of one pack each. The config is another in a dry run on a CPU."""
    on_gpu = config is None
    config = config or large_llava()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    start_distributed()
    model = build_mmchat(build_llava(config, dtype, device), dtype, checkpointing)
    side = config.vision_config.image_size // config.vision_config.patch_size
    engine, _ = build_engine(model, num_tokens, str(dtype).removeprefix("torch."))
    attention = model.llm.config._attn_implementation
    say(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters, {attention}, packs of {num_tokens}")

    packs: list[Batch] = []
    waiting: list[Example] = []
    seed = 0
    while len(packs) < 2 + repetitions:
        examples = make_examples(64, config, side * side, seed)
        seed += 1
        for example in examples:
            if sum(len(e.ids) for e in waiting) + len(example.ids) > num_tokens:
                packs.append(pack(waiting, side))
                waiting = []
            waiting.append(example)
    counter, peak, seconds = FlopCounter(model), peak_flops(), []
    for number, batch in enumerate(packs[: 2 + repetitions]):
        if number == 2 and on_gpu:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        result = engine.train_step([batch], batch.num_learned, rate_factor=1.0, seed=0)  # reads the loss: has waited
        seconds.append(time.perf_counter() - started)
        say(f"step {number + 1}/{2 + repetitions}: {seconds[-1]:.2f} s, loss {result.loss_sum / batch.num_learned:.3f}")
    timed, taken = packs[2 : 2 + repetitions], sum(seconds[2:])
    figures = {
        "attention": attention,
        "seconds": seconds[2:],
        "tokens_per_s": sum(batch.token_ids.numel() for batch in timed) / taken,
        "learned_per_s": sum(batch.num_learned for batch in timed) / taken,
        "mfu": sum(counter.count(batch) for batch in timed) / taken / peak if peak else "not known for this GPU",
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else "not run",
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }
    engine.close()
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
        figures = run_cuda(arguments.repetitions, arguments.tokens, arguments.gradient_checkpointing)
    out = arguments.out or RESULTS / f"step_{arguments.device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", *sys.argv])
    out.write_text(json.dumps({"command": command, "machine": machine(), **figures}, indent=1) + "\n")
    say(f"written to {out}")


if __name__ == "__main__":
    main()
