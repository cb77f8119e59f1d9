"""Rewrites tests/golden/tiny_losses.txt: `make golden`, after a change that is meant to alter numbers."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests import runs, tiny

FILE = Path(__file__).parent / "tiny_losses.txt"


def losses(folder: Path) -> list[tuple[str, int, float]]:
    """Trains configs/tiny.yaml: (stage, step, loss) of every step."""
    tiny.build_all()
    runs.train(folder)
    return [(stage, x["step"], x["loss"]) for stage in ("align", "instruct") for x in runs.log(folder, stage)]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        FILE.write_text("".join(f"{stage} {step} {loss:.6f}\n" for stage, step, loss in losses(Path(folder))))
    print(f"wrote {FILE}")
