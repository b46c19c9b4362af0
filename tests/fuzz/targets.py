"""Fuzz targets: readers of untrusted files and requests, each with valid seeds and a strategy."""

import json
import struct
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml
from fuzz.mutate import deep, mutated_bytes, mutated_facts, mutated_text, mutated_value
from fuzz.requests import bodies, constraints, dialects, prompts, teach
from fuzz.target import Fuzzer, Run, as_json, lossless, lossy, on_file
from hypothesis import strategies as st
from pyarrow import Table, parquet
from tiny_expert import save_base, save_expert
from tiny_gguf import tiny_llama, tiny_model, write_gguf
from tiny_tokenizer import CHATML, tiny_tokenizer

from deepseek.checkpoint.gguf.convert import convert_gguf
from deepseek.data.preferences.files import read_preferences
from deepseek.data.text.source import read_records
from deepseek.engine.load import load
from deepseek.errors import UserError
from deepseek.model.transformer import DeepSeekModel
from deepseek.packs.bundle import install_bundle, write_bundle
from deepseek.packs.lock import lock_packs
from deepseek.packs.pack import read_pack
from deepseek.text.chat_template import encode_chat, encode_prompt
from deepseek.train.jobs.pretrain_arguments import PretrainArguments
from deepseek.train.jobs.recipe import STAGES, RecipeSettings


def pack(folder: Path, _: ExitStack) -> Fuzzer:
    """Expert packs: header length, JSON header, manifest and tensors."""
    base = save_base(folder / "base")
    seed = save_expert(load(base, dtype="float32"), "one", folder).read_bytes()
    header, data = split_safetensors(seed)
    manifest = json.loads(header["__metadata__"]["deepseek.expert"])

    def packed(parts: tuple[Any, Any]) -> bytes:
        changed, own = parts
        if isinstance(changed, dict) and isinstance(changed.get("__metadata__"), dict):
            changed["__metadata__"]["deepseek.expert"] = as_json(own)
        return join_safetensors(changed, data)

    cases = st.one_of(
        mutated_bytes(seed),
        st.tuples(mutated_value(header), mutated_value(manifest)).map(packed),
        st.just(join_safetensors({"__metadata__": {"deepseek.expert": deep("[", "]")}}, b"")),
    )
    return Fuzzer(cases, on_file(folder / "case.safetensors", read_pack))


def bundle(folder: Path, _: ExitStack) -> Fuzzer:
    """Sets of experts as one file: headers of the archive, the lock and the packs."""
    base = save_base(folder / "base")
    packs = [save_expert(load(base, dtype="float32"), "one", folder)]
    write_bundle(folder / "seed.tar", lock_packs(packs), packs)
    seed = (folder / "seed.tar").read_bytes()
    cases = st.one_of(
        mutated_bytes(seed),
        mutated_bytes(seed[: 3 * 512], most=8).map(lambda start: start + seed[3 * 512 :]),
    )
    installed = folder / "installed"
    return Fuzzer(
        cases,
        on_file(folder / "case.tar", lambda file: install_bundle(file, installed, replace=True)),
    )


def gguf(folder: Path, _: ExitStack) -> Fuzzer:
    """GGUF files: counts, lengths, types, offsets and facts."""
    path = folder / "seed.gguf"
    seed = write_gguf(tiny_llama(), path).read_bytes()
    others = [
        write_gguf(tiny_model(architecture), path, architecture).read_bytes()
        for architecture in ("gemma3", "qwen3moe", "phi3")
    ]
    out = folder / "out"
    out.mkdir()
    cases = st.one_of(
        mutated_bytes(seed), mutated_bytes(seed[:2048], most=8), mutated_facts(seed, *others)
    )
    return Fuzzer(cases, on_file(folder / "case.gguf", lambda file: convert_gguf(file, out)))


def safetensors(folder: Path, _: ExitStack) -> Fuzzer:
    """Model folders: the header of the weights, the weights and config.json."""
    base = save_base(folder / "base")
    weights = base / "model.safetensors"
    config = base / "config.json"
    seed = weights.read_bytes()
    fields = json.loads(config.read_text())
    header, data = split_safetensors(seed)
    cases = st.one_of(
        st.tuples(mutated_bytes(seed), st.just(as_json(fields))),
        st.tuples(
            mutated_value(header).map(lambda changed: join_safetensors(changed, data)),
            st.just(as_json(fields)),
        ),
        st.tuples(st.just(seed), mutated_value(fields).map(as_json)),
        st.tuples(st.just(seed), mutated_bytes(as_json(fields).encode()).map(lossy)),
    )

    def run(case: tuple[bytes, str]) -> None:
        weights.write_bytes(case[0])
        config.write_text(case[1], encoding="utf-8", errors="surrogatepass")
        DeepSeekModel.from_pretrained(base, dtype="float32")

    return Fuzzer(cases, run)


RECORDS = [
    {"text": "one line", "time": 5},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"prompt": "q", "chosen": "a", "rejected": "b"},
]

PAIRS = [
    {"prompt": "q", "chosen": "a", "rejected": "b", "labels": ["x"], "scores": {"j": [1, 0]}},
    {
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
        "source": "s",
        "scores": '{"j": [1, 0]}',
    },
]


def lines(seeds: list[Any]) -> st.SearchStrategy[bytes]:
    """Return JSONL files of changed records."""
    whole = "\n".join(map(json.dumps, seeds)).encode()
    one = mutated_value(*seeds).map(as_json)
    return st.one_of(
        mutated_bytes(whole),
        st.lists(one, min_size=1, max_size=4).map(lambda many: lossless("\n".join(many))),
        st.sampled_from([deep("[", "]").encode(), deep('{"text":', "}").encode()]),
    )


