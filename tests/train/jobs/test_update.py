"""An expert is updated with what is new in its source, and a watcher plugs every new state."""

import errno
import json
import random
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.store import home, read_json, write_json
from deepseek.cli.main import main
from deepseek.data import Document, TokenShards
from deepseek.data.text.decode import decode_documents
from deepseek.errors import ConfigError, DataError, PackError, TrainError
from deepseek.evaluate.quality import ReportedRows, expert_texts, held_out_folder, trained_here
from deepseek.packs.listing import read_manifest
from deepseek.packs.pack import ExpertPack, read_pack, write_pack
from deepseek.retrieval.index import Index
from deepseek.text.tokenizer import load_tokenizer
from deepseek.train.jobs import expert_index, watch
from deepseek.train.jobs.expert import train_expert
from deepseek.train.jobs.expert_server import ExpertServer
from deepseek.train.jobs.update import TrainedExpert
from deepseek.train.loop.past_runs import finished_runs, latest_run
from deepseek.train.loop.run_lock import run_lock
from deepseek.train.text.corpus import whole_text

Capture = pytest.CaptureFixture[str]

PACK = "words.safetensors"
DIALS: dict[str, Any] = {
    "name": "words",
    "layers": "last:2",
    "width": 24,
    "tokens": 1500,
    "epochs": 1,
    "row_length": 32,
    "batch_rows": 4,
    "learning_rate": 1e-2,
    "held_out_tokens": 400,
    "quiet": True,
}
WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa")


def sentence(seed: int) -> str:
    """Return ninety words, each with three possible followers."""
    draw = random.Random(seed)
    place = seed
    words = []
    for _ in range(90):
        words.append(WORDS[place % len(WORDS)])
        place = place * 3 + draw.randrange(3)
    return " ".join(words)


@dataclass
class Home:
    """A trained expert `words` and its source."""

    source: Path
    run: Path
    pack: Path

    def write(self, *numbers: int) -> None:
        """Add files to the source, or change them."""
        for number in numbers:
            (self.source / f"{number}.txt").write_text(sentence(number) + f" {number}")

    def updates(self) -> list[Path]:
        folder = self.run / "updates"
        return [path for path in folder.glob("*") if path.is_dir()]


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Home:
    """An expert `words`, trained on a folder of texts."""
    folder = tmp_path_factory.mktemp("updated")
    words = Home(folder / "texts", home() / "runs" / "words", home() / "experts" / PACK)
    words.source.mkdir()
    words.write(*range(40))
    train_expert(str(tiny_base), from_folder=words.source, **DIALS)
    return words


@pytest.fixture
def words(trained: Home, tmp_path: Path) -> Iterator[Home]:
    """The trained expert; it is restored after the test."""
    expert = trained.pack.read_bytes()
    folders = {trained.run: tmp_path / "run", trained.source: tmp_path / "texts"}
    for folder, saved in folders.items():
        shutil.copytree(folder, saved)
    yield trained
    for folder, saved in folders.items():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved, folder)
    trained.pack.write_bytes(expert)


def update(**changes: Any) -> Path:
    return train_expert(update="words", tokens=600, epochs=1, quiet=True, **changes)


def documents(run: Path) -> set[str]:
    return set(read_json(run / "corpus" / "corpus.json")["documents"])


