// What was asked and answered, and how it is put to the server.
//
// A shown item: {id, kind: "image" | "video" | "audio", blob, url, name, format, width, height, seconds}.
// A question: {text, shown: [items], places: Map of number to {number, item, box | point}}. In its text a place stands
// as "[box 1]" or "[point 2]", so that it can be typed, read aloud, cut and pasted as any other word.
// An exchange: {id, question, answer, pictures, videos}, the last two of all the conversation as the answer counts
// them. An answer: {text, regions, state, problem, finish, usage}; its `state` is one
// of waiting, writing, done, stopped, failed.

const TOKEN = /\[(box|point) (\d+)\]/g;

/** How a place is written in a question. */
export const tokenOf = (place) => `[${place.box ? "box" : "point"} ${place.number}]`;

/** A question's text in order: strings, and the places that stand between them. */
export function splitQuestion({ text, places }) {
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(TOKEN)) {
    const place = places.get(Number(match[2]));
    if (!place || tokenOf(place) !== match[0]) continue; // typed, but nothing was drawn: it stays text
    parts.push(text.slice(end, match.index), place);
    end = match.index + match[0].length;
  }
  return [...parts, text.slice(end)].filter((part) => part !== "");
}

/** The places that stand in the text, in its order, each once. */
export function usedPlaces(question) {
  return [...new Set(splitQuestion(question).filter((part) => typeof part !== "string"))];
}

export const emptyAnswer = () => ({ text: "", regions: [], state: "waiting", problem: null, finish: null, usage: null });

/** Whether the model has this exchange in mind: one that failed before a word was said is not part of the chat. */
export const isHeard = (exchange) => exchange.answer.text !== "" || exchange.answer.state === "done";

/** Pictures of some exchanges in reading order, as regions count them. */
export const picturesOf = (exchanges) => itemsOf(exchanges, "image");

/** The same of any kind. */
export function itemsOf(exchanges, kind) {
  return exchanges.flatMap(({ question }) => question.shown.filter((item) => item.kind === kind));
}

/** OpenAI's messages. `encode` makes the data URI (or a stand-in) of a shown item; it may be asynchronous. */
export async function messagesOf(exchanges, system, encode) {
  const pictures = picturesOf(exchanges);
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const { question, answer } of exchanges) {
    const shown = await Promise.all(question.shown.map(async (item) => mediaPart(item, await encode(item))));
    const said = splitQuestion(question).map((part) => (typeof part === "string" ? textPart(part) : region(part, pictures)));
    const content = [...shown, ...said];
    messages.push({ role: "user", content: content.every(({ type }) => type === "text") ? question.text : content });
    if (answer.text !== "") messages.push({ role: "assistant", content: answer.text });
  }
  return messages;
}

const textPart = (text) => ({ type: "text", text });

function region(place, pictures) {
  const where = place.box ? { box: place.box } : { point: place.point };
  return { type: "region", image: pictures.indexOf(place.item), ...where };
}

function mediaPart(item, uri) {
  if (item.kind === "image") return { type: "image_url", image_url: { url: uri } };
  if (item.kind === "video") return { type: "video_url", video_url: { url: uri } };
  return { type: "input_audio", input_audio: { data: uri.slice(uri.indexOf(",") + 1), format: item.format } };
}

/** The regions of an exchange with their words: those of the question first, as they are coloured. */
export function marksOf(exchange) {
  const { question, answer, pictures, videos } = exchange;
  const asked = usedPlaces(question).map((place) => ({ ...place, isAsked: true, words: "" }));
  const itemOf = (one) => (one.video === undefined ? pictures[one.image] : videos[one.video]) ?? null;
  const said = answer.regions.map((one) => ({ ...one, item: itemOf(one), words: one.text ?? "" }));
  // What a single place was said to be is its name: 'What is in [box 1]?' 'A drum.'
  if (asked.length === 1 && said.length === 0 && answer.state === "done" && answer.text.length <= 40) {
    asked[0].words = answer.text.replace(/[\s.]+$/, "");
  }
  return [...asked, ...said].map((mark, i) => ({ ...mark, id: `${exchange.id}.${i + 1}`, count: i + 1, colour: i % 8 }));
}