def jsonl(folder: Path, _: ExitStack) -> Fuzzer:
    """Training text in JSONL."""
    return Fuzzer(lines(RECORDS), on_file(folder / "case.jsonl", lambda f: list(read_records(f))))


def parquet_rows(folder: Path, _: ExitStack) -> Fuzzer:
    """Training text in Parquet."""
    path = folder / "seed.parquet"
    parquet.write_table(Table.from_pylist([{"text": "one"}, {"text": "two"}]), path)
    cases = mutated_bytes(path.read_bytes())
    return Fuzzer(cases, on_file(folder / "case.parquet", lambda f: list(read_records(f))))


def preferences(folder: Path, _: ExitStack) -> Fuzzer:
    """Preference pairs in JSONL, and their rows in the database."""

    def run(file: Path) -> None:
        for pair in read_preferences(file):
            pair.row()

    return Fuzzer(lines(PAIRS), on_file(folder / "case.jsonl", run))


RECIPE = {
    "name": "r",
    "base": "smollm2-135m",
    "licence": "Apache-2.0",
    "stages": [
        {"stage": "adapt", "with": {"from_folder": "docs", "tokens": 100, "learning_rate": 0.001}},
        {"stage": "align", "name": "b", "with": {"rollouts": 2, "layers": "last:2"}},
    ],
}

PRETRAIN = {
    "name": "p",
    "domains": {"text": {"folder": "docs", "weight": 1.0}},
    "tokens": 1000,
    "model": {"preset": "deepseek-nano", "num_hidden_layers": 2},
    "samples": ["The "],
}

YAML_WORDS = ("&a ", "*a", "!!python/object:os.system ", "- ", ": ", "\t", "{", "[", "'", '"', "\0")
YAML_WORDS += (
    "!!timestamp 2001-01-01",
    "!!binary x",
    ".nan",
    ".inf",
    "0x",
    "1_000",
    "~",
    "<<: *a",
    "? ",
)

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


def recipes(folder: Path, _: ExitStack) -> Fuzzer:
    """Recipes and pre-training configurations in YAML."""

    def run(file: Path) -> None:
        refusals = [refusal(read, file) for read in (read_recipe, PretrainArguments.read)]
        if all(refusals):
            raise UserError(" ".join(map(str, refusals)))

    texts = [yaml.safe_dump(seed) for seed in (RECIPE, PRETRAIN)]
    cases = st.one_of(
        mutated_text(*texts, words=YAML_WORDS).map(lossless),
        mutated_value(RECIPE, PRETRAIN).map(as_json).map(lossless),
        mutated_bytes(*[text.encode() for text in texts]),
        st.sampled_from([BOMB.encode(), deep("[", "]").encode(), deep("{a: ", "}").encode()]),
    )
    return Fuzzer(cases, on_file(folder / "case.yaml", run))


def refusal(read: Run, file: Path) -> UserError | None:
    """Return the error that a reader raises; None if it accepts the file."""
    try:
        read(file)
    except UserError as error:
        return error
    return None


def read_recipe(file: Path) -> None:
    """Read a recipe and the arguments of its stages, as `train_recipe` does before it starts."""
    for step in RecipeSettings.read(file).stages:
        if step.stage in STAGES:
            STAGES[step.stage].arguments.read(**step.with_)


TEMPLATE_WORDS = ("{{ ", " }}", "{% for ", "{% endfor %}", "{% if ", "{% endif %}", "{{ 1/0 }}")
TEMPLATE_WORDS += ("{{ messages[99].x.y }}", "{{ range(10**9)|list }}", "{{ 'x' * 10**12 }}")
TEMPLATE_WORDS += (
    "{{ ''.__class__.__mro__ }}",
    "{{ messages|tojson }}",
    "{{ raise_exception('no') }}",
)
TEMPLATE_WORDS += ("{{ strftime_now('%Y') }}", "{% include 'x' %}", "{% set x = 2**2**2**2**2 %}")
TEMPLATE_WORDS += (
    "{{ (1,2)|sum }}",
    "{{ messages|first + 1 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}",
)

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def templates(_: Path, __: ExitStack) -> Fuzzer:
    """Chat templates, and conversations in them."""
    tokenizer = tiny_tokenizer()

    def run(case: tuple[str, Any]) -> None:
        tokenizer.chat_template = case[0]
        encode_prompt(tokenizer, case[1])
        encode_chat(tokenizer, case[1])

    cases = st.one_of(
        st.tuples(mutated_text(CHATML, words=TEMPLATE_WORDS), st.just(TALK)),
        st.tuples(st.just(CHATML), mutated_value(TALK)),
    )
    return Fuzzer(cases, run)


TARGETS: dict[str, Callable[[Path, ExitStack], Fuzzer]] = {
    "pack": pack,
    "bundle": bundle,
    "gguf": gguf,
    "safetensors": safetensors,
    "jsonl": jsonl,
    "parquet": parquet_rows,
    "preferences": preferences,
    "bodies": bodies,
    "dialects": dialects,
    "constraints": constraints,
    "teach": teach,
    "prompts": prompts,
    "recipes": recipes,
    "templates": templates,
}


def split_safetensors(data: bytes) -> tuple[Any, bytes]:
    """Return the header and the bytes of a safetensors file."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_safetensors(header: Any, data: bytes) -> bytes:
    """Return a safetensors file."""
    text = lossless(as_json(header))
    return struct.pack("<Q", len(text)) + text + data
