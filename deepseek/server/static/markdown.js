// Markdown to elements. Text becomes text nodes and never markup, so a model cannot write HTML into
// the page; links lead to http, https and mailto alone.
//
// Each piece of text is made by `leaf(start, end, className)` from its place in the source, so that
// the caller can mark who wrote it. Supported: paragraphs, headings, fenced code, lists, quotes,
// tables, rules; code, strong, emphasis, strike, links.

import { button, copy, element } from "/static/dom.js";
import { highlight } from "/static/highlight.js";

/**
 * Text, with the places in the source of its characters and of its end.
 * @typedef {{text: string, at: number[]}} Located
 * @typedef {(start: number, end: number, className?: string) => Node[]} Leaf
 */

// No two parts of a form that repeat may match the same text side by side: a line of thousands of
// spaces would take seconds.
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const LANGUAGE = /^[\w+#.-]*/;
const HEADING = /^( {0,3}(#{1,6})[ \t]+)(.*)$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}>[ ]?/;
const ITEM = /^( {0,6})([-*+]|\d{1,9}[.)])[ \t]+/;
/** Nested quotes and lists above this read as paragraphs: a model that loops writes thousands. */
const DEEPEST = 40;
/** The line under a table's head, without the spaces around it. */
const TABLE_LINE = /^\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?$/;

/**
 * @param {string} source
 * @param {Leaf} leaf
 * @returns {DocumentFragment}
 */
export function render(source, leaf) {
  const lines = [];
  let start = 0;
  for (const text of source.split("\n")) {
    lines.push(located(text, start));
    start += text.length + 1;
  }
  const made = document.createDocumentFragment();
  made.append(...blocks(lines, leaf));
  return made;
}

/** @param {string} text @param {number} start @returns {Located} */
const located = (text, start) => ({
  text,
  at: Array.from({ length: text.length + 1 }, (_, place) => start + place),
});

/** @param {Located} piece @returns {Located} */
const part = (piece, from, to = piece.text.length) => ({
  text: piece.text.slice(from, to),
  at: piece.at.slice(from, to + 1),
});

/** Join lines by line breaks. @param {Located[]} lines @returns {Located} */
const joined = (lines) => ({
  text: lines.map((line) => line.text).join("\n"),
  at: lines.flatMap((line) => line.at),
});

const startsBlock = (text) =>
  FENCE.test(text) || HEADING.test(text) || RULE.test(text) || QUOTE.test(text) || ITEM.test(text);

/** @param {Located[]} lines @param {Leaf} leaf @param {number} [depth] levels around it @returns {Node[]} */
function blocks(lines, leaf, depth = 0) {
  if (depth > DEEPEST) return [element("p", {}, ...inline(joined(lines), leaf))];
  const made = [];
  for (let place = 0; place < lines.length;) {
    const { text } = lines[place];
    if (!text.trim()) {
      place += 1;
      continue;
    }
    const reader =
      readers.find(({ form }) => form.test(text)) ??
      (text.includes("|") && TABLE_LINE.test(lines[place + 1]?.text.trim() ?? "")
        ? { read: table }
        : { read: paragraph });
    const { node, next } = reader.read(lines, place, leaf, depth);
    made.push(node);
    place = next;
  }
  return made;
}

const readers = [
  { form: FENCE, read: fence },
  { form: HEADING, read: heading },
  { form: RULE, read: (_lines, place) => ({ node: element("hr"), next: place + 1 }) },
  { form: QUOTE, read: quote },
  { form: ITEM, read: list },
];

function fence(lines, place, leaf) {
  const [, mark, info] = lines[place].text.match(FENCE);
  const [language] = info.trim().match(LANGUAGE);
  let end = place + 1;
  while (end < lines.length && !closes(lines[end].text, mark)) end += 1;
  const code = joined(lines.slice(place + 1, end));
  return { node: codeBlock(code, language, leaf), next: end + 1 };
}

const closes = (text, mark) =>
  text.trim().length >= mark.length && [...text.trim()].every((character) => character === mark[0]);

function codeBlock(code, language, leaf) {
  const shown = highlight(code.text, language).flatMap(([from, to, kind]) =>
    leaves(part(code, from, to), leaf, kind),
  );
  const head = element(
    "div",
    { className: "code-head" },
    element("span", { textContent: language || "code" }),
    button("Copy", () => copy(code.text), { className: "plain", "aria-label": "Copy the code" }),
  );
  const body = element("pre", {
    tabIndex: 0,
    role: "group",
    "aria-label": `Code${language ? `, ${language}` : ""}`,
  });
  body.append(element("code", {}, ...shown));
  return element("div", { className: "code" }, head, body);
}

function heading(lines, place, leaf) {
  const line = lines[place];
  const [, start, marks, text] = line.text.match(HEADING);
  const from = start.length;
  const to = from + withoutClosing(text).length;
  const level = Math.min(6, marks.length + 2); // the page has levels 1 and 2
  return {
    node: element(`h${level}`, {}, ...inline(part(line, from, to), leaf)),
    next: place + 1,
  };
}

/** A heading's text without the marks that may close it. Those that end a word belong to it, as in C#. */
function withoutClosing(text) {
  const trimmed = text.trimEnd();
  let end = trimmed.length;
  while (trimmed[end - 1] === "#") end -= 1;
  return end === 0 || /[ \t]/.test(trimmed[end - 1]) ? trimmed.slice(0, end).trimEnd() : trimmed;
}

function quote(lines, place, leaf, depth) {
  let end = place;
  const inner = [];
  while (end < lines.length && QUOTE.test(lines[end].text)) {
    inner.push(part(lines[end], lines[end].text.match(QUOTE)[0].length));
    end += 1;
  }
  return { node: element("blockquote", {}, ...blocks(inner, leaf, depth + 1)), next: end };
}

function list(lines, place, leaf, depth) {
  const [, indent, mark] = lines[place].text.match(ITEM);
  const numbered = /\d/.test(mark);
  const made = element(numbered ? "ol" : "ul");
  if (numbered) made.start = Number.parseInt(mark, 10);
  let next = place;
  while (next < lines.length) {
    const found = lines[next].text.match(ITEM);
    if (!found || found[1].length < indent.length || /\d/.test(found[2]) !== numbered) break;
    const item = listItem(lines, next, found[0].length);
    made.append(element("li", {}, ...tight(blocks(item.lines, leaf, depth + 1))));
    next = item.next;
  }
  return { node: made, next };
}

/** The lines of one item: the first one, and those that follow and are indented as deep, or continue a paragraph. */
function listItem(lines, place, depth) {
  const inner = [part(lines[place], depth)];
  let next = place + 1;
  for (; next < lines.length; next += 1) {
    const { text } = lines[next];
    const indent = text.match(/^ */)[0].length;
    const blank = !text.trim();
    const goesOn = blank
      ? (lines[next + 1]?.text.match(/^ */)[0].length ?? 0) >= 2 &&
        Boolean(lines[next + 1].text.trim())
      : indent >= Math.min(2, depth) ||
        (!startsBlock(text) && Boolean(lines[next - 1].text.trim()));
    if (!goesOn) break;
    inner.push(part(lines[next], Math.min(indent, depth)));
  }
  while (next < lines.length && !lines[next].text.trim() && ITEM.test(lines[next + 1]?.text ?? ""))
    next += 1;
  return { lines: inner, next };
}

/** An item with one paragraph shows its text without the paragraph's margins. */
const tight = (nodes) =>
  nodes[0]?.nodeName === "P" ? [...nodes[0].childNodes, ...nodes.slice(1)] : nodes;

function table(lines, place, leaf) {
  let end = place + 2;
  while (end < lines.length && lines[end].text.includes("|")) end += 1;
  const row = (line, name) =>
    element("tr", {}, ...cells(line).map((cell) => element(name, {}, ...inline(cell, leaf))));
  const body = lines.slice(place + 2, end).map((line) => row(line, "td"));
  const node = element(
    "table",
    {},
    element("thead", {}, row(lines[place], "th")),
    element("tbody", {}, ...body),
  );
  return {
    node: element(
      "div",
      { className: "wide-table", tabIndex: 0, role: "group", "aria-label": "Table" },
      node,
    ),
    next: end,
  };
}

function cells(line) {
  const made = [];
  let from = line.text.length - line.text.trimStart().length;
  if (line.text[from] === "|") from += 1;
  let stop = line.text.trimEnd().length;
  if (line.text[stop - 1] === "|") stop -= 1;
  for (let place = from; place <= stop; place += 1) {
    if (place < stop && line.text[place] !== "|") continue;
    made.push(part(line, from, place));
    from = place + 1;
  }
  return made.map((cell) =>
    part(cell, cell.text.length - cell.text.trimStart().length, cell.text.trimEnd().length),
  );
}

function paragraph(lines, place, leaf) {
  let end = place + 1;
  while (end < lines.length && lines[end].text.trim() && !startsBlock(lines[end].text)) end += 1;
  return { node: element("p", {}, ...inline(joined(lines.slice(place, end)), leaf)), next: end };
}

const WORD = "[\\p{L}\\p{M}\\p{N}_]";
/** What ends an address without brackets around it, marks and quotes of Chinese and Japanese among it. */
const NO_URL =
  "\\s<>()[\\]\"'`*\\u2018-\\u201f\\u3000-\\u303f\\uff01-\\uff0f\\uff1a-\\uff20\\uff3b-\\uff40\\uff5b-\\uff65";

/** A form of text between underscores, which inside a word are part of it. */
const underscored = (mark, text) =>
  new RegExp(`(?<!${WORD})(${mark})${text}(?<=\\S)${mark}(?!${WORD})`, "uy");

// Forms inside a line, tried at each place in this order. Lengths are limited, so that a long line
// of markers takes no quadratic time.
const INLINE = [
  {
    form: /\\([!-/:-@[-`{-~])/y,
    make: ([, kept], piece, leaf) => leaves(part(piece, 1, 1 + kept.length), leaf),
  },
  {
    form: /(`+)(?!`)([^]{1,1000}?)(?<!`)\1(?!`)/y,
    make: ([, ticks, code], piece, leaf) => [
      element("code", {}, ...leaves(part(piece, ticks.length, ticks.length + code.length), leaf)),
    ],
  },
  {
    form: /\[([^\]\n]{1,500})\]\(((?:https?:\/\/|mailto:)[^\s()<>]{1,1000})\)/y,
    make: ([, text, href], piece, leaf) => [
      link(href, inline(part(piece, 1, 1 + text.length), leaf)),
    ],
  },
  {
    form: new RegExp(`https?://[^${NO_URL}]{1,1000}[^${NO_URL}.,;:!?]`, "y"),
    make: ([href], piece, leaf) => [link(href, leaves(piece, leaf))],
  },
  {
    form: /\*{3}(?=[^\s*])([^*]{1,1000}?)(?<=\S)\*{3}/y,
    make: ([, text], piece, leaf) => [
      element("em", {}, element("strong", {}, ...inline(part(piece, 3, 3 + text.length), leaf))),
    ],
  },
  { form: /(\*\*)(?=\S)([^]{1,1000}?)(?<=\S)\*\*/y, make: wrapped("strong") },
  { form: underscored("__", "(?=\\S)([^]{1,1000}?)"), make: wrapped("strong") },
  { form: /(~~)(?=\S)([^]{1,1000}?)(?<=\S)~~/y, make: wrapped("del") },
  { form: /(\*)(?=[^\s*])([^*]{1,1000}?)(?<=\S)\*/y, make: wrapped("em") },
  { form: underscored("_", "(?=[^\\s_])([^_]{1,1000}?)"), make: wrapped("em") },
];

function wrapped(name) {
  return ([, mark, text], piece, leaf) => [
    element(name, {}, ...inline(part(piece, mark.length, mark.length + text.length), leaf)),
  ];
}

const link = (href, nodes) =>
  element("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...nodes);

/** @param {Located} piece @param {Leaf} leaf @returns {Node[]} */
function inline(piece, leaf) {
  const made = [];
  let plain = 0;
  for (let place = 0; place < piece.text.length;) {
    const next = nextMarker(piece.text, place);
    if (next < 0) break;
    place = next;
    const found = firstForm(piece.text, place);
    if (!found) {
      place += 1;
      continue;
    }
    made.push(...leaves(part(piece, plain, place), leaf));
    const end = place + found.match[0].length;
    made.push(...found.make(found.match, part(piece, place, end), leaf));
    plain = place = end;
  }
  return [...made, ...leaves(part(piece, plain), leaf)];
}

const MARKER = /[\\`[*_~]|https?:/g;

function nextMarker(text, place) {
  MARKER.lastIndex = place;
  return MARKER.exec(text)?.index ?? -1;
}

function firstForm(text, place) {
  for (const { form, make } of INLINE) {
    form.lastIndex = place;
    const match = form.exec(text);
    if (match) return { match, make };
  }
  return null;
}

/** Text nodes of a piece, made of runs that stand together in the source. */
function leaves(piece, leaf, className = "") {
  const made = [];
  for (let from = 0; from < piece.text.length;) {
    let to = from + 1;
    while (to < piece.text.length && piece.at[to] === piece.at[to - 1] + 1) to += 1;
    made.push(...leaf(piece.at[from], piece.at[to - 1] + 1, className));
    from = to;
  }
  return made;
}
