// One question and its answer on the page.

import { answerNodes, chip, spokenText, writingNodes } from "./answer.js";
import { marksOf, splitQuestion } from "./conversation.js";
import { announce, iconButton, make } from "./dom.js";
import { pictureFigure, player } from "./figure.js";
import { linkMarks } from "./marks.js";

/**
 * The view of an exchange.
 *
 * `actions`: open(item, marks), retry(exchange), edit(exchange), call(exchange), askForKey(), and what is asked when it is
 * needed: titleOf(item), isLast(exchange).
 */
export class ExchangeView {
  constructor(exchange, actions) {
    this.exchange = exchange;
    this.actions = actions;
    this.isRaw = false;
    this.read = 0; // characters of the answer that were read aloud
    this.figures = new Map();
    this.players = new Map();
    this.says = make("div", { class: "says" });
    this.shown = make("div", { class: "shown" });
    this.text = make("div", { class: "answer", tabindex: "-1" });
    this.after = make("div", { class: "after" });
    const asked = make("div", { class: "asked-part" }, make("h2", { class: "unseen" }, "Question"), this.says);
    const answered = make("div", { class: "answered-part" }, make("h2", { class: "unseen" }, "Answer"), this.text, this.after);
    this.element = make("article", { class: "exchange", id: exchange.id }, asked, this.shown, answered);
    this.pin = linkMarks(this.element);
    for (const item of exchange.question.shown) this.show(item);
    this.update();
  }

  /** Adds a picture, a video or a sound below the question. */
  show(item) {
    if (item.kind !== "image") {
      this.players.set(item, player(item));
      this.shown.append(this.players.get(item));
      return;
    }
    const open = () => this.actions.open(item, this.marks);
    const isAgain = !this.exchange.question.shown.includes(item);
    const figure = pictureFigure(item, this.actions.titleOf(item), isAgain, open, (mark) => this.pin([mark.id]));
    this.figures.set(item, figure);
    this.shown.append(figure.element);
    this.shown.classList.toggle("several", this.figures.size > 1);
  }

  /** Another answer to the same question begins. */
  restart() {
    this.isRaw = false;
    this.read = 0;
    this.pin([]);
  }

  get marks() {
    return marksOf(this.exchange);
  }

  /** Draws everything anew, after a change of state. */
  update() {
    const { exchange, marks } = this;
    for (const { item } of marks) if (item && !this.figures.has(item) && !this.players.has(item)) this.show(item);
    for (const figure of this.figures.values()) figure.draw(marks);
    this.says.replaceChildren(...this.question(marks));
    const { answer } = exchange;
    this.element.dataset.state = answer.state;
    if (this.isRaw) this.text.replaceChildren(make("pre", { class: "raw", tabindex: "0" }, answer.text));
    else if (answer.state === "writing") this.write();
    else if (answer.state === "waiting") this.text.replaceChildren(make("span", { class: "caret", "aria-hidden": "true" }));
    else {
      const said = marks.filter((mark) => !mark.isAsked);
      this.text.replaceChildren(...answerNodes(answer.text, said, (ids) => this.follow(ids)));
    }
    this.after.replaceChildren(...this.problem(), ...this.notes(), this.tools());
  }

  /** The text so far, while it is written; whole sentences are read aloud, not each token. */
  write() {
    const { text } = this.exchange.answer;
    this.text.replaceChildren(...writingNodes(text));
    const end = Math.max(...[". ", "! ", "? ", "\n"].map((mark) => text.lastIndexOf(mark) + 1));
    if (end - this.read > 80) this.speak(end);
  }

  /** Reads aloud what has come since the last time. */
  speak(end = this.exchange.answer.text.length) {
    announce(spokenText(this.exchange.answer.text.slice(this.read, end)));
    this.read = end;
  }

  /** Holds marks lit, and brings the first one's picture into sight; a video goes to its time. */
  follow(ids) {
    this.pin(ids);
    const { item, time_s: time, tube } = this.marks.find(({ id }) => id === ids[0]);
    const video = this.players.get(item);
    if (video) video.currentTime = time ?? tube?.[0][0] ?? 0;
    video?.scrollIntoView({ block: "nearest" });
    const mark = [...this.shown.querySelectorAll(".mark")].find((one) => one.dataset.mark === ids[0]);
    mark?.closest(".canvas").scrollIntoView({ block: "nearest" });
  }

  question(marks) {
    const { question } = this.exchange;
    const parts = splitQuestion(question).map((part) => {
      if (typeof part === "string") return part;
      const mark = marks.find((one) => one.isAsked && one.number === part.number);
      return chip(mark, "", (ids) => this.follow(ids));
    });
    const edit = iconButton("edit", "Edit the question", () => this.actions.edit(this.exchange), { short: "Edit" });
    const says = parts.length ? make("div", { class: "bubble" }, ...parts) : null;
    return [says, edit].filter(Boolean);
  }

  problem() {
    const { problem } = this.exchange.answer;
    if (!problem) return [];
    const again = this.actions.isLast(this.exchange);
    return [
      make(
        "div",
        { class: "trouble", role: "alert" },
        make("p", {}, problem.message),
        make(
          "p",
          { class: "row" },
          again ? button("Try again", () => this.actions.retry(this.exchange)) : null,
          problem.kind === "key" ? button("Enter the key", () => this.actions.askForKey()) : null,
          button("Edit the question", () => this.actions.edit(this.exchange)),
        ),
      ),
    ];
  }

  notes() {
    const { answer } = this.exchange;
    const notes = [];
    if (answer.state === "stopped") notes.push("Stopped.");
    if (answer.state === "done" && answer.text === "") notes.push("The model said nothing.");
    if (answer.finish === "length") notes.push("Cut off: the answer has reached the longest length that is set.");
    const lost = this.marks.filter((mark) => mark.item === null).length;
    if (lost > 0) notes.push(`Places that lie in no picture of this conversation: ${lost}.`);
    return notes.map((note) => make("p", { class: "hint" }, note));
  }

  tools() {
    const { exchange, actions } = this;
    const tools = make("div", { class: "answer-tools" });
    if (["waiting", "writing"].includes(exchange.answer.state)) return tools;
    if (exchange.answer.text) {
      tools.append(iconButton("copy", "Copy the answer", (event) => this.copy(event.currentTarget), { short: "Copy" }));
      const raw = iconButton("raw", "Raw text", () => this.toggleRaw(), { "aria-pressed": String(this.isRaw) });
      tools.append(raw);
    }
    if (actions.isLast(exchange) && !exchange.answer.problem) {
      tools.append(iconButton("retry", "Answer again", () => actions.retry(exchange), { short: "Again" }));
    }
    tools.append(iconButton("code", "Copy as an API call", () => actions.call(exchange), { short: "API call", "aria-haspopup": "dialog" }));
    return tools;
  }

  toggleRaw() {
    this.isRaw = !this.isRaw;
    this.update();
    this.after.querySelector("[aria-pressed]").focus();
  }

  async copy(pressed) {
    const name = pressed.querySelector(".wide");
    try {
      await navigator.clipboard.writeText(this.exchange.answer.text);
      name.textContent = "Copied";
      announce("Copied");
    } catch {
      name.textContent = "Not allowed";
    }
    setTimeout(() => (name.textContent = "Copy"), 2000);
  }
}

const button = (label, onclick) => make("button", { type: "button", class: "soft", onclick }, label);
