"""Cleaning: secrets, duplicates, and counts that add up."""

import base64
import json
import random
import string
import time
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deepseek.data import Document, clean
from deepseek.data.text.clean import (
    MOST_VERIFIED,
    THRESHOLD,
    jaccard,
    near_duplicates,
    shingle_hashes,
)
from deepseek.data.text.document import conversation
from deepseek.data.text.secrets import RULES, redact
from deepseek.errors import DataError

BODY = "MIIEpAIBAAKCAQEA7bq\nq83vEjRWeJq83vEjRWeJ\n"
SECRETS = {
    "AKIA" + "IOSFODNN7EXAMPL3": "aws-key",
    "ghp_" + "a1B2" * 9: "github-token",
    "github_pat_" + "a1B2" * 8: "github-token",
    "glpat-" + "a1B2" * 5: "gitlab-token",
    "AIza" + "a1B2c" * 7: "google-key",
    "sk-ant-" + "a1B2" * 8: "anthropic-key",
    "sk-proj-" + "a1B2" * 8: "openai-key",
    "hf_" + "aBcD" * 9: "huggingface-token",
    "xoxb-" + "123456789012-abcdefghij": "slack-token",
    "sk_live_" + "a1B2c3" * 4: "stripe-key",
    "-----BEGIN RSA PRIVATE KEY-----\n" + BODY + "-----END RSA PRIVATE KEY-----": "private-key",
    "-----BEGIN OPENSSH PRIVATE KEY-----\n" + BODY: "private-key",
}
LETTERS = string.ascii_letters + string.digits
TOKENS = {  # prefix: kind, alphabet, minimum length
    "AIza": ("google-key", LETTERS + "_-", 35),
    "ghs_": ("github-token", LETTERS + "_", 36),
    "glpat-": ("gitlab-token", LETTERS + "_-", 20),
    "glptt-": ("gitlab-token", LETTERS + "_-", 40),
    "hf_": ("huggingface-token", LETTERS, 34),
    "npm_": ("npm-token", LETTERS, 36),
    "sk-admin-": ("openai-key", LETTERS + "_-", 20),
    "sk-proj-": ("openai-key", LETTERS + "_-", 20),
    "sk-svcacct-": ("openai-key", LETTERS + "_-", 20),
    f"sk-{'a1B2' * 5}T3BlbkFJ": ("openai-key", LETTERS, 20),
    "rk_live_": ("stripe-key", LETTERS, 24),
    "sk_live_": ("stripe-key", LETTERS, 24),
}
ASSIGNMENTS = [
    "db_password = 'hunter2hunter2hunter2'",
    "postgres://app:s3cr3tvalue@db/x",
    "//registry.example.org/:_authToken=npm_a1B2c3",
]
ORDINARY = """
def f(password, token=None):
    key = hashlib.sha256(data).hexdigest()  # e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
    password = getpass.getpass("password: ")
    secret = "short1"
    api_key = "{settings.api_key_for_tests}"
    title = surveyJson.title + keyJson.getString(moneyJar.total) + journeyJob.identifier_of_the_job
    url = "https://example.org/a:b@c"; commit = "0f79eca5a7e3b9c1d2e4f60718293a4b5c6d7e8f"
"""


@pytest.mark.parametrize(("secret", "kind"), SECRETS.items(), ids=lambda value: str(value)[:12])
def test_a_secret_leaves_only_its_kind(secret: str, kind: str) -> None:
    text, found = redact(f'before = "{secret}"\nafter = 1\n')
    assert f"<REDACTED:{kind}>" in text
    assert secret not in text
    assert BODY not in text
    assert text.startswith('before = "')
    assert text.endswith("after = 1\n")
    assert found[kind] == 1


