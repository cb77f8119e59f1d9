"""Makes pages of what the documentation links outside docs/, and of notebooks; a hook that mkdocs.yml names.

mkdocs knows the files of docs/ alone. A page links `../data_prep/README.md` or `../configs/tiny.yaml` as GitHub wants
it; here such a file becomes a page of the site below `repository/`, and the links lead there. So one text reads well in
both places.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
# In the navigation, whether a page links them or not.
ALWAYS = ("CONTRIBUTING.md", "CHANGELOG.md", "data_prep/README.md", "checkpoints/README.md", "benchmarks/README.md")
_LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[)#])")
# GitHub takes a picture's width as HTML alone, in which mkdocs does not resolve the path.
_SIZED = re.compile(r'<img src="([^"]+)" alt="([^"]*)" width="(\d+)">')
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sh": "bash", ".sbatch": "bash", ".toml": "toml"}


def site_uri(path: str) -> str:
    """Where a file of the repository stands in the site's sources: docs/video.md -> video.md."""
    uri = path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"
    if uri.endswith(".ipynb"):
        return uri.removesuffix(".ipynb") + ".md"
    return uri if path.startswith("docs/") or uri.endswith(".md") else f"{uri}.md"


def linked(path: str, text: str) -> Iterator[tuple[str, str]]:
    """(link as written, file of the repository) of each relative link in the page at `path`, where that file exists."""
    for target in _LINK.findall(text):
        if "://" not in target and not target.startswith(("/", "mailto:")):
            found = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
            if not found.startswith("..") and (ROOT / found).is_file():
                yield target, found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each notebook and for each file outside docs/ that a page links, and those that these link."""
    notebooks = [f"docs/{file.src_uri}" for file in files if file.src_uri.endswith(".ipynb")]
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()] + [*ALWAYS, *notebooks]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        if not path.startswith("docs/") or path.endswith(".ipynb"):
            files.append(File.generated(config, site_uri(path), content=_page(path)))
        if path.endswith(".md"):
            new = {found for _, found in linked(path, (ROOT / path).read_text())} - seen
            waiting += [found for found in new if not found.startswith("docs/")]
            seen |= new
    config.extra["repository_paths"] = {site_uri(path): path for path in seen}
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads links to files of the repository to their pages, and writes pictures with a width as mkdocs does."""
    uri = page.file.src_uri
    path = config.extra["repository_paths"].get(uri, f"docs/{uri}")
    if PurePosixPath(path).suffix != ".md":
        return markdown
    places = {
        target: posixpath.relpath(site_uri(found), posixpath.dirname(uri) or ".")
        for target, found in linked(path, markdown)
    }
    markdown = _SIZED.sub(r"![\2](\1){ width=\3 }", markdown)
    return _LINK.sub(lambda match: places.get(match[1], match[1]), markdown)


def _page(path: str) -> str:
    text = (ROOT / path).read_text()
    match PurePosixPath(path).suffix:
        case ".md":
            return text
        case ".ipynb":
            return "\n\n".join(_cell(cell) for cell in json.loads(text)["cells"])
        case suffix:
            return f"# {path}\n\n````{_LANGUAGES.get(suffix, 'text')}\n{text.rstrip()}\n````\n"


def _cell(cell: dict) -> str:
    """Text as it is; code with the text and the pictures that it printed."""
    source = "".join(cell["source"])
    if cell["cell_type"] != "code":
        return source
    shown = [f"````python\n{source}\n````"]
    for output in cell["outputs"]:
        data = output.get("data", {})
        text = "".join(output.get("text", data.get("text/plain", "")))
        if "image/png" in data:
            shown.append(f"![output](data:image/png;base64,{''.join(data['image/png']).strip()})")
        elif text:
            shown.append(f"````text\n{text.rstrip()}\n````")
    return "\n\n".join(shown)
