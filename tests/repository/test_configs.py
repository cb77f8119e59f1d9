"""Every configuration loads, the cluster ones suit clusters, and the launch scripts and documents say what exists."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from mmchat.config import ConfigError, dump_config, load_config, parse_config
from tests import tiny

ROOT = tiny.ROOT
PROTOCOLS = sorted((ROOT / "configs/protocols").glob("*.yaml"))
DIRECTED = ROOT / "configs/directed_speech.yaml"  # of a corpus: tests/unit/test_directed_speech.py
CONFIGS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if path != DIRECTED]
CLUSTER = [ROOT / "configs/image_7b.yaml", ROOT / "configs/omni_7b.yaml"]
WORLD_SIZES = [8, 16, 32, 64]
LAUNCH = [ROOT / "configs/launch/torchrun.sh", ROOT / "configs/launch/slurm.sbatch"]
DOCUMENTS = [
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
    ROOT / "data_prep/README.md",
    ROOT / "checkpoints/README.md",
]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ---- configurations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=_name)
def test_it_loads_and_its_dump_loads_to_the_same(path):
    config = load_config(path)
    assert parse_config(yaml.safe_load(dump_config(config)), "the dump") == config
    assert config.run not in [load_config(other).run for other in CONFIGS if other != path], "runs share a folder"


@pytest.mark.parametrize("path", PROTOCOLS, ids=_name)
def test_protocols_load_and_name_fields_that_exist(path):
    from mmchat.inference.evaluate import load_protocol
    from mmchat.tasks.question import Protocol

    values = yaml.safe_load(path.read_text())
    assert values and values.keys() <= Protocol.model_fields.keys()
    protocol = load_protocol(path)
    assert {name: getattr(protocol, name) for name in values} == values


def test_a_protocol_with_an_unknown_field_is_refused(tmp_path):
    from mmchat.inference.evaluate import load_protocol

    (tmp_path / "wrong.yaml").write_text("iuo: 0.5\n")
    with pytest.raises(ConfigError, match="iou"):
        load_protocol(tmp_path / "wrong.yaml")


@pytest.mark.parametrize("path", CLUSTER, ids=_name)
def test_lanes_divide_by_the_ranks_and_micro_batches_of_clusters(path):
    for stage in load_config(path).stages:
        for world_size in WORLD_SIZES:
            assert stage.batch.lanes % (world_size * stage.batch.packs_per_micro_batch) == 0, (stage.name, world_size)


@pytest.mark.parametrize("path", CLUSTER, ids=_name)
def test_cluster_stages_train_what_the_model_has(path):
    """`train` names parts of this model; the shards are the reader's own."""
    config = load_config(path)
    parts = {"llm", "fusion"}
    for modality in config.model.modalities.entries():
        parts |= {f"connectors.{modality}", f"encoders.{modality}", f"fusion.{modality}"}
    for stage in config.stages:
        for entry in stage.train:
            assert any(part == entry or part.startswith(f"{entry}.") for part in parts), (stage.name, entry)
        for source in stage.data:
            assert str(source.shards).startswith("data/")


@pytest.fixture
def deepspeed_parser(monkeypatch):
    """DeepSpeed's own parser for a given number of ranks. It asks the process group, which a test has not, for the
    rank alone; the number of ranks it takes from `mpu`, an argument of its constructor.
    """
    from deepspeed.runtime import config as parser

    monkeypatch.setattr(parser.dist, "get_rank", lambda: 0)

    def parse(values, world_size):
        return parser.DeepSpeedConfig(values, mpu=SimpleNamespace(get_data_parallel_world_size=lambda: world_size))

    return parse