@pytest.mark.parametrize("prefix", ["AKIA", "ASIA", "ABIA", "ACCA"])
@pytest.mark.parametrize("before", ["", "id=", "'", "[", "密钥", r"id\n", "Credential%3D"])
def test_ids_of_keys_of_aws_go(prefix: str, before: str) -> None:
    assert redact(f"{before}{prefix}QWERTYUIOPAS2DFG,")[0] == f"{before}<REDACTED:aws-key>,"


@given(st.text("ACGT", max_size=200))
def test_dna_is_no_key_of_aws(rest: str) -> None:
    for before in ("", "GATT", ">seq1\n", "'"):
        source = f"{before}ACCATTTGACCAGTTTGACCATTGAC{rest}\n"
        assert redact(source) == (source, {})


def test_capitals_within_a_word_are_no_key_of_aws() -> None:
    protein = "MKTAYIAKIAQRQISFVKSHFSRQLEERASIAVLDEFGHIKLMNPQRST"
    assert redact(protein) == (protein, {})


@given(st.data(), st.sampled_from(list(TOKENS)))
def test_nothing_is_left_of_a_token_that_is_longer(data: st.DataObject, prefix: str) -> None:
    kind, letters, shortest = TOKENS[prefix]
    token = prefix + data.draw(st.text(letters, min_size=shortest, max_size=160))
    for before, after in [('key="', '"'), ("", "\n"), ("密钥", "。"), ("密钥", "不要")]:
        assert redact(before + token + after) == (f"{before}<REDACTED:{kind}>{after}", {kind: 1})


@given(st.text(), st.binary(min_size=1, max_size=64))
def test_a_web_token_goes_with_its_signature(subject: str, signature: bytes) -> None:
    parts = [b'{"alg":"HS256"}', json.dumps({"sub": subject}).encode(), signature]
    token = ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)
    assert redact(f"Bearer {token}. Then")[0] == "Bearer <REDACTED:jwt>. Then"


def test_only_the_secret_part_of_an_assignment_goes() -> None:
    source = "db_password = 'hunter2hunter2hunter2'\nurl = 'postgres://app:s3cr3tvalue@db/x'\n"
    assert (
        redact(source)[0]
        == "db_password = '<REDACTED:password>'\nurl = 'postgres://app:<REDACTED:password>@db/x'\n"
    )


@pytest.mark.parametrize("password", ["s3cr3t", "p@ss", "@b@", "a:b", "p&s=1!", "a+b%40", "ü{"])
@pytest.mark.parametrize("after", ["@db/x", "@db:5432/x?ssl=1", "@10.0.0.1", "@[::1]/"])
def test_nothing_is_left_of_the_password_in_an_address(password: str, after: str) -> None:
    for before, end in [("", ""), ("'", "'"), ("see ", ", or ask a@b.c")]:
        source = f"{before}postgres://app:{password}{after}{end}"
        redacted = f"{before}postgres://app:<REDACTED:password>{after}{end}"
        assert redact(source) == (redacted, {"password": 1})


