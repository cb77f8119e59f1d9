"""`infer.py export --format hub`: a folder that loads wherever it lies, and from a hub."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

import mmchat
from mmchat.checkpoint import base_identity, open_checkpoint, write_checkpoint
from mmchat.inference.hub import is_hub_name, write_hub
from mmchat.inference.hub_card import front_matter
from mmchat.inference.load import Loaded, lies_inside, load
from tests import by_heart, runs, tiny

BOX = "[0.250,0.375,0.750,0.625]"
ASK = """import sys, mmchat
for name in sys.argv[1:]:
    try:
        print(mmchat.load(name, "float32").ask("Where is the drum?", image="photo.png").text)
    except ValueError as error:
        print("refused:", error)"""


def ask(cwd: Path, *names: str | Path, **environment: str) -> list[str]:
    """What a process of its own, in another folder, is answered by each model."""
    (cwd / "photo.png").write_bytes(by_heart.picture())
    done = subprocess.run(
        [sys.executable, "-c", ASK, *map(str, names)],
        cwd=cwd, env=runs.ENVIRONMENT | environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def answer(folder: Path) -> str:
    return mmchat.load(folder, "float32").ask("Where is the drum?", image=by_heart.picture()).text


@pytest.fixture(scope="module")
def far(heart, tmp_path_factory) -> Path:
    """A checkpoint whose base models lie in a folder of this test's own, by absolute paths."""
    folder = tmp_path_factory.mktemp("far")
    shutil.copytree(tiny.FOLDER, folder / "bases", ignore=shutil.ignore_patterns("shards"))
    (folder / "bases" / "llm" / "source.json").write_text('{"origin": "A tiny Llama", "licence": "Apache-2.0"}')
    (folder / "bases" / "clip" / "README.md").write_text("---\nlicense: mit\n---\n# A tiny CLIP\n")
    (folder / "bases" / "clip" / "LICENSE").write_text("Permission is granted.")
    (folder / "bases" / "llm" / "pytorch_model.bin").write_bytes(b"a pickle")
    checkpoint = open_checkpoint(heart)
    text = checkpoint.config_text.replace(".cache/tiny", str(folder / "bases"))
    facts = {name: value for name, value in checkpoint.manifest.items() if name not in ("format", "files", "sha256")}
    written = write_checkpoint(folder / "checkpoint", text, checkpoint.weights(), None, None, facts)
    (written / "evaluation").mkdir()
    metrics = {
        "task": "refer", "scores": {"accuracy": 0.25, "num_boxes": 1200}, "num_questions": 60,
        "protocol_sha256": "ab" * 32, "checkpoint_sha256": open_checkpoint(written).manifest["sha256"],
        "controls": {"swap": ["image"], "blank": [], "missing": {}, "seed": 0},
    }  # fmt: skip
    (written / "evaluation" / "metrics.json").write_text(json.dumps(metrics))
    return folder


@pytest.fixture(scope="module")
def loaded(far) -> Loaded:
    return load(far / "checkpoint", "float32")


@pytest.fixture(scope="module")
def whole(loaded, tmp_path_factory) -> Path:
    """A folder with everything inside, moved."""
    out = tmp_path_factory.mktemp("out") / "tiny-drum"
    lines = write_hub(loaded, out, with_base=True, licence="Apache-2.0")
    assert len(lines) == 1 and "loads with mmchat.load" in lines[0]
    moved = tmp_path_factory.mktemp("moved") / "elsewhere"
    shutil.move(out, moved)
    return moved


def test_without_base_models_their_names_are_said(far, loaded, tmp_path):
    lines = write_hub(loaded, tmp_path / "out", with_base=False)
    assert f"llm {far / 'bases' / 'llm'}" in lines[1] and "no licence" in lines[2]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.yaml", "manifest.json", "weights.safetensors", "tokenizer", "README.md", "NOTICE",
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    said = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert said == "<|im_start|>user\nHi<|im_end|>\n"
    assert answer(tmp_path / "out") == BOX
    assert front_matter((tmp_path / "out" / "README.md").read_text())["license"] == "other"


def test_a_card_beside_the_checkpoint_is_kept(far, loaded, tmp_path):
    readme = far / "checkpoint" / "README.md"
    readme.write_text("# Drums\n\nWritten by hand.\n")
    try:
        lines = write_hub(loaded, tmp_path / "out", with_base=False, licence="MIT")
    finally:
        readme.unlink()
    text = (tmp_path / "out" / "README.md").read_text()
    assert front_matter(text)["license"] == "mit" and text.endswith("# Drums\n\nWritten by hand.\n")
    assert len(lines) == 2


def test_what_cannot_be_written_leaves_nothing(far, loaded, tmp_path):
    with pytest.raises(ValueError, match="exists; remove it"):
        write_hub(loaded, tmp_path, with_base=True)
    llm = far / "bases" / "llm"
    (llm / "model.safetensors").rename(llm / "model.kept")
    try:
        with pytest.raises(ValueError, match=r"base model of llm, .*, cannot go inside: wanted a folder"):
            write_hub(loaded, tmp_path / "out", with_base=True)
    finally:
        (llm / "model.kept").rename(llm / "model.safetensors")
    (tmp_path / "metrics.json").write_text("[]")
    with pytest.raises(ValueError, match=r"wanted a metrics.json of infer.py evaluate"):
        write_hub(loaded, tmp_path / "out", with_base=True, evaluations=[tmp_path / "metrics.json"])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
    with pytest.raises(ValueError, match="found a configuration; wanted a checkpoint"):
        write_hub(load("configs/tiny.yaml"), tmp_path / "out", with_base=True)


