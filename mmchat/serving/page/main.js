// The chat page: a conversation with the model of the server that it came from. All of it lives in this tab's memory.

import { apiCall } from "./api_call.js";
import { Composer } from "./composer.js";
import { emptyAnswer, isHeard, itemsOf, messagesOf, picturesOf } from "./conversation.js";
import { announce, byId, inBytes, make } from "./dom.js";
import { checkCounts, dataUri, FileError } from "./media.js";
import { ask, AskError, readModel } from "./server.js";
import { Settings } from "./settings.js";
import { ExchangeView } from "./thread.js";
import { Viewer } from "./viewer.js";
import { drawWelcome, examplesFor } from "./welcome.js";

let model = null;
let exchanges = [];
let running = null; // {exchange, abort, ended} while an answer is written
let editing = null; // {exchange, draft}: the question that is edited, and what was in the field before
let count = 0;

const views = new Map();
const composer = new Composer({ send, stop, open: (item) => openPicture(item), titleOf, changed: drawExamples });
const settings = new Settings(() => loadModel());
const viewer = new Viewer((item, where) => composer.refer(item, where));

// ---- the model ----

async function loadModel() {
  try {
    model = await readModel(settings.key);
  } catch (error) {
    if (!(error instanceof AskError)) throw error;
    byId("model").textContent = "";
    if (error.kind === "key") settings.open(error.message);
    if (error.kind === "busy") setTimeout(loadModel, 3000); // the model is being loaded
    notice(error.message, error.kind === "key" ? ["Enter the key", () => settings.open()] : ["Try again", loadModel]);
    return false;
  }
  notice("");
  byId("model").textContent = model.id;
  byId("model").title = model.id;
  composer.setModel(model);
  settings.setModel(model);
  drawWelcome(model);
  return true;
}

function notice(text, [label, onclick] = []) {
  const button = label ? make("button", { type: "button", class: "soft", onclick }, label) : null;
  byId("notice").replaceChildren(...(text ? [make("span", {}, text), button].filter(Boolean) : []));
  byId("notice").hidden = text === "";
}

// ---- asking ----

async function send() {
  if (running || composer.isEmpty) return;
  if (!model && !(await loadModel())) return;
  if (running || composer.isEmpty) return; // pressed twice while the model was looked for
  const question = composer.question;
  if (editing) exchanges.splice(exchanges.indexOf(editing.exchange)).forEach(drop);
  const exchange = { id: `e${++count}`, question, answer: emptyAnswer(), pictures: [], videos: [] };
  exchanges.push(exchange);
  editing = null;
  composer.problem("");
  composer.clear();
  notice("");
  await answer(exchange);
}

/** Asks the question of the last exchange. */
async function answer(exchange) {
  const before = exchange.answer;
  const asked = [...exchanges.filter((one) => one !== exchange && isHeard(one)), exchange];
  exchange.answer = emptyAnswer();
  exchange.pictures = picturesOf(asked);
  exchange.videos = itemsOf(asked, "video");
  views.get(exchange)?.restart();
  const abort = new AbortController();
  running = { exchange, abort };
  composer.setRunning(true);
  draw();
  toEnd(true);
  announce("The model is answering.");
  running.ended = receive(exchange, asked, abort.signal);
  await running.ended;
  running = null;
  composer.setRunning(false);
  if (exchange.answer.text === "" && exchange.answer.state !== "done") unanswered(exchange, before);
  const wasAtEnd = isAtEnd();
  draw();
  if (wasAtEnd) toEnd();
  if (exchange.answer.problem === null) views.get(exchange)?.speak();
}

async function receive(exchange, asked, signal) {
  const { answer } = exchange;
  try {
    checkCounts(asked.flatMap(({ question }) => question.shown), model.limits);
    const messages = await messagesOf(asked, settings.system, dataUri);
    const body = { model: model.id, messages, ...settings.decoding };
    checkLength(JSON.stringify(body).length);
    for await (const event of ask(body, settings.key, signal)) {
      if (event.text) {
        answer.text += event.text;
        answer.state = "writing";
        drawSoon(exchange);
      }
      for (const name of ["regions", "finish", "usage"]) if (event[name]) answer[name] = event[name];
    }
    answer.state = "done";
  } catch (error) {
    if (error.name === "AbortError") answer.state = "stopped";
    else {
      // Whatever it was, the page goes on.
      const isKnown = error instanceof AskError || error instanceof FileError;
      answer.state = "failed";
      answer.problem = { message: isKnown ? error.message : `This page failed: ${error.message}`, kind: error.kind };
    }
  }
}

function checkLength(length) {
  const most = model.limits.body_bytes;
  if (length > most) {
    const message = `The conversation has grown to ${inBytes(length)} with all it shows; this server takes ${inBytes(most)} at most.`;
    throw new AskError(`${message} Begin a new chat, or edit the question to show less.`, "refused");
  }
}

/** Nothing came: an answer that was there before stays, and a question that was stopped goes back to be changed. */
function unanswered(exchange, before) {
  const { state, problem } = exchange.answer;
  if (before.text !== "") exchange.answer = { ...before, problem };
  else if (state === "stopped" && composer.isEmpty) {
    drop(exchanges.pop());
    composer.set(exchange.question);
    announce("Stopped. The question is back in the field.");
  }
}

async function stop() {
  running?.abort.abort();
  await running?.ended;
}

function retry(exchange) {
  if (!running && exchange === exchanges.at(-1)) answer(exchange);
}

// ---- editing ----

async function edit(exchange) {
  await stop();
  if (!exchanges.includes(exchange)) return; // it was stopped, and went back by itself
  editing = { exchange, draft: editing?.draft ?? composer.question };
  composer.set(exchange.question);
  draw();
  byId("question").focus();
}

