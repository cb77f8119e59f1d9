// Elements made from script. Text becomes text nodes only: nothing here reads a string as HTML.

/** An element with attributes, listeners (`onclick`) and children; null children are left out. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** One of the drawings at the top of index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A button with a drawing and a `short` name; on a narrow screen only the drawing is shown. */
export function iconButton(name, label, onclick, { short = label, ...attributes } = {}) {
  return make(
    "button",
    { type: "button", class: "quiet", "aria-label": label, title: label, onclick, ...attributes },
    icon(name),
    make("span", { class: "wide" }, short),
  );
}

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/** Says something to screen readers, without haste. */
export function announce(text) {
  byId("announcer").textContent = text;
}

/** 1234567 as "1.2 MB". */
export function inBytes(size) {
  if (size < 1024) return `${size} bytes`;
  const unit = size < 1024 ** 2 ? ["kB", 1024] : ["MB", 1024 ** 2];
  const value = size / unit[1];
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} ${unit[0]}`;
}
