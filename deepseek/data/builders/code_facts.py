"""Extract facts from code: docstrings, signatures, defaults, constants, comments and locations. The
code is never run.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deepseek.data.builders.facts import (
    Check,
    Fact,
    first_sentence,
    shortened,
    shown_path,
    tokens_of,
)
from deepseek.data.builders.functions import parsed
from deepseek.data.text.document import Document

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef

LONGEST_VALUE = 60
"""Maximum characters of a default or constant that is worth asking for."""

MOST_NAMES = 10
"""Maximum arguments, methods or exceptions in one answer."""


@dataclass(frozen=True)
class Definition:
    """A function, method or class.

    Attributes:
        name: name in questions, `Class.method` for a method.
        node: its syntax tree.
        method: whether its first argument is `self` or `cls`; default: False.
    """

    name: str
    node: FunctionNode | ast.ClassDef
    method: bool = False


def code_facts(document: Document) -> Iterator[Fact]:
    """Yield the facts of a code file: from the syntax tree of Python, from the comments before
    definitions in other languages.
    """
    place = shown_path(document.name)
    tree = parsed(document.text) if document.name.endswith(".py") else None
    if tree is None:
        yield from comment_facts(document.text, place)
        return
    overview = ast.get_docstring(tree)
    paragraph = opening(overview or "")
    if shortened(paragraph):
        yield Fact("module", f"`{place}`", shortened(paragraph), (first_sentence(paragraph),))
    yield from constant_facts(tree, place)
    for definition in definitions(tree):
        yield from definition_facts(definition, place)


def definitions(tree: ast.Module) -> Iterator[Definition]:
    """Yield public functions and classes, and their public methods, without tests and nested
    functions.
    """
    for node in tree.body:
        if isinstance(node, FunctionNode | ast.ClassDef) and is_public(node.name):
            yield Definition(node.name, node)
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, FunctionNode) and is_public(inner.name):
                    yield Definition(
                        f"{node.name}.{inner.name}", inner, method=not is_static(inner)
                    )


def is_public(name: str) -> bool:
    """Return whether a name is public and not that of a test."""
    return not name.startswith(("_", "test", "Test"))


def is_static(node: FunctionNode) -> bool:
    """Return whether a method is a static method."""
    return any(
        isinstance(decorator, ast.Name) and decorator.id == "staticmethod"
        for decorator in node.decorator_list
    )


def definition_facts(definition: Definition, place: str) -> Iterator[Fact]:
    """Yield the facts of one definition."""
    node = definition.node
    subject = f"`{definition.name}`"
    docstring = ast.get_docstring(node) or ""
    paragraph = opening(docstring)
    if shortened(paragraph):
        yield Fact("purpose", subject, shortened(paragraph), (first_sentence(paragraph),), place)
    if "." not in definition.name:  # methods are in the same file as their class
        yield location(subject, place)
    if isinstance(node, ast.ClassDef):
        yield from class_facts(node, subject, place)
    else:
        yield from call_facts(node, definition, place)
    for argument, description in described_arguments(docstring, takes_fields(node)):
        if shortened(description):
            check = (first_sentence(description),)
            yield Fact("argument", subject, shortened(description), check, place, argument=argument)


def takes_fields(node: FunctionNode | ast.ClassDef) -> bool:
    """Return whether a call takes the fields of a class: it is a dataclass without `__init__`."""
    if not isinstance(node, ast.ClassDef):
        return False
    decorators = [
        decorator.func if isinstance(decorator, ast.Call) else decorator
        for decorator in node.decorator_list
    ]
    is_dataclass = any(unparse(decorator).split(".")[-1] == "dataclass" for decorator in decorators)
    names = [inner.name for inner in node.body if isinstance(inner, FunctionNode)]
    return is_dataclass and "__init__" not in names


def location(subject: str, place: str) -> Fact:
    """Return the fact where a name is defined; an answer needs only the path's last two parts."""
    return Fact(
        "location",
        subject,
        f"{subject} is defined in `{place}`.",
        ("/".join(place.split("/")[-2:]),),
    )


def names_fact(kind: str, subject: str, verb: str, names: list[str], place: str) -> Iterator[Fact]:
    """Yield the fact that a subject has some names, unless there are none or too many to list.

    Args:
        kind: kind of the fact.
        subject: what has the names.
        verb: words between the subject and the names.
        names: the names.
        place: where it is stated.
    """
    if 0 < len(names) <= MOST_NAMES:
        sentence = f"{subject} {verb} {join_names(names)}."
        yield Fact(kind, subject, sentence, tuple(names), place)