@pytest.mark.parametrize("path", CLUSTER, ids=_name)
def test_deepspeed_accepts_every_stage(path, deepspeed_parser):
    from mmchat.training.engine import deepspeed_config

    for stage in load_config(path).stages:
        for world_size in WORLD_SIZES:
            num_packs = stage.batch.lanes // stage.batch.packs_per_micro_batch
            values = deepspeed_config(stage, num_packs // world_size)
            parsed = deepspeed_parser(values, world_size)
            assert parsed.world_size == world_size
            assert parsed.train_batch_size == num_packs  # the same step on any number of ranks
            assert parsed.zero_optimization_stage == stage.zero
            assert parsed.bfloat16_config.enabled == (stage.dtype == "bfloat16")
            assert parsed.gradient_clipping == stage.max_grad_norm
            assert parsed.zero_allow_untested_optimizer


@pytest.mark.parametrize(
    "wrong", [{"zero_optimization": {"stages": 2}}, {"bf16": {"enable": True}}, {"zero_optimization": {"stage": 9}}]
)
def test_deepspeed_refuses_what_it_does_not_know(wrong, deepspeed_parser):
    """What the test above relies on."""
    from mmchat.training.engine import deepspeed_config

    stage = load_config(CLUSTER[0]).stages[0].model_copy(update={"deepspeed": wrong})
    with pytest.raises(ValueError):
        deepspeed_parser(deepspeed_config(stage, 1), 8)


# ---- launch scripts -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train_options() -> set[str]:
    shown = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(re.findall(r"--[a-z-]+", shown.stdout))


@pytest.fixture(scope="module")
def asking_options() -> dict[str, set[str]]:
    """Options of each command of infer.py."""
    found = {}
    for command in ("chat", "evaluate", "judge", "serve", "release", "export", "import"):
        words = [sys.executable, "infer.py", command, "--help"]
        shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
        found[command] = set(re.findall(r"--[a-z-]+", shown.stdout))
    return found


def _training_lines(text: str) -> list[list[str]]:
    """Words behind `train.py` or a launch script on every line that starts one."""
    found = []
    for line in text.splitlines():
        match = re.search(r"(?:train\.py|torchrun\.sh|slurm\.sbatch) (configs/\S+\.yaml[^`#]*)", line)
        if match:
            found.append(shlex.split(match[1].replace("...", "")))
    return found


def _check_training_line(words: list[str], options: set[str]) -> None:
    config, *rest = words
    first = next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))
    overrides, flags = rest[:first], rest[first:]
    loaded = load_config(ROOT / config, overrides)
    for i, word in enumerate(flags):
        if word.startswith("--"):
            assert word in options, f"train.py has no {word}"
        else:
            assert flags[i - 1] == "--stage" and word in [stage.name for stage in loaded.stages], word


@pytest.mark.parametrize("path", LAUNCH, ids=_name)
def test_launch_scripts_parse_and_name_options_that_exist(path, train_options):
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK)
    lines = _training_lines(path.read_text())
    assert lines
    for words in lines:
        _check_training_line(words, train_options)


def _script(path: Path, text: str) -> Path:
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
    return path


def _torchrun(arguments: list[str]):
    """What torchrun itself understands of a command line."""
    from torch.distributed.run import get_args_parser

    assert arguments[:2] == ["-m", "torch.distributed.run"]
    return get_args_parser().parse_args(arguments[2:])


@pytest.mark.parametrize("nodes", [1, 4])
def test_torchrun_script(tmp_path, nodes):
    python = _script(tmp_path / "python", f'printf "%s\\n" "$@" >{tmp_path}/said\n')
    rendezvous = {"NODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "first"} if nodes > 1 else {}
    command = [LAUNCH[0], "configs/tiny.yaml", "stages.align.steps=20", "run=a b", "--stage", "align"]
    subprocess.run(command, env={**os.environ, "PYTHON": str(python), **rendezvous}, cwd=tmp_path, check=True)
    parsed = _torchrun((tmp_path / "said").read_text().splitlines())
    assert parsed.training_script == str(ROOT / "train.py")
    assert parsed.training_script_args == command[1:]
    assert parsed.nproc_per_node == "gpu" and parsed.shutdown_timeout >= 300
    if nodes == 1:
        assert parsed.standalone
    else:
        assert (parsed.nnodes, parsed.node_rank, parsed.master_addr, parsed.master_port) == ("4", 3, "first", 29500)


def test_torchrun_script_refuses_half_a_rendezvous_and_no_config():
    environment = {name: value for name, value in os.environ.items() if name not in ("NODE_RANK", "MASTER_ADDR")}
    environment["NODES"] = "2"
    for arguments, said in ([], "usage"), (["configs/tiny.yaml"], "NODE_RANK"):
        done = subprocess.run([LAUNCH[0], *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode != 0 and said in done.stderr


@pytest.fixture
def slurm(tmp_path):
    """A make-believe SLURM of one node: srun runs what it is given, and its 'torchrun' has one rank that saves when it
    gets SIGUSR1. Returns a function that submits.
    """
    programs = tmp_path / "programs"
    programs.mkdir()
    _script(
        programs / "scontrol",
        f'if [ "$1" = requeue ]; then echo "$2" >{tmp_path}/requeued; else printf "first\\nsecond\\n"; fi\n',
    )
    _script(
        programs / "srun",
        'while [ "$1" != bash ]; do shift; done\nSLURM_NODEID=0 exec "$@"\n',
    )
    rank = _script(
        tmp_path / "rank",
        f"trap 'echo saved >{tmp_path}/saved; exit 0' USR1\necho ready >{tmp_path}/ready\n"
        f"if [ -e {tmp_path}/short ]; then exit $(cat {tmp_path}/short); fi\nwhile true; do sleep 0.05; done\n",
    )
    python = _script(tmp_path / "python", f'printf "%s\\n" "$@" >{tmp_path}/said\n{rank} &\nwait $!\n')
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHON": str(python),
        "PID_FILE": str(tmp_path / "torchrun.pid"),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
    }

    def submit(*arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([LAUNCH[1], *arguments], cwd=ROOT, env=environment, start_new_session=True)

    return submit


def test_slurm_script_runs_train_on_every_node(tmp_path, slurm):
    (tmp_path / "short").write_text("0")
    assert slurm("configs/tiny.yaml", "stages.align.steps=20", "--stage", "align").wait(timeout=60) == 0
    parsed = _torchrun((tmp_path / "said").read_text().splitlines())
    assert parsed.training_script_args == ["configs/tiny.yaml", "stages.align.steps=20", "--stage", "align"]
    assert (parsed.nnodes, parsed.node_rank, parsed.nproc_per_node) == ("2", 0, "8")
    assert (parsed.master_addr, parsed.master_port) == ("first", 23456)
    assert not (tmp_path / "requeued").exists()


def test_slurm_script_passes_a_failure_on(tmp_path, slurm):
    (tmp_path / "short").write_text("3")
    assert slurm("configs/tiny.yaml").wait(timeout=60) == 3
    assert not (tmp_path / "requeued").exists()


def test_slurm_script_saves_and_requeues_on_its_warning(tmp_path, slurm):
    job = slurm("configs/tiny.yaml")
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)  # to the batch shell alone, as --signal=B: does
    assert job.wait(timeout=60) == 0
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "requeued").read_text().strip() == "123456"


def test_slurm_directives():
    directives = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in LAUNCH[1].read_text().splitlines()
        if line.startswith("#SBATCH")
    )
    assert directives["ntasks-per-node"] == "1"  # torchrun starts the ranks of a node
    assert re.fullmatch(r"B:USR1@\d{3,}", directives["signal"]) and "requeue" in directives


