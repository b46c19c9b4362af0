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
 * @param {() => unknown} act until a promise of it has ended, further clicks do nothing
 * @param {Record<string, unknown>} [fields]
 */
export function button(text, act, fields = {}) {
  const made = element("button", { type: "button", textContent: text, ...fields });
  let acting = false;
  made.addEventListener("click", async () => {
    if (acting) return;
    acting = true;
    try {
      await act();
    } finally {
      acting = false;
    }
  });
  return made;
}

/**
 * Whether a key belongs to an input method, which takes Enter and Escape for its own suggestions.
 * Safari tells of the last key only by its code.
 * @param {KeyboardEvent} event
 */
export const composing = (event) => event.isComposing || event.keyCode === 229;

const nameOf = (control) => control.getAttribute("aria-label") ?? control.textContent;

/**
 * Put other children in a place. If the focus was on one of the old, it goes to the control with the
 * same name, or else to the composer, so that the keyboard does not begin again at the top.
 * @param {any} place
 * @param {any[]} children
 * @param {boolean} [inOrder] whether old and new children correspond by their order, as controls of
 *   several have the same name
 */
export function refill(place, children, inOrder = false) {
  const focused = document.activeElement;
  const number = [...place.children].findIndex((child) => child.contains(focused));
  place.replaceChildren(...children);
  if (number < 0) return;
  const near = inOrder ? place.children[number] : place;
  const controls = [...(near?.querySelectorAll("button, input, summary") ?? [])];
  refocus(
    controls.find((one) => one.nodeName === focused.nodeName && nameOf(one) === nameOf(focused)),
    focused,
  );
}

/** Focus what stands for a control that has left the page. */
function refocus(counterpart, lost) {
  const folded = counterpart?.closest("details");
  const before = lost.closest("details"); // one that has left the page too
  if (folded && before) folded.open = before.open;
  counterpart?.focus();
  if (document.activeElement === document.body) byId("words").focus();
}

/** Show a sentence about something that went wrong; "" hides it. @param {string} text */
export function notice(text) {
  if (byId("notice").textContent === text) return; // a screen reader would say it again
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
