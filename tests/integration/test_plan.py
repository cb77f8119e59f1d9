"""train.py --plan says what training then consumes, without weights and without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import train
from mmchat.config import Rate, RunConfig, load_config
from mmchat.data.build import build_template
from mmchat.data.chat_template import ChatTemplate
from mmchat.data.mixture import Mixture
from mmchat.data.shard_writer import write_shards
from mmchat.modalities.efficientnet_lite import EfficientNetLite
from mmchat.models.skeleton import kept_bytes, skeleton
from mmchat.training.memory import model_state
from mmchat.training.plan import plan_stage, planned_steps
from mmchat.training.plan_table import WIDTH, plan_table
from mmchat.training.trainable import select
from tests import models, runs, tiny

# A stage whose packs are too small for some samples, of two sources that are drawn three to one.
MIXED = [
    "stages.instruct.batch.tokens=66",
    "stages.instruct.batch.packs_per_micro_batch=2",
    "stages.instruct.bad_samples=1",
    "stages.instruct.workers=2",
    "stages.instruct.data=[{name: a, task: instruct, shards: .cache/tiny/shards, weight: 3}, "
    "{name: b, task: instruct, shards: .cache/tiny/shards}]",
]


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    runs.train(folder, "log.every=1", *MIXED)
    return folder


@pytest.mark.parametrize("number", [0, 1])
def test_training_consumes_what_was_planned(trained, number):
    config = load_config("configs/tiny.yaml", MIXED)
    stage = config.stages[number]
    log = runs.log(trained, stage.name)
    assert len(log) == stage.steps
    steps = planned_steps(stage, config.seed, build_template(config), Mixture(stage.data), stage.workers)
    left_out = 0
    for line, packs in zip(log, steps, strict=False):
        assert [pack.lane for pack in packs] == list(range(stage.batch.lanes))
        assert line["tokens"] == sum(pack.size("tokens") for pack in packs)
        assert line["learned"] == sum(pack.num_learned for pack in packs)
        assert line["samples"] == sum(len(pack.keys) for pack in packs)
        left_out += sum(sum(pack.reasons.values()) for pack in packs)
        assert line["bad_samples"] == left_out

    plan = plan_stage(config, stage, seconds=600)
    assert plan["is_exact"] and (plan["left_out"] > 0) == (number == 1)
    for what in ("tokens", "learned", "samples"):
        assert plan[what] == sum(line[what] for line in log) == sum(source[what] for source in plan["sources"])
    assert plan["left_out"] == log[-1]["bad_samples"] == sum(plan["left_out_by_reason"].values())
    # The log rounds to millions.
    assert plan["flops"] == pytest.approx(sum(line["gflops"] for line in log) * 1e9, abs=0.5e6 * len(log))
    assert plan["padding"] == pytest.approx(sum(line["padding"] for line in log) / len(log))
    assert max(plan["largest"]["tokens"]["tokens"], 1) <= stage.batch.tokens
    drawn = plan["samples"] + plan["left_out"]
    assert sum(source["epochs"] for source in plan["sources"]) == pytest.approx(drawn / 60)


def test_what_does_not_fit_the_time_is_extrapolated_and_said():
    config = load_config("configs/tiny.yaml", ["stages.align.steps=200"])
    stage = config.stages[0]
    exact, first = plan_stage(config, stage, seconds=600), plan_stage(config, stage, seconds=0)
    assert exact["is_exact"] and not first["is_exact"] and first["steps_planned"] == 1
    for what in ("tokens", "learned", "flops"):
        assert first[what] == pytest.approx(exact[what], rel=0.5)
    assert "exact: every pack was planned" in plan_table(exact)
    table = plan_table(first)
    assert "~: first 1 of 200 steps, extrapolated" in table
    for said in ("most tokens in a pack of the planned steps: ", "activations of the LLM, at least", "sum, at least"):
        assert said in table and said not in plan_table(exact)


def test_a_source_not_drawn_yet_is_extrapolated_by_its_weight(tiny_folder, tmp_path):
    write_shards(tiny.records(4), tmp_path)
    config = load_config(
        "configs/tiny.yaml",
        [
            "stages.align.data=[{name: a, task: instruct, shards: .cache/tiny/shards, weight: 999}, "
            f"{{name: rare, task: instruct, shards: {tmp_path}}}]",
            "stages.align.steps=100000",
        ],
    )
    plan = plan_stage(config, config.stages[0], seconds=0)
    common, rare = plan["sources"]
    assert rare["samples"] == pytest.approx(plan["samples"] / 1000, abs=1) and rare["tokens"] is None
    assert common["samples"] == pytest.approx(plan["samples"] * 0.999, abs=1)
    assert rare["epochs"] == pytest.approx(plan["samples"] / 1000 / 4)
    assert len(plan["warnings"]) == 2 and all(" times over; lower its weight" in said for said in plan["warnings"])
    (row,) = [line for line in plan_table(plan).splitlines() if line.startswith("rare")]
    assert row.split() == ["rare", "instruct", "0.1%", "4", f"~{rare['samples']:,}", "?", f"~{rare['epochs']:.2f}",
                           "?", "?"]  # fmt: skip


SCRIPT = """
import sys, torch, train
sys.argv = ["train.py", *sys.argv[1:]]
code = train.main()
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
assert "mmchat.training.engine" not in sys.modules
sys.exit(code)
"""


def test_no_weights_no_gpu_no_checkpoint_folder(tiny_folder, tmp_path):
    for name in ("llm", "clip", "whisper"):
        shutil.copytree(tiny_folder / name, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
    command = [
        sys.executable,
        "-c",
        SCRIPT,
        "configs/tiny.yaml",
        "--plan",
        f"checkpoints={tmp_path / 'runs'}",
        f"model.llm.pretrained={tmp_path / 'llm'}",
        f"model.modalities.image.encoder.pretrained={tmp_path / 'clip'}",
        f"model.modalities.audio.encoder.pretrained={tmp_path / 'whisper'}",
        f"--plan-json={tmp_path / 'plan.json'}",
        "--ranks=2",
    ]
    environment = {**runs.ENVIRONMENT, "PYTHONPATH": str(tiny.ROOT)}
    done = subprocess.run(command, cwd=tiny.ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= WIDTH
    assert not (tmp_path / "runs").exists()
    written = json.loads((tmp_path / "plan.json").read_text())
    assert [plan["stage"] for plan in written["stages"]] == ["align", "instruct"]
    for plan in written["stages"]:
        assert plan_table(plan) in done.stdout
        assert [column["ranks"] for column in plan["memory"]] == [2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stages.align.data.tiny.shards=nowhere/*.tar"], "no such shards"),
        (["stages.align.data.tiny.task=instuct"], "did you mean 'instruct'?"),
        (["--ranks=3"], "must be a multiple of ranks x packs_per_micro_batch (3 x 1)"),
        (["--stage=later"], "the stages are"),
        (["model.llm.pretrained=.cache/nowhere"], "model.llm.pretrained: no tokenizer"),
        # What is missing here shows before the tokenizer is asked for, and in the last stage too.
        (["stages.instruct.data.tiny.shards=no/*.tar", "model.llm.pretrained=.cache/nowhere"], "no such shards"),
        (["--plan-json=."], "--plan-json . cannot be written: Is a directory"),
        (["--plan-json=/proc/none/plan.json"], "--plan-json /proc/none/plan.json cannot be written"),
    ],
)
def test_faults_are_named(tiny_folder, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(sys, "argv", ["train.py", "configs/tiny.yaml", "--plan", *arguments])
    assert train.main() == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error


@pytest.mark.parametrize("seconds", ["-1", "nan"])
def test_a_time_that_is_none_is_refused(monkeypatch, capsys, seconds):
    monkeypatch.setattr(sys, "argv", ["train.py", "configs/tiny.yaml", "--plan", f"--plan-seconds={seconds}"])
    with pytest.raises(SystemExit):
        train.main()
    assert "--plan-seconds" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("where", ["imports", "packs"])
def test_a_plan_can_be_stopped(tiny_folder, where):
    command = [sys.executable, "-X", "importtime"] if where == "imports" else [sys.executable]
    command += ["train.py", "configs/tiny.yaml", "--plan", "stages.align.steps=1000000", "stages.align.workers=2"]
    with subprocess.Popen(
        command, cwd=tiny.ROOT, env=runs.ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        awaited = "torch.version" if where == "imports" else "planned "
        for line in process.stderr:
            if awaited in line:
                break
        os.killpg(process.pid, signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert "\nstopped\n" in said and "checkpoint" not in said and "Traceback" not in said


def test_warnings(tiny_folder, tmp_path):
    """A source of text and pairs of pictures, which do not fit, and one that is almost never drawn."""
    write_shards([record for record in tiny.records(30) if int(record.key) % 5 > 2], tmp_path)
    source = f"task: instruct, shards: {tmp_path}"
    config = load_config(
        "configs/tiny.yaml",
        [
            f"stages.align.data=[{{name: a, {source}}}, {{name: b, {source}, weight: 1.0e-9}}]",
            "stages.align.batch.tokens=60",
        ],
    )
    plan = plan_stage(config, config.stages[0], seconds=600)
    said = plan["warnings"]
    for words in (
        "a: drawn ",
        "samples left out (",
        "b: never drawn",
        "connectors.image should learn",
        "connectors.video should learn, but no video is in the packs that were planned",
        "connectors.audio should learn",
    ):
        assert any(words in warning for warning in said), (words, said)
    table = plan_table(plan)
    assert len(said) == 6 and table.count("warning: ") == 6 and "left out: 70, does not fit the budget" in table
    assert max(map(len, table.splitlines())) <= WIDTH


# ---- the model without its weights ----------------------------------------------------------------------------------

FUSIONS = [
    {"kind": "flora", "rank": 4},
    {"kind": "lora", "rank": 4},
    {"kind": "early"},
    {"kind": "full"},
    {"kind": "late", "num_heads": 4},
]


def _skeleton_equals(run: RunConfig, dtype: torch.dtype):
    real, bones = run.model.build(dtype, run.seed), skeleton(run.model, dtype)
    assert all(parameter.is_meta for parameter in bones.parameters())
    sizes = [{n: (p.shape, p.dtype) for n, p in model.named_parameters()} for model in (real, bones)]
    assert sizes[0] == sizes[1]
    return real, bones


def _sizes(template: ChatTemplate):
    """Tokens and media of the pack that tests.models.pack() makes."""
    samples = [template.render(conversation) for conversation in models.conversations()]
    media: dict = {}
    for item in [item for sample in samples for item in sample.media]:
        shapes, patches = media.get(item.modality, ([], 0))
        media[item.modality] = ([*shapes, item.plan.shape], patches + item.plan.num_patches)
    return sum(map(len, samples)), media


def _really_kept(model, batch) -> int:
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.hidden(batch)
    assert output.numel()
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda fusion: fusion["kind"])
def test_sizes_and_activations_are_those_of_the_real_model(tiny_folder, fusion, dtype, monkeypatch):
    monkeypatch.setattr("mmchat.models.llm.PRODUCTS_MAX_LENGTH", 0)  # a fused attention is assumed
    run = models.config(fusion=fusion)
    real, bones = _skeleton_equals(run, dtype)
    template = build_template(run)
    tokens, media = _sizes(template)
    batch = models.pack(template)
    real.train()
    learned = [["connectors"], ["connectors", "encoders"]]
    learned += [["connectors", "fusion"]] if fusion["kind"] != "early" else []
    for names in learned:
        stage = run.stages[1].model_copy(update={"train": {name: Rate(lr=1e-3) for name in names}})
        for model in (real, bones):
            select(model, stage, fusion["kind"] == "full")
        inside, around = kept_bytes(bones, tokens, media, False)
        assert inside + around == pytest.approx(_really_kept(real, batch), rel=0.03), names
        assert kept_bytes(bones, tokens, media, True)[0] <= inside


@pytest.fixture
def encoder_folders(tmp_path):
    from transformers import Siglip2Config, Siglip2Model, SiglipConfig, SiglipModel

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {**vision, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    square = {**vision, "image_size": 24, "patch_size": 8}
    SiglipModel(SiglipConfig(vision_config=square, text_config=text)).save_pretrained(tmp_path / "siglip")
    naflex = {**vision, "num_patches": 9, "patch_size": 8}
    Siglip2Model(Siglip2Config(vision_config=naflex, text_config=text)).save_pretrained(tmp_path / "siglip2")
    lite = {"kind": "efficientnet_lite", "variant": 0, "num_classes": 5, "image_size": 64, "mean": [0.5] * 3,
            "std": [0.5] * 3, "interpolation": "bicubic"}  # fmt: skip
    (tmp_path / "lite").mkdir()
    save_file(EfficientNetLite(0, num_classes=5).state_dict(), tmp_path / "lite/model.safetensors")
    (tmp_path / "lite/config.json").write_text(json.dumps(lite))
    return tmp_path


@pytest.mark.parametrize(
    "encoder",
    [
        {"kind": "transformers", "pretrained": "{}/siglip", "layer": -2},
        {"kind": "transformers", "pretrained": "{}/siglip", "layer": None},
        {"kind": "transformers", "pretrained": "{}/siglip2"},
        {"kind": "efficientnet_lite", "pretrained": "{}/lite"},
        {"kind": "timm", "model": "test_vit", "pretrained": False},
        {"kind": "open_clip", "model": "ViT-B-32", "pretrained": None, "layer": -11, "image_size": 64},
    ],
    ids=lambda encoder: encoder.get("model") or encoder["pretrained"][3:],
)
def test_every_encoder_is_sized_without_weights(tiny_folder, encoder_folders, encoder):
    named = {key: value.format(encoder_folders) if isinstance(value, str) else value for key, value in encoder.items()}
    run = models.config(image={"encoder": named, "connector": {"kind": "mlp"}})
    real, bones = _skeleton_equals(run, torch.float32)
    for name in ("connectors", "encoders"):
        stage = run.stages[1].model_copy(update={"train": {name: Rate(lr=1e-3)}})
        for model in (real.train(), bones):
            select(model, stage, False)
        template = build_template(run)
        inside, around = kept_bytes(bones, *_sizes(template), False)
        if around is None:
            assert name == "encoders" and named.get("pretrained", "").endswith("siglip2")
            continue
        # timm's and open_clip's attention is counted with its weights, which a fused one does not keep.
        assert inside + around == pytest.approx(_really_kept(real, models.pack(template)), rel=0.2), name


# ---- memory of the model's state ------------------------------------------------------------------------------------

LEVELS = [(0, "float32"), (1, "float32"), (1, "bfloat16"), (2, "bfloat16"), (3, "bfloat16")]


def _num_bytes(tensors) -> int:
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _measure() -> None:
    """Prints, for every level, the model state that DeepSpeed holds on rank 0 and what is planned."""
    from mmchat.training.engine import MOMENTS, Engine, start_distributed

    start_distributed()
    ranks = torch.distributed.get_world_size()
    for zero, dtype in LEVELS:
        run = models.config()
        stage = run.stages[1].model_copy(update={"zero": zero, "dtype": dtype})
        model = run.model.build(getattr(torch, dtype), 0)
        parts = select(model, stage, False)
        engine = Engine(model, parts, stage, 2)
        inner = engine._engine
        batch = models.pack(build_template(run))
        engine.rehearse([batch, batch])
        inner.backward(inner(batch).sum)  # the first of two micro-batches
        weights = [p.ds_tensor if zero == 3 else p for p in engine.model.parameters()]
        held, masters = inner.optimizer, []
        gradients = _num_bytes(p.grad for p in engine.trained.values())
        if zero == 3:
            masters, gradients = held.fp32_partitioned_groups_flat, held.grad_partitions_flat_buffer.nbytes
        elif zero:
            masters = held.single_partition_of_fp32_groups
        if zero == 2:  # its own part is set apart when the last micro-batch is done
            inner.step()
            inner.backward(inner(batch).sum)
            own = [gradient for group in held.averaged_gradients.values() for gradient in group or []]
            gradients = sum(gradient.nbytes for gradient in own if gradient is not None)
        moments = [state[moment] for state in inner.basic_optimizer.state.values() for moment in MOMENTS]
        found = {"weights": _num_bytes(weights), "gradients": gradients,
                 "optimizer": _num_bytes([*masters, *moments])}  # fmt: skip
        if torch.distributed.get_rank() == 0:
            print(json.dumps({"zero": zero, "found": found, "planned": model_state(stage, parts, ranks)}))
        engine.close()


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_state_in_memory_is_that_of_deepspeed(tiny_folder, ranks):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *launcher, "-m", "tests.integration.test_plan"]
    done = subprocess.run(command, cwd=tiny.ROOT, env=runs.ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"zero"')]
    assert [line["zero"] for line in lines] == [zero for zero, _ in LEVELS]
    for line in lines:
        for what, found in line["found"].items():
            assert line["planned"][what] == pytest.approx(found, rel=0.02), (line["zero"], what)


if __name__ == "__main__":
    _measure()
