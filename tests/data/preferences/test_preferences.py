"""The preference database: acknowledged writes persist, duplicates are refused, and splits keep a
prompt's pairs together.
"""

import gzip
import json
import os
import signal
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.data.preferences.database import REVIEWED, Added, Preference, PreferenceDatabase
from deepseek.data.preferences.files import (
    preference,
    read_preferences,
    record_of,
    write_preferences,
)
from deepseek.data.text import source
from deepseek.errors import DataError

KILLS = int(os.environ.get("KILLS", "20"))
"""For a long run: `KILLS=200 pytest tests/data/preferences/test_preferences.py -k killed`."""


def pair(number: int, prompt: int | None = None) -> Preference:
    asked = {
        "role": "user",
        "content": f"question {number if prompt is None else prompt} about\ntopic",
    }
    return Preference(
        (asked,),
        f"good answer {number}",
        f"bad answer {number}",
        "test",
        ("even",) * (number % 2 == 0),
    )


@pytest.fixture
def database(tmp_path: Path) -> PreferenceDatabase:
    return PreferenceDatabase(tmp_path / "p.db")


def test_what_goes_in_comes_out(database: PreferenceDatabase) -> None:
    judged = Preference(pair(1).prompt, "a", "b", "s", ("x", "y"), {"judge": (0.9, 0.25)})
    number = database.add(judged)
    assert number is not None
    found = database.get(number)
    assert (found.prompt, found.chosen, found.labels, found.scores) == (
        judged.prompt,
        "a",
        ("x", "y"),
        judged.scores,
    )
    assert database.add(judged) is None
    assert database.add_all([pair(1), pair(2), pair(1)]).duplicates == 1


def test_words_are_found_wherever_they_stand(database: PreferenceDatabase) -> None:
    database.add_all((pair(i) for i in range(50)), batch=7)
    assert [found.chosen for found in database.search("topic 7")] == ["good answer 7"]
    assert database.search("topic")[0].chosen == "good answer 49"
    assert database.search('no "such* OR (words') == []
    assert database.search("user") == [], "roles are no words"
    newest = [pair.id for pair in database.search("", limit=5)]
    assert newest == sorted((pair.id for pair in database.pairs()), reverse=True)[:5]


def test_words_of_scripts_without_spaces_are_found_within_others(
    database: PreferenceDatabase,
) -> None:
    texts = ["今天天气很好。", "明日の天気はどうですか", "GPT模型100%好_了", "อากาศดีมาก", "plain"]
    for text in texts:
        database.add(Preference(({"role": "user", "content": text},), f"{text} yes", "no"))

    def found(words: str, limit: int = 20) -> list[str]:
        return [pair.prompt[0]["content"] for pair in database.search(words, limit)]

    assert found("天气") == [texts[0]]
    assert found("天気") == [texts[1]]
    assert found("天") == [texts[1], texts[0]]
    assert found("天", limit=1) == [texts[1]]
    assert found("天气 很好") == [texts[0]]
    assert found("天气 明日") == []
    assert found("gpt模型 100%好_了") == [texts[2]]
    assert found("模型1_0") == found("模%好") == []
    assert found("ดีมาก yes") == [texts[3]]
    assert found("天气 plain") == []
    assert found("天 " * 2000) == [texts[1], texts[0]]


