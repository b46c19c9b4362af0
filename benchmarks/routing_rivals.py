"""Which text is an expert's? Ways to tell from a passage, each with what a pack can know.

    python benchmarks/corpora.py many --out TEXTS --megabytes 1
    python benchmarks/routing_rivals.py --texts TEXTS --packs PACKS

PACKS are those of `many_experts.py`; an expert that is missing is trained first. Held-out passages
of each folder of TEXTS are given to an expert, or to none if theirs is not among the known ones.
Each way chooses the known expert with the highest score, or none:

    informed     ridge classifier over the base's embeddings, one class per expert and one for none,
                 which is fitted on training text of the very folders without an expert
    ridge        the same with public text (the Python installation's source and the descriptions of
                 its packages) for none, as nobody knows what else users will write
    closed_form  linear discriminants: a mean of each expert's and of each kind of public text, and
                 the mean covariance within them, which packs could hold
    pairs        evidence of the pack's table of pairs of tokens, with the price that documents pay
    both         the sum of the two, the discriminants weighted by `--weight`

"first half" and "second half" know every other expert: what is chosen on one is reported on the
other. The gates themselves, which decide token by token, are in `many_experts.py`.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from math import log
from pathlib import Path

import numpy as np
import torch
from entry import existing_path, run_main
from many_experts import Passage, embedded, labelled, passages, pieces, shares, train_missing
from results import FOLDER, resumed, write

from deepseek.data import Document
from deepseek.engine.engine import Engine
from deepseek.engine.start import start_engine
from deepseek.model.experts.relevance import NATS_PER_CANDIDATES, PASSAGE_WEIGHT, Relevance
from deepseek.packs.manifest import Manifest
from deepseek.packs.pack import read_pack
from deepseek.train.gates.background import descriptions, installed_source

RIDGE = 1e-2
SHRINKAGE = 0.05
"""Share of a multiple of the identity in the covariance."""

KINDS = 8
"""Kinds of public text, which k-means finds."""

Score = Callable[[np.ndarray], np.ndarray]
"""Embeddings `[N, D]` -> scores of the experts over none, in nats, `[N, M]`."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--packs", type=Path, required=True)
    parser.add_argument("--texts", type=existing_path, required=True)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--train-tokens", type=int, default=12_000, help="of an expert's text")
    parser.add_argument("--experts", type=int, help="of the first texts; default: all")
    parser.add_argument("--counts", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--passages", type=int, default=8, help="held-out ones of each text")
    parser.add_argument("--fitting", type=int, default=94, help="training passages of each text")
    parser.add_argument("--public", type=int, default=1000, help="passages of public text")
    parser.add_argument("--length", type=int, default=128, help="tokens of a passage")
    parser.add_argument("--weight", type=float, default=0.4, help="of the discriminants in `both`")
    parser.add_argument("--json", type=Path, default=FOLDER / "routing_rivals.json")
    options = parser.parse_args()
    resumed(options.packs)
    train_missing(options)
    tables = {path.stem: relevance(path) for path in sorted(options.packs.glob("*.safetensors"))}
    known = {str(count): list(tables)[:count] for count in options.counts}
    known |= {"first half": list(tables)[::2], "second half": list(tables)[1::2]}
    with start_engine(options.base) as engine:
        fitting, held_out = passages(engine, options, set(tables), options.fitting)
        public_ND = embedded(engine, public(engine, options.public, options.length))[:, :-1]
        texts = Texts(engine, fitting, public_ND)
        asked_ND = embedded(engine, held_out)[:, :-1]
    evidence_NM = np.array(
        [[table.of_pairs(ids) for table in tables.values()] for ids in map(ids_of, held_out)]
    ) + np.array([table.offset * PASSAGE_WEIGHT for table in tables.values()])
    figures = {}
    for what, names in known.items():
        columns = [list(tables).index(name) for name in names]
        of_pairs_NM = evidence_NM[:, columns] - NATS_PER_CANDIDATES * log(len(names))
        of_means_NM = texts.discriminants(names)(asked_ND)
        found = {
            "informed": texts.ridge(names, informed=True)(asked_ND),
            "ridge": texts.ridge(names, informed=False)(asked_ND),
            "closed_form": of_means_NM,
            "pairs": of_pairs_NM,
            "both": of_pairs_NM + options.weight * of_means_NM,
        }
        asked = labelled(held_out, set(names))
        figures[what] = {
            way: shares(asked, decided(names, scores)) for way, scores in found.items()
        }
        print(what, figures[what], flush=True)
    write(options.json, {"figures": figures})


def relevance(path: Path) -> Relevance:
    """Return the tables of a pack."""
    pack = read_pack(path)
    manifest, tensors = pack.manifest, pack.tensors
    assert isinstance(manifest, Manifest)
    return Relevance(
        tensors["relevance"],
        manifest.gate.relevance_threshold,
        manifest.gate.relevance_offset,
        tensors["pairs"],
    )


def ids_of(passage: Passage) -> torch.Tensor:
    return torch.tensor(passage.ids)


def public(engine: Engine, count: int, length: int) -> list[Passage]:
    """Return passages of public text, one of each file: four fifths source, the rest descriptions
    of packages.
    """
    few = count // 5
    texts = [*islice(installed_source(), count - few), *islice(descriptions(), few)]
    documents = [Document(text, str(number)) for number, text in enumerate(texts)]
    return [Passage(ids, None) for ids in pieces(engine, documents, length)[: len(texts)]]


class Texts:
    """Embeddings of the texts that scores are fitted on.

    Args:
        engine: engine that computes embeddings.
        fitting: training passages of every folder.
        public_ND: embeddings of public text, `[N, D]`.
    """

    def __init__(self, engine: Engine, fitting: Sequence[Passage], public_ND: np.ndarray) -> None:
        rows_ND = embedded(engine, fitting)[:, :-1]
        labels = np.array([passage.label or "" for passage in fitting])
        self._of = {label: rows_ND[labels == label] for label in sorted(set(labels))}
        self._public_ND = public_ND
        self._kinds = means(public_ND, KINDS)

    def ridge(self, names: Sequence[str], *, informed: bool) -> Score:
        """Return the scores of a ridge classifier, of which none's is taken off.

        Args:
            names: known experts.
            informed: whether none is fitted on the text of folders without an expert.
        """
        others = [rows for name, rows in self._of.items() if name not in names]
        groups = [self._public_ND] if not informed else [np.concatenate(others)]
        groups += [self._of[name] for name in names]
        rows_ND = with_ones(np.concatenate(groups))
        classes_N = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        targets_NC = np.eye(len(groups))[classes_N] - 0.5
        gram_DD = rows_ND.T @ rows_ND + RIDGE * np.eye(rows_ND.shape[1])
        weights_DC = np.linalg.solve(gram_DD, rows_ND.T @ targets_NC)

        def score(asked_ND: np.ndarray) -> np.ndarray:
            scores_NC = with_ones(asked_ND) @ weights_DC
            return np.asarray(scores_NC[:, 1:] - scores_NC[:, :1])

        return score

    def discriminants(self, names: Sequence[str]) -> Score:
        """Return log likelihood ratios of normal distributions with one covariance: of each expert
        over the likeliest kind of public text.

        Args:
            names: known experts.
        """
        groups = [self._of[name] for name in names]
        covariance_DD = within([*groups, *self._kinds])
        whiten_DD = np.linalg.cholesky(np.linalg.inv(covariance_DD))
        experts_MD = np.array([group.mean(0) for group in groups]) @ whiten_DD
        kinds_KD = np.array([kind.mean(0) for kind in self._kinds]) @ whiten_DD

        def score(asked_ND: np.ndarray) -> np.ndarray:
            rows_ND = asked_ND @ whiten_DD
            nearest_N1 = distances(rows_ND, kinds_KD).min(1, keepdims=True)
            return np.asarray((nearest_N1 - distances(rows_ND, experts_MD)) / 2)

        return score


def with_ones(rows_ND: np.ndarray) -> np.ndarray:
    """Return rows with a constant 1 for the bias."""
    return np.concatenate([rows_ND, np.ones((len(rows_ND), 1))], 1)


def distances(rows_ND: np.ndarray, centres_MD: np.ndarray) -> np.ndarray:
    """Return the squared distance of each row from each centre, `[N, M]`."""
    squares_NM = (rows_ND**2).sum(1)[:, None] + (centres_MD**2).sum(1)
    return np.asarray(squares_NM - 2 * rows_ND @ centres_MD.T)


def means(rows_ND: np.ndarray, count: int) -> list[np.ndarray]:
    """Return the rows in `count` groups, by k-means."""
    draw = np.random.default_rng(0)
    centres_KD = rows_ND[draw.choice(len(rows_ND), count, replace=False)]
    for _ in range(20):
        nearest_N = distances(rows_ND, centres_KD).argmin(1)
        groups = [rows_ND[nearest_N == number] for number in range(count)]
        centres_KD = np.array([group.mean(0) for group in groups if len(group)])
        count = len(centres_KD)
    return [group for group in groups if len(group)]


def within(groups: Iterable[np.ndarray]) -> np.ndarray:
    """Return the covariance within groups of rows, shrunk towards a multiple of the identity."""
    centred_ND = np.concatenate([group - group.mean(0) for group in groups])
    covariance_DD = centred_ND.T @ centred_ND / len(centred_ND)
    size = np.trace(covariance_DD) / len(covariance_DD)
    return np.asarray(
        (1 - SHRINKAGE) * covariance_DD + SHRINKAGE * size * np.eye(len(covariance_DD))
    )


def decided(names: Sequence[str], scores_NM: np.ndarray) -> list[str | None]:
    """Return the expert with the highest score of each passage, none if that is not above 0."""
    best_N, most_N = scores_NM.argmax(1), scores_NM.max(1)
    return [names[index] if most > 0 else None for index, most in zip(best_N, most_N, strict=True)]


if __name__ == "__main__":
    run_main(main)
