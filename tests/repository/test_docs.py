"""The documentation builds as a site without a warning, shows all its pages, loads nothing, and names what exists."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests import tiny

ROOT = tiny.ROOT
DOCS = sorted((ROOT / "docs").rglob("*.md"))
COMMANDS = [*DOCS, ROOT / "README.md"]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; `strict` in mkdocs.yml makes a warning a failure."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


class _Site(HTMLParser):
    """Files that a page loads, links of its navigation, and the text of its paragraphs."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.paragraphs: list[str] = []
        self._in_paragraph = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag in ("script", "img", "iframe", "source") and "src" in values:
            self.loaded.append(values["src"])
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload", "preconnect", "modulepreload"):
            self.loaded.append(values["href"])
        if tag == "a" and "md-nav__link" in values.get("class", ""):
            self.linked.append(values["href"])
        if tag == "p":
            self.paragraphs.append("")
        self._in_paragraph = tag == "p" or (self._in_paragraph and tag in ("em", "strong", "a", "br"))

    def handle_endtag(self, tag: str) -> None:
        self._in_paragraph = self._in_paragraph and tag != "p"

    def handle_data(self, data: str) -> None:
        if self._in_paragraph:
            self.paragraphs[-1] += data


def test_it_builds_and_every_page_is_in_the_navigation(site):
    linked = {(site / link.partition("#")[0]).resolve() for link in _Site((site / "index.html").read_text()).linked}
    for path in [*DOCS, *sorted((ROOT / "docs").rglob("*.ipynb"))]:
        page = path.relative_to(ROOT / "docs").with_suffix("")
        page = page.parent if page.name == "index" else page
        assert (site / page / "index.html").is_file(), page
        assert (site / page).resolve() in linked, f"{_name(path)} is not in the navigation of mkdocs.yml"


def test_what_it_loads_is_its_own_and_there(site):
    for path in site.rglob("index.html"):
        for place in _Site(path.read_text()).loaded:
            assert not place.startswith(("http:", "https:", "//")), (path, place)
            if not place.startswith("data:"):
                assert (path.parent / place.partition("?")[0]).is_file(), (path, place)
    assert json.loads((site / "search/search_index.json").read_text())["docs"]


def test_lists_and_tables_are_not_shown_as_text(site):
    """GitHub sees a list or a table right below a line of text; mkdocs wants an empty line between."""
    for path in site.rglob("index.html"):
        for paragraph in _Site(path.read_text()).paragraphs:
            assert not re.search(r"^(\* |- |\d+\. |\|)", paragraph, re.M), (path, paragraph[:200])


def test_files_outside_docs_are_pages_that_links_lead_to(site):
    assert 'href="../repository/data_prep/"' in (site / "training/index.html").read_text()
    assert "../repository/configs/directed_speech.yaml/" in (site / "directed_speech/index.html").read_text()
    assert "loudspeaker_hz" in (site / "repository/configs/directed_speech.yaml/index.html").read_text()


@pytest.mark.parametrize("path", DOCS, ids=_name)
def test_links_resolve_where_the_files_lie(path):
    """As GitHub follows them; mkdocs checks their anchors."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[)#]", text):
        if "://" not in target:
            assert (path.parent / target).exists(), target


# ---- commands -------------------------------------------------------------------------------------------------------


def _lines(text: str) -> Iterator[list[str]]:
    """Words from `infer.py` or `train.py` on, of each command in a fenced block for a shell."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.search(r"python ((?:infer|train)\.py .*)", line)
            if match and language in ("", "bash"):
                yield shlex.split(re.split(r" 2?[&|>]", match[1])[0], comments=True)


def _deployed() -> Iterator[list[str]]:
    """The commands of the container and of the service."""
    entry = re.search(r"^ENTRYPOINT (\[.*\])$", (ROOT / "deploy/Dockerfile").read_text(), re.M)
    start = re.search(r"^ExecStart=\S+ (.*)$", (ROOT / "deploy/mmchat.service").read_text(), re.M)
    assert entry is not None and start is not None
    yield [*json.loads(entry[1])[1:], "/model", "--api-key-file", "/run/secrets/key"]
    yield shlex.split(start[1])


@pytest.fixture
def understand(monkeypatch, capsys):
    """Has a program parse its command line and stop there."""
    import infer
    import train

    def stop_behind(parse):
        def parse_and_stop(self, *arguments):
            parse(self, *arguments)
            sys.exit(0)

        return parse_and_stop

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stop_behind(getattr(argparse.ArgumentParser, name)))

    def check(words: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stopped:
            {"infer.py": infer.main, "train.py": train.main}[words[0]]()
        assert stopped.value.code == 0, shlex.join(words) + "\n" + capsys.readouterr().err

    return check


@pytest.mark.parametrize("path", COMMANDS, ids=_name)
def test_commands_are_understood_by_the_programs(path, understand):
    for words in _lines(path.read_text()):
        understand(words)


def test_deployed_commands_are_understood(understand):
    for words in _deployed():
        understand(words)


def test_a_wrong_option_is_noticed(understand):
    (words,) = _lines("```\npython infer.py serve x \\\n    --prot 8000 &\n```\n")
    with pytest.raises(AssertionError, match="--prot"):
        understand(words)


# ---- deployment -----------------------------------------------------------------------------------------------------


def test_the_program_runs_from_what_the_image_holds(tmp_path):
    """.dockerignore and the Dockerfile's COPY lines leave nothing out that serving imports."""
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [name for line in re.findall(r"^COPY (?!--)(.*) \S+$", (ROOT / "deploy/Dockerfile").read_text(), re.M)
              for name in line.split()]  # fmt: skip
    assert set(copied) == set(allowed)
    for name in copied:
        (tmp_path / name).symlink_to(ROOT / name)
    check = "import infer, sys, mmchat.serving.server; print(*(m for m in sys.modules if m.partition('.')[0] in "
    check += "('data_prep', 'tests', 'deepspeed')))"
    done = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "", done.stdout + done.stderr
