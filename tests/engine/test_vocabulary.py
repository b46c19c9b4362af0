"""Text streams hold back what may become a stop text; output under a grammar follows it."""

import json
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import tiny_model
from tiny_tokenizer import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from deepseek.engine.engine import Engine
from deepseek.engine.request import Grammar, Request, TokenEvent
from deepseek.engine.sampler import Sampling
from deepseek.engine.sequence import activate
from deepseek.engine.vocabulary import MOST_OPENING, TextStream, Vocabulary, begun
from deepseek.errors import ConfigError

TOKENIZER = tiny_tokenizer()
SCHEMAS = [
    {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "minimum": 0, "maximum": 99},
            "b": {"type": "boolean"},
        },
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"enum": ["x", "yy", None, 3]}, "minItems": 1, "maxItems": 3},
    {
        "type": "object",
        "properties": {"who": {"type": "string", "maxLength": 5}, "in": {"$ref": "#/$defs/n"}},
        "required": ["who", "in"],
        "additionalProperties": False,
        "$defs": {
            "n": {
                "type": "object",
                "properties": {"k": {"const": 1}},
                "required": ["k"],
                "additionalProperties": False,
            }
        },
    },
    {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[ab]{1,4}$"}]},
]


def read(ids: list[int], stop: list[str]) -> tuple[list[str], bool]:
    """Return the pieces of text up to a stop text, and whether there was one."""
    stream, pieces = TextStream(TOKENIZER, stop), []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stop_text is not None:
            return pieces, True
    return [*pieces, stream.flush()], False


