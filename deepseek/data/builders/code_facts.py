"""What code states about itself: docstrings, signatures, defaults, constants, comments, and places;
nothing is run.
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
"""Characters of a default or constant that somebody may know by heart."""

MOST_NAMES = 10
"""Arguments, methods or exceptions in one answer."""


@dataclass(frozen=True)
class Definition:
    """A function, method or class.

    Attributes:
        name: as one asks for it, `Class.method` for a method.
        node: its syntax tree.
        method: whether its first argument is the object.
    """

    name: str
    node: FunctionNode | ast.ClassDef
    method: bool = False


def code_facts(document: Document) -> Iterator[Fact]:
    """Yield what a file of code states: of Python by its syntax tree, of other languages by
    comments before names.
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
    """Yield public functions and classes, and their public methods; nobody asks for tests and
    nested functions.
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
    """Return whether somebody outside would ask for a name."""
    return not name.startswith(("_", "test", "Test"))


def is_static(node: FunctionNode) -> bool:
    """Return whether a method is called without an object."""
    return any(
        isinstance(decorator, ast.Name) and decorator.id == "staticmethod"
        for decorator in node.decorator_list
    )


def definition_facts(definition: Definition, place: str) -> Iterator[Fact]:
    """Yield all that the definition of one name states."""
    node = definition.node
    what = f"`{definition.name}`"
    docstring = ast.get_docstring(node) or ""
    paragraph = opening(docstring)
    if shortened(paragraph):
        yield Fact("purpose", what, shortened(paragraph), (first_sentence(paragraph),), place)
    if "." not in definition.name:  # a method is where its class is
        yield location(what, place)
    if isinstance(node, ast.ClassDef):
        yield from class_facts(node, what, place)
    else:
        yield from call_facts(node, definition, place)
    for argument, description in described_arguments(docstring):
        if shortened(description):
            check = (first_sentence(description),)
            yield Fact("argument", what, shortened(description), check, place, argument=argument)


def location(what: str, place: str) -> Fact:
    """Return where a name is defined; a path counts as known by its last two parts."""
    return Fact(
        "location", what, f"{what} is defined in `{place}`.", ("/".join(place.split("/")[-2:]),)
    )


def class_facts(node: ast.ClassDef, what: str, place: str) -> Iterator[Fact]:
    """Yield bases, methods, defaults of fields, and how an object is made."""
    bases = [written(base) for base in node.bases]
    if bases and all(bases):
        yield Fact("bases", what, f"{what} inherits from {listed(bases)}.", tuple(bases), place)
    functions = [inner for inner in node.body if isinstance(inner, FunctionNode)]
    methods = list(dict.fromkeys(inner.name for inner in functions if is_public(inner.name)))
    if 0 < len(methods) <= MOST_NAMES:
        yield Fact(
            "methods", what, f"{what} has the methods {listed(methods)}.", tuple(methods), place
        )
    for field in node.body:
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and is_public(field.target.id)
        ):
            yield from default_facts(what, place, field.target.id, field.value)
    for inner in functions:
        if inner.name == "__init__":
            yield from argument_facts(inner, what, place, skipped=1)


def call_facts(node: FunctionNode, definition: Definition, place: str) -> Iterator[Fact]:
    """Yield signature, arguments, defaults, what comes back and what is raised."""
    what = f"`{definition.name}`"
    yield from argument_facts(node, what, place, skipped=int(definition.method))
    call = f"{node.name}({written(node.args)})"
    returned = written(node.returns) if node.returns else ""
    if (
        len(node.args.args + node.args.kwonlyargs) > definition.method
        and len(call) <= 4 * LONGEST_VALUE
    ):
        yield Fact(
            "signature", what, f"`{call}{f' -> {returned}' if returned else ''}`", (call,), place
        )
    if returned and returned != "None" and len(returned) <= LONGEST_VALUE:
        yield Fact("returns", what, f"{what} returns `{returned}`.", (returned,), place)
    raised = list(dict.fromkeys(exceptions(node)))
    if 0 < len(raised) <= MOST_NAMES:
        yield Fact("raises", what, f"{what} raises {listed(raised)}.", tuple(raised), place)


def argument_facts(node: FunctionNode, what: str, place: str, skipped: int) -> Iterator[Fact]:
    """Yield the names and defaults of arguments without the first `skipped`, which are the object
    itself.
    """
    positional = [*node.args.posonlyargs, *node.args.args]
    names = [argument.arg for argument in [*positional[skipped:], *node.args.kwonlyargs]]
    if 0 < len(names) <= MOST_NAMES:
        yield Fact("arguments", what, f"{what} takes {listed(names)}.", tuple(names), place)
    defaults = node.args.defaults
    pairs = [
        *zip(positional[len(positional) - len(defaults) :], defaults, strict=True),
        *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True),
    ]
    for argument, value in pairs:
        yield from default_facts(what, place, argument.arg, value)


def default_facts(what: str, place: str, argument: str, value: ast.expr | None) -> Iterator[Fact]:
    """Yield the default of one argument or field; None says nothing that a guess would not."""
    text = simple(value)
    if text and text != "None":
        answer = f"The default of `{argument}` in {what} is `{text}`."
        yield Fact("default", what, answer, (text,), place, argument=argument)


def constant_facts(tree: ast.Module, place: str) -> Iterator[Fact]:
    """Yield the simple values of capitalised names at the top of a module."""
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
            what = f"`{targets[0].id}`"
            yield Fact("constant", what, f"{what} is `{text}`.", (text,), place)
            yield location(what, place)


def exceptions(node: FunctionNode) -> Iterator[str]:
    """Yield the names of what a function raises itself."""
    for inner in ast.walk(node):
        raised = inner.exc if isinstance(inner, ast.Raise) else None
        name = raised.func if isinstance(raised, ast.Call) else raised
        if isinstance(name, ast.Name) and name.id[:1].isupper():
            yield name.id


def simple(value: ast.expr | None) -> str:
    """Return a number, text, name, or short tuple or list of such as source; "" for all that is
    computed.
    """
    if value is None or any(
        isinstance(node, ast.Call | ast.Lambda | ast.JoinedStr) for node in ast.walk(value)
    ):
        return ""
    text = written(value)
    return text if len(text) <= LONGEST_VALUE and "\n" not in text and tokens_of(text) else ""


def written(node: ast.AST) -> str:
    """Return a syntax tree as source, "" if it is too deep."""
    try:
        return ast.unparse(node)
    except RecursionError:
        return ""


def listed(names: Sequence[str]) -> str:
    """Return names as a person lists them."""
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


OPENING_END = re.compile(r"\n\s*\n|\n\s*(?:[A-Z][a-z]+:\s*(?:\n|$)|:\w+|>>>|[-*] )")


def opening(docstring: str) -> str:
    """Return the first paragraph of a docstring, which ends at a blank line, section, list or
    example.
    """
    return OPENING_END.split(docstring, maxsplit=1)[0]


SECTION = re.compile(r"^\s*(?:Args|Arguments|Parameters|Attributes|Fields):\s*$")
ARGUMENT = re.compile(r"^(\s*)\*{0,2}`?([A-Za-z_]\w*)`?(?:\s*\([^)]*\))?:\s+(\S.*)$")
FIELD = re.compile(r"^\s*:(?:param|parameter|arg)(?:\s+[\w\[\], |.]+)?\s+(\w+):\s+(\S.*)$")
DASHED = re.compile(r"^(\s*)[-*]\s+\*\*(\w+)\*\*(?:\s*\([^)]*\))?\s+--\s+(\S.*)$")


def described_arguments(docstring: str) -> Iterator[tuple[str, str]]:
    """Yield (name, description) of arguments out of a docstring in one of the usual forms, one line
    or several.
    """
    lines = docstring.split("\n")
    inside = False
    for number, line in enumerate(lines):
        inside = bool(SECTION.match(line)) or (inside and (not line or line[:1].isspace()))
        field = FIELD.match(line)
        found = DASHED.match(line) or (ARGUMENT.match(line) if inside else None)
        if field:
            yield field[1], " ".join([field[2], *continued(lines[number + 1 :], 0)])
        elif found:
            yield found[2], " ".join([found[3], *continued(lines[number + 1 :], len(found[1]))])


def continued(lines: Sequence[str], indent: int) -> Iterator[str]:
    """Yield the lines that go on with a description: those indented deeper than it."""
    for line in lines:
        if len(line) - len(line.lstrip()) <= indent or ARGUMENT.match(line) or DASHED.match(line):
            return
        yield line.strip()


DEFINED = re.compile(
    r"^\s{0,4}(?:(?:export|default|pub(?:\(\w+\))?|public|static|async|abstract|final|inline|unsafe)\s+)*"
    r"(?:function|func|fn|def|class|struct|enum|trait|interface|module|type)\s+(?:\([^)]*\)\s*)?([A-Za-z_]\w+)"
)
COMMENT = re.compile(r"^\s*(?:///?!?|/\*\*?|\*/?|#+|--|;;)\s?(.*?)(?:\s*\*/)?$")


def comment_facts(text: str, place: str) -> Iterator[Fact]:
    """Yield where the names of a file that is not Python are defined, and what the comment before
    each says.
    """
    lines = text.split("\n")
    for number, line in enumerate(lines):
        found = DEFINED.match(line)
        if not found or not is_public(found[1]):
            continue
        what = f"`{found[1]}`"
        yield location(what, place)
        comment = " ".join(comment_before(lines, number))
        if shortened(comment) and len(tokens_of(comment)) > 2:
            check: Check = (first_sentence(comment),)
            yield Fact("purpose", what, shortened(comment), check, place)


def comment_before(lines: Sequence[str], number: int) -> list[str]:
    """Return the comment lines right before a line, without their signs and without tags such as
    `@param`.
    """
    first = number
    while first > 0 and COMMENT.match(lines[first - 1]):
        first -= 1
    found = [COMMENT.match(line) for line in lines[first:number]]
    texts = [match[1].strip() for match in found if match]
    tag = next(
        (index for index, text in enumerate(texts) if text.startswith(("@", "\\"))), len(texts)
    )
    return [text for text in texts[:tag] if text]