def class_facts(node: ast.ClassDef, subject: str, place: str) -> Iterator[Fact]:
    """Yield bases, methods, defaults of fields, and the arguments of `__init__`."""
    bases = [unparse(base) for base in node.bases]
    if bases and all(bases):
        yield Fact(
            "bases", subject, f"{subject} inherits from {join_names(bases)}.", tuple(bases), place
        )
    functions = [inner for inner in node.body if isinstance(inner, FunctionNode)]
    methods = list(dict.fromkeys(inner.name for inner in functions if is_public(inner.name)))
    yield from names_fact("methods", subject, "has the methods", methods, place)
    for field in node.body:
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and is_public(field.target.id)
        ):
            yield from default_facts(subject, place, field.target.id, field.value)
    for inner in functions:
        if inner.name == "__init__":
            yield from argument_facts(inner, subject, place, skipped=1)


def call_facts(node: FunctionNode, definition: Definition, place: str) -> Iterator[Fact]:
    """Yield signature, arguments, defaults, return type and exceptions of a function."""
    subject = f"`{definition.name}`"
    yield from argument_facts(node, subject, place, skipped=int(definition.method))
    call = f"{node.name}({unparse(node.args)})"
    return_type = unparse(node.returns) if node.returns else ""
    if (
        len(node.args.args + node.args.kwonlyargs) > definition.method
        and len(call) <= 4 * LONGEST_VALUE
    ):
        yield Fact(
            "signature",
            subject,
            f"`{call}{f' -> {return_type}' if return_type else ''}`",
            (call,),
            place,
        )
    if return_type and return_type != "None" and len(return_type) <= LONGEST_VALUE:
        yield Fact("returns", subject, f"{subject} returns `{return_type}`.", (return_type,), place)
    exception_names = list(dict.fromkeys(exceptions(node)))
    yield from names_fact("raises", subject, "raises", exception_names, place)


def argument_facts(node: FunctionNode, subject: str, place: str, skipped: int) -> Iterator[Fact]:
    """Yield the names and defaults of arguments, without the first `skipped` ones (`self`)."""
    positional = [*node.args.posonlyargs, *node.args.args]
    names = [argument.arg for argument in [*positional[skipped:], *node.args.kwonlyargs]]
    if 0 < len(names) <= MOST_NAMES:
        yield Fact(
            "arguments", subject, f"{subject} takes {join_names(names)}.", tuple(names), place
        )
    defaults = node.args.defaults
    pairs = [
        *zip(positional[len(positional) - len(defaults) :], defaults, strict=True),
        *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True),
    ]
    for argument, value in pairs:
        yield from default_facts(subject, place, argument.arg, value)


def default_facts(
    subject: str, place: str, argument: str, value: ast.expr | None
) -> Iterator[Fact]:
    """Yield the default of one argument or field, except None, which is too easy to guess."""
    text = simple(value)
    if text and text != "None":
        answer = f"The default of `{argument}` in {subject} is `{text}`."
        yield Fact("default", subject, answer, (text,), place, argument=argument)


def constant_facts(tree: ast.Module, place: str) -> Iterator[Fact]:
    """Yield value and location of module constants (upper-case names) with simple values."""
    for node in tree.body:
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else []
        )
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        text = simple(value)
        if (
            len(targets) == 1
            and isinstance(targets[0], ast.Name)
            and targets[0].id.isupper()
            and text
        ):
            subject = f"`{targets[0].id}`"
            yield Fact("constant", subject, f"{subject} is `{text}`.", (text,), place)
            yield location(subject, place)


def exceptions(node: FunctionNode) -> Iterator[str]:
    """Yield the names of the exceptions in a function's own `raise` statements, in their order.

    Those of nested functions and classes are not its own, and what is raised within a `try` with
    handlers may be caught there.
    """
    pending: list[ast.AST] = [*reversed(node.body)]
    while pending:
        statement = pending.pop()
        if isinstance(statement, FunctionNode | ast.Lambda | ast.ClassDef):
            continue
        expression = statement.exc if isinstance(statement, ast.Raise) else None
        name = expression.func if isinstance(expression, ast.Call) else expression
        if isinstance(name, ast.Name) and name.id[:1].isupper():
            yield name.id
        parts = [*ast.iter_child_nodes(statement)]
        if isinstance(statement, ast.Try | ast.TryStar) and statement.handlers:
            parts = [*statement.handlers, *statement.orelse, *statement.finalbody]
        pending += reversed(parts)


def simple(value: ast.expr | None) -> str:
    """Return the source of a short value without calls (number, string, name, tuple, list), ""
    for others.
    """
    if value is None or any(
        isinstance(node, ast.Call | ast.Lambda | ast.JoinedStr) for node in ast.walk(value)
    ):
        return ""
    text = unparse(value)
    return text if len(text) <= LONGEST_VALUE and "\n" not in text and tokens_of(text) else ""


def unparse(node: ast.AST) -> str:
    """Return the source of a syntax tree, "" if it is too deeply nested."""
    try:
        return ast.unparse(node)
    except RecursionError:
        return ""


