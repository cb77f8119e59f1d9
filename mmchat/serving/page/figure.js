// What is shown, in the conversation: pictures that can be enlarged and marked, players for videos and sounds.

import { icon, make } from "./dom.js";
import { drawMarks } from "./marks.js";

// On the screen; a smaller picture is enlarged up to FACTOR times so that its boxes can be told apart.
const MAX_WIDTH = 760;
const MAX_HEIGHT = 520;
const AGAIN_HEIGHT = 320; // of a picture that was shown before
const FACTOR = 8;

/** The figure of a picture, {element, draw(marks)}. `open()` enlarges it; `pick(mark)` is called on a mark. */
export function pictureFigure(item, title, isAgain, open, pick) {
  const scale = Math.min(MAX_WIDTH / item.width, (isAgain ? AGAIN_HEIGHT : MAX_HEIGHT) / item.height, FACTOR);
  const canvas = canvasOf(item, `${title}: ${item.name}`);
  canvas.style.width = `${Math.max(24, Math.round(item.width * scale))}px`;
  canvas.querySelector("img").addEventListener("click", open);
  const enlarge = make(
    "button",
    { type: "button", class: "quiet", "aria-label": `Enlarge ${title.toLowerCase()} or mark a place in it`, onclick: open },
    icon("mark"),
    "Mark a place",
  );
  const element = make("figure", { class: "picture" }, canvas, make("figcaption", {}, make("span", {}, title), enlarge));
  return { element, draw: (marks) => drawMarks(canvas.querySelector(".marks"), item, marks, pick) };
}

/** A picture with a layer for marks above it, in its own proportions. */
export function canvasOf(item, alt) {
  const image = make("img", { src: item.url, alt, width: item.width, height: item.height, draggable: "false" });
  const canvas = make("div", { class: "canvas" }, image, make("div", { class: "marks" }));
  canvas.style.aspectRatio = `${item.width} / ${item.height}`;
  return canvas;
}

/** A player for a video or a sound. */
export function player(item) {
  const attributes = { src: item.url, controls: true, preload: "metadata", "aria-label": item.name };
  return make(item.kind, { ...attributes, class: `player ${item.kind}` });
}
