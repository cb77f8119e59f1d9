"""Small checkpoints to export, and what plain transformers makes of an export in a process that has no mmchat."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmchat.checkpoint import write_checkpoint
from mmchat.config import dump_config, parse_config
from mmchat.models.parts import names_in, parts_of
from mmchat.models.probe import probe_logits
from tests import models
from tests.runs import ENVIRONMENT

IMAGE = {
    "encoder": {"kind": "transformers", "pretrained": ".cache/tiny/clip"},
    "resize": "pad",
    "connector": {"kind": "mlp"},
}

# Run with -I from another folder: neither the repository nor what is installed of it is on the path. A torchvision that
# does not fit torch is as good as none, and transformers then resizes with PIL.
PLAIN = """
import json, sys
picture, question, *folders = sys.argv[1:]
sys.path = [place for place in sys.path if "__editable__" not in place]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
try:
    import torchvision
except RuntimeError:
    sys.modules["torchvision"] = None
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

talk = [{"role": "user", "content": [
    {"type": "image", "image": Image.open(picture)}, {"type": "text", "text": question},
]}]
for folder in folders:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    inputs = processor.apply_chat_template(
        talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**inputs).logits[0]
        said = model.generate(**inputs, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
    torch.save(logits, folder + ".pt")
    print(json.dumps({"model": type(model).__name__, "text": processor.decode(said, skip_special_tokens=True)}))
assert not any(name.split(".")[0] == "mmchat" for name in sys.modules), "this process has mmchat"
"""


def checkpoint(folder: Path, chat: dict[str, Any] | None = None, **model: Any) -> Path:
    """A checkpoint of an image model on the tiny parts, whose fusion says something."""
    values = models.config(**{"image": IMAGE, "video": None, "audio": None, **model}).model_dump(mode="json")
    values["chat"] |= chat or {}
    config = parse_config(values, "test")
    made, _ = models.build(config)
    models.wake(made)
    is_full = config.model.fusion.kind == "full"
    learned = {part for part in parts_of(made, is_full) if part.startswith(("connectors", "fusion"))}
    names = names_in(made, learned, is_full)
    weights = {name: tensor for name, tensor in made.state_dict().items() if name in names}
    logits = probe_logits(made, next(made.parameters()).device)
    facts = {
        "run": "tiny", "stage": "align", "step": 1, "is_last": True, "parts": sorted(learned), "bases": {},
        "fusion": config.model.fusion.model_dump(mode="json"), "probe": {"dtype": "float32", "logits": logits},
    }  # fmt: skip
    return write_checkpoint(folder, dump_config(config), weights, None, None, facts)


def plain(folders: Sequence[Path], picture: Path, question: str) -> list[dict[str, Any]]:
    """What transformers says with each model about a picture, in a process without mmchat.

    The logits of the prompt are saved beside each folder, as FOLDER.pt.
    """
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN, str(picture), question, *map(str, folders)],
        cwd=picture.parent, env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
