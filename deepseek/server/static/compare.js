// The same question to the base and to the experts, side by side: same words, seed and sampling.

import { digestOf, paint } from "/static/attribution.js";
import { textOf } from "/static/conversations.js";
import { announce, element } from "/static/dom.js";
import { baseAlone } from "/static/experts.js";

/** @typedef {import("/static/conversations.js").Token} Token */
/** @typedef {import("/static/conversations.js").Answer} Answer */

const MOST_CELLS = 4e6; // of the table that the difference is computed in

/**
 * Which tokens two answers do not share, by a longest common subsequence.
 * @param {string[]} first
 * @param {string[]} second
 * @returns {[boolean[], boolean[]] | null} for each token whether it differs; null if there are too
 *   many to tell
 */
export function difference(first, second) {
  let start = 0;
  while (start < first.length && start < second.length && first[start] === second[start])
    start += 1;
  const left = first.slice(start);
  const right = second.slice(start);
  const differs = [
    first.map((_, place) => place >= start),
    second.map((_, place) => place >= start),
  ];
  if (left.length * right.length > MOST_CELLS) return null;
  const width = right.length + 1;
  const common = new Uint16Array((left.length + 1) * width);
  for (let row = left.length - 1; row >= 0; row -= 1) {
    for (let column = right.length - 1; column >= 0; column -= 1) {
      const at = row * width + column;
      common[at] =
        left[row] === right[column]
          ? common[at + width + 1] + 1
          : Math.max(common[at + width], common[at + 1]);
    }
  }
  for (let row = 0, column = 0; row < left.length && column < right.length;) {
    if (left[row] === right[column]) {
      differs[0][start + row++] = false;
      differs[1][start + column++] = false;
    } else if (common[(row + 1) * width + column] >= common[row * width + column + 1]) row += 1;
    else column += 1;
  }
  return differs;
}

/**
 * The model that an answer is compared with: the base alone, or the server's experts for an answer
 * of the base alone.
 * @param {string} model
 */
export const rivalOf = (model) => (model === baseAlone() ? model.split("+")[0] : baseAlone());

/**
 * Show an answer beside its rival.
 * @param {Answer} answer
 * @param {Answer} rival
 * @param {boolean} whole whether the rival has ended
 */
export function comparison(answer, rival, whole) {
  const baseFirst = rival.model === baseAlone();
  const [left, right] = baseFirst ? [rival, answer] : [answer, rival];
  const differs = whole ? difference(texts(left), texts(right)) : null;
  const digests = { ...answer.digests, ...rival.digests };
  const columns = [left, right].map((one, side) =>
    element(
      "article",
      { "aria-label": one.model },
      element("h4", { textContent: heading(one.model, side) }),
      element(
        "p",
        { className: "compared" },
        ...words(one.tokens, differs?.[side] ?? [], digests),
      ),
    ),
  );
  const made = element(
    "section",
    { className: "comparison", "aria-label": "Comparison with the base" },
    ...columns,
  );
  if (whole)
    made.append(element("p", { className: "quiet", textContent: summary(left, right, differs) }));
  return made;
}

const texts = (answer) => answer.tokens.map(([text]) => text);

const heading = (model, side) =>
  side ? `${model} (with experts)` : `${model.split("+")[0]} (base alone)`;

function words(tokens, differs, digests) {
  return tokens.map(([text, expert], place) => {
    const node = element(differs[place] ? "mark" : "span", { textContent: text });
    if (expert === null) return node;
    node.classList.add("by");
    node.title = expert;
    return paint(node, digestOf(digests, expert));
  });
}

function summary(left, right, differs) {
  if (textOf(left) === textOf(right))
    return "Both answers are the same: no expert changed a token.";
  if (!differs) return "The answers are too long to compare token by token.";
  const changed = differs[1].filter(Boolean).length;
  return `${changed} of the ${right.tokens.length} tokens with experts differ from the base's; they are tinted. Same words, seed and sampling.`;
}

/** Say the outcome. @param {Answer} answer */
export function announceOutcome(answer) {
  announce(`The base's answer: ${textOf(answer.rival)}`);
}
