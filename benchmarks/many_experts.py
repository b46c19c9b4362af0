"""Hundreds of experts on one base: routing, overhead, memory, and speed under a memory budget.

    python benchmarks/corpora.py many --out TEXTS --megabytes 1
    python benchmarks/many_experts.py --texts TEXTS --packs PACKS [--counts 8 64 1024] [--room 8]

TEXTS holds one folder of text for each expert; no expert is trained on folders with "public" in
their names. An expert that PACKS lacks is trained first (`--train-tokens`, the last three layers).
Larger counts are reached with renamed copies (`--width` wide): half of the entries of their
relevance tables are shuffled and noise is added to their gates and weights, so that they stand for
other domains of the same kind.

One engine has a memory budget for the weights of about `--room` experts. For each of `--counts`,
with that many plugged:

    plug      milliseconds to plug the first and the last of the new experts (medians of a quarter),
              and memory of the process per expert
    overhead  time per decoding step, wall and processor, and to the first token, of requests that
              choose their experts automatically ("auto"), relative to the same requests that name
              the right expert, or none; as conversations and as documents to continue
    routing   share of held-out passages answered by the right expert, or by none if theirs is not
              plugged, in per cent; an expert answers if it wrote more than half of 8 tokens. The
              same for documents of `--longer` tokens

`embeddings` is a rival's routing: a ridge classifier over the base's embeddings, fitted on
`--fitting` passages of each expert's training text and of each text without an expert, by default
about as many tokens as an expert is trained on. There is no text for the copies, so it chooses only
among the trained experts.

`room` is the speed with the memory budget relative to that of an engine with all experts in memory.
All experts of the second count are asked by name, by four clients at once: uniformly, and by Zipf's
law.
"""

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from entry import existing_path, run_main
from results import FOLDER, resumed, write
from turns import in_turn

import deepseek
from deepseek.data import Document, clean, read_folder
from deepseek.data.text.document import split
from deepseek.engine.engine import Engine
from deepseek.engine.generation import Generation
from deepseek.engine.request import ExpertChoice, Request
from deepseek.engine.sampler import Sampling
from deepseek.engine.start import start_engine
from deepseek.packs.manifest import Manifest
from deepseek.packs.pack import ExpertPack, read_pack, write_pack
from deepseek.text.tokenizer import encode_plain

KINDS = ("conversation", "document")
TIMED = 8
"""Maximum number of timed passages of each kind, spread over the experts."""
CLIENTS = 4
"""Number of concurrent requests."""

SPOKEN = 8
"""Tokens of a reply that decide which expert answered."""

WITHOUT_EXPERT = "public"
"""Part of the name of folders that no expert is trained on."""


