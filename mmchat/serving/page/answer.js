// An answer as it is read: words linked with what they name, code in boxes, everything else as it was written.
//
// What the model said becomes text nodes only.

import { make } from "./dom.js";
import { nameOf, timeOf } from "./marks.js";

// With the empty lines around it: its box has margins of its own.
const FENCE = /\n*^```[^\n]*\n([\s\S]*?)\n?(?:^```[ \t]*$\n*|(?![\s\S]))/gm;
// While an answer is written the server has not yet said where its places stand; what looks like one shows as a dot.
const NUMBER = String.raw`-?\d+(?:\.\d*)?`;
const WRITTEN_PLACE = new RegExp(
  String.raw`(?:#\d{1,3})?(?:@[\d.]+s)?\[\s*${NUMBER}(?:\s*[,;]\s*${NUMBER})+\s*\]|(?:#\d{1,3})?(?:<loc\d+>)+|` +
    String.raw`(?:#\d{1,3})?\[[\d\s.,;-]*$|#\d{0,3}$|<l?o?c?\d*$`,
  "g",
);

/** The children of an answer that is still being written. */
export function writingNodes(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(WRITTEN_PLACE)) {
    nodes.push(text.slice(end, match.index), make("span", { class: "chip pending", "aria-label": "a place" }));
    end = match.index + match[0].length;
  }
  return [...nodes, text.slice(end), make("span", { class: "caret", "aria-hidden": "true" })];
}

/** The same without places, to be read aloud. */
export const spokenText = (text) => text.replace(WRITTEN_PLACE, "").replace(/\s+/g, " ").trim();

/** The children of a whole answer. `marks` are those of its regions; `follow(ids)` is called on a click. */
export function answerNodes(text, marks, follow) {
  const at = offsets(text);
  const groups = grouped(marks.map((mark) => ({ ...mark, from: at(mark.start), to: at(mark.end) })));
  const pieces = [];
  let before = 0;
  for (const group of groups) {
    pieces.push(...groupPieces(text, before, group, follow));
    before = group.to;
  }
  for (const match of text.matchAll(FENCE)) {
    const [from, to] = [match.index, match.index + match[0].length];
    if (pieces.some((piece) => piece.from < to && from < piece.to)) continue; // places in code stay places
    pieces.push({ from, to, node: make("pre", { tabindex: "0" }, make("code", {}, match[1])) });
  }
  pieces.sort((a, b) => a.from - b.from);
  const nodes = [];
  let end = 0;
  for (const { from, to, node } of pieces) {
    nodes.push(text.slice(end, from), ...[node].flat());
    end = to;
  }
  return [...nodes, text.slice(end)].filter((node) => node !== "");
}

/** The server counts characters, a script counts UTF-16 units: some characters have two. */
function offsets(text) {
  if (!/[\ud800-\udbff]/.test(text)) return (index) => index;
  const units = [0];
  for (const character of text) units.push(units.at(-1) + character.length);
  return (index) => units[Math.min(index, units.length - 1)];
}

/** Marks that stand in the same piece of text, as several boxes in one bracket do. */
function grouped(marks) {
  const groups = [];
  for (const mark of marks.toSorted((a, b) => a.from - b.from)) {
    const last = groups.at(-1);
    if (last && mark.from < last.to) {
      last.marks.push(mark);
      last.to = Math.max(last.to, mark.to);
    } else groups.push({ from: mark.from, to: mark.to, marks: [mark] });
  }
  return groups;
}

function groupPieces(text, before, { from, to, marks }, follow) {
  const ids = marks.map((mark) => mark.id);
  const words = marks[0].words;
  const found = words ? text.slice(before, from).toLowerCase().lastIndexOf(words.toLowerCase()) : -1;
  if (found < 0) return [{ from, to, node: marks.map((mark) => chip(mark, mark.words, follow)) }];
  const start = before + found;
  const link = make(
    "a",
    {
      class: `word c${marks[0].colour}`,
      href: `#${ids[0]}`,
      "data-mark": ids.join(" "),
      "aria-label": `${text.slice(start, start + words.length)}, ${marks.map(nameOf).join(", ")}`,
      onclick: (event) => {
        event.preventDefault();
        follow(ids);
      },
    },
    text.slice(start, start + words.length),
  );
  const chips = marks.map((mark) => {
    const attributes = { class: `chip c${mark.colour}`, "data-mark": mark.id, "aria-hidden": "true" };
    return make("span", attributes, [mark.count, timeOf(mark)].filter(Boolean).join(" "));
  });
  return [
    { from: start, to: start + words.length, node: link },
    { from, to, node: chips },
  ];
}

/** A place in a text with its number, and its words where they do not stand beside it. */
export function chip(mark, words, follow) {
  const attributes = {
    class: `chip c${mark.colour}${mark.isAsked ? " asked" : ""}`,
    href: `#${mark.id}`,
    "data-mark": mark.id,
    "aria-label": [words, nameOf(mark), timeOf(mark)].filter(Boolean).join(", "),
    onclick: (event) => {
      event.preventDefault();
      follow([mark.id]);
    },
  };
  return make("a", attributes, [mark.count, words, timeOf(mark)].filter(Boolean).join(" "));
}
