// What the user sets: how answers are chosen, the system text, the key, light or dark.

import { byId } from "./dom.js";

const FIELDS = ["temperature", "max-tokens", "system", "key"];
const KEPT = "mmchat.settings";
const THEMES = ["system", "light", "dark"];

/** Settings live in this tab; only light or dark is remembered beyond it. */
export class Settings {
  /** `changed()` is called when the dialog was closed. */
  constructor(changed) {
    this.dialog = byId("settings");
    const kept = JSON.parse(sessionStorage.getItem(KEPT) ?? "{}");
    for (const id of FIELDS) byId(id).value = kept[id] ?? "";
    byId("open-settings").addEventListener("click", () => this.open());
    this.dialog.addEventListener("close", () => {
      const values = Object.fromEntries(FIELDS.map((id) => [id, byId(id).value]));
      sessionStorage.setItem(KEPT, JSON.stringify(values));
      changed();
    });
    byId("theme").addEventListener("click", () => this.nextTheme());
    this.showTheme();
  }

  /** Opens the dialog; with a problem of the key, at the key. */
  open(keyProblem = "") {
    byId("key-problem").textContent = keyProblem;
    byId("key-problem").hidden = keyProblem === "";
    if (!this.dialog.open) this.dialog.showModal();
    (keyProblem ? byId("key") : byId("temperature")).focus();
  }

  /** Shows what holds where nothing is set. */
  setModel({ temperature, limits }) {
    byId("temperature").placeholder = temperature;
    byId("max-tokens").max = limits.new_tokens;
    byId("max-tokens").placeholder = `${limits.default_new_tokens} (at most ${limits.new_tokens})`;
  }

  get key() {
    return byId("key").value.trim();
  }

  get system() {
    return byId("system").value.trim();
  }

  /** The server's names and values of what was set; what was not stays the server's choice. */
  get decoding() {
    const values = { temperature: byId("temperature").valueAsNumber, max_tokens: byId("max-tokens").valueAsNumber };
    return Object.fromEntries(Object.entries(values).filter(([, value]) => Number.isFinite(value)));
  }

  get theme() {
    return document.documentElement.dataset.theme ?? "system";
  }

  nextTheme() {
    const next = THEMES[(THEMES.indexOf(this.theme) + 1) % THEMES.length];
    if (next === "system") {
      delete document.documentElement.dataset.theme;
      localStorage.removeItem("mmchat.theme");
    } else {
      document.documentElement.dataset.theme = next;
      localStorage.setItem("mmchat.theme", next);
    }
    this.showTheme();
  }

  showTheme() {
    const names = { system: "as the system", light: "light", dark: "dark" };
    const label = `Colours: ${names[this.theme]}`;
    byId("theme").setAttribute("aria-label", label);
    byId("theme").title = label;
  }
}