@given(st.text("天气好 ab", min_size=1, max_size=12), st.text("天气好 ab", min_size=1, max_size=4))
def test_parts_of_texts_without_spaces_are_found(text: str, wanted: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        database = PreferenceDatabase(Path(folder) / "p.db")
        database.add(Preference(({"role": "user", "content": text},), "yes", "no"))
        parts = [word for word in wanted.split() if not word.isascii()]
        if parts and len(parts) == len(wanted.split()):
            assert bool(database.search(wanted)) == all(part in text for part in parts)
        database.close()


def test_pairs_of_another_process_are_not_counted(tmp_path: Path) -> None:
    database = PreferenceDatabase(tmp_path / "p.db")
    other = PreferenceDatabase(tmp_path / "p.db")

    def sampled() -> Iterator[Preference]:
        for number in range(3):
            other.add(pair(100 + number))
            yield pair(number)
        yield pair(0)
        yield pair(101)

    assert database.add_all(sampled()) == Added(3, 2)
    assert database.add(pair(7)) is not None
    assert database.statistics().pairs == 7


def test_a_revision_is_found_by_its_new_words_and_keeps_the_old_ones(
    database: PreferenceDatabase,
) -> None:
    database.add_all([pair(1), pair(2)])
    database.revise(1, chosen="splendid reply", labels=("checked",))
    assert [found.id for found in database.search("splendid")] == [1]
    assert database.search("good 1") == []
    assert [before["chosen"] for before in database.history(1)] == ["good answer 1"]
    with pytest.raises(DataError, match="duplicate"):
        database.revise(
            1, **{name: getattr(pair(2), name) for name in ("prompt", "chosen", "rejected")}
        )
    assert database.get(1).chosen == "splendid reply" and len(database.history(1)) == 1
    database.check()


def test_two_reviewers_at_once_are_both_heard(tmp_path: Path) -> None:
    path = tmp_path / "p.db"
    with closing(PreferenceDatabase(path)) as database:
        database.add_all([replace(pair(number), scores={}) for number in range(30)])
    gate = threading.Barrier(2)

    def judge(reviewer: str) -> None:
        for number in range(1, 31):
            with closing(PreferenceDatabase(path)) as database:
                gate.wait()
                database.revise_by(
                    number, lambda before: {"scores": {**before.scores, reviewer: (1.0, 0.0)}}
                )

    reviewers = [threading.Thread(target=judge, args=(name,)) for name in ("ann", "bob")]
    for thread in reviewers:
        thread.start()
    for thread in reviewers:
        thread.join()
    with closing(PreferenceDatabase(path)) as database:
        assert all(found.scores.keys() == {"ann", "bob"} for found in database.pairs())
        assert [len(before["scores"]) for before in database.history(1)] == [0, 1]


def test_pairs_of_a_prompt_stay_together_and_sides_do_not_change(
    database: PreferenceDatabase,
) -> None:
    database.add_all(pair(i, prompt=i // 4) for i in range(800))
    held = {found.prompt[0]["content"] for found in database.pairs("eval")}
    assert not held & {found.prompt[0]["content"] for found in database.pairs("train")}
    assert 5 < len(held) < 40
    database.set_eval_share(0.3)
    assert held < {found.prompt[0]["content"] for found in database.pairs("eval")}
    counted = database.statistics()
    assert (counted.pairs, counted.prompts, counted.labels) == (800, 200, {"even": 400})
    assert sum(counted.splits.values()) == 800


def test_the_next_pair_to_review_is_the_first_without_the_label(tmp_path: Path) -> None:
    labels = [
        (),
        (REVIEWED,),
        ("un" + REVIEWED, f'a "{REVIEWED}" label'),
        ("x", REVIEWED),
        (),
        (REVIEWED,),
    ]
    with_index = PreferenceDatabase(tmp_path / "p.db")
    with_index.add_all(replace(pair(number), labels=own) for number, own in enumerate(labels * 20))
    with_index.close()
    with sqlite3.connect(tmp_path / "p.db") as file:
        file.execute("DROP INDEX unreviewed")  # older databases lack it
    database = PreferenceDatabase(tmp_path / "p.db")
    for after in range(122):
        expected = next(
            (one for one in database.pairs() if one.id > after and REVIEWED not in one.labels), None
        )
        assert database.unreviewed(after) == expected
    assert database.reviewed() == (120, 60)
    database.revise(1, labels=(REVIEWED,))
    assert database.reviewed() == (120, 61)
    first = database.unreviewed()
    assert first is not None and first.id == 3
    database.check()


def test_finding_it_does_not_take_longer_with_more_pairs(database: PreferenceDatabase) -> None:
    steps, last = [], 0
    for start in (0, 1000):
        database.add_all(
            replace(pair(number), labels=(REVIEWED,)) for number in range(start, start + 1000)
        )
        after, last = last, database.add(pair(start + 99_999)) or 0
        steps.append(0)

        def count() -> None:
            steps[-1] += 1

        database._db.set_progress_handler(count, 1)
        found = database.unreviewed(after)
        database._db.set_progress_handler(None, 1)
        assert found is not None and found.id == last
    assert steps[1] <= 1.2 * steps[0] < 1000


def test_judges_are_counted(database: PreferenceDatabase) -> None:
    for number, scores in enumerate([(0.9, 0.1), (0.8, 0.2), (0.1, 0.6), (0.7, 0.1)]):
        database.add(Preference(pair(number).prompt, "a", "b", scores={"clean": scores}))
    assert database.statistics().agreement == {"clean": 0.75}


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_export_and_import_give_the_same_pairs(
    database: PreferenceDatabase, tmp_path: Path, name: str
) -> None:
    database.add_all(pair(i) for i in range(20))
    database.add(Preference(pair(99).prompt, "a\n", "b", "s", (), {"judge": (1.0, 0.0)}))
    assert write_preferences(database, tmp_path / name) == 21
    again = list(read_preferences(tmp_path / name))
    assert [one.digest for one in again] == [one.digest for one in database.pairs()]
    assert again[-1].scores == {"judge": (1.0, 0.0)} and again[0].source == "test"


def test_what_came_before_an_interruption_stays(tmp_path: Path) -> None:
    def sampled() -> Iterator[Preference]:
        for number in range(3):
            ask = ({"role": "user", "content": f"question {number}"},)
            yield Preference(ask, "yes", "no")
        raise KeyboardInterrupt

    database = PreferenceDatabase(tmp_path / "p.db")
    with pytest.raises(KeyboardInterrupt):
        database.add_all(sampled())
    database.close()
    assert len(list(PreferenceDatabase(tmp_path / "p.db").pairs())) == 3


@given(
    st.text(min_size=1),
    st.text(min_size=1),
    st.lists(st.sampled_from(["user", "assistant", "system"]), max_size=3),
)
def test_a_record_gives_its_pair_back(chosen: str, rejected: str, roles: list[str]) -> None:
    if chosen == rejected:
        return
    prompt = (
        {"role": "user", "content": "q"},
        *({"role": role, "content": role} for role in roles),
    )
    one = Preference(prompt, chosen, rejected)
    assert preference(record_of(one), "x", "").digest == one.digest


def test_the_forms_of_the_field_mean_the_same() -> None:
    user, good, bad = (
        {"role": role, "content": text}
        for role, text in (("user", "q"), ("assistant", "g"), ("assistant", "b"))
    )
    forms = [
        {"prompt": "q", "chosen": "g", "rejected": "b"},
        {"prompt": [user], "chosen": [good], "rejected": [bad]},
        {"prompt": [user], "chosen": [user, good], "rejected": [user, bad]},
        {"chosen": [user, good], "rejected": [user, bad]},
        {"chosen": "\n\nHuman: q\n\nAssistant: g", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    ]
    assert len({preference(form, "x", "s").digest for form in forms}) == 1


def test_transcripts_are_split_into_turns() -> None:
    """Turns of one speaker are joined, empty ones dropped; an answer may be empty."""
    start = "\n\nHuman: one\n\nHuman: two\n\nAssistant: \n\nHuman: three\n\nAssistant:"
    found = preference({"chosen": f"{start} Yes.\n\nNo.", "rejected": f"{start} "}, "x", "s")
    assert found.prompt == ({"role": "user", "content": "one\n\ntwo\n\nthree"},)
    assert (found.chosen, found.rejected) == ("Yes.\n\nNo.", "")


def test_a_packed_file_is_read_and_a_damaged_one_refused(tmp_path: Path) -> None:
    plain = tmp_path / "pairs.jsonl"
    plain.write_text('{"prompt": "ä", "chosen": "g", "rejected": "b"}\n' * 2, encoding="utf-8-sig")
    file = tmp_path / "pairs.jsonl.gz"
    packed = gzip.compress(plain.read_bytes())
    file.write_bytes(packed)
    pairs = list(read_preferences(file))
    assert [pair.digest for pair in pairs] == [pair.digest for pair in read_preferences(plain)]
    for damaged in (b"\x1f\x8b", packed[:-9], b"no gzip"):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match="is damaged"):
            list(read_preferences(file))


def test_a_line_of_a_packed_file_has_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "LONGEST_LINE", 1 << 20)
    file = tmp_path / "pairs.jsonl.gz"
    file.write_bytes(gzip.compress(b" " * (1 << 20)))
    with pytest.raises(DataError, match="line 1 has 1 MiB or more; write one record"):
        list(read_preferences(file))


def test_other_packed_files_are_named_as_such(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl.zst"
    file.write_bytes(b"\x28\xb5")
    with pytest.raises(DataError, match="is compressed; unpack it first"):
        list(read_preferences(file))


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"text": "x"}, "rename"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "to itself"),
        ({"chosen": "a", "rejected": "b"}, "no `prompt`"),
        ({"prompt": "q", "chosen": [{"role": "assistant"}], "rejected": "b"}, "needs a text"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "after the prompt"),
        (
            {
                side: [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": side},
                    {"role": "user", "content": "and?"},
                    {"role": "assistant", "content": f"more {side}"},
                ]
                for side in ("chosen", "rejected")
            },
            "different conversations",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "scores": {"j": 1}}, "must map a judge"),
    ],
)
def test_what_is_no_pair_is_named_with_its_line(
    tmp_path: Path, record: dict[str, object], why: str
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(
        json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"})
        + "\n"
        + json.dumps(record)
        + "\n"
    )
    with pytest.raises(DataError, match=f"bad.jsonl line 2.*{why}"):
        list(read_preferences(file))


def test_two_may_create_the_same_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process sees no tables at first, and finds the first one's when it may write."""
    path = tmp_path / "prefs.sqlite"
    PreferenceDatabase(path).add(pair(1))
    looks = PreferenceDatabase._is_new
    answers = [True]
    monkeypatch.setattr(
        PreferenceDatabase, "_is_new", lambda self: answers.pop() if answers else looks(self)
    )
    second = PreferenceDatabase(path)
    assert not answers
    assert second.add(pair(1)) is None and second.add(pair(2))


def test_other_files_are_refused_and_stay_as_they_are(tmp_path: Path) -> None:
    other, text = tmp_path / "other.db", tmp_path / "text.db"
    sqlite3.connect(other).execute("CREATE TABLE mine (x)").connection.close()
    text.write_text("no database " * 100)
    for path in (other, text):
        before = path.read_bytes()
        with pytest.raises(DataError, match="cannot be used"):
            PreferenceDatabase(path)
        assert path.read_bytes() == before


def write_forever(path: Path, number: int, pipe: int) -> None:
    """Add pairs, revise every third, and acknowledge each number on `pipe` once its calls have
    returned.
    """
    database = PreferenceDatabase(path)
    while True:
        added = database.add(pair(number))
        if number % 3 == 0 and added is not None:
            database.revise(added, chosen=f"revised {number}")
        os.write(pipe, f"{number}\n".encode())
        number += 1


def killed_writer(path: Path, number: int, seconds: float) -> set[int]:
    """Return the numbers that a writer in another process acknowledged before it was killed."""
    reading, writing = os.pipe()
    writer = os.fork()
    if writer == 0:
        write_forever(path, number, writing)
    os.close(writing)
    with open(reading) as lines:
        first = lines.readline()
        time.sleep(seconds)
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        return {int(first), *(int(line) for line in lines if line.endswith("\n"))}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_writers_lose_nothing_that_they_acknowledged(tmp_path: Path) -> None:
    path, acknowledged = tmp_path / "p.db", set[int]()
    for kill in range(KILLS):
        acknowledged |= killed_writer(path, kill * 10_000, 0.0013 * (kill % 17))
        database = PreferenceDatabase(path)
        database.check()
        kept = {found.prompt[0]["content"]: found.chosen for found in database.pairs()}
        for number in acknowledged:
            answer = f"revised {number}" if number % 3 == 0 else f"good answer {number}"
            assert kept[pair(number).prompt[0]["content"]] == answer
        database.close()
