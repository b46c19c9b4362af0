"""Error messages name the cause in terms of the command line, and the fix, before anything is
loaded.
"""

from pathlib import Path

import pytest

from deepseek.cli.main import main
from deepseek.cli.messages import with_options
from deepseek.cli.serve import checked_origin

Capture = pytest.CaptureFixture[str]
OPTIONS = {"from_git": "--from-git", "name": "--name", "row_length": "--row-length"}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def refused(capsys: Capture, *words: str) -> str:
    """Return the message with which `deepseek WORDS` fails."""
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    output = capsys.readouterr()
    assert (stop.value.code, output.out, output.err.count("\n")) == (2, "", 1), output
    return output.err


@pytest.mark.parametrize("origin", ["*", "null", "https://a.example", "http://[::1]:80/"])
def test_what_browsers_send_is_an_origin(origin: str) -> None:
    assert checked_origin(origin) == origin.rstrip("/")


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("inspect", "Missing command; valid: attention; see `deepseek inspect --help`."),
        ("models lst", "No such command 'lst'; perhaps 'list' is meant; see"),
        ("serve --base x", "No such option: --base; the model is an argument, without an option;"),
        ("chat x", "Got unexpected extra argument(s) (x); a model is named with --base; see"),
        ("expert train --lr 1", "No such option: --lr; perhaps --learning-rate is meant; see"),
        ("expert train x", "a folder of text is named with --from-folder; see"),
        ("generate --model x", "No such option: --model; a model is named with --base; see"),
        ("chat --temperatur 1", "(Possible options: --experts, --temperature); see"),
        ("runs list --nope", "No such option: --nope; valid: --json; see"),
        ("export M out", "Missing option '--to': onnx, openvino, tensorrt, hf (a folder for stock"),
        ("--nope", "unknown option '--nope'; valid: --debug, --help, --version"),
        ("pull smollm2-135m --dtype int3", "'int3' is not one of 'float32'"),
        ("pull smollm2-135m --dtype bfloat16", "--dtype goes with a GGUF file; leave it out."),
        ("pull tiny-bytes --dtype bfloat16", "--dtype goes with a GGUF file; leave it out."),
        ("serve --lock L --experts nosuch", "--experts does not go with --lock"),
        ("serve --allow-origin foo", "'foo' is no origin of a page; write scheme://host"),
        ("serve --allow-origin https://a.example/page", "is no origin of a page"),
        ("adapt tiny --base tiny --from-folder .", "MODEL and --base are the same argument"),
        ("align tiny --base tiny", "MODEL and --base are the same argument"),
        ("run --from-git nosuch", "nosuch does not exist; check the path."),
        ("run --from-git .", "is not inside a git repository"),
        (
            "expert train --from-git https://github.com/a/b.git",
            "clone it first with `git clone https://github.com/a/b.git`, and give its folder.",
        ),
        (
            "run --from-git git@example.org:a/b",
            "clone it first with `git clone git@example.org:a/b`",
        ),
        (
            "data questions --out x.jsonl --from-git ssh://h/a",
            "clone it first with `git clone ssh://h/a`",
        ),
        ("generate x --max-tokens 0", "Invalid value for '--max-tokens'"),
        ("generate x --seed 99999999999999999999", "less than or equal to 4294967295"),
        ("chat --top-p 2", "Invalid value for '--top-p'"),
        ("plan --batch 99999999999999", "--batch=99999999999999 must be a whole number from 1 to"),
        ("plan deepseek-8b --config x.yaml", "both name the model; give one of them."),
        ("expert sign x --key me.pub", "me.pub is a public key; sign with the private key"),
        ("expert lock --key me.pub", "me.pub is a public key"),
        ("expert lock --experts-folder nosuch", "--experts-folder nosuch is not a folder"),
        ("expert lock --out .", "cannot be written, it is a folder; choose another path."),
        ("expert lock", "There is no expert for the base smollm2-135m in "),
        ("pull ~nosuchuser/x", "'~nosuchuser/x' is no model's name or folder ("),
        ("eval one --against ,", "--against ',' names no method; give rag or lora or full."),
        ("expert lock --experts ,", "--experts ',' names no expert; give names, or all."),
        ("expert lock --base tiny", "There is no expert for the base tiny in "),
        ("data code . x.py", "x.py does not end with .jsonl; name a file that does."),
        ("data mathematics x", "x does not end with .jsonl; name a file that does."),
        ("data questions --out x.md --from-folder .", "x.md does not end with .jsonl"),
        ("expert bundle .", "exists already"),
        ("expert bundle x.tar", "There is no expert for the base smollm2-135m in "),
        (
            "expert install nosuch.tar",
            "The bundle nosuch.tar cannot be read (No such file or directory).",
        ),
        ("expert install .", "give the file that `expert bundle` wrote."),
        ("plan --deepspeed .", "cannot be written, it is a folder; choose another path."),
        ("expert rename demo x!y", "'x!y' is no name; use at most 64 letters"),
        ("pull tiny-byte", "perhaps 'tiny-bytes' is meant"),
        ("pull smollm2-13m", "perhaps 'smollm2-135m' is meant"),
    ],
)
def test_a_mistake_is_one_sentence_with_its_mend(
    command: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    model = tmp_path / "home" / "models" / "tiny-bytes"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    monkeypatch.setattr(
        "deepseek.checkpoint.hub.pull_wheels", lambda *_: pytest.fail("it is fetched")
    )
    assert told in refused(capsys, *command.split())


@pytest.mark.parametrize("command", ["plan --deepspeed .", "expert keygen you --folder file"])
def test_a_result_that_cannot_be_written_is_named(
    command: str, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "file").write_text("a file")
    assert "cannot be written, it is " in refused(capsys, *command.split())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("command", ["prefs stats", "expert keygen you"])
def test_a_home_that_cannot_be_used_is_named_by_its_variable(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "file").write_text("a file")
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "file" / "home"))
    told = refused(capsys, *command.split())
    assert told.startswith("error: DEEPSEEK_HOME: ") and "lies below a file; choose" in told


