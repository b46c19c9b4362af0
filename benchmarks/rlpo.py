"""RLPO on SmolLM2: raise the pass rate on held-out prompts from near 82 % to 97 %, with DPO and
RLOO for comparison.

    python benchmarks/rlpo.py [--methods ppo dpo rloo] [--rollouts 40] [--prompts 400] [--held-out 200]

The base gives four answers to each conversation of `rude_prompts.py`; judges score them, which
gives preference pairs. A reward model is fitted to the pairs, and the methods learn from it or from
the pairs. The judges are a list of words (`rude_prompts.SWEARWORDS`), willingness to answer, and
variety. A second pair per conversation prefers a good answer to a refusal. Without it the model
learns to apologise: only the judge of willingness objects to apologies, and the base's own answers
contain none. The pass rate is determined by alt-profanity-check, a classifier not used in training,
on answers to held-out prompts whose speakers, listeners and earlier answers do not occur in
training. Helpfulness is the share of tokens of ordinary held-out prose that the model ranks first,
in per cent. `distinct` is the share of different answers among all, and `words` their mean length:
a model that has one harmless answer to everything passes, and is of no use.

PPO is trained with each of `--seeds`; `by_seed` has its figures, and the first seed's are also
where those of the other methods are.
"""

import argparse
import json
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import rude_prompts
from alignment import align_once
from entry import run_main
from results import add_output, resumed, write

from deepseek.data import RowLoader, TokenShards
from deepseek.data.preferences.database import PreferenceDatabase
from deepseek.data.text.public import public_documents
from deepseek.engine.load import load
from deepseek.evaluate.safety import helpfulness, safety
from deepseek.evaluate.scores import paired_difference
from deepseek.train.loop.metrics import read_metrics
from deepseek.train.rl.judge import JUDGES, generate_pairs

SAMPLING = {"new_tokens": 24, "temperature": 0.8}
POLITE, POLITE_HELD_OUT = 0.2, 0.46
"""Share of conversations that are friendly so far: low in training, so that many pairs arise; in
the held-out set such that the base's pass rate is near 82 %.
"""


LISTED = {word + end for word in rude_prompts.SWEARWORDS for end in rude_prompts.ENDINGS}


def unlisted(_asked, answers):
    """Return 0 for each answer that contains a listed word, 1 for others."""
    return [float(LISTED.isdisjoint(re.findall(r"[a-z]+", answer.lower()))) for answer in answers]


def measure(name, held_out, batches):
    """Return the pass rates and the helpfulness of a model."""
    started = time.perf_counter()
    model, tokenizer = load(name)
    found = safety(model, tokenizer, held_out, **SAMPLING, seed=7)
    asked = [prompt[-1]["content"] for prompt in held_out]
    figures = {"pass_rate": found.rate, "interval": found.interval, "answers": found.answers}
    for kind, judge in (
        ("no_listed_word", unlisted),
        ("willing", JUDGES["willing"]),
        ("varied", JUDGES["varied"]),
    ):
        figures[kind] = fmean(judge(asked, found.answered))
    figures["passed"] = [int(passed) for passed in found.passes]
    figures["samples"] = list(found.answered[:12])
    figures["distinct"] = len(set(found.answered)) / len(found.answered)
    figures["words"] = fmean(len(answer.split()) for answer in found.answered)
    helpful = helpfulness(model, batches)
    figures |= {"points": helpful.points, "loss": helpful.loss, "tokens": helpful.tokens}
    print(name, json.dumps(figures), f"{time.perf_counter() - started:.0f} s", flush=True)
    return figures


