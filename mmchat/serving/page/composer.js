// The question that is being written: its text, what is shown with it, and the places that it refers to.

import { splitQuestion, tokenOf, usedPlaces } from "./conversation.js";
import { byId, icon, iconButton, inBytes, make } from "./dom.js";
import { canvasOf, player } from "./figure.js";
import { drawMarks } from "./marks.js";
import { checkCounts, FileError, readFile } from "./media.js";
import { Recording } from "./recorder.js";

const KEPT = "mmchat.question";
const ACCEPTS = {
  image: ["Picture", "image/*"],
  video: ["Video", "video/*"],
  audio: ["Sound", "audio/*"],
};

export class Composer {
  /** `actions`: send(), stop(), open(item), titleOf(item). */
  constructor(actions) {
    this.actions = actions;
    this.model = { modalities: [], limits: {} };
    this.field = byId("question");
    this.form = byId("composer");
    this.recording = null;
    this.recordings = 0;
    // What was typed outlives a reload of the page; what was shown does not, and its places with it.
    const kept = sessionStorage.getItem(KEPT)?.replace(/\[(box|point) \d+\]/g, "") ?? "";
    this.set({ text: kept, shown: [], places: new Map() });
    this.field.addEventListener("input", () => this.changed());
    this.field.addEventListener("keydown", (event) => this.key(event));
    this.field.addEventListener("beforeinput", (event) => this.deleteToken(event));
    this.form.addEventListener("submit", (event) => event.preventDefault());
    byId("send").addEventListener("click", () => (this.isRunning ? actions.stop() : actions.send()));
  }

  /** What is written now, to be sent or kept. */
  get question() {
    return { text: this.field.value, shown: this.shown, places: this.places };
  }

  get isEmpty() {
    return this.field.value.trim() === "" && this.shown.length === 0;
  }

  set({ text, shown, places }) {
    this.shown = [...shown];
    this.places = new Map(places);
    this.field.value = text;
    this.changed();
  }

  clear() {
    this.set({ text: "", shown: [], places: new Map() });
  }

  /** Takes places out of the text that lie in pictures of a conversation that is over. */
  forgetOthers() {
    for (const place of this.places.values()) {
      if (!this.shown.includes(place.item)) this.field.value = this.field.value.replaceAll(tokenOf(place), "");
    }
    this.changed();
  }

  setRunning(isRunning) {
    this.isRunning = isRunning;
    const send = byId("send");
    send.querySelector("use").setAttribute("href", isRunning ? "#i-stop" : "#i-send");
    send.querySelector(".name").textContent = isRunning ? "Stop" : "Send";
    send.classList.toggle("stopping", isRunning);
    this.changed();
  }

  /** Offers what the model takes. */
  setModel(model) {
    this.model = model;
    const buttons = model.modalities.filter((kind) => ACCEPTS[kind]).map((kind) => this.attachButton(kind));
    if (model.modalities.includes("audio")) {
      buttons.push(iconButton("record", "Record from the microphone", () => this.record(), { short: "Record", id: "record" }));
    }
    byId("attach").replaceChildren(...buttons);
    this.changed();
  }

  attachButton(kind) {
    const [label, accept] = ACCEPTS[kind];
    const input = make("input", { type: "file", accept, multiple: true, hidden: true, "data-kind": kind });
    input.addEventListener("change", async () => {
      await this.attach(input.files);
      input.value = "";
    });
    const icons = { image: "picture", video: "video", audio: "audio" };
    const button = iconButton(icons[kind], `Attach a ${label.toLowerCase()}`, () => input.click(), { short: label });
    return make("span", {}, button, input);
  }

  /** Shows files with the question; those that cannot be used are named, the others stay. */
  async attach(files) {
    const problems = [];
    for (const file of files) {
      try {
        const item = await readFile(file, this.model);
        checkCounts([...this.shown, item], this.model.limits);
        this.shown.push(item);
      } catch (error) {
        if (!(error instanceof FileError)) throw error;
        problems.push(error.message);
      }
    }
    this.problem(problems.join(" "));
    this.changed();
    this.field.focus();
  }

  remove(item) {
    this.shown = this.shown.filter((other) => other !== item);
    for (const place of this.places.values()) {
      if (place.item === item) this.field.value = this.field.value.replaceAll(tokenOf(place), "");
    }
    this.changed();
    this.field.focus();
  }