@given(
    ids=st.lists(st.sampled_from(TOKENIZER.encode("abab the expert é 漢字 aabb")), max_size=30),
    stop=st.lists(st.text("abe the漢é", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_first_stop_text(ids: list[int], stop: list[str]) -> None:
    pieces, stopped = read(ids, stop)
    unstopped, _ = read(ids, [])
    whole = "".join(unstopped)
    places = [whole.find(mark) for mark in stop if mark in whole]
    assert stopped == bool(places)
    if not stopped:
        assert "".join(pieces) == whole
        return
    # The text is cut where a stop text begins, and the tokens read so far contain no other whole
    # stop text.
    text = "".join(pieces)
    assert whole.startswith(text)
    assert any(whole[len(text) :].startswith(mark) for mark in stop)
    assert not any(mark in text for mark in stop)


@given(
    text=st.text("ab", max_size=8),
    stop=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_only_the_beginning_of_a_stop_text_is_held_back(text: str, stop: list[str]) -> None:
    ends = [
        n
        for n in range(1, len(text) + 1)
        for mark in stop
        if mark.startswith(text[-n:]) and len(mark) > n
    ]
    assert begun(text, stop) == max(ends, default=0)


@given(st.text(max_size=20))
def test_characters_come_whole(text: str) -> None:
    pieces, _ = read(TOKENIZER.encode(text), [])
    assert "".join(pieces) == text


def test_bytes_that_are_no_characters_do_not_end_a_text() -> None:
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a"]
    backend = Tokenizer(
        models.BPE({piece: place for place, piece in enumerate(pieces)}, [], byte_fallback=True)
    )
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    stream = TextStream(PreTrainedTokenizerFast(tokenizer_object=backend))
    # The byte "I" is emitted at once, although invalid bytes after it change how it is decoded.
    assert stream.push(pieces.index("<0x49>")) == "I"
    for piece in ("<0xE8>", "<0xFF>", "<0x2B>"):
        assert stream.push(pieces.index(piece)) == ""
    assert stream.push(pieces.index("a")) == "\ufffd\ufffd\ufffda"
    assert stream.push(pieces.index("a")) == "a"


@cache
def vocabulary_of(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    model, _ = tiny_model(vocab_size=len(tokenizer))
    return Vocabulary(model, tokenizer)


@given(st.text("the router é\n\t_.1", max_size=12))
def test_the_end_that_is_sampled_again_is_a_word_or_white_space(text: str) -> None:
    ids = TOKENIZER.encode(text)
    opening = vocabulary_of(TOKENIZER).opening(ids)
    kept = len(ids) - opening.tokens
    assert TOKENIZER.decode(ids[:kept]) + opening.text == text
    if opening.tokens not in (0, MOST_OPENING) and kept:
        around = text[len(text) - len(opening.text) - 1 :][:2]
        assert not (around.isspace() and opening.text.isspace())
        assert not around.isalnum() or TOKENIZER.decode(ids[kept - 1 : kept]) == "\ufffd"


def test_a_word_that_is_not_finished_can_become_the_token_of_the_whole_word() -> None:
    (whole,) = TOKENIZER.encode(" expert")
    for cut in range(2, len(" expert")):
        ids = TOKENIZER.encode("the expert"[: 3 + cut])
        vocabulary = vocabulary_of(TOKENIZER)
        opening = vocabulary.opening(ids)
        assert opening.text == " expert"[:cut]
        assert vocabulary.begins_with(opening.text).allowed()[whole]


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(2, 14), seed=st.integers(0, 99))
def test_a_healed_prompt_is_continued_as_a_grammar_would(
    engine: Engine, cut: int, seed: int
) -> None:
    """Token healing and a regular expression are two ways to force a given beginning."""
    prompt = [5, *TOKENIZER.encode("the expert\n   a the"[:cut])]
    opened_again = vocabulary_of(TOKENIZER).opening(prompt[1:])
    opening = opened_again.text
    sampling = Sampling(12, temperature=2.0, seed=seed)
    behind_space = opening.endswith(" ")
    rest = r"([^ \t](.|\n)*)?" if behind_space else r"(.|\n)*"
    begins = Grammar("lark", f"start: {json.dumps(opening)} REST\nREST: /{rest}/")
    healed = list(engine.submit(Request(tuple(prompt), sampling, heal=True, ignore_end=True)))
    before = tuple(prompt[: -opened_again.tokens])
    bound = list(engine.submit(Request(before, sampling, grammar=begins)))
    opened = next(n for n in range(1, 13) if len(decoded(bound[:n])) >= len(opening))
    assert decoded(healed[:opened]) == decoded(bound[:opened])
    text = "".join(event.text for event in healed)
    assert decoded(healed).startswith(opening + text)
    assert not (behind_space and text.startswith((" ", "\t")))


@pytest.mark.parametrize("count", [1, 2, 3, 6])
@pytest.mark.parametrize("seed", range(4))
def test_the_tokens_of_a_healed_prompt_are_not_those_of_the_reply(
    engine: Engine, count: int, seed: int
) -> None:
    prompt = (5, *TOKENIZER.encode("the expert"))
    opening = vocabulary_of(TOKENIZER).opening(prompt[1:]).text
    sampling = Sampling(count, temperature=1.0, seed=seed)
    generation = engine.submit(Request(prompt, sampling, heal=True, ignore_end=True))
    events = list(generation)
    places = range(len(events) + 1)
    opened = next(n for n in places if len(decoded(events[:n])) >= len(opening))
    assert len(events) - opened == count
    text = "".join(event.text for event in events)  # without an incomplete last character
    assert decoded(events).rstrip("\ufffd") == (opening + text).rstrip("\ufffd")
    assert events[-1].finish_reason == "length"
    usage = generation.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), count)
    assert usage.experts == {None: count}


def test_a_character_after_the_opening_is_the_replys_although_a_token_ends_within_it() -> None:
    model, _ = tiny_model(vocab_size=len(TOKENIZER) + 1)
    spec = json.loads(TOKENIZER.backend_tokenizer.to_str())
    vocab = spec["model"]["vocab"]
    vocab["Ġð"] = len(vocab)  # a space and the first byte of a character
    spec["model"]["merges"].append(["Ġ", "ð"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token="<|im_end|>"
    )
    llama = tokenizer.encode(" 🦙")
    assert llama[0] == vocab["Ġð"] and len(llama) == 4
    prompt = tuple(tokenizer.encode("the ", add_special_tokens=False))
    assert tokenizer.decode(prompt[-1:]) == " "
    request = Request(prompt, Sampling(3, temperature=0.0), heal=True)
    sequence = activate(request, model, Vocabulary(model, tokenizer), 4, lambda _: False)
    text = ""
    for token in llama:
        logits_V = np.zeros(model.config.vocab_size, dtype=np.float32)
        logits_V[token] = 9.0
        assert sequence.finish_reason is None
        text += sequence._sample(logits_V, None).text
    assert (text, sequence.finish_reason) == ("🦙", "length")
    assert sequence.usage.completion_tokens == 3


@pytest.mark.parametrize("field", [{"grammar": Grammar("regex", "a")}, {"prompt_logprobs": True}])
def test_healing_takes_no_grammar_and_scores_no_prompt(field: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="leave it or them out"):
        Request((5, 6), heal=True, **field)


@pytest.mark.parametrize("strips", [False, True])
def test_tokens_that_a_text_would_not_begin_with_are_not_healed(strips: bool) -> None:
    """A SentencePiece tokenizer: spaces as \u2581, byte fallback; some decoders strip the first
    space of a text.
    """
    pieces = ["<eos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", "r", "e", "t", "re", "ret", "\u2581re", "\u2581ret", "\u2581\u2581"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("r", "e"), ("re", "t"), ("\u2581", "re"), ("\u2581re", "t"), ("\u2581", "\u2581")]
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strips else steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    model, _ = tiny_model()
    tokens = Vocabulary(model, tokenizer)
    tokens.ends = frozenset([vocabulary["<eos>"]])

    def opening(*pieces: str) -> str:
        return tokens.opening([vocabulary[piece] for piece in pieces]).text

    assert opening("ret") == "ret"
    assert opening("\u2581ret") == ("" if strips else " ret")
    assert opening("\u2581\u2581") == ("" if strips else "  ")
    assert opening("<0xE6>") == opening("<eos>") == ""
    # The word's first piece stays as it is where its space would be dropped.
    assert opening("\u2581re", "t") == ("t" if strips else " ret")
    assert opening("<eos>", "re", "t") == "ret"


def decoded(events: list[TokenEvent]) -> str:
    ids = [event.token_id for event in events if event.token_id is not None]
    return TOKENIZER.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("token", ["<|endoftext|>", "é"])
def test_control_tokens_and_parts_of_characters_are_not_healed(engine: Engine, token: str) -> None:
    prompt = (5, *TOKENIZER.encode(token)[:1])
    sampling = Sampling(6)
    replies = [
        [event.token_id for event in engine.submit(Request(prompt, sampling, heal=heal))]
        for heal in (False, True)
    ]
    assert replies[0] == replies[1]


def test_a_stop_text_may_span_tokens_and_ends_the_generation() -> None:
    with Engine(*tiny_model()) as engine:
        request = Request(
            (5, 17, 80), Sampling(max_new_tokens=30, temperature=2.0, seed=5), ignore_end=True
        )
        whole = "".join(event.text for event in engine.submit(request))
        place = next(n for n in range(4, len(whole) - 6) if whole.find(whole[n : n + 3]) == n)
        stop = whole[place : place + 3]
        stopped = Request(request.prompt_ids, request.sampling, stop=(stop,), ignore_end=True)
        events = list(engine.submit(stopped))
    assert "".join(event.text for event in events) == whole[:place]
    assert events[-1].finish_reason == "stop"


@settings(max_examples=8)
@given(schema=st.sampled_from(SCHEMAS), seed=st.integers(0, 1000))
def test_finished_json_validates_at_temperature_1(
    engine: Engine, schema: dict[str, object], seed: int
) -> None:
    sampling = Sampling(max_new_tokens=60, temperature=1.0, seed=seed)
    events = list(
        engine.submit(
            Request((5, 17, 80), sampling, grammar=Grammar("json_schema", json.dumps(schema)))
        )
    )
    text = "".join(event.text for event in events)
    if events[-1].finish_reason == "stop":
        jsonschema.validate(json.loads(text), schema)
    else:
        assert (events[-1].finish_reason, len(events)) == ("length", 60)


def test_dates_have_a_year_that_date_types_can_hold() -> None:
    vocabulary = Vocabulary(*tiny_model())

    def fits(text: str, schema: object) -> bool:
        matcher = vocabulary.matcher(Grammar("json_schema", json.dumps(schema)))
        return all(
            matcher.allowed()[token] and not matcher.take(token)
            for token in TOKENIZER.encode(text)[:-1]
        )

    for kind, rest in (("date", "-01-02"), ("date-time", "-01-02T03:04:05Z")):
        schema = {"anyOf": [{"type": "integer"}, {"type": "string", "format": kind}]}
        assert fits(f'"0001{rest}"', schema) and not fits(f'"0000{rest}"', schema)
    assert fits('{"format": "date"}', {"const": {"format": "date"}})


@pytest.mark.parametrize(
    ("grammar", "texts"),
    [
        (Grammar("regex", "(ab|c){2}x"), {"ababx", "abcx", "cabx", "ccx"}),
        (Grammar("lark", 'start: "yes" | "no"'), {"yes", "no"}),
        (Grammar("json_schema", '{"enum": [7]}'), {"7"}),
        (Grammar("gbnf", 'root ::= "y" rest\nrest ::= "es" | "ou"'), {"yes", "you"}),
    ],
)
def test_grammars_bind(engine: Engine, grammar: Grammar, texts: set[str]) -> None:
    for seed in range(5):
        events = list(
            engine.submit(Request((9,), Sampling(temperature=1.0, seed=seed), grammar=grammar))
        )
        assert "".join(event.text for event in events) in texts
        assert events[-1].finish_reason == "stop"


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json_schema", "{"),
        Grammar("json_schema", "7"),
        Grammar("json_schema", '{"type": 5}'),
        Grammar("regex", "(a"),
        Grammar("lark", "start: x"),
        Grammar("gbnf", "root ::= x"),
    ],
)
def test_a_grammar_that_does_not_compile_is_refused(engine: Engine, grammar: Grammar) -> None:
    with pytest.raises(ConfigError, match=r"The .* cannot be used \(.*\); correct it"):
        engine.submit(Request((9,), grammar=grammar))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(*tiny_model())
