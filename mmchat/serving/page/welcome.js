// What stands on the page before the first question: what can be done here, with this model.

import { byId, icon, make } from "./dom.js";

const WAYS = {
  image: [
    ["picture", "Show a picture", "Or several: drop them, paste them, or attach them below."],
    ["mark", "Point at things", "Draw a box or a point on a picture and put it into your question. Places in an answer are drawn the same way."],
  ],
  video: [["video", "Play a video", "Ask what happens in it, and when."]],
  audio: [["record", "Speak or play a sound", "Record a question, or attach a sound to ask about."]],
};
const TEXTS = {
  image: "A picture, a question, and an answer that shows what it means.",
  none: "This model reads text only.",
};

/** Says what this model takes. */
export function drawWelcome({ modalities }) {
  const ways = Object.keys(WAYS).filter((kind) => modalities.includes(kind)).flatMap((kind) => WAYS[kind]);
  byId("ways").replaceChildren(
    ...ways.map(([name, title, text]) => make("li", {}, icon(name), make("h3", {}, title), make("p", {}, text))),
  );
  byId("welcome-title").textContent = ways.length ? "Ask about what you show" : "Ask a question";
  byId("welcome-text").textContent = modalities.includes("image") ? TEXTS.image : ways.length ? "" : TEXTS.none;
}

/** Questions to begin with, {label, text, draws}: in the text "…" is where the user goes on, perhaps by drawing. */
export function examplesFor(shown) {
  const kinds = shown.map((item) => item.kind);
  if (kinds.includes("image")) {
    return [
      { label: "Describe this picture.", text: "Describe this picture." },
      { label: "Where is the …?", text: "Where is the …?" },
      { label: "What is in the box that I draw?", text: "What is in …?", draws: true },
    ];
  }
  if (kinds.includes("video")) return [{ label: "What happens here?", text: "What happens here?" }];
  if (kinds.includes("audio")) return [{ label: "What is said here?", text: "What is said here?" }];
  return [];
}
