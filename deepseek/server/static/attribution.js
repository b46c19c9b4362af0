// Who wrote which words: colours, marked text, legend.

import { element } from "/static/dom.js";

/** @typedef {import("/static/conversations.js").Token} Token */
/** @typedef {import("/static/conversations.js").Answer} Answer */

/**
 * The hue of an expert, from the digest of its pack: the same on every page, for as long as the
 * pack stays the same.
 * @param {string} digest in hexadecimal
 */
export const hue = (digest) =>
  Math.round((Number.parseInt(digest.slice(0, 8) || "0", 16) / 2 ** 32) * 360);

/**
 * Give an element the colour of an expert.
 * @param {any} painted
 * @param {string} digest
 */
export function paint(painted, digest) {
  painted.classList.add("expert");
  painted.style.setProperty("--hue", String(hue(digest)));
  return painted;
}

/**
 * Digest of an expert's pack, "" if it is unknown.
 * @param {Record<string, string>} digests
 * @param {string} name which may be one that all objects have, such as `constructor`
 */
export const digestOf = (digests, name) => (Object.hasOwn(digests, name) ? digests[name] : "");

/** A spot in the colour of an expert, or of the base without a digest. @param {string} [digest] */
export function dot(digest) {
  const made = element("span", { className: "dot", "aria-hidden": "true" });
  return digest === undefined ? made : paint(made, digest);
}

/**
 * A function that makes nodes of parts of an answer, in which experts' words are marked.
 * @param {Token[]} tokens
 * @param {Record<string, string>} digests
 */
export function marker(tokens, digests) {
  const ends = [];
  let length = 0;
  for (const [text] of tokens) ends.push((length += text.length));
  const source = tokens.map(([text]) => text).join("");

  /** @param {number} start @param {number} end @param {string} [className] */
  return (start, end, className = "") => {
    const nodes = [];
    let token = firstAbove(ends, start);
    for (let from = start; from < end;) {
      const expert = tokens[token]?.[1] ?? null;
      while (token + 1 < tokens.length && ends[token] < end && tokens[token + 1][1] === expert)
        token += 1;
      const to = Math.min(end, ends[token] ?? end);
      nodes.push(marked(source.slice(from, to), expert, digests, className));
      from = to;
      token += 1;
    }
    return nodes;
  };
}

function marked(text, expert, digests, className) {
  if (expert === null)
    return className
      ? element("span", { className, textContent: text })
      : document.createTextNode(text);
  const span = element("span", { className: `by ${className}`, textContent: text, title: expert });
  return paint(span, digestOf(digests, expert));
}

/** Index of the first number above `value` in an ascending list. */
function firstAbove(ends, value) {
  let low = 0;
  let high = ends.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (ends[middle] > value) high = middle;
    else low = middle + 1;
  }
  return low;
}

/** How many tokens each expert and the base wrote. @param {Answer} answer */
export function legend(answer) {
  const rows = Object.entries(answer.counts)
    .filter(([, count]) => count)
    .sort((a, b) => b[1] - a[1]);
  return element(
    "span",
    { className: "legend" },
    ...rows.map(([name, count]) =>
      element(
        "span",
        {},
        dot(name ? digestOf(answer.digests, name) : undefined),
        `${name || "base"} ${count}`,
      ),
    ),
  );
}
