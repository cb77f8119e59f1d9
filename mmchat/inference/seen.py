"""What the model was given, as files and a page: frames with their times, sound as it was resampled, spectrograms.

Everything is made again by the preprocess that the answer was made with, from the same plan, so it is what was seen
and heard and not what the files hold.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from mmchat.conversation import Conversation, MediaRef
from mmchat.data.chat_template import ChatTemplate
from mmchat.html_page import document
from mmchat.inference.predictions import text_of, write_file
from mmchat.modalities import MediaPlan
from mmchat.modalities.audio import POSITIONS_PER_S, SAMPLE_RATE_HZ, AudioPreprocess
from mmchat.modalities.image import ImagePreprocess
from mmchat.modalities.video import VideoPreprocess

# The page holds its pictures and sounds itself; what is beyond these is in the folder alone.
MAX_FRAMES = 64
MAX_SOUND_S = 600.0

_ROW_GAP = 6  # pixels between the windows of a spectrogram
_ENLARGED = 2  # pixels of a mel channel


def check_folder(path: str) -> Path:
    """Where what was seen can be saved: a folder that is new or empty. Raises ValueError."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_empty = not any(folder.iterdir())
    except OSError as error:
        raise ValueError(f"cannot save to {path} ({error.strerror}); name a new folder") from error
    if not is_empty:
        raise ValueError(f"cannot save to {path}: found files in it; name a new or empty folder")
    return folder


class Seen:
    """The folder that holds what a conversation has shown so far; each item is written once."""

    def __init__(self, folder: Path, template: ChatTemplate) -> None:
        self.folder, self.template = folder, template
        self._sections: list[tuple[MediaRef, str]] = []

    def save(self, conversation: Conversation) -> None:
        """Writes the items that are new, and index.html over all. Raises SampleError, OSError."""
        sections: list[tuple[MediaRef, str]] = []
        planned = self.template.render(conversation, answer=True).media
        for number, ref in enumerate(conversation.media, 1):
            plan = next((item.plan for item in planned if item.ref is ref), None)
            known = next((section for other, section in self._sections if other is ref), None)
            if plan is not None:
                sections.append((ref, known or self._section(number, ref, plan)))
        self._sections = sections
        body = ["<h1>What the model was given</h1>", *(section for _, section in sections), _said(conversation)]
        write_file(self.folder / "index.html", document("What the model was given", _STYLE, "", "\n".join(body)))

    def _section(self, number: int, ref: MediaRef, plan: MediaPlan) -> str:
        name = f"{ref.modality}-{number}"
        preprocess = self.template.preprocesses[ref.modality]
        data = ref.read()
        if isinstance(preprocess, AudioPreprocess):
            shown = self._sound(name, data, plan, preprocess)
        elif isinstance(preprocess, VideoPreprocess):
            tensor, times_s = preprocess.frames(data, plan)
            shown = self._pictures(name, preprocess.spec.pictures(tensor), times_s)
        elif isinstance(preprocess, ImagePreprocess):
            shown = self._pictures(name, preprocess.spec.pictures(preprocess(data, plan)), ())
        else:
            shown = "<p>Features that were stored, of which there is nothing to show.</p>"
        return f"<section><h2>{name}</h2><p>{html.escape(described(ref, plan))}</p>{shown}</section>"

    def _pictures(self, name: str, pictures: Sequence[Image.Image], times_s: Sequence[float]) -> str:
        """Writes the squares that the encoder got; of frames with the time at which each really starts."""
        figures = []
        for i, picture in enumerate(pictures):
            file = f"{name}.png" if not times_s else f"{name}-frame-{i + 1:03d}-at-{times_s[i]:.3f}s.png"
            data = _png(picture)
            (self.folder / file).write_bytes(data)
            caption = f"<figcaption>{times_s[i]:.3f} s</figcaption>" if times_s else ""
            label = f"Frame at {times_s[i]:.3f} seconds" if times_s else "The picture as the encoder gets it"
            figures.append(f'<figure><img src="{_uri("image/png", data)}" alt="{label}">{caption}</figure>')
        more = ""
        if len(figures) > MAX_FRAMES:
            more = f"<p>The first {MAX_FRAMES} of {len(figures)} frames; all are in the folder.</p>"
        return f'<div class="frames">{"".join(figures[:MAX_FRAMES])}</div>{more}'

    def _sound(self, name: str, data: bytes, plan: MediaPlan, preprocess: AudioPreprocess) -> str:
        """Writes the waveform at SAMPLE_RATE_HZ, without the silence behind it, and the spectrogram."""
        windows = preprocess.samples(data, plan)  # [windows, samples]
        num_samples = plan.shape[0] * SAMPLE_RATE_HZ // POSITIONS_PER_S
        wav = _wav(windows.reshape(-1)[:num_samples], "FLOAT")
        (self.folder / f"{name}.wav").write_bytes(wav)
        spectrogram = _png(spectrogram_of(preprocess.features(windows).numpy(), plan.shape[0]))
        (self.folder / f"{name}-spectrogram.png").write_bytes(spectrogram)
        player = ""
        if num_samples <= MAX_SOUND_S * SAMPLE_RATE_HZ:
            small = _wav(windows.reshape(-1)[:num_samples], "PCM_16")
            player = f'<audio controls src="{_uri("audio/wav", small)}"></audio>'
        return (
            f'<p>{player} <a href="{name}.wav">{name}.wav</a></p><figure><img class="mels" alt="Spectrogram" '
            f'src="{_uri("image/png", spectrogram)}"><figcaption>log-mel, low tones at the bottom; a row for each '
            "window of the encoder</figcaption></figure>"
        )


