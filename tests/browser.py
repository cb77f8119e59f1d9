"""A real headless Chromium for tests, and a screenshot: python -m tests.browser PAGE.html PICTURE.png [--width 1200]

A Chromium that the machine has is taken; else one comes out of the npm package @sparticuz/chromium, which holds a
headless build (x86-64 Linux) with the libraries that servers lack. Playwright (PyPI) drives it; its own downloads are
not needed.

    with launch() as browser, watched_page(browser) as watched:
        watched.page.goto(file.as_uri())
        assert watched.faults == [] and watched.requests == [file.as_uri()]
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

from data_prep.packages import Package, PackageError, fetch, keep_first

CHROMIUM = Package(
    "npm",
    "@sparticuz/chromium",
    "153.0.0",
    "sparticuz-chromium-153.0.0.tgz",
    "20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0",
    "MIT (the package), BSD-3-Clause (Chromium)",
)
_INSTALLED = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
_INFLATE = """
const { pipeline } = require("stream"), { createBrotliDecompress } = require("zlib");
pipeline(process.stdin, createBrotliDecompress(), process.stdout, (error) => { if (error) throw error; });
"""
# The machine's fonts and the package's own, so that text has a shape on a machine without any.
_FONTS = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>/usr/share/fonts</dir><dir>{folder}/fonts</dir><cachedir>{folder}/fonts-cache</cachedir></fontconfig>
"""


@dataclass
class Watched:
    """A page, and what went wrong or out since it was opened.

    Attributes:
        faults: errors and warnings of the console, and exceptions that nothing caught.
        requests: addresses asked for, `data:` and `blob:` left out: they never leave the page.
    """

    page: Page
    faults: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(message.text)

    def _request(self, request: Request) -> None:
        if not request.url.startswith(("data:", "blob:")):
            self.requests.append(request.url)


@contextmanager
def launch(*switches: str) -> Iterator[Browser]:
    """A headless browser, with further switches of Chromium's. Raises PackageError where none can be had."""
    executable, environment = chromium()
    # Tests run as root in containers, where Chromium's own sandbox cannot; they open pages of this project only.
    options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--font-render-hinting=none", *switches]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=options, env={**os.environ, **environment}, timeout=60_000
        )
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def watched_page(browser: Browser, width: int = 1200, height: int = 900, **options: Any) -> Iterator[Watched]:
    """A page in a context of its own; `options` go to Playwright's new_context (color_scheme, has_touch, ...)."""
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    try:
        watched = Watched(context.new_page())
        watched.page.on("console", watched._console)
        watched.page.on("pageerror", lambda error: watched.faults.append(str(error)))
        watched.page.on("request", watched._request)
        yield watched
    finally:
        context.close()


def chromium() -> tuple[Path, dict[str, str]]:
    """The executable, and what it needs in its environment. Raises PackageError."""
    for name in _INSTALLED:
        if found := shutil.which(name):
            return Path(found), {}
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise PackageError(
            f"no browser: found none of {', '.join(_INSTALLED)}, and {CHROMIUM.pin} is for Linux on x86-64, this is "
            f"{platform.system()} on {platform.machine()}; install Chromium or Chrome so that it is on the PATH"
        )
    archive = fetch(CHROMIUM)
    folder = archive.with_suffix("")
    if not folder.exists():
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=archive.parent) as partial:
            _unpack(archive, Path(partial) / "files", folder)
            keep_first(Path(partial) / "files", folder)
    libraries = os.pathsep.join(filter(None, [str(folder / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]))
    return folder / "chromium", {"LD_LIBRARY_PATH": libraries, "FONTCONFIG_FILE": str(folder / "fonts.conf")}


def _unpack(archive: Path, made: Path, final: Path) -> None:
    """Chromium, its libraries and fonts as files in `made`, which will be renamed to `final`."""
    made.mkdir()
    with tarfile.open(archive) as package:
        for name in ("chromium", "al2023.tar", "fonts.tar"):
            member = package.extractfile(f"package/bin/{name}.br")
            assert member is not None
            with open(made / name, "wb") as out:
                # Node is there, npm runs on it; Python has no Brotli of its own.
                subprocess.run(["node", "-e", _INFLATE], input=member.read(), stdout=out, check=True, timeout=300)
    for name in ("al2023.tar", "fonts.tar"):
        with tarfile.open(made / name) as inner:
            inner.extractall(made, filter="data")
        (made / name).unlink()
    (made / "chromium").chmod(0o755)
    (made / "fonts.conf").write_text(_FONTS.format(folder=final))


def main() -> None:
    parser = argparse.ArgumentParser(description="Takes a picture of a page.")
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--height", type=int, help="of the picture; the whole page by default")
    parser.add_argument("--dark", action="store_true")
    args = parser.parse_args()
    scheme = "dark" if args.dark else "light"
    with launch() as browser, watched_page(browser, args.width, args.height or 900, color_scheme=scheme) as watched:
        watched.page.goto(args.page.resolve().as_uri())
        watched.page.screenshot(path=args.picture, full_page=args.height is None)


if __name__ == "__main__":
    main()
