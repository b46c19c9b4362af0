"""`generate`, `chat` and `eval` on a small model, with valid and invalid input."""

import io
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from tiny_adapter import write_adapter
from tiny_expert import save_base, save_expert

from deepseek.cli.main import main
from deepseek.cli.session import ChatSession
from deepseek.cli.speak import Palette, emit, speak
from deepseek.data import Document, TokenShards
from deepseek.engine.adapters import import_adapter
from deepseek.engine.engine import Engine
from deepseek.engine.load import Loaded, load
from deepseek.engine.request import Request
from deepseek.engine.sampler import Sampling
from deepseek.engine.scheduler import Scheduler
from deepseek.engine.start import start_engine
from deepseek.evaluate.quality import held_out_folder
from deepseek.packs.library import experts_folder
from deepseek.text.chat_template import encode_prompt

Capture = pytest.CaptureFixture[str]

SAMPLED = ("--max-tokens", "40", "--temperature", "1", "--seed", "3")
GENERATE = ("generate", "the value", *SAMPLED, "--base")


@pytest.fixture
def pack(loaded: Loaded) -> Iterator[Path]:
    """An expert named `always` in the folder of trained experts, with its run's held-out text."""
    experts_folder().mkdir(parents=True, exist_ok=True)
    path = save_expert(loaded, "always", experts_folder())
    documents = [
        Document(f"the value of the router {i} returns the expert " * 20, f"{i}") for i in range(4)
    ]
    TokenShards.build(documents, loaded.tokenizer, held_out_folder("always"))
    yield path
    path.unlink()


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def converse(monkeypatch: pytest.MonkeyPatch, base: Path, *lines: str) -> int:
    """Run `deepseek chat` on typed lines, then the end of input."""
    type_lines(monkeypatch, *lines)
    return run("chat", "--base", base, "--experts", "", "--max-tokens", "4", "--seed", "1")