function stopEditing() {
  composer.set(editing.draft);
  editing = null;
  draw();
  byId("question").focus();
}

async function newChat() {
  await stop();
  if (editing) stopEditing();
  const last = exchanges;
  exchanges = [];
  last.forEach(drop);
  composer.forgetOthers();
  draw();
  if (last.length) {
    notice("A new chat.", ["Bring the last one back", () => {
      exchanges.splice(0).forEach(drop);
      exchanges = last;
      notice("");
      draw();
      toEnd(true);
    }]);
  }
  byId("question").focus();
}

// ---- pictures ----

/** The exchanges that the question in the field follows. */
function earlier() {
  const end = editing ? exchanges.indexOf(editing.exchange) : exchanges.length;
  return exchanges.slice(0, end);
}

function titleOf(item) {
  const pictures = [...new Set(picturesOf([...exchanges, { question: composer }]))];
  return `Picture ${pictures.indexOf(item) + 1}`;
}

/** Enlarges a picture: one of a conversation with the marks of its exchange, else with those of the question. */
function openPicture(item, marks = composer.marks) {
  const heard = picturesOf(earlier().filter((exchange) => isHeard(exchange) || exchange === running?.exchange));
  let whyNot = "";
  if (!heard.includes(item) && !composer.shown.includes(item)) {
    whyNot = editing ? "This picture comes after the question that is edited." : "The model has not seen this picture: its question was not answered.";
  }
  viewer.open(item, titleOf(item), marks, whyNot);
}

// ---- drawing ----

function draw() {
  for (const exchange of exchanges) {
    const view = views.get(exchange);
    if (view) view.update();
    else views.set(exchange, new ExchangeView(exchange, actions));
    views.get(exchange).element.classList.toggle("leaving", editing !== null && !earlier().includes(exchange));
  }
  const elements = exchanges.map((exchange) => views.get(exchange).element);
  const thread = byId("thread");
  for (const element of [...thread.children]) if (!elements.includes(element)) element.remove();
  thread.append(...elements.filter((element) => !element.isConnected));
  byId("welcome").hidden = exchanges.length > 0;
  byId("editing").hidden = editing === null;
  drawExamples();
}

function drop(exchange) {
  views.get(exchange)?.element.remove();
  views.delete(exchange);
}

const actions = {
  open: openPicture,
  retry,
  edit,
  call: showCall,
  askForKey: () => settings.open(),
  titleOf,
  isLast: (exchange) => exchange === exchanges.at(-1),
};

let frame = 0;

/** The text as far as it has come, once a frame however many pieces came. */
function drawSoon(exchange) {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    if (exchange.answer.state !== "writing" || !views.has(exchange)) return;
    const wasAtEnd = isAtEnd();
    views.get(exchange).element.dataset.state = "writing";
    views.get(exchange).write();
    if (wasAtEnd) toEnd();
  });
}

const page = document.documentElement;
const isAtEnd = () => innerHeight + scrollY >= page.scrollHeight - 80;

function toEnd(isAlways = false) {
  if (isAlways || !isAtEnd()) scrollTo({ top: page.scrollHeight, behavior: "instant" });
}

function drawExamples() {
  if (!model) return;
  const isFresh = exchanges.length === 0 && byId("question").value.trim() === "";
  const examples = isFresh ? examplesFor(composer.shown) : [];
  const buttons = examples.map((example) =>
    make("button", { type: "button", class: "soft", onclick: () => suggest(example) }, example.label),
  );
  byId("examples").replaceChildren(...buttons);
  byId("examples").hidden = buttons.length === 0;
}

function suggest({ text, draws }) {
  composer.suggest(text);
  if (draws) openPicture(composer.shown.find((item) => item.kind === "image"));
}

async function showCall(exchange) {
  const asked = exchanges.slice(0, exchanges.indexOf(exchange) + 1).filter((one) => one === exchange || isHeard(one));
  const { text, files } = await apiCall(asked, model, settings);
  byId("call-text").textContent = text;
  byId("call-hint").textContent = files.length
    ? `Run it where these files lie: ${files.join(", ")}. The key is read from MMCHAT_KEY.`
    : "The key is read from MMCHAT_KEY.";
  byId("call-copied").textContent = "";
  byId("call").showModal();
  await copyCall();
}

async function copyCall() {
  try {
    await navigator.clipboard.writeText(byId("call-text").textContent);
    byId("call-copied").textContent = "Copied.";
  } catch {
    byId("call-copied").textContent = "The browser did not allow copying: select the text.";
  }
}

// ---- the page as a whole ----

const hasFiles = (event) => event.dataTransfer?.types.includes("Files") && !document.querySelector("dialog[open]");

addEventListener("dragover", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  byId("dropping").hidden = false;
});
addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) byId("dropping").hidden = true;
});
addEventListener("drop", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  byId("dropping").hidden = true;
  composer.attach([...event.dataTransfer.files]);
});
addEventListener("paste", (event) => {
  const { files, types } = event.clipboardData;
  // Some programs copy a text together with a picture of it: the text is what was meant.
  if (files.length === 0 || types.includes("text/plain") || document.querySelector("dialog[open]")) return;
  event.preventDefault();
  composer.attach([...files]);
});
addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (composer.recording) composer.endRecording(false);
  else if (running) stop();
  else if (editing) stopEditing();
});
byId("new-chat").addEventListener("click", newChat);
byId("stop-editing").addEventListener("click", stopEditing);
byId("call-copy").addEventListener("click", copyCall);

loadModel();