def described(ref: MediaRef, plan: MediaPlan) -> str:
    """What of an item is seen or heard, by which rule, in one line: "8 frames, one every 0.125 s of 1 s"."""
    if ref.modality == "audio":
        heard_s = plan.shape[0] / POSITIONS_PER_S
        pieces = ", ".join(f"{start:,.2f} to {end:,.2f} s" for start, end in plan.spans_s)
        text = f"{heard_s:,.6g} s heard" + (f": {pieces}" if pieces else "")
    elif plan.times_s:
        whole_s = plan.times_s[0] + plan.times_s[-1]  # the middles of equal segments
        num = len(plan.times_s)
        text = f"{num} frame{'s' * (num > 1)}, one every {whole_s / num:,.4g} s of {whole_s:,.6g} s"
    else:
        text = "seen as a whole"
    return "; ".join([text, *map(str, plan.excerpts)])


def spectrogram_of(mels: np.ndarray, num_positions: int) -> Image.Image:
    """[windows, channels, frames] as a picture: a row for each window, dark where it is quiet.

    num_positions: of the encoder, that hold sound; a single window is cut to them.
    """
    if len(mels) == 1:
        mels = mels[:, :, : 2 * num_positions]  # two spectra a position
    low, high = float(mels.min()), float(mels.max())
    levels = (mels[:, ::-1] - low) / max(high - low, 1e-6)  # low tones at the bottom
    rows = np.pad(levels.repeat(_ENLARGED, axis=1), ((0, 0), (0, _ROW_GAP), (0, 0)), constant_values=1)
    flat = rows.reshape(-1, rows.shape[2])[:-_ROW_GAP]
    stops = np.linspace(0, 1, len(_COLOURS))
    channels = [np.interp(flat, stops, [colour[i] for colour in _COLOURS]) for i in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


_COLOURS = [(10, 10, 40), (70, 20, 110), (190, 50, 90), (250, 150, 40), (255, 250, 200)]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222;
  background: #fff }
.frames { display: flex; flex-wrap: wrap; gap: .6rem } figure { margin: 0 }
.frames img { display: block; max-width: 16rem; min-width: 8rem; border: 1px solid #ccc }
.mels { width: 100%; image-rendering: pixelated } figcaption { font-size: .85rem; color: #555 }
audio { vertical-align: middle } dt { font-weight: 600 } dd { margin: 0 0 .6rem; white-space: pre-wrap }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #16181c } figcaption { color: #aaa } a { color: #8bf }
}
"""


def _said(conversation: Conversation) -> str:
    num_media = len(conversation.media)
    turns = "".join(
        f"<dt>{turn.role}</dt><dd>{html.escape(text_of(turn.parts, num_media))}</dd>" for turn in conversation.turns
    )
    return f"<section><h2>What was said</h2><dl>{turns}</dl></section>"


def _png(picture: Image.Image) -> bytes:
    out = BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def _wav(samples: np.ndarray, subtype: str) -> bytes:
    out = BytesIO()
    soundfile.write(out, samples, SAMPLE_RATE_HZ, subtype, format="WAV")
    return out.getvalue()


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