@pytest.mark.parametrize("command", ["expert list", "models list", "runs list --json"])
@pytest.mark.parametrize("place", ["file", "file/home"])
def test_a_list_of_a_home_that_is_no_folder_is_refused(
    command: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "file").write_text("a file")
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / place))
    message = refused(capsys, *command.split())
    assert message.startswith("error: DEEPSEEK_HOME: ") and "lies below a file; choose" in message


def test_an_empty_file_does_not_become_a_database(tmp_path: Path, capsys: Capture) -> None:
    database = tmp_path / "empty.db"
    database.touch()
    message = refused(capsys, "prefs", "search", "x", "--database", str(database))
    assert "empty.db is empty; check --database" in message
    assert database.read_bytes() == b""


def test_no_pair_is_made_of_empty_texts(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "empty.jsonl").touch()
    message = refused(capsys, "prefs", "import", str(tmp_path / "empty.jsonl"))
    assert "empty.jsonl holds no pairs" in message
    texts = {"--prompt": "p", "--chosen": "c", "--rejected": "r"}
    for option in texts:
        words = [word for pair in {**texts, option: " "}.items() for word in pair]
        assert f"{option} is empty; give a text." in refused(capsys, "prefs", "add", *words)


def test_judges_are_named_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("deepseek.engine.load.load", lambda *_, **__: pytest.fail("it is loaded"))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi"}\n')
    for judges in ("", " , "):
        told = refused(capsys, "prefs", "generate", "prompts.jsonl", "--judges", judges)
        assert "names no judge; give clean or willing or varied." in told


def test_a_path_with_the_name_of_an_argument_stays(capsys: Capture) -> None:
    for path in ("/data/from_git/out", "a/from_git", "from_git/a", "from_git.txt", "'from_git'"):
        message = f"row_length=1 must be 2; {path} is as it is."
        assert with_options(message, OPTIONS) == f"--row-length=1 must be 2; {path} is as it is."
    told = with_options("no text to learn from; give from_git, or a name.", OPTIONS)
    assert told == "no text to learn from; give --from-git, or a name."


@pytest.mark.parametrize("words", [["expert", "train"], ["plan"], ["expert"], ["bench"]])
def test_every_command_has_the_short_option_for_help(words: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*words, "-h"])
    assert (stop.value.code, capsys.readouterr().err) == (0, "")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("plan", ["default: deepseek-8b", "default: 8", "default: 2", "default: h100"]),
        ("generate", ["'none', the default of generate and export"]),
        ("data questions", ["Git repository", "JSONL file to ask about"]),
        ("adapt", ["--base", "The same as MODEL."]),
    ],
)
def test_help_says_what_an_option_is_and_its_default(
    command: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(word in shown for word in words), shown


def test_a_plan_of_training_names_its_preset(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "deepseek-1b"])
    assert capsys.readouterr().out.startswith("deepseek-1b: ")
