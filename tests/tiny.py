"""Tiny pretrained folders and shards, made from a seed, so that tests take the paths that real models take.

`python tests/tiny.py` writes them to .cache/tiny, where configs/tiny.yaml looks.
"""

from __future__ import annotations

import io
import math
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mmchat  # noqa: E402, F401  (repairs torchvision before transformers looks for it)

# isort: split
import av  # noqa: E402
import numpy as np  # noqa: E402
import soundfile  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from mmchat.conversation import MediaHeader, MediaRef, Record  # noqa: E402

FOLDER = ROOT / ".cache" / "tiny"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 256 + len(SPECIAL)
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}  # fmt: skip
LLMS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SIZES, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**_SIZES, bos_token_id=1, eos_token_id=2),
    "qwen3": Qwen3Config(**_SIZES, head_dim=16, bos_token_id=1, eos_token_id=2),
    "gemma3": Gemma3TextConfig(
        **_SIZES, head_dim=16, sliding_window=16, final_logit_softcapping=30.0, bos_token_id=1, eos_token_id=2
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=2048, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    ),
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the three ChatML tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=SPECIAL[1], eos_token=SPECIAL[2], pad_token=SPECIAL[0]
    )
    fast.chat_template = CHATML
    return fast


def build_llm(folder: Path, kind: str = "llama", seed: int = 0) -> Path:
    """A random causal LM of the kind, with the byte tokenizer beside it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(LLMS[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.08)  # transformers' 0.02 leaves a model of this width almost silent
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def build_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIP vision tower: 32 pixels, patches of 8, 16 patch tokens of width 32."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def build_whisper(folder: Path, seed: int = 0) -> Path:
    """A Whisper of width 32; 80 mels, 30 s windows."""
    torch.manual_seed(seed)
    config = WhisperConfig(
        vocab_size=60, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=80, max_target_positions=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    return folder


# ---- media ----------------------------------------------------------------------------------------------------------

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 70, 220), "yellow": (230, 210, 40)}


def picture(colour: str, rng: random.Random, size: tuple[int, int] = (48, 32)) -> bytes:
    """A JPEG with one filled circle."""
    image = Image.new("RGB", size, (128, 128, 128))
    x, y = rng.randint(0, size[0] - 16), rng.randint(0, size[1] - 16)
    ImageDraw.Draw(image).ellipse((x, y, x + 15, y + 15), fill=COLOURS[colour])
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


def tone(hz: float, duration_s: float) -> bytes:
    """A 16 kHz mono WAV."""
    samples = 0.3 * np.sin(2 * math.pi * hz * np.arange(int(16000 * duration_s)) / 16000)
    out = io.BytesIO()
    soundfile.write(out, samples.astype(np.float32), 16000, format="WAV")
    return out.getvalue()


def clip(direction: str, num_frames: int = 8, fps: int = 8) -> bytes:
    """An MP4 with a white square that moves left or right."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for i in range(num_frames):
            frame = np.zeros((32, 64, 3), np.uint8)
            x = int(48 * (i if direction == "right" else num_frames - 1 - i) / (num_frames - 1))
            frame[8:24, x : x + 16] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def _turns(question: list[dict], answer: str) -> dict:
    return {"turns": [{"role": "user", "parts": question}, {"role": "assistant", "parts": [{"text": answer}]}]}


def records(count: int, seed: int = 0) -> list[Record]:
    """Instruct records in turn about a picture, a tone, a clip, two pictures, and nothing but text."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        key, kind = f"{i:06d}", i % 5
        if kind == 0:
            colour = rng.choice(list(COLOURS))
            media = (MediaRef("image", picture(colour, rng), MediaHeader(48, 32)),)
            facts = _turns([{"media": 0}, {"text": "What colour?"}], colour)
        elif kind == 1:
            pitch, seconds = rng.choice([("low", 200.0), ("high", 1500.0)]), rng.choice([0.3, 1.1])
            media = (MediaRef("audio", tone(pitch[1], seconds)),)
            facts = _turns([{"text": "Low or high?"}, {"media": 0}], pitch[0])
        elif kind == 2:
            direction = rng.choice(["left", "right"])
            media = (MediaRef("video", clip(direction)),)
            facts = _turns([{"media": 0}, {"text": "Which way?"}], direction)
        elif kind == 3:
            colours = [rng.choice(list(COLOURS)) for _ in range(2)]
            media = tuple(MediaRef("image", picture(colour, rng), MediaHeader(48, 32)) for colour in colours)
            facts = _turns([{"media": 0}, {"media": 1}, {"text": "Both colours?"}], " ".join(colours))
        else:
            media = ()
            facts = _turns([{"text": f"Say {i % 7}."}], str(i % 7))
        made.append(Record(key, facts, media))
    return made


def build_all(folder: Path = FOLDER, num_records: int = 60) -> Path:
    """Everything that configs/tiny.yaml names."""
    from data_prep.make_shards import media_header
    from mmchat.data.shard_writer import write_shards

    for name, build in (("llm", build_llm), ("clip", build_clip), ("whisper", build_whisper)):
        if not (folder / name / "config.json").exists():
            build(folder / name)
    if not (folder / "shards").exists():
        write_shards(records(num_records), folder / "shards", samples_per_shard=20, header_of=media_header)
    return folder


if __name__ == "__main__":
    print(f"tiny models and shards in {build_all()}")