@pytest.mark.parametrize(
    ("before", "secret", "after"),
    [
        ("redis://:", "s3cr3tpassword", "@host:6379/0"),
        ("SECRET_KEY = '", "abc123def456ghi789jkl012", "'"),
        ('"SecretAccessKey": "', "wJalrXUtnFEMI7K7MDENGbPxRfiCYEXAMPLEKEYa", '"'),
        ('password = "', "hunter2-prod-9", '"'),
        ('password := "', "hunter2hunter2", '"'),
        ('API_KEY: str = "', "abcdef0123456789abcdef", '"'),
        ('const apiKey: string = "', "abcdef0123456789abcdef", '"'),
        ('os.environ["API_KEY"] = "', "abcdef0123456789abcdef", '"'),
        ("$config['password'] = '", "hunter2hunter2", "'"),
        ('{"x-api-key": "', "abcdef0123456789abcdef", '"}'),
        ("const password = `", "hunter2hunter2", "`"),
        ("const apiKey = `", "abcdef0123456789abcdef", "`"),
        ('api_key = b"', "abcdef0123456789abcdef", '"'),
        (r'"{\"password\": \"', "hunter2hunter2", r'\"}"'),
        ('password = "', "S3cr3t#2024!", '"'),
        ("postgres://admin:", "P4$$w0rd", "@db.host/x"),
        ("SECRET_KEY = '", "django-insecure-8y#k2(v!w0^x)3p@1m=z7q_c$e5r-t&u9i+o*a6s(d)f4g", "'"),
        ('password = "', "kX9(mPq2!vL", '"'),
        ('password: "', "a1b2c3d4:x", '"'),
        ("PASSWORD = '", "p[4}8x<7>;|,Qz", "'"),
        ('SECRET_KEY_BASE = "', "0123456789abcdef0123456789abcdef", '"'),
        ('API_KEY_V2="', "abcd1234efgh5678ijkl", '"'),
        ('apiKeyProd: "', "abcd1234efgh5678ijkl", '"'),
        ("password = '", "P@ssw0rd(1)", "'"),
        ("DB_PASSWORD_PROD = '", "kX9mPq2vLzz", "'"),
    ],
)
def test_short_passwords_and_keys_of_frameworks_go(before: str, secret: str, after: str) -> None:
    assert redact(before + secret + after)[0] == f"{before}<REDACTED:password>{after}"


def test_an_encrypted_key_that_is_cut_off_goes() -> None:
    header = "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,0AF1\n"
    assert redact(f"{header}\nMIIEpQ0123\nAbCd+/09==\n")[0] == "<REDACTED:private-key>"


@pytest.mark.parametrize("name", ["aws_secret_access_key", "AWS_SECRET_ACCESS_KEY"])
@pytest.mark.parametrize("mark", [" = ", "=", ": "])
def test_a_secret_key_of_aws_needs_no_quotes(name: str, mark: str) -> None:
    text = f"{name}{mark}{'wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY'}\nregion = x\n"
    assert redact(text)[0] == f"{name}{mark}<REDACTED:aws-key>\nregion = x\n"


@pytest.mark.parametrize(
    "password",
    ["{password}", "{}", "{self.password}", "{{pw}}", "%s", "$PW", "${PW}", "<password>", "***"],
)
def test_placeholders_of_format_strings_are_no_passwords(password: str) -> None:
    source = f'url = f"postgres://{{user}}:{password}@{{host}}/x"\n'
    assert redact(source) == (source, {})


def test_ordinary_code_stays_as_it_is() -> None:
    assert redact(ORDINARY) == (ORDINARY, {})


DJANGO = "abcdefghijklmnopqrstuvwxyz0123456789!@#$%^&*(-_=+)"


def test_generated_keys_of_django_go() -> None:
    """About one in ten thousand looks like a format string, such as `%(ab)s`, and is kept."""
    draw = random.Random(0)
    for _ in range(1000):
        key = "".join(draw.choices(DJANGO, k=50))
        assert redact(f"SECRET_KEY = '{key}'")[0] == "SECRET_KEY = '<REDACTED:password>'"


@pytest.mark.parametrize(
    "value",
    [
        *(
            "get_password(user1)",
            "hashlib.sha256(",
            "os.environ.get(KEY_1)",
            "b64decode(data[0:8])",
        ),
        *("{user}:{password1}", "{0:08x}-secret", "${DB_PASSWORD:-changeme1}", "%(password1)s:x1"),
        *("$(cat/run/secrets/db1)", "{{resolve:ssm:db:1}}", "<your-api-key-1>", "<%=secret1%>"),
        *("https://example.org/reset/v1", "arn:aws:secretsmanager:us-east-1:12:secret:Db-a1b2c3"),
        *(
            "Optional[SecretStr1]",
            "dict[str,np.float32]",
            "Callable[[int],np.int64]",
            "Vec<u8>|None",
        ),
        *(
            "passlib.hash:sha256_crypt",
            "app.models.v1:User",
            "required|min:8|max:20",
            "Length(8-20):",
        ),
        *(
            r"^[a-zA-Z0-9]{8,20}$",
            "^(?=.*[A-Z])(?=.*[0-9]).+$",
            "[A-Za-z0-9+/]{40}",
            "([a-z0-9]{64})",
        ),
        *(
            "Enter password (8 characters)",
            "input[name=password1]",
            "min:8,max:20",
            "[REDACTED:v1]",
        ),
    ],
)
@pytest.mark.parametrize("before", ["password = '", '"password": "', "secret_key: str = '"])
def test_quoted_code_is_no_secret(before: str, value: str) -> None:
    source = f"{before}{value}{before[-1]}\n"
    assert redact(source) == (source, {})


