"""The notebook runs in a real kernel, and the examples of docs/python.md run as they stand."""

from __future__ import annotations

import inspect
import re

import nbformat
from nbclient import NotebookClient

from mmchat.inference.python_api import Answer, Chat
from tests import by_heart, tiny

NOTEBOOK = tiny.ROOT / "docs" / "notebooks" / "chat.ipynb"
BOX = "[0.250,0.375,0.750,0.625]"


def cells() -> list:
    return nbformat.read(NOTEBOOK, as_version=4).cells


def test_no_outputs_are_stored():
    """They would be of a checkpoint that the reader does not have."""
    assert [cell for cell in cells() if cell.cell_type == "code" and (cell.outputs or cell.execution_count)] == []


def test_the_notebook_runs(heart, tmp_path):
    (tmp_path / "photo.png").write_bytes(by_heart.picture())
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    parameters = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(parameters) == 1
    values = (str(heart), str(tmp_path / "photo.png"), "Where is the drum?")
    parameters[0].source = f"CHECKPOINT, PICTURE, QUESTION = {values}"
    # In its own folder, as Jupyter runs it. Loading takes long on a busy machine.
    NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": NOTEBOOK.parent}}
    ).execute()
    shown: dict = {}
    for cell in notebook.cells:
        outputs = cell.outputs if cell.cell_type == "code" else []
        for output in (output for output in outputs if output.get("name") != "stderr"):
            found = shown.setdefault(cell.source.splitlines()[0], {"printed": ""})
            found |= output.get("data", {})
            found["printed"] += output.get("text", "")  # what is printed comes in any number of pieces
    answer = shown["answer = chat.ask(QUESTION, image=picture)"]["text/html"]
    assert '<img src="data:image/jpeg;base64,' in answer and BOX in answer and "the drum: box (16, 8, 48, 24)" in answer
    assert shown["for region in answer.regions:"]["printed"] == "the drum (16.0, 8.0, 48.0, 24.0)\n"
    assert shown['for piece in chat.stream("Describe it.", max_new_tokens=60):']["printed"]
    assert "A drum." in shown["width, height = picture.size"]["text/html"]
    assert "no_such_picture.jpg: cannot be read" in shown["try:"]["printed"]


def test_the_notebook_draws_a_picture_where_none_is_named():
    sources = [cell.source for cell in cells() if cell.source.startswith("from PIL import")]
    names: dict = {"PICTURE": None}
    exec(sources[0], names)
    assert names["picture"].size == (320, 240) and names["picture"].getpixel((220, 150)) == (210, 40, 40)


def test_the_examples_of_the_reference_run(heart, tmp_path, monkeypatch, capsys):
    text = (tiny.ROOT / "docs" / "python.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert len(examples) == 7
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "demo").symlink_to(heart)
    (tmp_path / "photo.jpg").write_bytes(by_heart.picture("JPEG"))
    (tmp_path / "clip.mp4").write_bytes(tiny.clip("left"))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for example in examples:
        exec(compile(example, "docs/python.md", "exec"), names)
    assert (tmp_path / "out.png").is_file()
    assert "no_such_photo.jpg: cannot be read" in capsys.readouterr().out


def test_the_reference_names_every_argument():
    text = (tiny.ROOT / "docs" / "python.md").read_text()
    wanted = {*inspect.signature(Chat.ask).parameters, *Answer.__dataclass_fields__, "pictures", "picture"}
    absent = {name for name in wanted if f"`{name}`" not in text and f"{name}=" not in text}
    assert absent == {"self", "question", "template"}
