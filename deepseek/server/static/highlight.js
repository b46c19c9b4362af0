// Colours for code: comments, strings, numbers, keywords and calls, told apart by their form.

const KEYWORDS = new Set(
  (
    "abstract and as assert async await bool break case catch char class const continue def default defer del do done double " +
    "elif else elseif end enum esac except export extends extern false False fi final finally float fn for from func function go goto " +
    "if impl implements import in instanceof int interface is lambda let local long loop match mod mut namespace new nil None nonlocal " +
    "not null or package pass private protected pub public raise ref return self select short static string struct super switch " +
    "then this throw trait true True try type typedef typeof undefined union unsafe unsigned use using var virtual void when where while " +
    "with yield SELECT FROM WHERE INSERT UPDATE DELETE CREATE TABLE JOIN GROUP ORDER BY AND OR NOT NULL VALUES INTO SET"
  ).split(" "),
);

const HASH_COMMENTS = "#[^\\n]*";
const SLASH_COMMENTS = "//[^\\n]*|/\\*[^]*?(?:\\*/|$)";
const DASH_COMMENTS = "--[^\\n]*";
const MARKUP_COMMENTS = "<!--[^]*?(?:-->|$)";
const STRINGS =
  "\"\"\"[^]*?(?:\"\"\"|$)|'''[^]*?(?:'''|$)|\"(?:\\\\.|[^\"\\\\\\n])*\"?|'(?:\\\\.|[^'\\\\\\n])*'?|`(?:\\\\.|[^`\\\\])*`?";

/** Comments of a language; an unknown one has those of the most. @param {string} language */
function comments(language) {
  if (
    /^(py|python|sh|bash|shell|zsh|console|rb|ruby|ya?ml|toml|r|perl|make|makefile|dockerfile|ini)$/.test(
      language,
    )
  )
    return HASH_COMMENTS;
  if (/^(sql|lua|hs|haskell|ada)$/.test(language)) return DASH_COMMENTS;
  if (/^(html?|xml|svg|markdown|md)$/.test(language)) return MARKUP_COMMENTS;
  if (language === "php") return `${SLASH_COMMENTS}|${HASH_COMMENTS}`;
  return language ? SLASH_COMMENTS : `${SLASH_COMMENTS}|${HASH_COMMENTS}`;
}

/**
 * Split code into parts with a class each, "" for plain ones.
 * @param {string} code
 * @param {string} language as written behind the fence
 * @returns {[number, number, string][]} start, end and class of each part, in order
 */
export function highlight(code, language) {
  const form = new RegExp(
    `(${comments(language.toLowerCase())})|(${STRINGS})|(\\b\\d[\\w.]*)|([A-Za-z_]\\w*)`,
    "g",
  );
  const parts = [];
  let plain = 0;
  for (const match of code.matchAll(form)) {
    const [text, comment, string, number, word] = match;
    const called = word !== undefined && code[match.index + text.length] === "(";
    let kind = called ? "code-call" : "";
    if (comment) kind = "code-comment";
    else if (string) kind = "code-string";
    else if (number) kind = "code-number";
    else if (KEYWORDS.has(word)) kind = "code-keyword";
    if (!kind) continue;
    if (match.index > plain) parts.push([plain, match.index, ""]);
    plain = match.index + text.length;
    parts.push([match.index, plain, kind]);
  }
  if (plain < code.length) parts.push([plain, code.length, ""]);
  return parts;
}
