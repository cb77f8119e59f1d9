"""The chat page in a real browser, with the real server and a model whose answers are known."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import soundfile
from PIL import ImageColor
from playwright.sync_api import Browser, Page, Request, expect

from mmchat.conversation import Conversation, MediaRef, Region, Turn
from mmchat.inference.draw import COLOURS
from mmchat.inference.load import Loaded, load
from mmchat.serving.limits import Limits
from mmchat.serving.server import Server, Settings
from tests import by_heart, tiny
from tests.browser import Watched, launch, watched_page
from tests.serving import in_thread

HOSTILE = "<img src=x onerror=alert(1)>"
KEY = "a-key-for-tests-0123456789"
DRUM = [round(value) for value in by_heart.DRUM]
# Chromium's own microphone: it beeps.
MICROPHONE = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
WAIT_MS = 120_000


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    *known, described = by_heart.conversations()
    about = Region(0, box=by_heart.DRUM)
    later = (Turn("user", ("What is in ", about, "?")), Turn("assistant", ("A drum.",)))
    bad = (Turn("user", (MediaRef("image", by_heart.picture()), "Be bad.")), Turn("assistant", (HOSTILE,)))
    folder = tmp_path_factory.mktemp("page")
    by_heart.checkpoint(folder, [*known, Conversation((*described.turns, *later)), Conversation(bad)])
    return load(folder / "tiny")


@contextmanager
def serving(loaded: Loaded, **settings: Any) -> Iterator[Server]:
    with in_thread(Settings(**{"port": 0, **settings}), lambda: loaded) as server:
        assert server.ready.wait(WAIT_MS / 1000)
        yield server


@pytest.fixture(scope="module")
def server(loaded: Loaded) -> Iterator[Server]:
    with serving(loaded) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=WAIT_MS)
    with launch(*MICROPHONE) as opened:
        yield opened


@contextmanager
def opened(browser: Browser, server: Server, width: int = 1200, **options: Any) -> Iterator[Watched]:
    """The page, ready to be asked; it must have no faults and ask nobody but its server."""
    with watched_page(browser, width, **options) as watched:
        watched.page.set_default_timeout(WAIT_MS)
        watched.page.goto(server.url)
        expect(watched.page.locator("#model")).to_have_text("tiny")
        yield watched
        assert watched.faults == []
        assert {url for url in watched.requests if not url.startswith(f"{server.url}/")} == set()


def upload(page: Page, *pictures: bytes) -> None:
    files = [{"name": f"drum {i}.png", "mimeType": "image/png", "buffer": data} for i, data in enumerate(pictures, 1)]
    page.locator("input[data-kind=image]").set_input_files(files)
    expect(page.locator("#tray > li")).to_have_count(len(pictures))


def ask(page: Page, question: str, state: str = "done") -> None:
    """Types and sends; waits until the last exchange is in this state."""
    page.get_by_label("Question", exact=True).fill(question)
    page.keyboard.press("Enter")
    expect(page.locator(".exchange").last).to_have_attribute("data-state", state)


def sent(page: Page) -> list[dict[str, Any]]:
    """Bodies of the questions that the page puts to the server from now on."""
    bodies: list[dict[str, Any]] = []

    def note(request: Request) -> None:
        if request.url.endswith("/v1/chat/completions"):
            bodies.append(json.loads(request.post_data or ""))

    page.on("request", note)
    return bodies


def give(page: Page, kind: str, data: bytes) -> None:
    """Pastes or drops a picture, as a browser tells a page of it."""
    page.evaluate(
        """([kind, data]) => {
            const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "given.png", { type: "image/png" }));
            const options = { bubbles: true, cancelable: true };
            document.body.dispatchEvent(kind === "paste"
                ? new ClipboardEvent("paste", { ...options, clipboardData: transfer })
                : new DragEvent(kind, { ...options, dataTransfer: transfer }));
        }""",
        [kind, base64.b64encode(data).decode()],
    )


def shares(page: Page, mark: str) -> list[float]:
    """Where a mark is drawn, as shares of its picture on the screen."""
    inner, outer = page.locator(mark).bounding_box(), page.locator(".shown .canvas").first.bounding_box()
    assert inner is not None and outer is not None
    x, y = (inner["x"] - outer["x"]) / outer["width"], (inner["y"] - outer["y"]) / outer["height"]
    return [x, y, x + inner["width"] / outer["width"], y + inner["height"] / outer["height"]]


def test_places_of_answers_and_questions_are_drawn_and_linked(browser: Browser, server: Server) -> None:
    styles = (tiny.ROOT / "mmchat/serving/page/base.css").read_text()
    assert re.findall(r"\.c\d { --c: (#\w+); }", styles) == list(COLOURS)
    with opened(browser, server) as watched:
        page, bodies = watched.page, sent(watched.page)
        expect(page.get_by_role("heading", name="Ask about what you show")).to_be_visible()
        upload(page, by_heart.picture())
        expect(page.locator("#examples button")).to_have_count(3)
        ask(page, "Describe it.")

        # The words stand without coordinates, each beside the number of its place.
        assert page.locator(".answer").inner_text() == "A drum 1 on a wall 2."
        words, marks = page.locator(".answer a.word"), page.locator(".shown .mark")
        assert words.all_inner_texts() == ["A drum", "a wall"] and marks.count() == 2
        assert shares(page, ".shown .mark.box") == pytest.approx([0.25, 0.25, 0.75, 0.75], abs=0.01)
        for i in (0, 1):
            colour = "rgb({}, {}, {})".format(*ImageColor.getrgb(COLOURS[i]))
            shown = "getComputedStyle(one)." + ("borderTopColor" if i == 0 else "backgroundColor")
            assert marks.nth(i).evaluate(f"(one) => {shown}") == colour
        words.first.hover()
        expect(marks.first).to_have_class(re.compile(r"\blit\b"))
        marks.last.hover()
        expect(words.last).to_have_class(re.compile(r"\blit\b"))
        expect(marks.first).not_to_have_class(re.compile(r"\blit\b"))
        words.first.focus()
        expect(marks.first).to_have_class(re.compile(r"\blit\b"))
        page.get_by_role("button", name="Raw text").click()
        assert "[0.250,0.375,0.750,0.625]" in page.locator(".answer").inner_text()
        assert page.locator("#announcer").text_content() == "A drum on a wall ."

        # A box is drawn with the pointer on the picture above, and asked about.
        page.get_by_label("Question", exact=True).fill("What is in ")
        page.get_by_role("button", name="Enlarge picture 1").click()
        stage = page.locator("#stage .canvas").bounding_box()
        assert stage is not None
        scale = stage["width"] / 64
        page.mouse.move(stage["x"] + DRUM[0] * scale, stage["y"] + DRUM[1] * scale)
        page.mouse.down()
        page.mouse.move(stage["x"] + 60 * scale, stage["y"] + 20 * scale)
        page.mouse.move(stage["x"] + DRUM[2] * scale, stage["y"] + DRUM[3] * scale)
        page.mouse.up()
        page.get_by_role("button", name="Use in the question").click()
        page.keyboard.type("?")
        expect(page.get_by_label("Question", exact=True)).to_have_value("What is in [box 1]?")
        page.keyboard.press("Enter")
        last = page.locator(".exchange").last
        expect(last).to_have_attribute("data-state", "done")
        assert last.locator(".answer").inner_text() == "A drum."
        assert last.locator(".bubble").inner_text() == "What is in 1?"
        expect(last.locator(".mark.box.asked")).to_have_accessible_name("box 1, A drum, of the question")
        region = {"type": "region", "image": 0, "box": DRUM}
        asked = bodies[-1]["messages"]
        text = [{"type": "text", "text": part} for part in ("What is in ", "?")]
        assert asked[-1]["content"] == [text[0], region, text[1]]
        assert [message["role"] for message in asked] == ["user", "assistant", "user"]


def test_a_place_is_drawn_with_the_keyboard_alone(browser: Browser, server: Server) -> None:
    with opened(browser, server) as watched:
        page, question = watched.page, watched.page.get_by_label("Question", exact=True)
        upload(page, by_heart.picture())
        page.get_by_role("button", name="Enlarge picture 1").press("Enter")
        page.get_by_role("button", name="Point", exact=True).press("Enter")
        for key in ("ArrowLeft", "ArrowLeft", "ArrowDown"):
            page.keyboard.press(key)
        expect(page.locator("#viewer-status")).to_have_text("Point at 30, 17 pixels")
        page.keyboard.press("Enter")
        expect(question).to_have_value("[point 1]")
        expect(page.locator("#tray .mark.point")).to_have_count(1)
        page.get_by_role("button", name="Enlarge picture 1").press("Enter")
        page.get_by_role("button", name="Box", exact=True).press("Enter")
        page.keyboard.press("Shift+ArrowRight")
        page.keyboard.press("Enter")
        expect(question).to_have_value("[point 1] [box 2]")
        page.keyboard.press("Backspace")  # all of it
        expect(question).to_have_value("[point 1] ")
        expect(page.locator("#tray .mark")).to_have_count(1)
        page.keyboard.press("Control+z")
        expect(page.locator("#tray .mark")).to_have_count(2)
        page.get_by_role("button", name="Remove drum 1.png").press("Enter")
        expect(question).to_have_value(" ")


def test_stop_again_and_edit(browser: Browser, server: Server) -> None:
    with opened(browser, server) as watched:
        page, exchange = watched.page, watched.page.locator(".exchange")
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Longest answer, in tokens").fill("1500")
        page.get_by_role("button", name="Done").click()
        # Without a picture, nothing was learned by heart: it goes on and on.
        ask(page, "Tell me a story.", "writing")
        page.keyboard.press("Escape")
        expect(exchange).to_have_attribute("data-state", "stopped")
        assert page.locator(".answer").inner_text() and "Stopped." in page.locator(".after").inner_text()
        for name in ("Stop", "New chat"):
            page.get_by_role("button", name="Answer again").click()
            expect(exchange).to_have_attribute("data-state", "writing")
            page.get_by_role("button", name=name).click()
            if name == "New chat":
                expect(exchange).to_have_count(0)
                page.get_by_role("button", name="Bring the last one back").click()
            expect(exchange).to_have_attribute("data-state", "stopped")
        expect(page.locator("#send")).to_have_text("Send")

        page.get_by_role("button", name="Edit the question").click()
        question = page.get_by_label("Question", exact=True)
        expect(question).to_have_value("Tell me a story.")
        page.keyboard.press("Escape")  # leaves it as it was
        expect(question).to_have_value("")
        page.get_by_role("button", name="Edit the question").click()
        for i, kind in enumerate(("paste", "drop"), 1):
            give(page, kind, by_heart.picture(colour=("red", "blue")[i - 1]))
            expect(page.locator("#tray > li")).to_have_count(i)
        ask(page, "Where is the drum?")
        assert exchange.count() == 1 and page.locator(".picture").count() == 2
        expect(page.locator(".picture").last.locator(".mark")).to_have_accessible_name("box 1, the drum")


def test_what_a_model_says_stays_text_and_the_api_call_asks_the_same(
    browser: Browser, server: Server, tmp_path: Path
) -> None:
    with opened(browser, server) as watched:
        page = watched.page
        upload(page, by_heart.picture())
        ask(page, "Be bad.")
        assert page.locator(".answer").inner_text() == HOSTILE and page.locator(".answer img").count() == 0
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Longest answer, in tokens").fill("8")
        page.get_by_role("button", name="Done").click()
        ask(page, 'Does `it` cost "$HOME" or\\n it\'s 5 €?')
        assert "longest length" in page.locator(".after").last.inner_text()
        page.get_by_role("button", name="Copy as an API call").last.click()
        call = page.locator("#call-text").inner_text()
        (tmp_path / "drum-1.png").write_bytes(by_heart.picture())
        done = subprocess.run(
            ["bash", "-c", call],
            cwd=tmp_path,
            env={**os.environ, "MMCHAT_KEY": "any"},
            capture_output=True,
            timeout=120,
        )
        choice = json.loads(done.stdout)["choices"][0]
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Raw text").last.click()
        assert choice["message"]["content"] == page.locator(".answer").last.evaluate("(one) => one.textContent")
        assert choice["finish_reason"] == "length"


def test_a_recording_is_sent_as_a_wav(browser: Browser, server: Server) -> None:
    with opened(browser, server, permissions=["microphone"]) as watched:
        page, bodies = watched.page, sent(watched.page)
        page.get_by_role("button", name="Record from the microphone").click()
        expect(page.locator(".recording .time")).to_have_text(re.compile(r"0:0[1-9]"))
        page.get_by_role("button", name="Done").click()
        expect(page.locator("#tray audio")).to_have_count(1)
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Longest answer, in tokens").fill("2")
        page.get_by_role("button", name="Done").click()
        ask(page, "What do you hear?")
        audio, text = bodies[0]["messages"][0]["content"]
        assert text == {"type": "text", "text": "What do you hear?"} and audio["input_audio"]["format"] == "wav"
        samples, rate = soundfile.read(io.BytesIO(base64.b64decode(audio["input_audio"]["data"])))
        assert rate == 16_000 and samples.ndim == 1 and len(samples) > 8_000 and abs(samples).max() > 0.01


def test_true_errors_and_nothing_typed_is_lost(browser: Browser, loaded: Loaded, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text(KEY)
    key.chmod(0o600)
    narrow = {"key_file": key, "limits": Limits(image_pixels=3000, images=1)}
    with watched_page(browser) as watched:
        page = watched.page
        page.set_default_timeout(WAIT_MS)
        with serving(loaded, **narrow) as server:
            page.goto(server.url)
            page.get_by_label("Key").fill(KEY)
            page.keyboard.press("Enter")
            expect(page.locator("#model")).to_have_text("tiny")

            page.get_by_role("button", name="Settings").click()
            page.get_by_label("Key").fill("another key")
            page.get_by_role("button", name="Done").click()
            expect(page.locator("#key-problem")).to_have_text("Incorrect API key provided.")
            page.get_by_label("Key").fill(KEY)
            page.get_by_role("button", name="Done").click()
            expect(page.locator("#notice")).to_be_hidden()

            for data, words in (
                (by_heart.picture(size=(100, 50)), "50 pixels; this server takes 0.003 megapixels at most"),
                (b"no picture", "cannot be read as a picture"),
            ):
                give(page, "paste", data)
                expect(page.locator("#problem")).to_contain_text(words)
            expect(page.locator("#tray > li")).to_have_count(0)
            give(page, "drop", by_heart.picture())
            expect(page.locator("#tray > li")).to_have_count(1)
            expect(page.locator("#problem")).to_be_hidden()
            give(page, "drop", by_heart.picture())
            expect(page.locator("#problem")).to_contain_text("These are 2 pictures; this server takes 1")
            port = int(server.url.rpartition(":")[2])

        ask(page, "Where is the drum?", "failed")
        expect(page.get_by_role("alert").get_by_text("cannot be reached")).to_be_visible()
        assert page.locator(".bubble").inner_text() == "Where is the drum?"
        with serving(loaded, **narrow, port=port):
            page.get_by_role("button", name="Try again").click()
            expect(page.locator(".exchange")).to_have_attribute("data-state", "done")
            expect(page.locator(".shown .mark")).to_have_accessible_name("box 1, the drum")
            expect(page.locator(".trouble")).to_have_count(0)
        assert [fault for fault in watched.faults if not fault.startswith("Failed to load resource")] == []


def test_what_was_typed_outlives_a_reload_and_an_answer_that_makes_no_sense(browser: Browser, server: Server) -> None:
    with opened(browser, server) as watched:
        page = watched.page
        page.get_by_label("Question", exact=True).fill("Where is the drum?")
        page.goto("about:blank")
        page.goto(server.url)
        expect(page.get_by_label("Question", exact=True)).to_have_value("Where is the drum?")

        chat = "**/v1/chat/completions"
        # Not what was asked for, but the login page of a proxy.
        page.route("**/v1/models", lambda route: route.fulfill(content_type="text/html", body="<p>Log in</p>"))
        page.reload()
        expect(page.get_by_label("Question", exact=True)).to_have_value("Where is the drum?")
        expect(page.locator("#notice")).to_contain_text("is not the server of this page")
        page.unroute("**/v1/models")
        page.reload()
        expect(page.locator("#model")).to_have_text("tiny")

        page.route(chat, lambda route: route.fulfill(content_type="text/event-stream", body="data: {no JSON\n\n"))
        page.get_by_label("Question", exact=True).press("Enter")
        expect(page.locator(".exchange")).to_have_attribute("data-state", "failed", timeout=20_000)
        assert page.locator(".bubble").inner_text() == "Where is the drum?"
        page.unroute(chat)
        page.get_by_role("button", name="Try again").click()
        expect(page.locator(".exchange")).to_have_attribute("data-state", "done")


# Elements with letters of their own, and the contrast of these to what lies behind them (WCAG 2).
CONTRAST = """() => {
    const pen = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const paint = (colours) => {
        pen.clearRect(0, 0, 1, 1);
        for (const colour of colours) { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); }
        const linear = [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3)
            .map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
    };
    const low = [];
    for (const one of document.querySelectorAll("body *")) {
        const letters = [...one.childNodes].filter((node) => node.nodeType === 3 && node.data.trim()).length;
        if (!letters || !one.checkVisibility() || one.closest(".unseen, .mirror, :disabled, script")) continue;
        const behind = [];
        for (let at = one; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
        const [back, ink] = [paint(behind), paint([...behind, getComputedStyle(one).color])];
        const contrast = (Math.max(back, ink) + 0.05) / (Math.min(back, ink) + 0.05);
        if (contrast < 4.5) low.push(`${one.className || one.tagName} ${one.textContent}: ${contrast.toFixed(2)}`);
    }
    return low;
}"""
NAMELESS = """() => [...document.querySelectorAll("button, a, input, textarea, [role=application], img")]
    .filter((one) => one.type !== "file" && !(one.tagName === "IMG" && one.hasAttribute("alt")))
    .filter((one) => !(one.getAttribute("aria-label") || one.labels?.length || one.textContent.trim()))
    .map((one) => one.outerHTML)"""


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1200, "light")])
def test_it_fits_the_screen_and_can_be_read(browser: Browser, server: Server, width: int, scheme: str) -> None:
    options: dict[str, Any] = {"has_touch": True, "is_mobile": True} if width < 400 else {}
    with opened(browser, server, width, color_scheme=scheme, **options) as watched:
        page = watched.page
        upload(page, by_heart.picture(), by_heart.picture(colour="blue"))
        for opener in (None, "#open-settings", "#tray .open"):
            if opener:
                page.locator(opener).first.click()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(CONTRAST) == [] and page.evaluate(NAMELESS) == []
            page.keyboard.press("Escape")
        page.get_by_label("Question", exact=True).fill("Where is the drum?")
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".exchange")).to_have_attribute("data-state", "done")
        assert page.locator(".answer").inner_text() == "It is 1 the drum."
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(CONTRAST) == [] and page.evaluate(NAMELESS) == []
        for box in [one.bounding_box() for one in page.locator(".shown .canvas").all()]:
            assert box is not None and box["width"] >= 300 and box["x"] + box["width"] <= width
        back = "getComputedStyle(document.body).backgroundColor"
        red = int(re.findall(r"\d+", page.evaluate(back))[0])
        assert (red < 60) == (scheme == "dark")
        page.get_by_role("button", name="Colours: as the system").click()  # light
        page.get_by_role("button", name="Colours: light").click()  # dark
        assert int(re.findall(r"\d+", page.evaluate(back))[0]) < 60
