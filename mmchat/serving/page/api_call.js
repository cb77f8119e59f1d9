// A conversation as a command that asks the server the same.

import { messagesOf } from "./conversation.js";

const SUFFIXES = { "image/jpeg": "jpg", "image/png": "png", "image/webp": "webp", "image/gif": "gif", "audio/mpeg": "mp3" };

/** The name under which the command looks for a file: letters that mean nothing to a shell. */
function fileName(item, i) {
  const suffix = item.name.match(/\.(\w{1,5})$/)?.[1] ?? SUFFIXES[item.blob.type] ?? "bin";
  const stem = item.name.replace(/\.\w{1,5}$/, "").replace(/[^\w-]+/g, "-").replace(/^-+|-+$/g, "");
  return `${stem || `file-${i + 1}`}.${suffix}`;
}

/**
 * The command for exchanges of which the last is asked: {text, files}. The key is $MMCHAT_KEY, and each file is read
 * from the folder in which the command runs.
 */
export async function apiCall(exchanges, model, settings) {
  const items = exchanges.flatMap(({ question }) => question.shown);
  const files = items.map(fileName).map((name, i, all) => (all.indexOf(name) < i ? `${i + 1}-${name}` : name));
  const sign = `@${Math.random().toString(36).slice(2)}@`; // stands for a file; nobody has typed it
  const stand = (item) => `data:${item.blob.type};base64,${sign}${items.indexOf(item)}${sign}`;
  const asked = [...exchanges.slice(0, -1), { ...exchanges.at(-1), answer: { text: "" } }];
  const messages = await messagesOf(asked, settings.system, stand);
  const body = JSON.stringify({ model: model.id, messages, ...settings.decoding }, null, 2);
  // Inside the here-document the shell would read these three; what stands for a file is put in afterwards.
  const quoted = body.replace(/[\\$`]/g, "\\$&").replace(new RegExp(`${sign}(\\d+)${sign}`, "g"), (_, i) => `$(base64 < '${files[i]}' | tr -d '\\n')`);
  const text = [
    `curl ${new URL("v1/chat/completions", location.href)} \\`,
    `  -H "Authorization: Bearer $MMCHAT_KEY" \\`,
    `  -H "Content-Type: application/json" \\`,
    `  --data-binary @- <<JSON`,
    quoted,
    "JSON",
  ].join("\n");
  return { text, files };
}
