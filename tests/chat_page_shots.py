"""Pictures of the chat page: python -m tests.chat_page_shots CHECKPOINT PICTURE OUT --ask "..." --ask "..."

Serves the checkpoint, asks the questions about the picture in a headless browser, and writes chat_page_desk.png and
chat_page_phone.png to the folder OUT. In a question, <box:x1,y1,x2,y2> is a box in pixels of the picture, which is
drawn there with the pointer, as a user does it.
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect

from tests.browser import launch, watched_page
from tests.serving import as_process

QUESTIONS = ("Describe this picture.", "What is in <box:300,220,420,340>?")
SCREENS = {
    "desk": {"width": 720, "height": 900},
    "phone": {"width": 360, "height": 760, "device_scale_factor": 1.5, "is_mobile": True, "has_touch": True},
}
_BOX = re.compile(r"<box:([\d.]+),([\d.]+),([\d.]+),([\d.]+)>")
_NUM_EVEN = 24
_MAX_BYTES = 200_000  # of a written picture, which has as many colours as fit


def draw_box(page: Page, box: list[float]) -> None:
    """Draws a box on the conversation's last picture, or on the one that is shown with the question."""
    page.get_by_role("button", name="Enlarge picture").last.click()
    page.wait_for_function("document.querySelector('#stage img').complete")
    stage, image = page.locator("#stage .canvas").bounding_box(), page.locator("#stage img")
    assert stage is not None
    scale = stage["width"] / float(image.get_attribute("width") or 1)
    x1, y1, x2, y2 = (value * scale for value in box)
    page.mouse.move(stage["x"] + x1, stage["y"] + y1)
    page.mouse.down()
    page.mouse.move(stage["x"] + x1 + 30, stage["y"] + y1 + 30)
    page.mouse.move(stage["x"] + x2, stage["y"] + y2)
    page.mouse.up()
    page.get_by_role("button", name="Use in the question").click()


def ask(page: Page, question: str) -> None:
    """Types a question, draws its boxes, sends it and waits for the answer."""
    page.get_by_label("Question", exact=True).fill("")
    end = 0
    for match in _BOX.finditer(question):
        page.keyboard.type(question[end : match.start()])
        draw_box(page, [float(value) for value in match.groups()])
        end = match.end()
    page.keyboard.type(question[end:])
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".exchange").last).to_have_attribute("data-state", "done", timeout=300_000)


def take(page: Page, url: str, picture: Path, questions: list[str]) -> Image.Image:
    """The whole conversation on the screen."""
    page.set_default_timeout(120_000)
    page.goto(url)
    page.locator("input[data-kind=image]").set_input_files(picture)
    for question in questions:
        ask(page, question)
    page.evaluate("document.activeElement.blur()")
    # As high as the conversation is, so that nothing of it is scrolled away.
    height = page.evaluate("document.documentElement.scrollHeight")
    assert page.viewport_size is not None
    page.set_viewport_size({"width": page.viewport_size["width"], "height": height})
    return Image.open(io.BytesIO(page.screenshot(animations="disabled")))


def small_png(image: Image.Image) -> bytes:
    """With up to 256 colours: a photograph in full colour takes five times the bytes. Raises ValueError."""
    image = image.convert("RGB")
    counted = sorted(image.getcolors(image.width * image.height) or [], reverse=True)
    # The page's own even colours stay as they are, the photograph shares what is left.
    even = [part for _, colour in counted[:_NUM_EVEN] for part in colour]
    for num_colours in (256 - _NUM_EVEN, 128, 96, 64, 48, 32):
        palette, out = Image.new("P", (1, 1)), io.BytesIO()
        palette.putpalette(even + image.quantize(num_colours).getpalette()[: 3 * num_colours])
        image.quantize(palette=palette, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
        if len(out.getvalue()) <= _MAX_BYTES:
            return out.getvalue()
    raise ValueError(f"found {image.width} x {image.height} pixels; wanted fewer, for {_MAX_BYTES} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description="Takes pictures of the chat page.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ask", action="append", metavar="QUESTION", help=f"default: {' '.join(QUESTIONS)}")
    args = parser.parse_args()
    with as_process(args.checkpoint) as (url, _), launch() as browser:
        for name, screen in SCREENS.items():
            with watched_page(browser, **screen) as watched:
                image = take(watched.page, url, args.picture, args.ask or list(QUESTIONS))
            path = args.out / f"chat_page_{name}.png"
            path.write_bytes(small_png(image))
            print(f"{path}: {image.width} x {image.height}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