def join_names(names: Sequence[str]) -> str:
    """Return names as an English list: `a`, `b` and `c`."""
    quoted_names = [f"`{name}`" for name in names]
    return (
        quoted_names[0]
        if len(quoted_names) == 1
        else f"{', '.join(quoted_names[:-1])} and {quoted_names[-1]}"
    )


OPENING_END = re.compile(r"\n\s*\n|\n\s*(?:[A-Z][a-z]+:\s*(?:\n|$)|:\w+|>>>|[-*] )")


def opening(docstring: str) -> str:
    """Return the first paragraph of a docstring; it ends at a blank line, section, list or
    example.
    """
    return OPENING_END.split(docstring, maxsplit=1)[0]


SECTION = re.compile(r"^\s*(Args|Arguments|Parameters|Attributes|Fields):\s*$")
FIELD_SECTIONS = ("Attributes", "Fields")
ARGUMENT = re.compile(r"^(\s*)\*{0,2}`?([A-Za-z_]\w*)`?(?:\s*\([^)]*\))?:\s+(\S.*)$")
FIELD = re.compile(r"^\s*:(?:param|parameter|arg)\s([^:]*):\s+(\S.*)$")
"""An argument in Sphinx style: its type, if stated, and name; and its description."""

DASHED_ARGUMENT = re.compile(r"^(\s*)[-*]\s+\*\*(\w+)\*\*(?:\s*\([^)]*\))?\s+--\s+(\S.*)$")


def described_arguments(docstring: str, with_fields: bool) -> Iterator[tuple[str, str]]:
    """Yield (name, description) of the arguments in a docstring in Google, Sphinx or dashed
    style.

    Args:
        docstring: the docstring.
        with_fields: whether attributes in the docstring are arguments too (see `takes_fields`).
    """
    lines = docstring.split("\n")
    in_section = False
    for number, line in enumerate(lines):
        section = SECTION.match(line)
        if section:
            in_section = with_fields or section[1] not in FIELD_SECTIONS
        else:
            in_section = in_section and (not line or line[:1].isspace())
        field = FIELD.match(line)
        entry = DASHED_ARGUMENT.match(line) or (ARGUMENT.match(line) if in_section else None)
        name = field[1].rpartition(" ")[2] if field else ""
        if field and name.isidentifier():
            yield name, " ".join([field[2], *continuation_lines(lines, number, 0)])
        elif entry:
            yield entry[2], " ".join([entry[3], *continuation_lines(lines, number, len(entry[1]))])


def continuation_lines(lines: Sequence[str], number: int, indent: int) -> Iterator[str]:
    """Yield the continuation lines of a description, which are indented deeper than it.

    Args:
        lines: the lines of the docstring.
        number: index of the line where the description begins.
        indent: its indentation.
    """
    for index in range(number + 1, len(lines)):
        line = lines[index]
        if len(line) - len(line.lstrip()) <= indent or any(
            pattern.match(line) for pattern in (ARGUMENT, DASHED_ARGUMENT, FIELD)
        ):
            return
        yield line.strip()


DEFINITION = re.compile(
    r"^\s{0,4}(?:(?:export|default|pub(?:\(\w+\))?|public|static|async|abstract|final|inline|unsafe)\s+)*"
    r"(?:function|func|fn|def|class|struct|enum|trait|interface|module|type)\s+(?:\([^)]*\)\s*)?([A-Za-z_]\w+)"
)
COMMENT = re.compile(r"^\s*(?:///?!?|/\*\*?|\*/?|#+|--|;;)(.*)$")


def comment_facts(text: str, place: str) -> Iterator[Fact]:
    """Yield the locations of the names defined in a file that is not Python, and their purpose from
    the comments before them.
    """
    lines = text.split("\n")
    for number, line in enumerate(lines):
        definition = DEFINITION.match(line)
        if not definition or not is_public(definition[1]):
            continue
        subject = f"`{definition[1]}`"
        yield location(subject, place)
        comment = " ".join(comment_before(lines, number))
        if shortened(comment) and len(tokens_of(comment)) > 2:
            check: Check = (first_sentence(comment),)
            yield Fact("purpose", subject, shortened(comment), check, place)


def comment_before(lines: Sequence[str], number: int) -> list[str]:
    """Return the comment lines directly before a line, without comment signs, up to the first tag
    such as `@param`.
    """
    first = number
    while first > 0 and COMMENT.match(lines[first - 1]):
        first -= 1
    matches = [COMMENT.match(line) for line in lines[first:number]]
    texts = [match[1].strip().removesuffix("*/").strip() for match in matches if match]
    tag = next(
        (index for index, text in enumerate(texts) if text.startswith(("@", "\\"))), len(texts)
    )
    return [text for text in texts[:tag] if text]
