"""One expert's run against its rivals, with tiny models: every row answers the same cases; results
are stored and resumed.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_expert import save_base

import deepseek
from deepseek.checkpoint.store import write_json
from deepseek.cli.main import main
from deepseek.data import TokenShards
from deepseek.data.text.decode import decode_documents
from deepseek.errors import ConfigError, DataError
from deepseek.evaluate import against as against_module
from deepseek.evaluate.against import Against, Row, rows_against
from deepseek.evaluate.completion import CompletionScores
from deepseek.evaluate.verdict import compared, draw, verdicts
from deepseek.packs.library import index_folder
from deepseek.retrieval.index import Index
from deepseek.text.tokenizer import load_tokenizer
from deepseek.train.gates import public_text
from deepseek.train.jobs import expert_index
from deepseek.train.jobs.adapt import AdaptRun, largest_rank
from deepseek.train.jobs.equal_time import (
    EVALUATION_COST,
    Effort,
    adapt_for_equal_time,
    drop_resume_state,
    fit,
    for_training,
    shorter_because,
)
from deepseek.train.jobs.plan import Amount, RowCounts, Speed, make_plan
from deepseek.train.loop.past_runs import find_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with the run of an expert trained on 40 small files."""
    home = tmp_path_factory.mktemp("against-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPSEEK_HOME", str(home))
        patch.setattr(public_text, "ROWS_PER_KIND", 4)
        patch.setattr(public_text, "SAMPLES_PER_OPENING", 1)
        base, text = save_base(home / "base"), home / "text"
        text.mkdir()
        for number in range(40):
            lines = (f"    expert_{n} = model.router_{number}(value_{n})\n" for n in range(30))
            (text / f"file_{number:02}.py").write_text(
                f"def load_{number}(model):\n{''.join(lines)}"
            )
        deepseek.train_expert(
            str(base),
            name="own",
            from_folder=text,
            layers="last:1",
            tokens=4000,
            epochs=1,
            row_length=64,
            quiet=True,
        )
        yield home


