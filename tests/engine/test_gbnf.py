"""llama.cpp's grammars: their translations accept the same texts with long terminals and with one
terminal per character.
"""

import itertools
import re
import time
from contextlib import suppress

import llguidance
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.engine.gbnf import lark_of, reference_lark
from deepseek.errors import ConfigError

BYTES = llguidance.LLTokenizer("byte")

JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws

object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws

array  ::= "[" ws ( value ("," ws value)* )? "]" ws  # a comment
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""


def accepts(grammar: str, text: str) -> bool:
    """Whether a grammar accepts exactly this text."""
    return bool(accepted(lark_of(grammar), [text]))


def accepted(lark: str, texts: list[str]) -> list[str]:
    """Return the texts that a grammar accepts."""
    start = llguidance.LLMatcher(BYTES, lark, log_level=0)
    assert not start.is_error(), start.get_error()
    return [text for text in texts if takes(start.deep_copy(), text)]


def takes(matcher: llguidance.LLMatcher, text: str) -> bool:
    taken = all(matcher.try_consume_tokens([byte]) == 1 for byte in text.encode())
    return taken and matcher.is_accepting()


PARTS = st.recursive(
    st.sampled_from([('"a"', "a"), ('"ab"', "ab"), ("[ab]", "[ab]"), ("[^a]", "[^a]"), (".", ".")]),
    lambda inner: st.one_of(
        st.builds(lambda x, y: (f"{x[0]} {y[0]}", f"{x[1]}{y[1]}"), inner, inner),
        st.builds(lambda x, y: (f"({x[0]} | {y[0]})", f"(?:{x[1]}|{y[1]})"), inner, inner),
        st.builds(
            lambda x, times: (f"({x[0]}){times}", f"(?:{x[1]}){times}"),
            inner,
            st.sampled_from(["*", "+", "?", "{2}", "{1,}", "{1,2}"]),
        ),
    ),
    max_leaves=5,
)
TEXTS = ["".join(letters) for size in range(5) for letters in itertools.product("ab", repeat=size)]


@given(part=PARTS)
def test_a_grammar_without_recursion_is_its_regular_expression(part: tuple[str, str]) -> None:
    grammar, expression = part
    for text in TEXTS:
        wanted = re.fullmatch(expression, text, re.DOTALL) is not None
        assert accepts(f"root ::= {grammar}", text) is wanted, (grammar, text)


CALLS = st.recursive(
    st.sampled_from(['"a"', '"ab"', "[ab]", "[^a]", '""', "first", "second"]),
    lambda inner: st.one_of(
        st.builds("{} {}".format, inner, inner),
        st.builds("({} | {})".format, inner, inner),
        st.builds("({}){}".format, inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}"])),
    ),
    max_leaves=6,
)


@given(root=CALLS, first=CALLS, second=CALLS)
def test_long_terminals_change_no_text(root: str, first: str, second: str) -> None:
    grammar = f"root ::= {root} | [ab] first\nfirst ::= {first}\nsecond ::= {second} | second [b]"
    assert accepted(lark_of(grammar), TEXTS) == accepted(reference_lark(grammar), TEXTS)


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        # The longest match of one terminal would include the beginning of the next.
        ('root ::= [a-z]+ rest\nrest ::= "x" rest "y" | "x"', "abxxy"),
        ('root ::= ("a" | "abc") rest\nrest ::= "b" rest "d" | "d"', "abdd"),
        ('root ::= open\nopen ::= "(" open ")" | ("a" | "b")* open? "b"', "(abb)"),
        # Characters that begin with the same byte.
        ('root ::= "é"+ rest\nrest ::= "è" rest "b" | "è"', "ééèèb"),
        # A rule that is used in two places.
        ('root ::= "[" (w root w ("," w root w)*)? "]" | w "a"\nw ::= [ ]*', "[ a,[], [a ] ]"),
    ],
)
def test_a_terminal_never_takes_what_follows_it(grammar: str, text: str) -> None:
    assert accepted(reference_lark(grammar), [text])
    assert accepts(grammar, text)


def test_a_string_of_json_is_one_terminal() -> None:
    """Masks then take one parser step per terminal, not one per character."""
    string = r"\u{22}(?:(?:[^"
    assert f"/{string}" in lark_of(JSON)
    assert f"/{string}" not in reference_lark(JSON)


@pytest.mark.parametrize(
    "grammar",
    [
        "\n".join(f"r{n} ::= r{n + 1}" for n in range(700)) + '\nr700 ::= "a"\nroot ::= r0',
        "\n".join(f"r{n} ::= r{n + 1} r{n + 1}" for n in range(40)) + '\nr40 ::= "a"\nroot ::= r0',
        "root ::= " + " ".join(['("a" | "b" root)?'] * 700),
        "root ::= " + " ".join(["[a-z]?"] * 2000),
        "root ::= " + " | ".join(f'"{n}" root' for n in range(1000)),
    ],
    ids=["chain", "doubling", "optional", "long", "wide"],
)
def test_a_large_grammar_is_translated_soon(grammar: str) -> None:
    start = time.process_time()
    assert lark_of(grammar).startswith("start: r0\n")
    assert time.process_time() - start < 4


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"a": [1, 2.5, {"b": null}], "c": "x\\u00e9 é"}', True),
        ("{}", True),
        ('{"a": 01}', False),
        ('{"a": 1', False),
        ('{"a" 1}', False),
    ],
)
def test_the_grammar_of_json(text: str, valid: bool) -> None:
    assert accepts(JSON, text) is valid


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        ('root ::= [a-z]* "x"', "abcxx"),  # llguidance's own converter finds no end here
        ('root ::= foo-bar foo_bar\nfoo-bar ::= "a"\nfoo_bar ::= "b"', "ab"),
        ('root ::= Foo foo\nFoo ::= "a"\nfoo ::= "b"', "ab"),
        (r'root ::= "\u00e9\x41\U0001F600\n\"" [\]\-a]', 'éA😀\n"-'),
        ('root ::= "a" |\n "b"\n\n', "b"),
        ('root ::= ""', ""),
        ("root ::= [a-]", "-"),
        ('root ::= "a/b" [/]', "a/b/"),
    ],
)
def test_what_is_accepted(grammar: str, text: str) -> None:
    assert accepts(grammar, text)


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ("", "no rule 'root'"),
        ('start ::= "a"', "no rule 'root'"),
        ("root ::= other", "no rule 'other'"),
        ('root ::= "a', "cannot be read"),
        ('root ::= ("a"', "not closed"),
        ('root ::= "a")', "a rule is expected"),
        ("root ::= *", "nothing before it"),
        (r'root ::= "\q"', "escape"),
        (r'root ::= "\ud800"', "no character"),
        ("root ::= []", "empty"),
        ("root ::= [z-a]", "ends before it begins"),
        ('root ::= "a"{3,1}', "ends before it begins"),
        ('root ::= "a"{9999}', "above 2000"),
        ('root ::= "a"{}', "needs a number"),
        ("root ::= <[1000]>", "cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence(grammar: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        lark_of(grammar)
    assert str(caught.value).endswith("; correct it.")


@given(text=st.text(alphabet='root:=|()[]{}*+?"\\ab1,- \n', max_size=40))
def test_any_text_is_translated_or_refused(text: str) -> None:
    with suppress(ConfigError):
        lark_of(f"root ::= {text}")
