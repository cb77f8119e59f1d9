// A picture on the whole screen, and a box or a point drawn on it: with the pointer, or with the arrow keys.

import { byId, make } from "./dom.js";
import { canvasOf } from "./figure.js";
import { drawMarks, linkMarks } from "./marks.js";
import { DrawnShape } from "./shape.js";

const HINTS = {
  draw: "Drag for a box, click for a point. Or press Box or Point, and use the arrow keys.",
  box: "Drag it or its corners, or use the arrow keys: with Shift they resize it. Enter uses it, Delete takes it away.",
  point: "Drag it, or use the arrow keys. Enter uses it, Delete takes it away.",
};

const whereOf = ({ box, point }) => (box ? { box: [...box] } : { point: [...point] });

/** The dialog. `refer(item, {box} or {point})` is called with what was drawn, in pixels of the picture. */
export class Viewer {
  constructor(refer) {
    this.refer = refer;
    this.dialog = byId("viewer");
    this.stage = byId("stage");
    this.pin = linkMarks(this.stage);
    byId("viewer-close").addEventListener("click", () => this.dialog.close());
    byId("refer").addEventListener("click", () => this.use());
    byId("add-box").addEventListener("click", () => this.middle("box"));
    byId("add-point").addEventListener("click", () => this.middle("point"));
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close(); // beside it
    });
    this.dialog.addEventListener("close", () => {
      this.stage.replaceChildren();
      this.opener?.isConnected && this.opener.focus();
    });
    addEventListener("resize", () => this.fit());
  }

  /** Opens a picture with its marks. `whyNot` says why nothing can be drawn on it, or is "". */
  open(item, title, marks, whyNot = "") {
    this.opener = document.activeElement;
    this.item = item;
    this.marks = marks;
    this.canDraw = whyNot === "";
    this.shape = null;
    byId("viewer-title").textContent = title;
    const size = make("span", { class: "hint" }, ` ${item.width} × ${item.height}`);
    byId("viewer-title").append(size);
    this.canvas = canvasOf(item, `${title}: ${item.name}`);
    this.canvas.classList.toggle("drawable", this.canDraw);
    this.stage.replaceChildren(this.canvas);
    drawMarks(this.canvas.querySelector(".marks"), item, marks, (mark) => this.pick(mark));
    if (this.canDraw) this.canvas.addEventListener("pointerdown", (event) => this.press(event));
    for (const id of ["add-box", "add-point", "refer"]) byId(id).hidden = !this.canDraw;
    this.hint(whyNot || HINTS.draw);
    byId("refer").disabled = true;
    this.dialog.showModal();
    this.fit();
    (this.canDraw ? byId("add-box") : byId("viewer-close")).focus({ focusVisible: false });
  }

  hint(text) {
    byId("viewer-hint").textContent = text;
  }

  /** As large as the room allows. */
  fit() {
    if (!this.dialog.open) return;
    const { clientWidth, clientHeight } = this.stage;
    const scale = Math.min(clientWidth / this.item.width, clientHeight / this.item.height);
    this.canvas.style.width = `${Math.max(1, Math.floor(this.item.width * scale))}px`;
  }

  /** Where a pointer is, in pixels of the picture. */
  at(event) {
    const { left, top, width, height } = this.canvas.getBoundingClientRect();
    const x = ((event.clientX - left) / width) * this.item.width;
    const y = ((event.clientY - top) / height) * this.item.height;
    return [Math.max(0, Math.min(x, this.item.width)), Math.max(0, Math.min(y, this.item.height))];
  }

  /** A press: it moves the shape or one of its corners, or begins a new one. */
  press(event) {
    if (event.button !== 0) return;
    const onMark = this.marks.find((mark) => mark.id === event.target.closest(".mark")?.dataset.mark);
    event.preventDefault(); // the picture is not to be dragged or selected
    const from = this.at(event);
    const change = this.shape?.grip(event.target, from);
    const near = (other) => Math.hypot(other.clientX - event.clientX, other.clientY - event.clientY) < 5;
    let isDragged = false;
    this.canvas.setPointerCapture(event.pointerId);
    const move = (next) => {
      if (!isDragged && near(next)) return;
      isDragged = true;
      if (change) change(this.at(next));
      else this.put({ box: [...from, ...this.at(next)] });
      this.changed();
    };
    const end = (last) => {
      this.canvas.removeEventListener("pointermove", move);
      this.canvas.removeEventListener("pointerup", end);
      this.canvas.removeEventListener("pointercancel", end);
      if (!isDragged && last.type === "pointerup" && !change) this.put(onMark ? whereOf(onMark) : { point: from });
      this.shape?.element.focus();
      this.shape?.tidy();
      this.changed();
    };
    this.canvas.addEventListener("pointermove", move);
    this.canvas.addEventListener("pointerup", end);
    this.canvas.addEventListener("pointercancel", end);
  }

  /** A place that was there before becomes the one that is referred to. */
  pick(mark) {
    if (!this.canDraw) {
      this.pin([mark.id]);
      return;
    }
    this.put(whereOf(mark));
    this.shape.element.focus();
    this.changed();
  }

  /** A new shape in the middle, for the arrow keys. */
  middle(kind) {
    const { width, height } = this.item;
    const box = [0.35 * width, 0.35 * height, 0.65 * width, 0.65 * height];
    this.put(kind === "box" ? { box } : { point: [width / 2, height / 2] });
    this.shape.tidy();
    this.shape.element.focus();
    this.changed();
  }

  put(where) {
    if (this.shape && Boolean(this.shape.box) === Boolean(where.box)) this.shape.set(where);
    else {
      this.shape?.element.remove();
      this.shape = new DrawnShape(this.item, where, (event) => this.key(event));
      this.canvas.append(this.shape.element);
    }
  }

  key(event) {
    if (event.key === "Enter") this.use();
    else if (event.key === "Delete" || event.key === "Backspace") this.clear();
    else if (!this.shape.key(event)) return;
    event.preventDefault();
    this.changed();
  }

  clear() {
    this.shape?.element.remove();
    this.shape = null;
    byId("add-box").focus();
  }

  /** Says what is drawn now. */
  changed() {
    byId("refer").disabled = this.shape === null;
    this.hint(this.shape ? HINTS[this.shape.box ? "box" : "point"] : HINTS.draw);
    byId("viewer-status").textContent = this.shape?.label ?? "Nothing is drawn.";
  }

  use() {
    if (!this.shape) return;
    const where = this.shape.where;
    this.opener = null; // the question gets the focus
    this.dialog.close();
    this.refer(this.item, where);
  }
}