@pytest.fixture(autouse=True)
def in_home(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_HOME", str(trained))


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


def test_every_row_answers_the_same_cases_and_stays(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "deepseek.train.jobs.adapt.largest_rank", lambda model: largest_rank(model, 0.1)
    )
    assert call("eval", "own", "--against", "rag,lora,full", "--cases", "3") == 0
    out = capsys.readouterr().out
    assert "expert against base: " in out and "not supported" in out
    folder = trained / "runs" / "own" / "against"
    result = json.loads((folder / "result.json").read_text())
    assert list(result["rows"]) == [
        "LoRA",
        "base",
        "expert",
        "expert + retrieval",
        "full fine-tuning",
        "retrieval",
    ]
    assert all(len(row["exact"]) == 3 and row["loss"] > 0 for row in result["rows"].values())
    assert result["training_seconds"]["LoRA"] > 0 and (folder / "against.png").stat().st_size > 1000
    assert result["rows"]["retrieval"]["prompt_tokens"] >= result["rows"]["base"]["prompt_tokens"]
    monkeypatch.setattr(against_module, "start_engine", None)  # nothing is computed again
    assert call("eval", "own", "--against", "lora", "--cases", "3") == 0
    assert "full fine-tuning" not in capsys.readouterr().out


def test_a_dry_run_estimates_and_changes_nothing(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(trained.rglob("*"))
    assert call("eval", "own", "--tokens", "512", "--human-eval", "2", "--dry-run") == 0
    out = capsys.readouterr().out
    assert re.search(r"3 texts: 3,584 tokens in all passes, about \d+\.\d minutes on cpu", out), out
    assert "2 problems to solve twice, not counted" in out
    assert call("eval", "own", "--against", "rag,lora", "--cases", "3", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "3 lines, each written by base, retrieval, expert, expert + retrieval, LoRA on" in out
    assert call("eval", "own", "--against", "rga", "--dry-run") == 2
    assert call("eval", "own", "--against", "", "--dry-run") == 2
    assert sorted(trained.rglob("*")) == before


def test_a_scored_rival_keeps_no_training_states_and_is_not_trained_again(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("eval", "own", "--against", "full", "--cases", "3") == 0
    folder = trained / "runs" / "own" / "against"
    before = json.loads((folder / "result.json").read_text())
    left = {path.name for path in (folder / "full" / "training").iterdir()}
    assert "metrics.jsonl" in left and not left & {"checkpoints", "best"}
    weights = folder / "full" / "model" / "model.safetensors"
    content = weights.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(AdaptRun, "run", None)  # nothing is trained
        assert call("eval", "own", "--against", "full", "--cases", "2") == 0  # from the model
        shutil.rmtree(weights.parent)
        assert call("eval", "own", "--against", "full", "--cases", "3") == 0  # from stored answers
    assert json.loads((folder / "result.json").read_text()) == before
    assert call("eval", "own", "--against", "full", "--cases", "4") == 0
    assert weights.read_bytes() == content, "other cases need the model, which is trained again"


def test_states_stay_while_they_are_all_that_is_left_of_a_model(tmp_path: Path) -> None:
    states = tmp_path / "training" / "best"
    states.mkdir(parents=True)
    drop_resume_state(tmp_path)
    assert states.is_dir()
    (tmp_path / "model").mkdir()
    drop_resume_state(tmp_path)
    assert not states.exists()


def test_commits_of_held_out_files_are_noted_for_runs_of_earlier_versions(trained: Path) -> None:
    against = Against("own")
    notes = trained / "runs" / "own" / "corpus" / "corpus.json"
    written = notes.read_text()
    counts = []
    try:
        for stored in (json.loads(written), {"report": "of an earlier version"}):
            notes.write_text(json.dumps(stored))
            for git in (None, "repository"):
                against.request["source"]["git"] = git
                counts.append(sum("changed held-out files" in note for note in against._notes()))
    finally:
        notes.write_text(written)
    assert counts == [0, 0, 0, 1]


def test_a_rival_that_was_cut_short_is_named(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "deepseek.train.jobs.adapt.largest_rank", lambda model: largest_rank(model, 0.1)
    )
    record = trained / "runs" / "own" / "result.json"
    before = record.read_text()
    assert call("eval", "own", "--against", "lora", "--cases", "3") == 0
    result = trained / "runs" / "own" / "against" / "result.json"
    seconds = json.loads(result.read_text())["training_seconds"]
    try:
        record.write_text(json.dumps(json.loads(before) | {"seconds": 2 * seconds["LoRA"]}))
        capsys.readouterr()
        assert call("eval", "own", "--against", "lora", "--cases", "3") == 0
    finally:
        record.write_text(before)
    (note,) = (one for one in json.loads(result.read_text())["notes"] if "LoRA" in one)
    assert note in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("epochs", "learnt", "said"),
    [(3, 0.5, "had stopped falling"), (5, 1.0, "5 passes"), (3, 1.0, "was busy")],
)
def test_why_a_rival_took_less_time(epochs: int, learnt: float, said: str, tmp_path: Path) -> None:
    write_json(tmp_path / "effort.json", {"tokens": 1000, "epochs": epochs})
    write_json(tmp_path / "result.json", {"figures": {"tokens": learnt * 1000 * epochs}})
    assert said in shorter_because(tmp_path)


def test_an_expert_of_another_device_is_compared_where_it_can_be(trained: Path) -> None:
    record = trained / "runs" / "own" / "result.json"
    before = record.read_text()
    try:
        record.write_text(json.dumps(json.loads(before) | {"device": "xpu:0"}))
        against = Against("own")
        rows = [Row("base"), Row("LoRA", model="lora")]
        (note,) = against._unequal(rows, {"expert": 1.0, "LoRA": 1.0})
    finally:
        record.write_text(before)
    assert against.device.type == "cpu"
    assert "trained on cpu, the expert on xpu" in note
    assert Against("own")._unequal(rows, {"expert": 1.0, "LoRA": 1.0}) == []


def test_a_run_of_another_kind_is_named(trained: Path) -> None:
    folder = trained / "runs" / "evaluation"
    folder.mkdir()
    write_json(folder / "result.json", {"stage": "eval"})
    try:
        with pytest.raises(DataError, match="made no expert"):
            Against("evaluation")
    finally:
        shutil.rmtree(folder)


def test_a_copy_that_was_cut_short_is_made_again(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = []

    def killed(source: str, target: str, **_: object) -> str:
        copied.append(target)
        if len(copied) == 3:
            raise KeyboardInterrupt
        return shutil.copy2(source, target)

    def finished(run: type, request: object, call: object) -> Path:
        return tmp_path

    monkeypatch.setattr("deepseek.train.jobs.equal_time.run_once", finished)
    monkeypatch.setattr("deepseek.train.jobs.equal_time.measure", lambda *_: Effort(512, 1))
    with monkeypatch.context() as patch:
        patch.setattr(shutil.copytree, "__defaults__", (False, None, killed, False, False))
        with pytest.raises(KeyboardInterrupt):
            adapt_for_equal_time(find_run("own"), "lora", tmp_path)
    assert not (tmp_path / "corpus").exists()
    adapt_for_equal_time(find_run("own"), "lora", tmp_path)
    names = [
        {str(path.relative_to(corpus)) for path in corpus.rglob("*")}
        for corpus in (find_run("own") / "corpus", tmp_path / "corpus")
    ]
    assert names[0] == names[1]


def test_the_index_holds_what_was_trained_on_and_nothing_that_was_held_out(trained: Path) -> None:
    folder = expert_index.index_expert("own")
    assert folder == index_folder("own") == trained / "experts" / "own.index"
    tokenizer = load_tokenizer(trained / "base")
    corpus = find_run("own") / "corpus"
    sides = [
        {document.name for document in decode_documents(TokenShards(corpus / side), tokenizer)}
        for side in ("train", "held-out")
    ]
    found = {passage.name for passage in Index.load(folder).passages}
    assert found == sides[0] and not found & sides[1]
    before = (folder / "passages.jsonl").stat().st_mtime_ns
    expert_index.index_expert("own")
    assert (folder / "passages.jsonl").stat().st_mtime_ns == before
    whole = (folder / "passages.jsonl").read_text()
    (folder / "passages.jsonl").write_text(whole[:-9])
    expert_index.index_expert("own")
    assert (folder / "passages.jsonl").read_text() == whole, "a damaged index is built again"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("eval", "--against", "rag"), "--against compares one expert at a time"),
        (("eval", "own", "--against", "rga"), "perhaps 'rag'"),
        (("eval", "own", "--json", "--dry-run"), "which has no JSON"),
        (("eval", "nobody", "--against", "rag"), "There is no run 'nobody'"),
        (("expert", "index", "nobody"), "There is no run 'nobody'"),
    ],
)
def test_a_mistake_is_one_sentence(
    words: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*words) == 2
    assert complaint in capsys.readouterr().err


def test_runs_that_made_no_expert_are_refused(trained: Path) -> None:
    run = trained / "runs" / "half"
    run.mkdir(parents=True)
    (run / "request.json").write_text('{"base": "x", "source": {"by": "file", "git": null}}')
    with pytest.raises(DataError, match="is not finished"):
        Against("half")
    (run / "result.json").write_text('{"stage": "adapt"}')
    with pytest.raises(DataError, match="made no expert"):
        Against("half")
    with pytest.raises(DataError, match="trains no expert"):
        expert_index.index_expert("half")


def test_rows_come_in_the_order_of_the_table() -> None:
    assert [row.name for row in rows_against(["full", "rag"])] == [
        "base",
        "retrieval",
        "expert",
        "expert + retrieval",
        "full fine-tuning",
    ]
    assert [row.name for row in rows_against([])] == ["base", "expert"]
    with pytest.raises(ConfigError, match="no rival 'ragg'"):
        rows_against(["ragg"])


@pytest.mark.parametrize(
    ("seconds", "effort"),
    [
        (5.0, Effort(5 * 512, 1)),
        (10.0, Effort(10 * 512, 1)),
        (25.0, Effort(8 * 512, 3)),
        (1000.0, Effort(10 * 512, 5)),
        (-3.0, Effort(512, 1)),
    ],
)
def test_the_time_decides_how_much_text_and_how_often(seconds: float, effort: Effort) -> None:
    assert fit(seconds, 1.0, 10, 512) == effort


@given(st.integers(400, 10_000), st.floats(0.01, 2.0), st.integers(1, 200))
def test_a_rival_gets_the_time_of_the_expert_evaluations_included(
    steps: int, row_seconds: float, rows: int
) -> None:
    """A plan made from the rival's own speed takes as long as the expert took."""
    seconds = steps * row_seconds
    speed = Speed(0.0, row_seconds, row_seconds * EVALUATION_COST)
    effort = fit(for_training(seconds, row_seconds, min(16, rows)), row_seconds, 10**6, 512)
    amount = Amount(effort.tokens, effort.epochs, effort.epochs, 512, 1, 16 * 512)
    plan = make_plan(amount, None, speed, RowCounts(10**6, 10**6, rows))
    assert plan.seconds == pytest.approx(seconds, rel=0.1)


def test_a_lost_row_is_told_as_a_won_one(tmp_path: Path) -> None:
    def row(exact: list[float]) -> CompletionScores:
        return CompletionScores(1.0, exact, exact, None, None, 1.0, 1.0, 1.0)

    base, expert = [0.0] * 50 + [1.0] * 50, [0.0] * 70 + [1.0] * 30
    rows = {
        "base": row(base),
        "retrieval": row(base),
        "expert": row(expert),
        "expert + retrieval": row([1.0] * 100),
    }
    documents = [str(place) for place in range(100)]
    said = verdicts(rows, documents)
    assert said[0].startswith("expert against base: worse, -20.0 points (")
    assert said[2].startswith("expert + retrieval against retrieval: better, +50.0 points (")
    assert verdicts({"base": row(base), "expert": row(base)}, documents)[0].startswith(
        "expert against base: no line differs"
    )
    few = {"base": row([0.0] * 200), "expert": row([1.0] * 4 + [0.0] * 196)}
    assert "not told apart, +2.0 points" in verdicts(few, [str(place) for place in range(200)])[0]
    table = compared(rows, documents)
    assert table["base"].over_base is None and table["expert"].exact.mean == 0.3
    draw(rows, "title", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
