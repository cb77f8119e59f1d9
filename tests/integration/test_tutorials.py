"""The tutorials' commands run as they stand, one page after another, and print what the pages say.

A fenced `bash` block is run; a `text` block right behind it is what it prints, where "..." stands for anything.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.runs import ENVIRONMENT

PAGES = tiny.ROOT / "docs" / "tutorials"
_BLOCK = re.compile(r"^```bash\n(.*?)^```$(?:\n+^```text\n(.*?)^```$)?", re.M | re.S)


def blocks(page: str) -> list[tuple[str, str | None]]:
    """(commands, what they print) in order; None where the page does not say."""
    return [(commands, shown or None) for commands, shown in _BLOCK.findall((PAGES / page).read_text())]


def run(page: str, folder: Path) -> None:
    """Runs a page in one shell, as a reader does. What it starts in the background ends with it."""
    found = blocks(page)
    assert found, f"{page} has no commands"
    script = "set -euo pipefail\ntrap 'kill $(jobs -p) 2> /dev/null || true' EXIT\n"
    script += "".join(f"{commands}\necho '>>> block'\n" for commands, _ in found)
    shell = subprocess.Popen(
        ["bash", "-c", script.replace("8000", str(_free_port()))],
        cwd=folder,
        env={
            **ENVIRONMENT,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(folder / "repaired"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = shell.communicate()
    except BaseException:  # also pytest's time limit
        os.killpg(shell.pid, signal.SIGKILL)
        raise
    printed = output.split(">>> block\n")
    assert shell.returncode == 0, f"{page}, block {len(printed)}:\n{output[-5000:]}"
    for (commands, shown), text in zip(found, printed, strict=False):
        assert shown is None or matches(text, shown), f"{page}:\n{commands}\nprinted\n{text}\nand not\n{shown}"


def matches(text: str, shown: str) -> bool:
    pattern = ".*".join(re.escape(part) for part in shown.strip().split("..."))
    return re.fullmatch(rf"\s*{pattern}\s*", text, re.S) is not None


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the repository's root in which the first tutorial was done."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("train.py", "infer.py", "data_prep", "configs", "mmchat", "tests"):
        (folder / name).symlink_to(tiny.ROOT / name)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "tiny").symlink_to(tiny_folder)
    # For what runs without mmchat where torchvision must be repaired (mmchat/torchvision_repair.py).
    (folder / "repaired").mkdir()
    (folder / "repaired" / "sitecustomize.py").write_text("import mmchat\n")
    run("train_on_my_data.md", folder)
    return folder


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", ["train_on_my_data.md", "evaluate.md", "serve.md", "export.md"])
def test_the_commands_run_and_print_what_the_page_says(trained, page):
    if page != "train_on_my_data.md":  # the fixture ran it
        run(page, trained)


def test_every_tutorial_is_run():
    assert {path.name for path in PAGES.glob("*.md")} == {"train_on_my_data.md", "evaluate.md", "serve.md", "export.md"}


def test_another_output_is_noticed():
    assert matches("1.3 s\nIt is blue.\n", "...\nIt is blue.\n") and matches("exact 1.00", "exact ...")
    assert not matches("It is red.\n", "It is blue.\n") and not matches("It is blue. Or red.", "It is blue.")
