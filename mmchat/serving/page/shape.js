// The box or point that is being drawn.

import { make } from "./dom.js";
import { place } from "./marks.js";

const CORNERS = ["nw", "ne", "sw", "se"];
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** A box or a point in pixels of `item`, an element that can be focused and moved. */
export class DrawnShape {
  constructor(item, where, onkeydown) {
    this.item = item;
    this.element = make("div", {
      class: `drawn ${where.box ? "box" : "point"}`,
      tabindex: "0",
      role: "application", // the arrow keys are its own, also under a screen reader
      "aria-roledescription": where.box ? "box" : "point",
      onkeydown,
    });
    if (where.box) this.element.append(...CORNERS.map((corner) => make("span", { class: `corner ${corner}`, "data-corner": corner })));
    this.set(where);
  }

  set({ box = null, point = null }) {
    this.box = box;
    this.point = point;
    place(this.element, this.ordered, this.item);
    this.element.style.zIndex = ""; // above all others
    this.element.setAttribute("aria-label", this.label);
  }

  /** With corners in order, whichever way it was dragged. */
  get ordered() {
    if (!this.box) return { point: this.point };
    const [x1, y1, x2, y2] = this.box;
    return { box: [Math.min(x1, x2), Math.min(y1, y2), Math.max(x1, x2), Math.max(y1, y2)] };
  }

  /** In whole pixels; a box has one at least each way. */
  get where() {
    const { box, point } = this.ordered;
    const { width, height } = this.item;
    if (point) return { point: [Math.min(Math.round(point[0]), width - 1), Math.min(Math.round(point[1]), height - 1)] };
    const [x1, y1] = [Math.min(Math.round(box[0]), width - 1), Math.min(Math.round(box[1]), height - 1)];
    return { box: [x1, y1, Math.max(Math.round(box[2]), x1 + 1), Math.max(Math.round(box[3]), y1 + 1)] };
  }

  get label() {
    const { box, point } = this.where;
    if (point) return `Point at ${point[0]}, ${point[1]} pixels`;
    return `Box from ${box[0]}, ${box[1]} to ${box[2]}, ${box[3]} pixels`;
  }

  /** To what is sent. */
  tidy() {
    this.set(this.where);
  }

  /** What a drag that begins on `target` changes, a function of the pointer's place; null for nothing of this shape. */
  grip(target, from) {
    if (!this.element.contains(target)) return null;
    const start = [...(this.box ?? this.point)];
    const corner = target.dataset.corner;
    if (!corner) return ([x, y]) => this.set(this.moved(start, x - from[0], y - from[1]));
    const [column, row] = [corner.endsWith("w") ? 0 : 2, corner.startsWith("n") ? 1 : 3];
    return ([x, y]) => {
      const box = [...start];
      box[column] = x;
      box[row] = y;
      this.set({ box });
    };
  }

  /** Moves by an arrow key, or resizes a box with Shift: by a hundredth of the picture, with Ctrl by one pixel. */
  key(event) {
    const direction = ARROWS[event.key];
    if (!direction || event.altKey || event.metaKey) return false;
    const { width, height } = this.item;
    const step = event.ctrlKey ? 1 : Math.max(1, Math.round(Math.max(width, height) / 100));
    const [dx, dy] = direction.map((one) => one * step);
    if (this.box && event.shiftKey) {
      const [x1, y1, x2, y2] = this.where.box;
      this.set({ box: [x1, y1, Math.max(x1 + 1, Math.min(x2 + dx, width)), Math.max(y1 + 1, Math.min(y2 + dy, height))] });
    } else this.set(this.moved(this.where.box ?? this.where.point, dx, dy));
    return true;
  }

  /** Moved, and kept inside the picture. */
  moved(start, dx, dy) {
    const { width, height } = this.item;
    const keep = (value, low, high) => Math.max(low, Math.min(value, high));
    if (start.length === 2) return { point: [keep(start[0] + dx, 0, width - 1), keep(start[1] + dy, 0, height - 1)] };
    const [x1, y1, x2, y2] = start;
    const [x, y] = [keep(dx, -Math.min(x1, x2), width - Math.max(x1, x2)), keep(dy, -Math.min(y1, y2), height - Math.max(y1, y2))];
    return { box: [x1 + x, y1 + y, x2 + x, y2 + y] };
  }
}