HOSTILE = sorted(
    {hint for rule in RULES for hint in rule.hints}
    | {"eyJ-", "\n-eyJ-", "eyJaaaaaaaaaa.", f"sk-{'a' * 30}", "T3BlbkFJ", "xoxb-1-", "://a:"}
    | {"/:_authToken= ", "-----BEGIN A ", "aws key'", "password = '1a", "https://hooks.slack.com/"}
    | {"password = '1a(", "password = '1a(b)' ", "password_1_1_", "secret_v1-base"}
    | {"password: a ", "password:  ", "api_key: a|", 'password["', "://a:$"}
)


@pytest.mark.parametrize("piece", HOSTILE)
def test_secrets_are_looked_for_in_linear_time(piece: str) -> None:
    every_hint = " ".join(hint for rule in RULES for hint in rule.hints)
    started = time.process_time()
    redact(f"{piece * (200_000 // len(piece))} {every_hint}")
    assert time.process_time() - started < 5


def test_a_token_behind_a_name_with_hyphens_goes() -> None:
    token = ".".join(["eyJ" + "a1B2" * 5] * 3)
    assert redact(f"cookie: my-session-{token};")[0] == "cookie: my-session-<REDACTED:jwt>;"


@pytest.mark.parametrize("before", ["", "+", "-", "key = ", "{'a':'"])
def test_tokens_in_the_lines_of_a_diff_go(before: str) -> None:
    token = ".".join(["eyJ" + "a1B2" * 5] * 2)
    for secret, kind in [(token, "jwt"), (f"sk-{'a1B2' * 5}T3BlbkFJ{'a1B2' * 5}", "openai-key")]:
        source = f"@@\n{before}{secret}\n x = 1\n"
        assert redact(source)[0] == f"@@\n{before}<REDACTED:{kind}>\n x = 1\n"


@given(
    st.lists(st.sampled_from([*SECRETS, *ASSIGNMENTS, ORDINARY, "x = '", "'"]), max_size=6).map(
        "\n".join
    )
)
def test_redacting_twice_changes_nothing(text: str) -> None:
    once, _ = redact(text)
    assert redact(once) == (once, {})


def test_a_private_key_in_a_diff_and_across_messages() -> None:
    diff = "+-----BEGIN EC PRIVATE KEY-----\n+MIIEpAIB\n+q83vEjRW\n+-----END EC PRIVATE KEY-----\n+x = 1\n"
    assert redact(diff)[0] == "+<REDACTED:private-key>\n+x = 1\n"
    ask = {"role": "user", "content": "-----BEGIN PRIVATE KEY-----\nMIIE"}
    answer = {"role": "assistant", "content": "text -----END PRIVATE KEY-----"}
    documents, report = clean([conversation([ask, answer], "d", "d")])
    assert documents[0].messages() == [{**ask, "content": "<REDACTED:private-key>"}, answer]
    assert report.changes == {"private-key redacted": 1}


def as_documents(texts: list[str]) -> list[Document]:
    return [Document(text, f"{number}") for number, text in enumerate(texts)]


def words(count: int, seed: int) -> str:
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(5000)}" for _ in range(count))