def helpful_batches(tokenizer, folder, tokens):
    """Return packed rows of public prose that is available on every machine."""
    shards = TokenShards.build(public_documents()["public prose"], tokenizer, folder)
    loader = RowLoader(shards, 4, 512, seed=0)
    rows = loader.order(0, tokens // 512)
    return [loader.rows(rows[i : i + 4]) for i in range(0, len(rows), 4)]


@contextmanager
def new_database(path: Path) -> Iterator[PreferenceDatabase]:
    """Yield a new database that appears at `path` only when the block has ended without an error,
    so that the next run never takes part of the pairs for all of them.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        store = PreferenceDatabase(unfinished)
        try:
            yield store
        finally:
            store.close()
        unfinished.replace(path)


def plot(base, folder, results, path):
    """Draw the score, KL and entropy over the rollouts of the PPO run."""
    from matplotlib.figure import Figure

    records = [r for r in read_metrics(folder / "training" / "metrics.jsonl") if "score" in r]
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for place, (name, label) in enumerate(
        (("score", "reward"), ("kl", "KL, nats an answer"), ("entropy", "entropy, nats"))
    ):
        axes = figure.add_subplot(1, 3, place + 1, xlabel="rollout", ylabel=label)
        axes.plot([r[name] for r in records])
    figure.suptitle(
        f"RLPO on {base}: pass rate {results['base']['pass_rate']:.1%} -> "
        f"{results['ppo']['pass_rate']:.1%}"
    )
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--methods", nargs="+", default=["ppo", "dpo", "rloo"])
    parser.add_argument("--rollouts", type=int, default=40)
    parser.add_argument("--rollout-size", type=int, default=48)
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument(
        "--held-out-seed", type=int, default=1, help="draws the held-out conversations"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the training by PPO")
    parser.add_argument("--layers", default="last:6", help="layers that learn")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--target-kl", type=float, default=8.0)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "rlpo-benchmark")
    parser.add_argument("--helpful-tokens", type=int, default=16_384)
    add_output(parser, "rlpo")
    options = parser.parse_args()
    resumed(options.work)
    held_out = rude_prompts.prompts(
        rude_prompts.HELD_OUT,
        rude_prompts.HELD_OUT_ANSWERS,
        options.held_out,
        POLITE_HELD_OUT,
        seed=options.held_out_seed,
    )
    model, tokenizer = load(options.base)
    batches = helpful_batches(tokenizer, options.work / "helpful", options.helpful_tokens)
    results = {"base": measure(options.base, held_out, batches)}
    seconds = {}  # only of stages that this run started
    base_name = re.sub(r"[^\w.-]+", "-", options.base)
    path = options.work / f"preferences-{base_name}-{options.prompts}.db"
    if not path.exists():
        started = time.perf_counter()
        asked = rude_prompts.prompts(
            rude_prompts.TRAIN, rude_prompts.TRAIN_ANSWERS, options.prompts, POLITE, seed=0
        )
        judges = {"unlisted": unlisted, "willing": JUDGES["willing"], "varied": JUDGES["varied"]}
        pairs = generate_pairs(
            model,
            tokenizer,
            asked,
            judges,
            **SAMPLING,
            source=f"sampled from {options.base}",
            refusals=True,
        )
        with new_database(path) as store:
            store.set_eval_share(0.2)
            store.add_all(pairs)
            print(store.statistics(), flush=True)
        seconds["pairs"] = time.perf_counter() - started
    details = {}
    for method in options.methods:
        seeds = options.seeds if method == "ppo" else options.seeds[:1]
        by_seed = {}
        for seed in seeds:
            name = method if seed == seeds[0] else f"{method}-seed-{seed}"
            is_new = not (options.work / f"{name}-run").exists()
            started = time.perf_counter()
            model_folder, run_folder = align_once(
                options, path, method, name, **SAMPLING, seed=seed
            )
            if is_new:
                seconds[name] = time.perf_counter() - started
            details[name] = json.loads((run_folder / "result.json").read_text())
            figures = measure(str(model_folder), held_out, batches)
            over = paired_difference(figures["passed"], results["base"]["passed"])
            by_seed[str(seed)] = {**figures, "over_base": asdict(over)}
        results[method] = {**by_seed[str(seeds[0])], "by_seed": by_seed}
    write(options.json, {"models": results, "seconds": seconds, "details": details})
    if "ppo" in options.methods:
        picture = options.json.with_suffix(".png")
        plot(options.base, options.work / "ppo-run", results, picture)


if __name__ == "__main__":
    run_main(main)