  /** Puts a place into the text, where the caret is. */
  refer(item, where) {
    // Numbers are not used twice: undo may bring a place back.
    const place = { number: Math.max(0, ...this.places.keys()) + 1, item, ...where };
    this.places.set(place.number, place);
    const { selectionStart: start, selectionEnd: end, value } = this.field;
    const before = /\S$/.test(value.slice(0, start)) && !/[([{"'“‘]$/.test(value.slice(0, start)) ? " " : "";
    const after = /^\w/.test(value.slice(end)) ? " " : "";
    this.insert(before + tokenOf(place) + after);
  }

  /** Types into the field, so that undo takes it back. */
  insert(text) {
    this.field.focus();
    const { selectionStart, selectionEnd } = this.field;
    if (!document.execCommand("insertText", false, text)) this.field.setRangeText(text, selectionStart, selectionEnd, "end");
    this.changed();
  }

  /** A question to begin with; "…" is where the caret goes. */
  suggest(text) {
    this.field.value = text.replace("…", "");
    this.field.focus();
    const caret = text.includes("…") ? text.indexOf("…") : text.length;
    this.field.setSelectionRange(caret, caret);
    this.changed();
  }

  problem(text) {
    byId("problem").textContent = text;
    byId("problem").hidden = text === "";
  }

  key(event) {
    // While a word is composed (IME) Enter belongs to it; on a touch keyboard it is a new line.
    const sends = event.key === "Enter" && !event.shiftKey && !event.isComposing && !matchMedia("(pointer: coarse)").matches;
    if (!sends) return;
    event.preventDefault();
    if (!this.isRunning) this.actions.send();
  }

  /** Backspace behind a place takes the whole of it, and Delete before it. */
  deleteToken(event) {
    const { selectionStart: at, selectionEnd: end, value } = this.field;
    if (at !== end || !["deleteContentBackward", "deleteContentForward"].includes(event.inputType)) return;
    const isBackward = event.inputType === "deleteContentBackward";
    const token = isBackward ? value.slice(0, at).match(/\[(?:box|point) \d+\]$/) : value.slice(at).match(/^\[(?:box|point) \d+\]/);
    if (!token) return;
    event.preventDefault();
    const from = isBackward ? at - token[0].length : at;
    this.field.setSelectionRange(from, from + token[0].length);
    document.execCommand("delete");
    this.changed();
  }

  /** Draws what belongs to the text anew. */
  changed() {
    sessionStorage.setItem(KEPT, this.field.value);
    const parts = splitQuestion(this.question);
    const pieces = parts.map((part) =>
      typeof part === "string" ? part : make("mark", { class: `c${this.colourOf(part)}` }, tokenOf(part)),
    );
    byId("mirror").replaceChildren(...pieces, "\n"); // a last empty line has its height too
    this.drawTray();
    byId("send").disabled = !this.isRunning && this.isEmpty;
    this.actions.changed?.();
  }

  colourOf(place) {
    return usedPlaces(this.question).indexOf(place) % 8;
  }

  /** As marks, for the pictures that they lie in. */
  get marks() {
    return usedPlaces(this.question).map((place, i) => ({
      ...place, id: `draft.${i + 1}`, count: place.number, colour: i % 8, words: "", isAsked: true,
    }));
  }

  drawTray() {
    const marks = this.marks;
    const earlier = new Set(marks.map((mark) => mark.item).filter((item) => !this.shown.includes(item)));
    const tray = byId("tray");
    const old = new Map([...tray.children].map((entry) => [entry.item, entry]));
    // Entries that stay are kept: a sound that plays goes on.
    const entries = [...this.shown, ...earlier].map((item) => old.get(item) ?? this.trayEntry(item));
    if (entries.length !== tray.children.length || entries.some((entry, i) => entry !== tray.children[i])) {
      tray.replaceChildren(...entries);
    }
    for (const entry of entries) {
      const layer = entry.querySelector(".marks");
      if (layer) drawMarks(layer, entry.item, marks, () => this.actions.open(entry.item));
    }
    tray.hidden = entries.length === 0;
  }

  trayEntry(item) {
    const isOwn = this.shown.includes(item);
    const title = item.kind === "image" ? this.actions.titleOf(item) : item.name;
    const remove = iconButton("close", `Remove ${item.name}`, () => this.remove(item), { class: "remove" });
    const facts = item.seconds ? `${Math.round(item.seconds)} s` : inBytes(item.blob.size);
    let face;
    if (item.kind === "image") {
      const canvas = canvasOf(item, "");
      canvas.style.width = `${Math.min(160, Math.max(40, (76 * item.width) / item.height))}px`;
      const label = `Enlarge ${title.toLowerCase()} or mark a place in it`;
      const open = make("button", { type: "button", class: "open", "aria-label": label, title: label, onclick: () => this.actions.open(item) }, icon("mark"));
      canvas.append(open);
      face = canvas;
    } else face = player(item);
    const entry = make("li", { class: `entry ${item.kind}${isOwn ? "" : " earlier"}` }, face);
    if (item.kind !== "image") entry.append(make("span", { class: "hint" }, `${item.name}, ${facts}`));
    if (isOwn) entry.append(remove);
    else entry.append(make("span", { class: "hint" }, title));
    entry.item = item;
    return entry;
  }

  // ---- the microphone ----

  async record() {
    try {
      this.recording = await Recording.start();
    } catch (error) {
      if (!(error instanceof FileError)) throw error;
      this.problem(error.message);
      return;
    }
    this.problem("");
    const time = make("span", { class: "time" }, "0:00");
    const bar = make(
      "div",
      { class: "recording", role: "group", "aria-label": "Recording" },
      make("span", { class: "dot", "aria-hidden": "true" }),
      time,
      make("button", { type: "button", class: "soft", onclick: () => this.endRecording(false) }, "Discard"),
      make("button", { type: "button", class: "soft", id: "recorded", onclick: () => this.endRecording(true) }, "Done"),
    );
    byId("attach").hidden = true;
    byId("attach").after(bar);
    byId("recorded").focus();
    const most = this.model.limits.audio_duration_s;
    this.ticks = setInterval(() => {
      const seconds = Math.floor(this.recording.seconds);
      time.textContent = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
      if (seconds >= most - 1) this.endRecording(true);
    }, 250);
  }

  async endRecording(isKept) {
    const recording = this.recording;
    if (!recording) return;
    this.recording = null;
    clearInterval(this.ticks);
    byId("composer").querySelector(".recording").remove();
    byId("attach").hidden = false;
    this.field.focus();
    if (!isKept) {
      await recording.discard();
      return;
    }
    try {
      const { blob } = await recording.finish();
      await this.attach([new File([blob], `recording-${++this.recordings}.wav`, { type: blob.type })]);
    } catch (error) {
      if (!(error instanceof FileError)) throw error;
      this.problem(error.message);
    }
  }
}