def type_lines(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Let `input` give these lines, then the end of input."""
    typed = iter(lines)

    def read(prompt: str = "") -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)


def test_generate_says_who_spoke(base_folder: Path, pack: Path, capsys: Capture) -> None:
    assert (
        run(
            "generate",
            "the value",
            "--base",
            base_folder,
            "--experts",
            "always",
            "--max-tokens",
            "5",
        )
        == 0
    )
    assert "always" in capsys.readouterr().err


def test_generate_without_arming_is_the_base(
    base_folder: Path, pack: Path, capsys: Capture
) -> None:
    sampled = ("--max-tokens", "40", "--temperature", "1", "--seed", "3")
    arguments = ("generate", "the value", "--base", base_folder, *sampled)
    run(*arguments)
    alone = capsys.readouterr().out
    run(*arguments, "--experts", pack, "--arm", "none")
    assert capsys.readouterr().out == alone
    run(*arguments, "--experts", pack)
    assert capsys.readouterr().out != alone


LORA_LAYERS = {"model.layers.1.mlp.down_proj": (48, 32)}


def test_an_adapter_that_is_named_is_armed(
    base_folder: Path, pack: Path, tmp_path: Path, capsys: Capture
) -> None:
    adapter = write_adapter(tmp_path / "lora", LORA_LAYERS, lora_alpha=2)
    path = import_adapter(adapter, base=base_folder)
    texts = {}
    for options in (
        ("--arm", "none"),
        ("--arm", "auto"),
        (),
        ("--arm", "lora"),
        ("--arm", "lora=0.5"),
    ):
        run(*GENERATE, base_folder, "--experts", "lora", *options)
        texts[options] = capsys.readouterr().out
    assert texts[()] == texts["--arm", "lora"]
    assert texts["--arm", "auto"] == texts["--arm", "none"]
    assert len(set(texts.values())) == 3
    run(*GENERATE, base_folder, "--experts", "lora=0.5")
    assert capsys.readouterr().out == texts["--arm", "lora=0.5"]
    path.unlink()


def test_a_weight_scales_an_expert(base_folder: Path, pack: Path, capsys: Capture) -> None:
    texts = []
    for experts in ("always", "always=1", "always=0.2"):
        run(*GENERATE, base_folder, "--experts", experts)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--experts", "nope"), "nope"),
        (("--experts", "always=much"), "'much'"),
        (("--experts", "always=3"), "at most 2"),
        (("--experts", "always,always=0.5"), "'always' is given twice"),
        (("--experts", "always", "--arm", "always=1, always"), "'always' is given twice"),
        (("--experts", "always", "--arm", " "), "names no expert"),
        (("--experts", "always", "--arm", ","), "names no expert"),
        (("--experts", "always", "--arm", "always=-1"), "above 0"),
        (("--experts", "always", "--arm", "alwys"), "alwys"),
        (("--temperature", "99"), "Invalid value for '--temperature'"),
        (("--max-tokens", "0"), "Invalid value for '--max-tokens'"),
        (("--max-tokns", "3"), "--max-tok"),
    ],
)
def test_generate_mistakes_end_in_one_sentence(
    arguments: tuple[str, ...], told: str, base_folder: Path, pack: Path, capsys: Capture
) -> None:
    assert run("generate", "the value", "--base", base_folder, *arguments) == 2
    output = capsys.readouterr()
    assert told in output.err and output.err.count("\n") == 1 and not output.out


def test_an_empty_prompt_is_refused(base_folder: Path, capsys: Capture) -> None:
    assert run("generate", "", "--base", base_folder) == 2
    assert "PROMPT is empty; give some text." in capsys.readouterr().err


@pytest.mark.parametrize("data", [b"\xff\xfe", b"ok \x80", b"cut \xe2\x82"])
def test_undecodable_input_is_one_sentence(
    data: bytes, base_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    assert run("generate", "-", "--base", base_folder) == 2
    told = capsys.readouterr()
    assert "Standard input is not UTF-8" in told.err
    assert told.err.count("\n") == 1 and not told.out


@pytest.mark.parametrize("line", [b"\xff\xfe", b"ok \x80", b"cut \xe2\x82"])
def test_an_undecodable_line_costs_a_chat_no_other(
    line: bytes, loaded: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    data = b"\n".join([b"before", line, b"after", line])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    with Engine(*loaded) as engine:
        session = ChatSession(engine, Sampling(max_new_tokens=2), Console(width=200))
        session.run()
    questions = [turn["content"] for turn in session.messages if turn["role"] == "user"]
    assert questions == ["before", "after"]
    assert capsys.readouterr().out.count("error: the line is not UTF-8; write it again.") == 2


def test_chat_plugs_arms_and_unplugs(
    base_folder: Path, pack: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    lines = (
        "hello",
        "/plug always",
        "hi",
        "/arm none",
        "/arm auto",
        "/unplug always",
        "/raw the value",
        "/reset",
        "/quit",
    )
    assert converse(monkeypatch, base_folder, *lines, "never read") == 0
    shown = capsys.readouterr().out
    assert "plugged always" in shown and "armed: none" in shown and "armed: always" in shown
    assert "unplugged always" in shown and "always 4" in shown


@pytest.mark.parametrize("line", ["/plugg x", "/plug nope", "/unplug nope", "/arm nope", "/arm ,"])
def test_chat_survives_mistakes(
    line: str, base_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert converse(monkeypatch, base_folder, line, "/help") == 0
    shown = capsys.readouterr().out
    assert "error: " in shown and "/unplug" in shown and "Unplug an expert by name" in shown


def test_tabs_stay_tabs() -> None:
    pieces = (("all:", "cyan"), ("\t", "cyan"), ("cc\x1b", ""), (" a.c\n", ""))
    for terminal in (False, True):
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, width=4, color_system="standard")
        for text, style in pieces:
            emit(console, text, style)
        colour, end = ("\x1b[36m", "\x1b[0m") if terminal else ("", "")
        assert file.getvalue() == f"{colour}all:{end}{colour}\t{end}cc\\x1b a.c\n"


class Interrupted(io.StringIO):
    """An output at which Ctrl-C is pressed while the fourth token is printed."""

    printed = 0

    def write(self, text: str) -> int:
        self.printed += 1
        if self.printed == 4:
            raise KeyboardInterrupt
        return super().write(text)


def test_an_interrupted_answer_costs_nothing_more(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Scheduler.step

    def waiting_step(scheduler: Scheduler) -> None:
        # Otherwise the tiny model could end before its fourth token is printed.
        deadline = time.monotonic() + 60
        while scheduler.completion_tokens >= 50 and time.monotonic() < deadline:
            if any(sequence.cancelled for sequence in scheduler.running):
                break
            time.sleep(0.001)
        step(scheduler)

    monkeypatch.setattr(Scheduler, "step", waiting_step)
    with start_engine(base_folder) as engine:
        request = Request((5, 17), Sampling(60), ignore_end=True)
        with pytest.raises(KeyboardInterrupt):
            speak(engine, request, Console(file=Interrupted()), Palette())
        assert engine.drain(timeout=30)
        assert engine.stats().finished["cancelled"] == 1


def test_a_turn_computes_only_what_is_new(
    loaded: Loaded, pack: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    loaded.model.config.max_position_embeddings = 512
    sampling = Sampling(max_new_tokens=4)
    shown, cached = [], []
    # The second block is longer than the whole conversation, so that nothing is cached.
    for block in (8, 1024):
        with Engine(*loaded, prefill_chunk=block) as engine:
            session = ChatSession(engine, sampling, Console(width=200))
            type_lines(
                monkeypatch, "hello", "/plug always", "and you?", "/unplug always", "who then?"
            )
            session.run()
            assert [message["role"] for message in session.messages] == ["user", "assistant"] * 3
            shown.append(capsys.readouterr().out)
            cached.append(engine.stats().cached_tokens)
    assert shown[0] == shown[1] and "always 4" in shown[0]
    first = len(encode_prompt(loaded.tokenizer, [{"role": "user", "content": "hello"}]))
    # The third turn reuses the first one's blocks; the second had another expert.
    assert cached == [first // 8 * 8, 0]


def test_eval_compares_every_text(
    base_folder: Path, pack: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "own").mkdir()
    for i in range(3):
        (tmp_path / "own" / f"{i}.txt").write_text(
            f"text number {i} of mine, long enough to count as a document " * 8
        )
    code = run(
        "eval",
        "always",
        "--base",
        base_folder,
        "--tokens",
        "512",
        "--data",
        tmp_path / "own",
        "--human-eval",
        "1",
    )
    shown = capsys.readouterr().out
    assert code == 0 and all(
        word in shown for word in ("always", "public", "change", "pass@1 (1 problems)")
    )


def test_eval_leaves_out_the_texts_of_another_bases_experts(
    base_folder: Path, pack: Path, tmp_path: Path, capsys: Capture
) -> None:
    # Their token ids mean something else for this base, or nothing at all.
    other = load(save_base(tmp_path / "other", intermediate_size=64), dtype="float32")
    theirs = save_expert(other, "theirs", experts_folder())
    try:
        TokenShards.build([Document("text " * 50, "a")], other.tokenizer, held_out_folder("theirs"))
        assert run("eval", "none", "--base", base_folder, "--tokens", "512") == 0
    finally:
        theirs.unlink()
    shown = capsys.readouterr().out
    assert "always" in shown and "theirs" not in shown


def test_eval_refuses_a_missing_text(base_folder: Path, pack: Path, capsys: Capture) -> None:
    assert run("eval", "always", "--base", base_folder, "--data", "/no/such/folder") == 2
    assert "/no/such/folder" in capsys.readouterr().err
