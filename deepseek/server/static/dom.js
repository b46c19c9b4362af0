// Elements of the page: find, make, announce.

const SVG = "http://www.w3.org/2000/svg";

/**
 * @param {string} id
 * @returns {any} the element with this id
 */
export const byId = (id) => document.getElementById(id);

/**
 * Make an element. `aria-*`, `role` and `data-*` become attributes, everything else properties.
 * @param {string} name
 * @param {Record<string, unknown>} [fields]
 * @param {...(Node | string)} children
 * @returns {any}
 */
export function element(name, fields = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(fields)) {
    if (/^(aria-|data-|role$)/.test(key)) made.setAttribute(key, String(value));
    else made[key] = value;
  }
  made.append(...children);
  return made;
}

/**
 * Make an element of a drawing.
 * @param {string} name
 * @param {Record<string, unknown>} attributes
 * @param {string} [text]
 */
export function drawn(name, attributes, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  made.textContent = text;
  return made;
}

/**
 * @param {string} text what is written on the button
 * @param {() => unknown} act
 * @param {Record<string, unknown>} [fields]
 */
export function button(text, act, fields = {}) {
  const made = element("button", { type: "button", textContent: text, ...fields });
  made.addEventListener("click", act);
  return made;
}

/** Show a sentence about something that went wrong; "" hides it. @param {string} text */
export function notice(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}

/** Let a screen reader say a sentence, when it has finished the one before. @param {string} text */
export function announce(text) {
  byId("live").textContent = text;
}

/**
 * Copy a text to the clipboard. The API for it needs HTTPS or localhost; elsewhere a selection does.
 * @param {string} text
 */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = element("textarea", { value: text, className: "covered" });
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  announce("Copied.");
}

/**
 * Offer a text to the user as a file.
 * @param {string} name
 * @param {string} text
 */
export function download(name, text) {
  const link = element("a", { href: URL.createObjectURL(new Blob([text])), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
}
