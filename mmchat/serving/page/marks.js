// Boxes and points on a picture, and the link between them and the words that name them.
//
// A mark: {id, count, colour, item, box | point, words, isAsked}. Whatever belongs to it, on the picture or in a text,
// has its id in data-mark; under the pointer or the focus all of them light up together. A place in a video has a time, or
// is a tube of timed boxes: it is not drawn, its words lead to that time.

import { make } from "./dom.js";

/** "box 2", as a screen reader says it. */
export const nameOf = (mark) => `${mark.tube ? "track" : mark.box ? "box" : "point"} ${mark.count}`;

/** When a place in a video is there, "" for a place in a picture. */
export function timeOf({ time_s: time, tube }) {
  if (tube) return `${tube[0][0]} to ${tube.at(-1)[0]} s`;
  return time === undefined ? "" : `at ${time} s`;
}

/** Puts the marks that lie in `item` into `layer`, which covers its picture. `pick(mark)` is called on a click. */
export function drawMarks(layer, item, marks, pick) {
  const own = marks.filter((mark) => mark.item === item);
  layer.replaceChildren(...own.map((mark) => markButton(mark, item, pick)));
  layer.classList.toggle("crowded", own.length > 6);
}

function markButton(mark, item, pick) {
  const label = mark.words ? `${mark.count} ${mark.words}` : `${mark.count}`;
  const shape = mark.box ? "box" : "point";
  const attributes = {
    type: "button",
    class: `mark ${shape} c${mark.colour}${mark.isAsked ? " asked" : ""}`,
    "data-mark": mark.id,
    "aria-label": [nameOf(mark), mark.words, mark.isAsked ? "of the question" : ""].filter(Boolean).join(", "),
    onclick: () => pick(mark),
  };
  const button = make("button", attributes, make("span", { class: "mark-label" }, label));
  button.classList.add(...place(button, mark, item));
  return button;
}

/** Puts an element where the mark lies; returns the classes that keep its label on the picture. */
export function place(element, mark, { width, height }) {
  const [x1, y1, x2, y2] = mark.box ?? [...mark.point, ...mark.point];
  const share = (value, whole) => `${(100 * Math.max(0, Math.min(value, whole))) / whole}%`;
  element.style.left = share(x1, width);
  element.style.top = share(y1, height);
  if (mark.box) {
    element.style.width = share(x2 - x1, width);
    element.style.height = share(y2 - y1, height);
    // A small box inside a large one must stay within reach; points lie above all boxes.
    element.style.zIndex = String(Math.round(1000 * (1 - ((x2 - x1) * (y2 - y1)) / (width * height))));
  }
  return [...(y1 < 0.12 * height ? ["at-top"] : []), ...(x1 > 0.55 * width ? ["at-right"] : [])];
}

/** Lights up everything in `root` that belongs to these marks, and nothing else. */
export function light(root, ids) {
  for (const element of root.querySelectorAll("[data-mark]")) {
    element.classList.toggle("lit", element.dataset.mark.split(" ").some((id) => ids.includes(id)));
  }
  root.classList.toggle("has-lit", ids.length > 0);
}

/** Makes marks and words of `root` follow the pointer and the focus. Returns pin(ids), which holds marks lit. */
export function linkMarks(root) {
  let pinned = [];
  const idsOf = (event) => event.target.closest?.("[data-mark]")?.dataset.mark.split(" ");
  for (const type of ["pointerover", "focusin"]) {
    root.addEventListener(type, (event) => light(root, idsOf(event) ?? pinned));
  }
  root.addEventListener("pointerleave", () => light(root, pinned));
  root.addEventListener("focusout", () => light(root, pinned));
  return (ids) => {
    pinned = ids.join() === pinned.join() ? [] : ids;
    light(root, pinned);
  };
}