def test_an_update_learns_what_is_new_and_keeps_the_rest(
    words: Home, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert update() == words.pack and words.updates() == []
    before = read_pack(words.pack).manifest
    words.write(*range(40, 44))
    (words.source / "3.txt").write_text(sentence(99))
    assert update() == words.pack
    after = read_pack(words.pack).manifest
    assert (after.layers, after.width, after.name) == (before.layers, before.width, "words")
    assert after.digest != before.digest
    assert after.data[: len(before.data)] == before.data and len(after.data) == 2
    (folder,) = words.updates()
    new = documents(folder) - documents(words.run)
    assert 1 <= len(new) <= 5
    rate = read_json(folder / "training" / "config.json")["optim"]["learning_rate"]
    assert rate == 0.25 * DIALS["learning_rate"]
    assert read_pack(folder / "before.safetensors").manifest.digest == before.digest
    assert read_json(folder / "result.json")["best_step"] > 0
    metric = after.metrics["held-out"]
    former = read_json(folder / "former.json")["loss"]
    assert metric.after < metric.before, "the report compares with the base"
    assert former < metric.before
    update(learning_rate=1e-3)
    train_expert(update="words")
    assert "nothing is new in the source of words" in capsys.readouterr().err
    assert read_pack(words.pack).manifest.digest == after.digest and words.updates() == [folder]
    words.write(44, 45, 46, 47, 48, 49)
    monkeypatch.setattr(watch, "train_signed", lambda **_: update())  # no time budget
    watch.watch_expert("words", every=0, rounds=2)
    assert read_pack(words.pack).manifest.digest != after.digest
    assert len(words.updates()) == 2


def test_after_an_update_its_text_is_the_one_to_report_on_and_to_search(words: Home) -> None:
    assert held_out_folder("words") == words.run / "corpus" / "held-out"
    folder = expert_index.index_expert("words")
    assert folder == words.pack.with_name("words.index")
    index = Index.load(folder)
    words.write(*range(40, 44))
    (words.source / "3.txt").write_text(sentence(99))
    update()
    update_run = latest_run(words.run)
    assert update_run != words.run
    assert held_out_folder("words") == update_run / "corpus" / "held-out"
    (text,) = expert_texts(["words"], ["words"])
    assert text.reported == ReportedRows.of(update_run)
    assert trained_here(read_pack(words.pack).manifest)

    tokenizer = load_tokenizer(resolve(read_json(words.run / "request.json")["base"]))
    learnt = [document.text for document in expert_index.learnt_documents(words.run, tokenizer)]
    assert len(set(learnt)) == len(learnt)
    read = {document.text for run in (words.run, update_run) for document in texts(run)}
    assert {*learnt} == read - {f"{sentence(3)} 3"}, "of a changed file, what it holds now"
    again = Index.load(expert_index.index_expert("words"))
    assert again.source != index.source
    assert len({passage.name for passage in again.passages}) == len(learnt)

    words.write(44, 45, 46)
    update()
    numbers = [read_json(run / "result.json").get("update", 0) for run in finished_runs(words.run)]
    assert numbers == [0, 1, 2]

    for path in list(words.source.iterdir()):
        path.rename(path.with_name(f"moved-{path.name}"))
    words.write(47)
    update()
    held_out = decode_documents(TokenShards(held_out_folder("words")), tokenizer)
    assert not {document.text for document in held_out} & {*learnt}, "a moved file is no test"


def texts(run: Path) -> Iterator[Document]:
    """Yield the training documents of one run."""
    tokenizer = load_tokenizer(resolve(read_json(run / "request.json")["base"]))
    return decode_documents(whole_text(run / "corpus"), tokenizer)


def test_an_interrupted_update_ends_with_the_same_bits(
    words: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    words.write(40, 41, 42, 43)
    expert = words.pack.read_bytes()
    update()
    whole = words.pack.read_bytes()
    shutil.rmtree(words.run / "updates")
    words.pack.write_bytes(expert)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("deepseek.train.jobs.update.UpdateRun.calibrate", stop)
        with pytest.raises(KeyboardInterrupt):
            update(learning_rate=1e-5)
        with pytest.raises(KeyboardInterrupt):
            update()  # with other arguments it starts again
    assert words.pack.read_bytes() == expert
    update()
    assert words.pack.read_bytes() == whole


def test_a_dry_run_changes_nothing(words: Home, capsys: Capture) -> None:
    words.write(40, 41)
    expert = words.pack.read_bytes()
    train_expert(update="words", tokens=600, dry_run=True)
    assert "steps, about" in capsys.readouterr().err
    assert words.pack.read_bytes() == expert and words.updates() == []


def test_what_cannot_be_updated_is_one_sentence(words: Home) -> None:
    with pytest.raises(DataError, match=r"no run 'wrods'; perhaps 'words' is meant"):
        train_expert(update="wrods")
    with pytest.raises(ConfigError, match=r"^layers does not go with update: words keeps"):
        train_expert(update="words", layers="all")
    with pytest.raises(ConfigError, match=r"^minutes"):
        train_expert(update="words", minutes=0)
    (words.source / "picture.png").write_bytes(b"\x89PNG\0\0")
    (words.source / "1.txt").unlink()
    with pytest.raises(DataError, match="holds no new text to train on"):
        update()
    with run_lock(words.run), pytest.raises(TrainError, match="in use"):
        threaded(update)
    shutil.move(words.source, words.source.with_name("elsewhere"))
    with pytest.raises(DataError, match="texts"):
        update()
    words.pack.unlink()
    with pytest.raises(DataError, match="gone"):
        update()
    (words.run / "result.json").unlink()
    with pytest.raises(DataError, match="no finished run"):
        update()


def threaded(call: Any) -> None:
    """Call in another thread and re-raise its exception here."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    raise raised[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("expert train --update wrods", "no run 'wrods'"),
        ("expert train --update words --width 9", "--width does not go with update"),
        ("watch wrods", "no run 'wrods'"),
        ("watch words --server ftp://x", "'ftp://x' is not understood"),
        ("watch words --server http://127.0.0.1:9", "cannot be reached"),
    ],
)
def test_mistakes_on_the_command_line_exit_with_2(
    words: Home, capsys: Capture, line: str, message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error and "Traceback" not in error


class Asked(BaseHTTPRequestHandler):
    """Records the requests; refuses those without the key."""

    seen: list[tuple[str, str, str]]
    plugged: list[dict[str, str]]

    def _answer(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        self.seen.append((self.command, self.path, self.rfile.read(size).decode()))
        allowed = self.headers["Authorization"] == "Bearer secret"
        self.send_response((404 if self.command == "DELETE" else 201) if allowed else 401)
        self.end_headers()
        if not allowed:
            self.wfile.write(b'{"error": {"message": "An admin key is needed."}}')
        elif self.command == "GET":
            self.wfile.write(json.dumps({"data": self.plugged}).encode())

    do_GET = do_POST = do_DELETE = _answer

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@dataclass
class Served:
    """A server that records its requests."""

    url: str
    seen: list[tuple[str, str, str]]
    plugged: list[dict[str, str]]


@pytest.fixture
def server() -> Iterator[Served]:
    seen: list[tuple[str, str, str]] = []
    plugged: list[dict[str, str]] = []
    handler = type("Handler", (Asked,), {"seen": seen, "plugged": plugged})
    served = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    yield Served(f"http://127.0.0.1:{served.server_port}", seen, plugged)
    served.shutdown()
    thread.join()
    served.server_close()


def test_an_index_lies_beside_a_pack_that_lies_elsewhere(words: Home, tmp_path: Path) -> None:
    """A server with that folder looks for it there."""
    pack = tmp_path / words.pack.name
    pack.write_bytes(words.pack.read_bytes())
    result = words.run / "result.json"
    write_json(result, read_json(result) | {"pack": str(pack)})
    assert expert_index.index_expert("words") == tmp_path / "words.index"
    assert (tmp_path / "words.index" / "meta.json").is_file()


def test_a_copied_home_updates_its_own_pack(
    words: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run has recorded the path of its pack at training time."""
    copied = tmp_path / "copied"
    shutil.copytree(words.run, copied / "runs" / "words")
    (copied / "experts").mkdir()
    pack = copied / "experts" / PACK
    pack.write_bytes(words.pack.read_bytes())
    monkeypatch.setenv("DEEPSEEK_HOME", str(copied))
    assert TrainedExpert.find("words").pack == pack
    assert expert_index.index_expert("words") == copied / "experts" / "words.index"
    words.pack.unlink()
    assert TrainedExpert.find("words").pack == pack, "the former home may be gone"


def test_a_pack_that_lies_elsewhere_is_updated_there(words: Home, tmp_path: Path) -> None:
    """The requested folder is named `experts` but is not in a home."""
    elsewhere = tmp_path / "experts" / PACK
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(words.pack.read_bytes())
    result = words.run / "result.json"
    write_json(result, read_json(result) | {"pack": str(elsewhere)})
    assert TrainedExpert.find("words").pack == elsewhere


def test_what_a_pack_that_was_trained_anew_lacks_is_learnt_again(words: Home) -> None:
    first = words.pack.read_bytes()
    words.write(40, 41)
    update()
    words.write(42, 43, 44)
    update()
    updated = documents(latest_run(words.run))
    assert len(words.updates()) == 2
    words.pack.write_bytes(first)  # as the same command would after `expert rm`
    update()
    (folder,) = words.updates()
    assert read_json(folder / "result.json")["update"] == 1
    assert documents(folder) == updated
    assert len(read_pack(words.pack).manifest.data) == 2
    learnt = {document.text for document in texts(folder)}
    news = [sentence(number) + f" {number}" for number in range(40, 45)]
    assert len(learnt & {*news}) > 2, "of both updates"


def test_a_pack_of_another_training_is_not_updated(words: Home) -> None:
    pack = read_pack(words.pack)
    manifest = pack.manifest.model_copy(update={"data": ("0" * 64,), "digest": ""})
    write_pack(words.pack, ExpertPack.seal(manifest, pack.tensors))
    foreign = words.pack.read_bytes()
    words.write(40, 41)
    with pytest.raises(PackError, match=r"is not what .*words trained; restore it, or delete"):
        update()
    assert words.pack.read_bytes() == foreign


def test_a_finished_run_keeps_the_place_of_its_pack(
    words: Home, tiny_base: Path, tmp_path: Path
) -> None:
    """The run would write the pack of its original training, without the updates."""
    asked = tmp_path / "elsewhere.safetensors"
    again = partial(train_expert, str(tiny_base), from_folder=words.source, **DIALS)
    with pytest.raises(ConfigError, match=r"words\.safetensors; copy that file to .*elsewhere"):
        again(out=asked)
    assert not asked.exists()
    assert again() == again(out=words.pack) == words.pack
    result = words.run / "result.json"
    shutil.copy(words.pack, asked)
    write_json(result, read_json(result) | {"pack": str(asked)})
    with pytest.raises(ConfigError, match=r"elsewhere\.safetensors; copy that file"):
        again()


def test_a_server_is_told_to_plug_the_new_pack(server: Served) -> None:
    ExpertServer(server.url + "/", "secret").plug_again("words")
    ((method, path, body),) = server.seen
    assert (method, path) == ("POST", "/v1/experts")
    assert json.loads(body) == {"name": "words", "replace": True}
    with pytest.raises(DataError, match=r"refused GET .*\(401\): An admin key is needed"):
        ExpertServer(server.url).plugged_digest("words")


def test_a_watcher_updates_when_the_source_has_changed_and_is_quiet(
    words: Home, monkeypatch: pytest.MonkeyPatch, server: Served
) -> None:
    """The source's state at each check comes from a list; the update is faked."""
    states = iter(["old", "old", "a", "b", "b", "b", "c", "c", "c", "old", "old"])
    learnt = {"old"}
    updated: list[str] = []
    said: list[str] = []
    now = [""]

    def state(_: TrainedExpert) -> str:
        now[0] = next(states)
        return now[0]

    def stand_in(**_: object) -> Path:
        updated.append(now[0])
        if now[0] == "b":
            raise DataError("There is no new text.")
        learnt.add(now[0])
        return words.pack

    monkeypatch.setattr(TrainedExpert, "state", state)
    monkeypatch.setattr(TrainedExpert, "learnt_states", lambda _: frozenset(learnt))
    monkeypatch.setattr(watch, "train_signed", stand_in)
    monkeypatch.setattr(watch.time, "sleep", lambda _: None)
    watch.watch_expert("words", ExpertServer(server.url, "secret"), rounds=10, say=said.append)
    assert updated == ["b", "c"]
    assert [text.partition(" in ")[0] for text in said] == [
        "watching the source of words; Ctrl-C ends it",
        "words: its source has changed; updating",
        "words: There is no new text.",
        "words: its source has changed; updating",
        "words is updated",
        "words is plugged",
    ]
    assert [method for method, _, _ in server.seen] == ["GET", "POST"]


@pytest.mark.parametrize(
    ("digest", "asked"), [("0" * 64, ["GET", "POST"]), (None, ["GET"]), ("", ["GET"])]
)
def test_a_watcher_plugs_what_was_updated_while_it_was_off(
    words: Home, monkeypatch: pytest.MonkeyPatch, server: Served, digest: str | None, asked: object
) -> None:
    """The server has another pack, the run's pack, or none."""
    own = read_manifest(words.pack).digest
    if digest != "":
        server.plugged.append({"name": "words", "digest": digest or own})
    monkeypatch.setattr(watch.time, "sleep", lambda _: None)
    watch.watch_expert("words", ExpertServer(server.url, "secret"), rounds=3)
    assert [method for method, _, _ in server.seen] == asked


def test_a_server_of_another_kind_is_told_from_ours(server: Served) -> None:
    server.plugged.append({"id": "some-model"})
    with pytest.raises(DataError, match="lists no experts; give"):
        ExpertServer(server.url, "secret").plugged_digest("words")


@pytest.mark.parametrize(
    ("error", "complaint"),
    [
        (TrainError("The disk is full."), "The disk is full."),
        (OSError(errno.ENOSPC, "No space left", "run"), "run: No space left."),
    ],
)
def test_a_watcher_tries_a_failed_update_again_after_ever_longer_pauses(
    words: Home, monkeypatch: pytest.MonkeyPatch, error: Exception, complaint: str
) -> None:
    looks: list[int] = []
    tried: list[int] = []
    said: list[str] = []

    def state(_: TrainedExpert) -> str:
        looks.append(0)
        return "new" if len(looks) < 15 else "newer"

    def fail(**_: object) -> Path:
        tried.append(len(looks))
        raise error

    monkeypatch.setattr(TrainedExpert, "state", state)
    monkeypatch.setattr(watch, "train_signed", fail)
    monkeypatch.setattr(watch.time, "sleep", lambda _: None)
    watch.watch_expert("words", every=0, rounds=21, say=said.append)
    assert tried == [2, 4, 7, 12, 16, 18, 21]
    assert said.count(f"words: {complaint}") == 2, "once for each state"


def test_a_watcher_waits_for_a_source_that_is_away(
    words: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[str | None] = ["old", None, None, "old"]
    said: list[str] = []

    def state(_: TrainedExpert) -> str:
        found = states.pop(0)
        if found is None:
            raise OSError(errno.EIO, "Input/output error", "/texts")
        return found

    monkeypatch.setattr(TrainedExpert, "state", state)
    monkeypatch.setattr(TrainedExpert, "learnt_states", lambda _: frozenset({"old"}))
    monkeypatch.setattr(watch.time, "sleep", lambda _: None)
    watch.watch_expert("words", every=0, rounds=3, say=said.append)
    assert said[1:] == ["words: /texts: Input/output error."]


def test_a_watcher_plugs_later_what_the_server_has_missed(
    words: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    plugged: list[str] = []
    faults = [DataError("The server is gone."), DataError("The server is gone."), None]

    class Restarted:
        def plugged_digest(self, name: str) -> str:
            return read_manifest(words.pack).digest

        def plug_again(self, name: str) -> None:
            fault = faults.pop(0)
            if fault is not None:
                raise fault
            plugged.append(name)

    learnt: set[str] = set()

    def stand_in(**_: object) -> Path:
        learnt.add(TrainedExpert.find("words").state())
        return words.pack

    monkeypatch.setattr(TrainedExpert, "learnt_states", lambda _: frozenset(learnt))
    monkeypatch.setattr(watch, "train_signed", stand_in)
    monkeypatch.setattr(watch.time, "sleep", lambda _: None)
    words.write(40)
    restarted: Any = Restarted()
    watch.watch_expert("words", restarted, rounds=5, say=said.append)
    assert plugged == ["words"]
    assert said[3:] == ["words: The server is gone.", "words is plugged"]
