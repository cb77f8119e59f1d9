"""A checkpoint made small enough to be given away: trained weights in half precision, nothing to resume from."""

from __future__ import annotations

from pathlib import Path

import torch

from mmchat.checkpoint import load_weights, write_checkpoint
from mmchat.inference.load import load
from mmchat.models.probe import probe_logits

DTYPES = ("float16", "bfloat16", "float32")


def release(path: str | Path, out: Path, dtype: str) -> tuple[int, float]:
    """Writes the trained parts of a checkpoint in another precision, for inference: no optimizer, no lane states.

    The probe is asked anew, in float32 with the stored weights, so that a damaged or mismatched release is noticed when
    it is loaded. The folder appears whole or not at all.

    Returns:
        Size of the folder in bytes, and the largest change of a probe's logit over the logits' standard deviation.
    Raises:
        ValueError: `out` exists, the checkpoint cannot be used, or a weight is too large for the precision.
        OSError: no space or no permission.
    """
    if out.exists():
        raise ValueError(f"{out} exists; remove it, or name another folder")
    loaded = load(path, "float32")
    checkpoint = loaded.checkpoint
    if checkpoint is None:
        raise ValueError(f"{path} is a configuration; wanted a checkpoint, or the folder of a run or stage")
    weights = checkpoint.weights()
    stored = {n: w.to(getattr(torch, dtype)) if w.is_floating_point() else w for n, w in weights.items()}
    if unheld := [name for name, weight in stored.items() if not torch.isfinite(weight).all()]:
        raise ValueError(f"{unheld[0]} has weights that {dtype} cannot hold; choose another --dtype")

    before = probe_logits(loaded.model, loaded.device)
    load_weights(loaded.model, stored, set(weights), checkpoint.folder)
    after = probe_logits(loaded.model, loaded.device)
    change = (torch.tensor(after) - torch.tensor(before)).abs().max() / torch.tensor(before).std()

    facts = checkpoint.facts | {"dtype": dtype, "probe": {"dtype": "float32", "logits": after}}
    write_checkpoint(out, checkpoint.config_text, stored, None, None, facts)
    return sum(file.stat().st_size for file in out.iterdir()), float(change)
