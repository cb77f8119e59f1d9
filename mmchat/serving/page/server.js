// The server's interface: which model it has, and answers as they are written.

/** Something went wrong that the user should read. `kind`: unreachable, key, busy, refused or broken. */
export class AskError extends Error {
  constructor(message, kind, status = 0) {
    super(message);
    this.kind = kind;
    this.status = status;
  }
}

const KINDS = { 401: "key", 403: "key", 429: "busy", 503: "busy" };

/** The model that the server has: {id, modalities, limits, temperature}. Throws AskError. */
export async function readModel(key) {
  const response = await send("v1/models", key);
  try {
    const model = (await response.json()).data[0];
    return { id: model.id, ...model.mmchat };
  } catch {
    // Perhaps the login page of something in between.
    throw new AskError(`What answers at ${location.host} is not the server of this page. Reload the page.`, "unreachable");
  }
}

/**
 * Asks, and yields {text} for each piece of the answer, {regions}, {finish} and {usage} as they come.
 *
 * Throws AskError; an AbortError of `signal` passes through.
 */
export async function* ask(body, key, signal) {
  const stream = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await send("v1/chat/completions", key, { body: JSON.stringify(stream), signal });
  let isFinished = false;
  for await (const line of lines(response.body, signal)) {
    if (!line.startsWith("data:")) continue; // blank lines between events, and comments that keep the line open
    const data = line.slice(5).trim();
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new AskError(event.error.message, "refused");
    for (const choice of event.choices ?? []) {
      if (choice.delta?.content) yield { text: choice.delta.content };
      if (choice.delta?.regions) yield { regions: choice.delta.regions };
      if (choice.finish_reason) {
        isFinished = true;
        yield { finish: choice.finish_reason };
      }
    }
    if (event.usage) yield { usage: event.usage };
  }
  if (!isFinished) throw new AskError("The connection broke off before the answer was complete.", "broken");
}

async function send(path, key, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    const method = options.body ? "POST" : "GET";
    response = await fetch(path, { method, headers, cache: "no-store", credentials: "same-origin", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new AskError(
      `The server at ${location.host} cannot be reached. It may have been stopped, or the network is down.`,
      "unreachable",
    );
  }
  if (response.ok) return response;
  throw new AskError(await reason(response), KINDS[response.status] ?? "refused", response.status);
}

/** What the server says is wrong; it answers with OpenAI's error object. */
async function reason(response) {
  const wait = response.headers.get("Retry-After");
  const after = wait && /^\d+$/.test(wait) ? ` Try again in ${wait} s.` : "";
  try {
    const { error } = await response.json();
    if (error?.message) return error.message + after;
  } catch {
    // Not JSON: something between the page and the server answered.
  }
  return `The server refused with status ${response.status} and gave no reason.${after}`;
}

async function* lines(body, signal) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const parts = (rest + value).split(/\r?\n/);
      rest = parts.pop();
      yield* parts;
    }
  } catch (error) {
    if (signal.aborted || error.name === "AbortError") throw new DOMException("stopped", "AbortError");
    throw new AskError("The connection to the server was lost before the answer was complete.", "broken");
  } finally {
    reader.cancel().catch(() => {});
  }
  if (rest) yield rest;
}