@dataclass(frozen=True)
class Passage:
    """A passage of text; `label` is the expert that it belongs to, None if there is none."""

    ids: tuple[int, ...]
    label: str | None

    def request(self, kind: str, arm: Any = "auto", tokens: int = SPOKEN) -> Request:
        choice = ExpertChoice(arm)
        request = Request(self.ids, Sampling(tokens), choice, ignore_end=True)
        return replace(request, user_ids=self.ids) if kind == "conversation" else request


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--packs", type=Path, required=True)
    parser.add_argument("--texts", type=existing_path, required=True)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--train-tokens", type=int, default=12_000, help="of an expert's text")
    parser.add_argument("--experts", type=int, help="real ones, of the first texts; default: all")
    parser.add_argument("--counts", type=int, nargs="+", default=[8, 64, 1024])
    parser.add_argument("--room", type=int, default=8)
    parser.add_argument("--width", type=int, default=256, help="of the copies' expert layers")
    parser.add_argument("--passages", type=int, default=4, help="of each text")
    parser.add_argument(
        "--fitting", type=int, default=94, help="passages of each text's classifier"
    )
    parser.add_argument("--length", type=int, default=128, help="tokens of a passage")
    parser.add_argument(
        "--longer", type=int, nargs="*", default=[1024], help="tokens of longer documents"
    )
    parser.add_argument("--tokens", type=int, default=48, help="of a reply that is timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=FOLDER / "many_experts.json")
    options = parser.parse_args()
    resumed(options.packs)
    train_missing(options)
    with tempfile.TemporaryDirectory() as folder:
        paths = filled(options, Path(folder))
        figures = measure(options, paths)
        figures["room"] = room(options, paths[: options.counts[min(1, len(options.counts) - 1)]])
    write(options.json, {"figures": figures})


def train_missing(options: argparse.Namespace) -> None:
    """Train the experts that do not exist yet; an interrupted training resumes."""
    folders = sorted(path for path in options.texts.iterdir() if path.is_dir())
    taught = [folder for folder in folders if WITHOUT_EXPERT not in folder.name]
    for folder in taught[: options.experts]:
        pack = options.packs / f"{folder.name}.safetensors"
        if pack.exists():
            continue
        deepseek.train_expert(
            options.base,
            name=folder.name,
            from_folder=folder,
            tokens=options.train_tokens,
            out=pack,
            run_folder=options.packs / "runs" / folder.name,
        )


def filled(options: argparse.Namespace, folder: Path) -> list[Path]:
    """Return the packs, followed by noisy copies of them up to the largest count."""
    real = sorted(options.packs.glob("*.safetensors"))
    paths = real[: max(options.counts)]
    for number in range(len(paths), max(options.counts)):
        source = read_pack(real[number % len(real)])
        path = folder / f"copy-{number:04}.safetensors"
        write_pack(path, jittered(source, path.stem, options.width, number))
        paths.append(path)
    return paths


def jittered(source: ExpertPack, name: str, width: int, seed: int) -> ExpertPack:
    """Return a noisy copy of a pack that stands for another domain of the same kind."""
    manifest = source.manifest
    assert isinstance(manifest, Manifest)
    width = min(width, manifest.width)
    torch.manual_seed(seed)
    tensors = {key: tensor.clone() for key, tensor in source.tensors.items()}
    for key, tensor in tensors.items():
        if key in ("relevance", "pairs"):
            words = torch.randperm(len(tensor))[: len(tensor) // 2]
            tensor[words] = tensor[words[torch.randperm(len(words))]]
            continue
        noise = torch.randn(tensor.shape) * tensor.float().square().mean().sqrt() / 2
        tensors[key] = tensor + noise.to(tensor.dtype)
        if key.endswith("gate_up_proj"):
            gate, up = tensors[key].chunk(2)
            tensors[key] = torch.cat([gate[:width], up[:width]])
        elif key.endswith("down_proj"):
            tensors[key] = tensors[key][:, :width].contiguous()
    changed = manifest.model_copy(update={"name": name, "width": width})
    return ExpertPack.seal(changed, tensors)


def budget(paths: Sequence[Path], room: int) -> int:
    """Return the bytes of `room` experts as large as the largest, with 8-bit weights and scales."""
    return int(room * 0.6 * max(path.stat().st_size for path in paths))


def measure(options: argparse.Namespace, paths: list[Path]) -> dict[str, Any]:
    """Plug experts up to each count, and measure routing and costs."""
    figures: dict[str, Any] = {"experts": len(list(options.packs.glob("*.safetensors")))}
    expert_bytes = budget(paths, options.room)
    with start_engine(options.base, expert_bytes=expert_bytes) as engine:
        names = [path.stem for path in paths]
        fitting, held_out = passages(engine, options, set(names), options.fitting)
        longer = longer_documents(engine, options, set(names))
        plugged = 0
        for count in options.counts:
            row: dict[str, Any] = {"plug": plug(engine, paths[plugged:count])}
            plugged = count
            known = set(names[:count])
            asked = labelled(held_out, known)
            decided = {kind: decisions(engine, asked, kind) for kind in KINDS}
            row["routing"] = {kind: shares(asked, decided[kind]) for kind in KINDS}
            right = {
                kind: [p for p, name in zip(asked, decided[kind], strict=True) if name == p.label]
                for kind in KINDS
            }
            row["overhead"] = {kind: overhead(engine, right[kind], kind, options) for kind in KINDS}
            row["routing"]["embeddings"] = embeddings(engine, fitting, asked, known)
            for length, documents in longer.items():
                found = labelled(documents, known)
                rights = shares(found, decisions(engine, found, "document"))
                row["routing"][f"document of {length}"] = rights | {"passages": len(found)}
            stats = engine.stats()
            row["weights_mib"] = round(stats.expert_bytes / (1 << 20), 1)
            assert stats.expert_bytes <= expert_bytes
            print(count, row, flush=True)
            figures[str(count)] = row
            write(options.json, {"figures": figures})  # an interrupted run keeps these
    return figures


def labelled(found: Sequence[Passage], known: set[str]) -> list[Passage]:
    """Return the passages with only the labels of known experts; other labels become None."""
    return [p if p.label in known else replace(p, label=None) for p in found]


def longer_documents(
    engine: Engine, options: argparse.Namespace, names: set[str]
) -> dict[int, list[Passage]]:
    """Return held-out passages of each length in `longer`, from the folders that have some."""
    found = {}
    for length in options.longer:
        changed = argparse.Namespace(**{**vars(options), "length": length})
        _, held_out = passages(engine, changed, names, 0)
        found[length] = [passage for passage in held_out if len(passage.ids) == length]
    return found


def passages(
    engine: Engine, options: argparse.Namespace, names: set[str], fitting: int | None = None
) -> tuple[list[Passage], list[Passage]]:
    """Return passages of the training text and of the held-out text of each folder.

    Args:
        engine: engine with the tokenizer.
        options: arguments; `passages` is the number of held-out passages per folder.
        names: folders that experts are trained on.
        fitting: number of training passages per folder; None: as many as held-out ones.
    """
    parts: tuple[list[Passage], list[Passage]] = ([], [])
    counts = (options.passages if fitting is None else fitting, options.passages)
    for folder in sorted(path for path in options.texts.iterdir() if path.is_dir()):
        documents, _ = clean(read_folder(folder))
        label = folder.name if folder.name in names else None
        for part, kept, count in zip(parts, split(documents), counts, strict=True):
            found = pieces(engine, kept, options.length)
            part += [Passage(ids, label) for ids in found[:count]]
    return parts


def pieces(engine: Engine, documents: Sequence[Document], length: int) -> list[tuple[int, ...]]:
    """Return passages of `length` tokens, the first of each document before second ones."""
    rows: list[tuple[int, int, tuple[int, ...]]] = []
    encoded = encode_plain(engine.tokenizer, [document.text for document in documents])
    for number, ids in enumerate(encoded):
        starts = range(0, max(1, len(ids) - length + 1), length)
        rows += [(place, number, tuple(ids[s : s + length])) for place, s in enumerate(starts)]
    return [ids for _, _, ids in sorted(rows) if ids]


def plug(engine: Engine, paths: Sequence[Path]) -> dict[str, float]:
    """Plug packs; return the times, and the memory per pack."""
    before = resident_bytes()
    times = []
    for path in paths:
        started = time.perf_counter()
        engine.plug(path)
        times.append((time.perf_counter() - started) * 1e3)
    quarter = max(1, len(times) // 4)
    return {
        "first_ms": round(median(times[:quarter]), 2),
        "last_ms": round(median(times[-quarter:]), 2),
        "mib_each": round((resident_bytes() - before) / len(paths) / (1 << 20), 3),
    }


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def overhead(
    engine: Engine, right: Sequence[Passage], kind: str, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Return the times of passages with arming "auto", relative to those that name the expert.

    Args:
        engine: engine with the experts plugged.
        right: correctly routed passages, for which both sides compute the same steps.
        kind: one of `KINDS`.
        options: arguments.
    """
    chosen = [p for p in right if p.label is not None]
    others = [p for p in right if p.label is None]
    figures = {}
    for what, passages_of_kind in {"own": chosen, "none": others}.items():
        number = min(TIMED, len(passages_of_kind))
        group = [passages_of_kind[len(passages_of_kind) * n // number] for n in range(number)]
        if not group:
            continue
        sides = {
            "auto": lambda group=group: [
                decode(engine, p.request(kind, "auto", options.tokens)) for p in group
            ],
            "named": lambda group=group: [
                decode(engine, p.request(kind, (p.label,) if p.label else (), options.tokens))
                for p in group
            ],
        }
        found = in_turn(sides, options.rounds)
        times = {side: np.median(np.array(results), 0) for side, results in found.items()}
        ratios = times["auto"] / times["named"]
        figures[what] = {
            "step_over_named": round(float(np.median(ratios[:, 1])), 4),
            "processor_over_named": round(float(np.median(ratios[:, 2])), 4),
            "step_ms": round(float(np.median(times["auto"][:, 1])), 3),
            "first_token_ms_more": round(
                float(np.median(times["auto"][:, 0] - times["named"][:, 0])), 2
            ),
        }
    return figures


def decode(engine: Engine, request: Request) -> tuple[float, float, float]:
    """Return milliseconds to the first token, wall time per later token, and processor time per
    later token.
    """
    started = time.perf_counter()
    events = iter(engine.submit(request))
    next(events)
    first, busy = time.perf_counter(), time.process_time()
    later = max(1, sum(1 for _ in events))
    seconds = first - started, (time.perf_counter() - first) / later
    return seconds[0] * 1e3, seconds[1] * 1e3, (time.process_time() - busy) * 1e3 / later


def decisions(engine: Engine, asked: Sequence[Passage], kind: str) -> list[str | None]:
    """Return which expert answered each passage, None for the base."""
    answered = in_order(engine, [passage.request(kind) for passage in asked])
    return [speaker(generation) for generation in answered]


def in_order(engine: Engine, requests: Sequence[Request]) -> Iterator[Generation]:
    """Yield the finished generations in order; `CLIENTS` of them run at a time."""
    running: list[Generation] = []
    for request in requests:
        if len(running) == CLIENTS:
            list(running[0])
            yield running.pop(0)
        running.append(engine.submit(request))
    for generation in running:
        list(generation)
        yield generation


def speaker(generation: Generation) -> str | None:
    """Return the expert that wrote more than half of a reply, None if the base or no one did."""
    counts = Counter(generation.usage.experts)
    name, tokens = counts.most_common(1)[0]
    return name if tokens * 2 > counts.total() else None


def shares(asked: Sequence[Passage], decided: Sequence[str | None]) -> dict[str, float]:
    """Return the shares of right decisions and of wrong experts, in per cent."""
    pairs = list(zip((passage.label for passage in asked), decided, strict=True))
    own = [label == name for label, name in pairs if label is not None]
    none = [name is None for label, name in pairs if label is None]
    figures = {"right": share(own + none), "own": share(own), "none": share(none)}
    wrong = [name not in (None, label) for label, name in pairs if label is not None]
    return figures | {"wrong_expert": share(wrong)}


def share(flags: Sequence[bool]) -> float:
    return round(100 * sum(flags) / max(1, len(flags)), 2)


def embeddings(
    engine: Engine, fitting: Sequence[Passage], asked: Sequence[Passage], known: set[str]
) -> dict[str, float]:
    """Return the shares of right decisions of a ridge classifier over the base's embeddings."""
    labels = [passage.label if passage.label in known else None for passage in fitting]
    classes = sorted({label or "" for label in labels})
    targets_NC = np.array([[(label or "") == one for one in classes] for label in labels], float)
    fit_ND = embedded(engine, fitting)
    weights_DC = np.linalg.solve(
        fit_ND.T @ fit_ND + 1e-2 * np.eye(fit_ND.shape[1]), fit_ND.T @ (targets_NC - 0.5)
    )
    best = (embedded(engine, asked) @ weights_DC).argmax(1)
    return shares(asked, [classes[index] or None for index in best])


def embedded(engine: Engine, found: Sequence[Passage]) -> np.ndarray:
    """Return the embeddings of passages and a constant 1 for the bias, `[N, D + 1]`."""
    rows_ND = np.array([embedding(engine, passage.ids) for passage in found])
    return np.concatenate([rows_ND, np.ones((len(rows_ND), 1))], 1)


@cache
def embedding(engine: Engine, ids: tuple[int, ...]) -> list[float]:
    """Return the embedding of a passage; cached, since every count uses the same passages."""
    return engine.embed(ids)


def room(options: argparse.Namespace, paths: Sequence[Path]) -> dict[str, Any]:
    """Return the speed with a memory budget for a few experts over that with all in memory."""
    names = [path.stem for path in paths]
    draws = random.Random(0)
    count = max(CLIENTS, 2 * len(names))
    by_rank = [1 / (rank + 1) for rank in range(len(names))]
    orders = {
        "even": [draws.choice(names) for _ in range(count)],
        "zipf": draws.choices(names, by_rank, k=count),
    }
    budgets = {"all": None, "room": budget(paths, options.room)}
    engines = {side: start_engine(options.base, expert_bytes=b) for side, b in budgets.items()}
    try:
        for engine in engines.values():
            for path in paths:
                engine.plug(path)
        figures: dict[str, Any] = {"experts": len(names), "room": options.room}
        for how, order in orders.items():
            sides = {
                side: asking(engine, order, options.tokens) for side, engine in engines.items()
            }
            found = in_turn(sides, options.rounds)
            speeds = {side: median(results) for side, results in found.items()}
            figures[how] = {
                "all_tokens_per_s": round(speeds["all"], 1),
                "room_tokens_per_s": round(speeds["room"], 1),
                "room_over_all": round(speeds["room"] / speeds["all"], 4),
            }
        figures["loads"] = engines["room"].stats().expert_loads
        return figures
    finally:
        for engine in engines.values():
            engine.close()


def asking(engine: Engine, order: Sequence[str], tokens: int) -> Callable[[], float]:
    """Return a function that asks experts by name and returns the tokens per second."""

    def ask() -> float:
        passage = Passage(tuple(range(3, 35)), None)
        requests = [passage.request("document", (name,), tokens) for name in order]
        started = time.perf_counter()
        written = sum(g.usage.completion_tokens for g in in_order(engine, requests))
        return written / (time.perf_counter() - started)

    return ask


if __name__ == "__main__":
    run_main(main)
