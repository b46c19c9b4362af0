"""Redact secrets: replace keys, tokens and passwords by `<REDACTED:kind>` before training.

Patterns come from detect-secrets if it has a precise one that takes linear time. They are applied
to whole texts instead of line by line, which is 50 times faster. Its entropy detectors are not
used, since they would remove hashes and test data from code.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class

from deepseek.data.text.document import Document, conversation


@dataclass(frozen=True)
class Rule:
    """A pattern for one kind of secret.

    Attributes:
        kind: name in the placeholder.
        hints: substrings of which a matching text has at least one; their absence saves the slow
            search.
        pattern: the regular expression.
        group: group of the pattern that holds the secret; default: 0, the whole match.
        is_code: returns whether a match is code and not a secret; default: all matches are
            secrets.
    """

    kind: str
    hints: tuple[str, ...]
    pattern: re.Pattern[str]
    group: int = 0
    is_code: Callable[[str], bool] | None = None


TAIL = "[A-Za-z0-9_-]*"
"""The rest of a token that is longer than its published pattern."""

DETECTORS: dict[str, Any] = get_mapping_from_secret_type_to_class()


def plugin_rules(kind: str, hints: str, secret_type: str, group: int = 0) -> list[Rule]:
    """Return the rules of a detect-secrets plugin.

    Services lengthen their tokens without notice, so a pattern without a group is extended to the
    whole token; detect-secrets only needs to find it.

    Args:
        kind: name in the placeholder.
        hints: hints separated by spaces, see `Rule`.
        secret_type: detect-secrets' name of the plugin.
        group: group that holds the secret, if a pattern has it; default: 0.
    """
    rules = []
    for pattern in DETECTORS[secret_type]().denylist:
        own_group = min(group, pattern.groups)
        # The look-ahead at the end of some patterns is false within a longer token.
        extended_pattern = pattern.pattern.removesuffix(r"(?!\w)") + TAIL
        matcher = pattern if own_group else re.compile(extended_pattern, pattern.flags)
        rules.append(Rule(kind, tuple(hints.split()), matcher, own_group))
    return rules


def custom_rule(kind: str, hints: str, pattern: str, group: int = 0) -> Rule:
    """Return a rule of ours. It matches ASCII only, as text without spaces may adjoin a secret.

    Args:
        kind: name in the placeholder.
        hints: hints separated by spaces, see `Rule`.
        pattern: the regular expression.
        group: group of the pattern that holds the secret; default: 0, the whole match.
    """
    return Rule(kind, tuple(hints.split()), re.compile(pattern, re.ASCII), group)


PRIVATE_KEY = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
    r"(?:[\s\S]{0,16000}?-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
    # Cut off: headers of an encrypted key, then what is left of it.
    r"|(?:\s*(?:Proc-Type|DEK-Info|Version|Comment): [^\n]*\n)*[A-Za-z0-9+/=\s\\]*)"
)
IS_SET_TO = r"""
    (?:\\?["'`])? \]? (?:\s{0,9}:\s{0,9}[\w.&\[\]|][\w.&\[\]| ]{0,40})?
    \s{0,9} (?::=|=>|=|:) \s{0,9} [bruf]{0,2}\\?["'`]
"""
"""What stands between a name and its quoted value: the end of a subscript or of a quoted key, a
type, the sign, the prefix of a string; quotes may be escaped. The bounds keep the time linear.
"""

VALUE = r"((?=[^\"'`\s]*\d)(?=[^\"'`\s]*[a-z])[\w+/=.~@!$^&*\#%?():,;\[\]{}<>|-]{BOUNDS})\\?[\"'`]"
"""A value with letters and digits; `BOUNDS` stands for its length. Plain words do not match."""

OF_A_PLACE = r"""
    (?:[_-]?(?:base|v?\d{1,3}|prod(?:uction)?|stag(?:e|ing)|dev(?:elopment)?|test(?:ing)?|live
    |local|default|main|primary|secondary|old|new|current|previous|backup)){0,2}
"""
"""What may follow the name of a secret, as in `API_KEY_V2` and `apiKeyProd`. Further words make it
the name of something else, as in `password_file`.
"""

ASSIGNED = re.compile(
    r"(?:secret|secret[_-]?(?:access[_-]?)?key|api[_-]?key|access[_-]?key|auth[_-]?token"
    r"|access[_-]?token|private[_-]?key)"
    + OF_A_PLACE
    + IS_SET_TO
    + VALUE.replace("BOUNDS", "16,200"),
    re.IGNORECASE | re.VERBOSE,
)
"""A quoted value that is assigned to a name such as `api_key`."""

PASSWORD = re.compile(
    "passw(?:or)?d" + OF_A_PLACE + IS_SET_TO + VALUE.replace("BOUNDS", "8,200"),
    re.IGNORECASE | re.VERBOSE,
)
"""The same for passwords, which people choose and which are shorter."""

MARK_OF_CODE = re.compile(r"[():,;\[\]{}<>|]")
"""Marks that are common in code; a value without any is a secret."""

FORM = re.compile(
    r"://|^(?:arn|vault):"
    r"|\{\{|\$\{|\#\{|\{%|<%|\{\d?\}|\{\$?[A-Za-z_][\w.:!\[\]()|-]*\}|%\([A-Za-z_]\w+\)[dfrs]"
    r"|</?[A-Za-z_][\w:/-]*>|(?:^|[:/])\$\([\w./-]+\)|\$env:|(?:^|[:,;/|])%[ds](?:$|[:,;/|])"
    r"|\(\?[:=!<P]|\.[*+][?)$]?|[\w\])]\{\d+,?\d*\}|\[\^?[^\[\]]*\w-\w[^\[\]]*\]"
)
"""What occurs in an address, a reference to a store of secrets, a format string, a template, a
shell's substitution or a regular expression, line by line.
"""

PLAIN_WORD = re.compile(
    r"(?:\d{1,6}[a-zA-Z]?|\d{0,3}(?:[A-Z]?[a-z]+|[A-Z]+)\d{0,4}[a-z]*"
    r"|\d{0,3}[A-Z]?[a-z]{2,}(?:[A-Z]{1,4}[a-z]+|[A-Z]{2,4})+\d{0,4})"
)
"""A number, or a word of names: `sha256`, `b64decode`, `SecretStr`, with digits in one place."""

AWS_UNQUOTED = r"(?i)aws_secret_access_key[\"']?\s*[=:]\s*([a-z0-9/+]{40})(?![a-z0-9/+=])"
"""Without quotes, as in `~/.aws/credentials`; with quotes it is a published pattern."""

JWT = r"(?<![\w-])(?:[\w-]{0,64}?-)?(eyJ[\w-]{10,}\.eyJ[\w-]{10,}(?:\.[\w-]+)?)"
"""Header, payload and signature. The first two are JSON objects in base64, so they begin with
`eyJ`, which alone occurs in names such as `keyJson.getString`.

A token may stand behind a hyphen, as in `session-eyJ...` and in a removed line of a diff. The bound
keeps the time of `eyJ-eyJ-` linear.
"""

OPENAI = r"sk-[\w-]{20,200}?T3BlbkFJ[\w-]{20,}"
"""With `OpenAI` in base64 at its middle. The bound keeps the time of `sk-sk-sk-` linear."""

NPM_SETTING = r"/:_authToken=\s*(npm_.+|[A-Fa-f0-9-]{36})"
"""As in `~/.npmrc`, after the address of a registry."""

ADDRESS = re.compile(
    r"""://[^:/?#\[\]@!$&'()*+,;=\s]*:(?!\{+[^{}@]*\}+@|%s@|\$)"""
    r"""((?:[^/?#\[\]$'"`()<>*,;\s]|\$(?![{(]))+)@"""
)
"""The password in an address, up to the last `@` before the host: people write one into a password
as it is. Placeholders of format strings, shells and documentation do not match.
"""

BEGIN = r"(?:(?<!\w)|(?<=\\[nrt])|(?<=%[0-9A-F]{2}))"
"""The start of a word, or of what follows an escaped line end or a percent-encoded character."""

AWS_RARE_ID = BEGIN + r"(?:ABIA|ACCA)(?=[A-Z]{0,15}[2-7])[A-Z0-9]{16}"
"""Id of a key of AWS with a digit, as most have that are random in base 32. Without one, DNA in
capitals would match.
"""

GITLAB_PREFIXES = "glpat- gldt- glft- glsoat- glrt- GR1348941 glcbt- glimt- glptt- glagent- gloas-"


def is_code(value: str) -> bool:
    """Return whether a quoted value is not a secret but a call, a type, a name or a template.

    Brackets and colons are common in both. Code has plain words between them and closes its
    brackets, unless a quote in it ends the value before; a secret mixes letters, digits and signs.
    """
    if not MARK_OF_CODE.search(value):
        return False
    if FORM.search(value):
        return True
    if re.search(r"\w[!@$%^~]|(?:[!@#$%^&*~+].*){3}", value):
        return False
    is_balanced = all(value.count(left) == value.count(right) for left, right in ("()", "[]", "{}"))
    words = re.findall("[A-Za-z0-9]+", value)
    return (is_balanced or value[-1] in "([{,:=") and all(map(PLAIN_WORD.fullmatch, words))


RULES = (
    Rule("private-key", ("PRIVATE KEY",), PRIVATE_KEY),
    custom_rule(
        "aws-key", "AKIA ASIA A3T", BEGIN + r"(?:A3T[A-Z0-9]|AKIA|ASIA)[A-Z0-9]{16}" + TAIL
    ),
    custom_rule("aws-key", "ABIA ACCA", AWS_RARE_ID + TAIL),
    *(rule for rule in plugin_rules("aws-key", "aws AWS Aws", "AWS Access Key", 1) if rule.group),
    custom_rule("aws-key", "aws_secret AWS_SECRET", AWS_UNQUOTED, 1),
    *plugin_rules("azure-key", "AccountKey=", "Azure Storage Account access key"),
    *plugin_rules("github-token", "ghp_ gho_ ghu_ ghs_ ghr_", "GitHub Token"),
    custom_rule("github-token", "github_pat_", r"github_pat_\w{22,}"),
    *plugin_rules("gitlab-token", GITLAB_PREFIXES, "GitLab Token"),
    custom_rule("google-key", "AIza ya29.", BEGIN + r"(?:AIza[\w-]{35,}|ya29\.[\w-]{20,})"),
    custom_rule("anthropic-key", "sk-ant-", BEGIN + r"sk-ant-[\w-]{20,}"),
    custom_rule("openai-key", "sk-", BEGIN + r"sk-(?:proj|svcacct|admin)-[\w-]{20,}"),
    custom_rule("openai-key", "T3BlbkFJ", OPENAI),
    custom_rule("huggingface-token", "hf_", BEGIN + r"hf_[A-Za-z0-9]{34,}"),
    *plugin_rules("slack-token", "xox hooks.slack.com", "Slack Token"),
    custom_rule("slack-token", "xapp-", BEGIN + r"xapp-\d-\w{5,40}-\d{5,20}-\w{20,}"),
    *plugin_rules("stripe-key", "_live_", "Stripe Access Key"),
    *plugin_rules("sendgrid-key", "SG.", "SendGrid API Key"),
    *plugin_rules("mailchimp-key", "-us", "Mailchimp Access Key"),
    *plugin_rules("square-token", "sq0csp-", "Square OAuth Secret"),
    *plugin_rules("pypi-token", "pypi-AgE", "PyPI Token"),
    custom_rule("npm-token", "_authToken", NPM_SETTING, 1),
    custom_rule("npm-token", "npm_", BEGIN + r"npm_[A-Za-z0-9]{36,}"),
    *plugin_rules("discord-token", ".", "Discord Bot Token"),
    *plugin_rules("telegram-token", ":", "Telegram Bot Token"),
    custom_rule("jwt", "eyJ", JWT, 1),
    Rule("password", ("://",), ADDRESS, 1),
    Rule("password", ('"', "'", "`"), ASSIGNED, 1, is_code),
    Rule("password", ("pass", "PASS", "Pass"), PASSWORD, 1, is_code),
)


def redact(text: str) -> tuple[str, Counter[str]]:
    """Return the text with every secret replaced by `<REDACTED:kind>`, and the number of secrets of
    each kind.
    """
    counts: Counter[str] = Counter()
    for rule in RULES:
        if any(hint in text for hint in rule.hints):
            text, count = replace_matches(rule, text)
            counts[rule.kind] += count
    return text, +counts


def replace_matches(rule: Rule, text: str) -> tuple[str, int]:
    """Return the text with the secret part of each match of one rule replaced, and their number."""
    parts = []
    end = 0
    count = 0
    for match in rule.pattern.finditer(text):
        start, stop = match.span(rule.group)
        if start < 0:  # the group is not part of this match
            continue
        if rule.is_code and rule.is_code(text[start:stop]):
            continue
        parts += [text[end:start], f"<REDACTED:{rule.kind}>"]
        end = stop
        count = count + 1
    return "".join([*parts, text[end:]]), count


def redact_document(document: Document) -> tuple[Document, Counter[str]]:
    """Return the document with secrets redacted (in a conversation, message by message), and the
    number of secrets of each kind.
    """
    if document.kind != "messages":
        text, counts = redact(document.text)
        return (replace(document, text=text) if counts else document), counts
    total: Counter[str] = Counter()
    messages = []
    for message in document.messages():
        content, counts = redact(message["content"])
        messages.append({**message, "content": content})
        total.update(counts)
    return (
        conversation(messages, document.name, document.name, document.time) if total else document
    ), total