def test_a_whole_folder_answers_after_it_was_moved(far, whole, tmp_path):
    (far / "bases").rename(far / "gone")  # what it was made from
    tiny.build_llm(tmp_path / "base" / "llm", seed=1)  # of the same name, below the working directory
    try:
        text, other = ask(tmp_path, whole, far / "checkpoint")
    finally:
        (far / "gone").rename(far / "bases")
    assert text == BOX and other.startswith("refused: ")
    config = yaml.safe_load((whole / "config.yaml").read_text())
    assert config["model"]["llm"]["pretrained"] == "base/llm"
    assert not list(whole.rglob("*.bin")) and (whole / "base/image/LICENSE").read_text() == "Permission is granted."
    bases = open_checkpoint(whole).manifest["bases"]
    assert bases["image"] == {**base_identity(str(whole / "base/image")), "pretrained": "base/image"}


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_code_of_a_base_model_is_not_offered_and_damage_is_named(whole, tmp_path, file, capsys):
    folder = shutil.copytree(whole, tmp_path / "odd")
    path = folder / "base/llm" / file
    if path.suffix == ".json":
        facts = {"model_type": "odd", "tokenizer_class": "Odd"}
        names = {"AutoConfig": "odd.Odd", "AutoModelForCausalLM": "odd.Odd", "AutoTokenizer": ["odd.Odd", "odd.Odd"]}
        path.write_text(json.dumps(json.loads(path.read_text()) | facts | {"auto_map": names}))
        (folder / "base/llm/odd.py").write_text("class Odd: pass\n")
    else:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"contains custom code|weights cannot be read"):
        load(folder, "float32")
    assert "wish to run" not in capsys.readouterr().out


def test_a_whole_folder_is_exported_again(whole, tmp_path):
    again = load(whole, "float32")
    with pytest.raises(ValueError, match=r"base model of llm lies in .* itself"):
        write_hub(again, tmp_path / "out", with_base=False)
    write_hub(again, tmp_path / "out", with_base=True)
    assert answer(tmp_path / "out") == BOX


def test_the_card_says_what_it_is(whole):
    text = (whole / "README.md").read_text()
    front = front_matter(text)
    assert front["library_name"] == "mmchat" and front["license"] == "apache-2.0"
    assert front["pipeline_tag"] == "image-text-to-text" and {"flora", "image", "audio"} <= set(front["tags"])
    assert 'chat = mmchat.load("tiny-drum")' in text
    assert "| instruct | 10 | connectors, fusion | tiny (instruct) |" in text
    assert "| refer | accuracy | 0.2500 | 60 | pictures swapped between records | abababababab | this |" in text
    assert "| refer | num_boxes | 1,200 |" in text
    assert "| llm | A tiny Llama | Apache-2.0 | `base/llm` |" in text and "| mit | `base/image` |" in text
    assert "llm: A tiny Llama\n  licence: Apache-2.0\n" in (whole / "NOTICE").read_text()


def test_a_path_out_of_the_folder_is_not_looked_for_in_it(tmp_path):
    (tmp_path / "checkpoint" / "base").mkdir(parents=True)
    assert lies_inside(tmp_path / "checkpoint", "base")
    for path in ("absent", "../checkpoint/base", "base/../..", str(tmp_path / "checkpoint" / "base")):
        assert not lies_inside(tmp_path / "checkpoint", path)


# ---- the hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(whole, tmp_path) -> Iterator[ThreadingHTTPServer]:
    """The two calls of the hub that a download makes, for `someone/drum`: a list of files, and the files.

    `asked`: the paths that were asked for.
    """
    folder = tmp_path / "repository"
    shutil.copytree(whole, folder)
    (folder / "model.bin").write_bytes(b"a pickle")
    (folder / "modeling.py").write_text("raise SystemExit('this was run')")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    commit, tags = "c" * 40, {name: f"{i:040x}" for i, name in enumerate(files)}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            self.server.asked.append(path)
            body, status = b"{}", 404
            if path in ("/api/models/someone/drum/revision/main", "/api/models/someone/drum"):
                known = {"id": "someone/drum", "sha": commit, "siblings": [{"rfilename": name} for name in files]}
                body, status = json.dumps(known).encode(), 200
            elif path.startswith("/api/models/someone/drum/tree/"):
                listed = [{"type": "file", "path": n, "size": len(files[n]), "oid": tags[n]} for n in files]
                body, status = json.dumps(listed).encode(), 200
            elif (name := path.removeprefix(f"/someone/drum/resolve/{commit}/")) in files:
                body, status = files[name], 200
            self.send_response(status)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{tags.get(path.partition(commit)[2][1:], 0)}"')
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_name_on_the_hub_is_downloaded_without_pickles_and_code(hub, tmp_path):
    cwd = tmp_path / "work"
    cwd.mkdir()
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    text, said = ask(cwd, "someone/drum", "someone/absent", **settings)
    assert text == BOX
    files = [path for path in hub.asked if "/resolve/" in path]
    assert any(path.endswith("base/llm/model.safetensors") for path in files)
    assert not any(path.endswith((".bin", ".py", "README.md")) for path in files)
    assert said.startswith(f"refused: someone/absent: there is no such folder below {cwd}, and the hub does not give")


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("owner/name", True), ("o-1/n.a_m-e", True), ("name", False), ("a/b/c", False), ("/a", False), ("../a", False),
     ("./a", False), ("a/", False), ("own er/name", False), ("öwner/name", False)],
)  # fmt: skip
def test_names_of_the_hub(name, is_one):
    assert is_hub_name(name) is is_one