@given(st.sets(st.integers(0, 60), min_size=1), st.sets(st.integers(0, 60), min_size=1))
def test_the_similarity_is_that_of_the_sets(left: set[int], right: set[int]) -> None:
    hashes = [np.array(sorted(one), dtype=np.uint32) for one in (left, right)]
    assert jaccard(*hashes) == len(left & right) / len(left | right)


@given(st.integers(20, 200), st.integers(0, 99), st.floats(0, 1))
def test_no_document_below_the_threshold_is_dropped(length: int, seed: int, changed: float) -> None:
    left = words(length, seed)
    tokens = left.split()
    tokens[: int(changed * length)] = words(int(changed * length), seed + 100).split()
    right = " ".join(tokens)
    similarity = jaccard(shingle_hashes(left), shingle_hashes(right))
    dropped = set(near_duplicates(as_documents([left, right])))
    assert dropped <= ({1} if similarity >= THRESHOLD else set())


def with_a_header(count: int, seed: int) -> list[str]:
    """Texts that share five sixths of their words, and edited copies of a third of them."""
    draw = random.Random(seed)
    header = words(150, seed + 1000)
    texts = [f"{header} {words(28, seed + number)}" for number in range(count)]
    for original in draw.sample(texts, count // 3):
        tokens = original.split()
        for _ in range(draw.randint(1, 3)):
            tokens[draw.randrange(len(tokens))] = "edited"
        texts.insert(draw.randrange(len(texts)), " ".join(tokens))
    return texts


@settings(max_examples=10)
@given(st.integers(0, 10_000))
def test_the_most_similar_sketches_are_those_of_the_near_duplicates(seed: int) -> None:
    documents = as_documents(with_a_header(200, seed))
    found = near_duplicates(documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepseek.data.text.clean.MOST_VERIFIED", len(documents))
        assert near_duplicates(documents) == found
    assert len(found) > 50


def test_texts_that_share_a_header_are_not_all_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def counted(left: NDArray[np.uint32], right: NDArray[np.uint32]) -> float:
        compared.append(1)
        return jaccard(left, right)

    monkeypatch.setattr("deepseek.data.text.clean.jaccard", counted)
    documents = as_documents(with_a_header(600, 0))
    near_duplicates(documents)
    assert len(compared) <= MOST_VERIFIED * len(documents)


def test_copies_with_small_edits_are_found_and_the_first_is_kept() -> None:
    texts = []
    for seed in range(100):
        original = words(300, seed)
        texts += [original, original.replace(" w1", " W1", 1) + " the end", words(300, seed + 500)]
    dropped = near_duplicates(as_documents(texts))
    assert all(number % 3 == 1 and retained == number - 1 for number, retained in dropped.items())
    assert len(dropped) >= 99  # sketches may miss a pair near the threshold


@given(st.integers(0, 500), st.lists(st.integers(0, 99), min_size=2, max_size=5, unique=True))
def test_a_shared_system_prompt_makes_no_duplicates(length: int, seeds: list[int]) -> None:
    system = {"role": "system", "content": words(length, 1000)}
    chats = [
        [
            system,
            {"role": "user", "content": words(10, seed)},
            {"role": "assistant", "content": words(10, seed + 100)},
        ]
        for seed in seeds
    ]
    documents = [
        conversation(chat, "d", f"{seed}") for seed, chat in zip(seeds, chats, strict=True)
    ]
    assert clean(documents)[0] == documents
    edited = [{**system, "content": f"Today is Monday. {system['content']}"}, *chats[0][1:]]
    copied = [*documents, conversation(edited, "d", "copy")]
    assert near_duplicates(copied) == {len(documents): 0}


def test_conversations_without_turns_are_compared_whole() -> None:
    prompts = [{"role": "system", "content": words(50, seed)} for seed in range(3)]
    documents = [conversation([prompt], "d", "d") for prompt in prompts]
    assert clean(documents)[0] == documents


@pytest.mark.parametrize("kind", ["code", "commit", "text"])
def test_code_that_differs_in_operators_is_no_duplicate(
    kind: Literal["code", "commit", "text"],
) -> None:
    sums = Document("x = a + b\ny = c + d\nz = e + f\nw = g + h\n", "a", kind)
    mixed = Document("x = a - b\ny = c * d\nz = e / f\nw = g % h\n", "b", kind)
    assert clean([sums, mixed])[0] == [sums, mixed]
    spaced = Document(sums.text.replace("\n", "\n\n"), "c", kind)
    assert clean([sums, spaced])[1].changes == {"near duplicates": 1}


@given(st.lists(st.tuples(st.sampled_from("+-*/"), st.integers(0, 99)), min_size=6, max_size=30))
def test_a_sum_and_a_table_of_the_same_numbers_are_no_duplicates(
    terms: list[tuple[str, int]],
) -> None:
    table = "".join(f"| {number} " for _, number in terms)
    formula = "".join(f"{sign} {number} " for sign, number in terms)
    documents = as_documents([f"{table}|", formula])
    assert clean(documents)[0] == documents


SPACELESS = {
    "Chinese": "的一是不了人我在有他这为之大来以个中上们到说国和地也子时道出而要于就下得可你年生自会",
    "Japanese": "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろ",
    "Thai": "กขคงจฉชซญดตถทธนบปผพฟมยรลวสหอะาเแโ",
}


@given(st.sampled_from(list(SPACELESS)), st.integers(0, 99), st.integers(0, 199))
def test_near_duplicates_are_found_in_scripts_without_spaces(
    script: str, seed: int, place: int
) -> None:
    draw = random.Random(seed)
    texts = ["".join(draw.choices(SPACELESS[script], k=200)) for _ in range(2)]
    edited = f"{texts[0][:place]}{SPACELESS[script][0]}{texts[0][place + 1 :]}"
    assert near_duplicates(as_documents([*texts, f"{edited}。"])) == {2: 0}


@given(st.lists(st.integers(0, 4), min_size=2, max_size=12), st.data())
def test_each_duplicate_names_the_document_that_is_retained(
    numbers: list[int], data: st.DataObject
) -> None:
    texts = [
        words(100, number) + data.draw(st.sampled_from(["", "\n", " and the end"]))
        for number in numbers
    ]
    kept, report = clean(as_documents(texts))
    names = [document.name for document in kept]
    assert sorted([*names, *report.duplicates]) == sorted(map(str, range(len(texts))))
    for name, retained in report.duplicates.items():
        assert retained in names and int(retained) < int(name)
        assert numbers[int(retained)] == numbers[int(name)]


def test_counts_add_up_and_order_stays() -> None:
    base = words(300, 1)
    documents = [
        Document("  ", "blank"),
        Document(base, "a"),
        Document(base + "\n", "copy"),
        Document(base + " more", "near"),
        Document("password = 'abc123abc123abc123'", "secret", "code"),
        Document(words(50, 2), "b"),
    ]
    kept, report = clean(documents)
    assert [document.name for document in kept] == ["a", "secret", "b"]
    assert (report.read, report.kept) == (6, 3)
    assert report.changes == {
        "exact duplicates": 1,
        "near duplicates": 1,
        "password redacted": 1,
        "skipped as empty": 1,
    }
    assert report.characters == sum(len(document.text) for document in kept)
    assert "3 documents" in str(report)
    assert "1 password redacted" in str(report)


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(DataError, match="Nothing is left of 2"):
        clean([Document("", "a"), Document("\n", "b")])


def test_thousands_of_documents_take_seconds() -> None:
    documents = [Document(words(200, seed), f"d{seed}") for seed in range(2000)]
    begin = time.process_time()
    kept, _ = clean(documents)
    assert len(kept) == 2000
    assert time.process_time() - begin < 10