# ---- documents ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_documents_name_commands_and_files_that_exist(path, train_options, asking_options):
    text = path.read_text()
    for command, rest in re.findall(r"infer\.py (\w+)((?:[^\n`\\]|\\\n)*)", text):
        assert set(re.findall(r"(?<!\S)--[a-z-]+", rest)) <= asking_options[command], rest
    for words in _training_lines(text):
        _check_training_line(words, train_options)
    for script in re.findall(r"python ((?:[\w/]+/)?\w+\.py)", text):
        assert (ROOT / script).is_file(), script
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z]+)`", text)) <= targets
    folders = "mmchat|tests|configs|data_prep|docs|checkpoints"
    for name in re.findall(rf"`((?:{folders})/[\w./-]+\.(?:py|yaml|md|sh|sbatch))`", text):
        assert (ROOT / name).is_file(), name


def _example(contains: str) -> str:
    """The Python block of CONTRIBUTING.md that holds this text."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    return next(block for block in blocks if contains in block)


def test_the_task_and_the_source_of_contributing_work(tmp_path):
    import random

    from mmchat.errors import SampleError
    from mmchat.sources.files import Files
    from mmchat.tasks.question import Answer, Protocol

    names: dict = {"__name__": "presence"}
    exec(_example("class Presence"), names)
    exec(_example("def read_presence"), names)
    task = names["Presence"]()
    (tmp_path / "train").mkdir()
    (tmp_path / "train/dog.jpg").write_bytes(tiny.picture("red", random.Random(0)))
    rows = ['{"image": "dog.jpg", "thing": "dog", "is_there": true}', '{"image": "dog.jpg"}', '{"image": "cat.jpg"}']
    (tmp_path / "train/presence.jsonl").write_text("\n".join(rows))
    record, other, error = names["SOURCES"]["presence"].read(Files(tmp_path), "train", {})
    assert error.reason == "missing media"
    with pytest.raises(SampleError, match="unreadable facts"):
        task.conversation(other, random.Random(0))
    asked, answered = task.conversation(record, random.Random(0)).turns
    assert asked.parts[0].modality == "image" and "dog" in asked.parts[1] and answered.parts == ("Yes.",)

    protocol = Protocol()
    (question,) = task.questions(record, protocol)
    assert question.conversation.turns[0].parts[1] == "Is there a dog in this picture?"  # the first prompt
    assert question.reference == ("Yes.",)
    answers = [Answer("yes"), Answer("No."), Answer(error="media not decodable: cut off"), Answer()]
    assert task.judge(answers[0], question, protocol) == 1.0 and task.judge(answers[1], question, protocol) == 0.0
    assert task.score(answers, [question, question, question, None], protocol) == {"accuracy": 0.25}


def test_the_connector_of_contributing_works():
    import torch

    from mmchat.models import connector

    names = dict(vars(connector))
    exec(_example("class EveryNthConfig"), names)
    config = names["EveryNthConfig"](n=3)
    shapes = ((7, 2, 2), (7, 2, 2), (1, 1, 1))
    features = torch.randn(57, 8)
    tokens = config.build(8, 16, 0.02)(features, shapes)
    assert tokens.shape == (sum(config.num_tokens(shape) for shape in shapes), 16) and len(tokens) == 25
