"""Language and domain experts, trained separately and armed in pairs on text that needs both.

    python benchmarks/corpora.py french spanish images-en images-fr images-es office-en \\
        final-french final-spanish
    python benchmarks/compose.py [--base NAME] [--corpora DIR] [--tokens 48000] [--json FILE]
    python benchmarks/compose.py --languages french --domains images    # one pair, three experts

Four experts are trained with default settings, two on a language (French and Spanish text about
another subject) and two on a domain (English manuals of an image editor and of an office suite).
None of them has seen the four mixed texts: the published French and Spanish manuals of the same
programs. For every pair of a language and a domain, one more expert is trained on the union of both
texts, with the tokens of both. Each text is scored on rows that no expert was trained on; the
frozen trunk is computed once:

    base      no expert
    language  the language's expert alone, at every token
    domain    the domain's expert alone, at every token
    pair      both armed by name; the gates decide at every token
    both      both at every token, their outputs added
    union     the expert of the union alone, at every token
    gated     the language's expert at every token, the domain's where its gate fires
    merged    both merged as by `deepseek expert merge`, at every token
    + 0.5     both at every token, the domain's output times 0.5 (also 0.25 and 0.75)

An expert's own held-out text is scored with each partner armed beside it, which gives the share of
its gain that is kept. An interrupted run resumes, and finished experts are kept.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from base_and_gain import Everywhere, Text, Variant, losses_of
from entry import existing_path, run_main
from results import add_output, resumed, write
from torch import Tensor

import deepseek
from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.store import home
from deepseek.data import TokenShards, read_folder
from deepseek.model.experts import ExpertModule
from deepseek.model.transformer import DeepSeekModel
from deepseek.packs.pack import read_pack
from deepseek.text.tokenizer import load_tokenizer
from deepseek.train.jobs.expert import CALIBRATION_TOKENS
from deepseek.train.jobs.merge import Part
from deepseek.train.jobs.merge_fit import fitted

LANGUAGES = ("french", "spanish")
MANUALS = {
    "images": {"english": "images-en", "french": "images-fr", "spanish": "images-es"},
    "office": {"english": "office-en", "french": "final-french", "spanish": "final-spanish"},
}
"""Corpus of each domain in each language; the domain's expert is trained on the English one."""

EPOCHS = 2
WEIGHTS = (0.25, 0.5, 0.75)
"""Weights of the domain's output; the language's output has weight 1."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--corpora", type=existing_path, default=home() / "corpora")
    parser.add_argument(
        "--work", type=Path, default=home() / "compose", help="experts and texts are kept here"
    )
    parser.add_argument(
        "--tokens", type=int, default=48_000, help="distinct tokens of each text to train on"
    )
    parser.add_argument("--languages", nargs="+", choices=LANGUAGES, default=LANGUAGES)
    parser.add_argument("--domains", nargs="+", choices=MANUALS, default=[*MANUALS])
    parser.add_argument("--score", type=int, default=8_192, help="tokens each text is scored on")
    parser.add_argument("--layers", default="last:3", help="layers of the experts")
    add_output(parser, "compose")
    options = parser.parse_args()
    resumed(options.work)
    pairs = [*product(options.languages, options.domains)]
    for language, domain in pairs:
        train(options, language, (language,))
        train(options, domain, (MANUALS[domain]["english"],))
        train(options, union(language, domain), (language, MANUALS[domain]["english"]))
    measured = Comparison(options)
    rows = [measured.mixed(*pair) for pair in pairs]
    kept = [measured.own(name, partner) for pair in pairs for name, partner in (pair, pair[::-1])]
    print_tables(rows, kept)
    write(options.json, {"base": options.base, "mixed": rows, "own": kept})


def union(language: str, domain: str) -> str:
    """Return the name of the expert trained on both texts."""
    return f"{language}-and-{domain}"


def train(options: argparse.Namespace, name: str, texts: tuple[str, ...]) -> None:
    """Train one expert on the texts of these corpora, unless that was done before."""
    folder = options.work / "sources" / name
    folder.mkdir(parents=True, exist_ok=True)
    for text in texts:
        copy(options.corpora / text, folder / text)
    deepseek.train_expert(
        options.base,
        name=name,
        from_folder=folder,
        layers=options.layers,
        tokens=options.tokens * len(texts),
        epochs=EPOCHS,
        out=options.work / "packs" / f"{name}.safetensors",
        run_folder=options.work / "runs" / name,
    )


def copy(source: Path, target: Path) -> None:
    """Copy the files of a folder that are not there yet."""
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_file() and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())


class Beside:
    """Armed experts with their gates, plus one module at every token.

    Args:
        module: the module without a gate.
        armed: returns the armed experts.
    """

    adapts = False

    def __init__(self, module: ExpertModule, armed: Variant) -> None:
        self.module, self.armed = module, armed()

    def apply(self, layer_idx: int, x_BTD: Tensor, y_BTD: Tensor, context: Any) -> Tensor:
        gated_BTD: Tensor = self.armed.apply(layer_idx, x_BTD, y_BTD, context)
        return gated_BTD + self.module(layer_idx, x_BTD)


class Comparison:
    """All experts on one base; computes losses on texts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model = DeepSeekModel.from_pretrained(options.base, dtype="auto")
        self.tokenizer = load_tokenizer(resolve(options.base))
        self.modules: dict[str, ExpertModule] = {}
        for path in sorted((options.work / "packs").glob("*.safetensors")):
            self.model.experts.plug(path)
            self.modules[path.stem] = ExpertModule.from_pack(read_pack(path), self.model.dtype)

    def mixed(self, language: str, domain: str) -> dict[str, Any]:
        """Score the manual of a domain's program in one language."""
        name = MANUALS[domain][language]
        text = Text(name, self._shards(name))
        variants = {
            "base": lambda: None,
            "language": self._forced(language),
            "domain": self._forced(domain),
            "pair": self._armed(language, domain),
            "both": self._forced(language, domain),
            "union": self._forced(union(language, domain)),
            "gated": partial(Beside, self.modules[language], self._armed(domain)),
            "merged": partial(Everywhere, [self._merged(language, domain)], 1.0),
        }
        for weight in WEIGHTS:
            modules = [self.modules[language], self.modules[domain]]
            variants[f"+ {weight}"] = partial(Everywhere, modules, 1.0, weight)
        losses = self._losses(text, variants)
        single = min(losses["language"], losses["domain"])
        return {
            "text": name,
            "language": language,
            "domain": domain,
            "losses": losses,
            "pair_less_single": losses["pair"] - single,
            "both_less_single": losses["both"] - single,
            "pair_less_union": losses["pair"] - losses["union"],
        }

    def own(self, name: str, partner: str) -> dict[str, Any]:
        """Score an expert's own held-out text with its partner armed beside it."""
        held_out = TokenShards(self.options.work / "runs" / name / "corpus" / "held-out")
        variants = {
            "base": lambda: None,
            "alone": self._forced(name),
            "pair": self._armed(name, partner),
        }
        losses = self._losses(Text(name, held_out), variants)
        gain = losses["base"] - losses["alone"]
        kept = 100 * (losses["base"] - losses["pair"]) / gain
        return {"text": name, "partner": partner, "losses": losses, "kept_percent": kept}

    def _losses(self, text: Text, variants: dict[str, Variant]) -> dict[str, float]:
        lowest = min(module.layers[0] for module in self.modules.values())
        batches = text.batches(self.options.score)
        return losses_of(self.model, batches, variants, lowest)

    def _shards(self, name: str) -> TokenShards:
        documents = list(read_folder(self.options.corpora / name))
        # Opens existing shards of the same documents and tokenizer.
        return TokenShards.build(documents, self.tokenizer, self.options.work / "texts" / name)

    def _forced(self, *names: str) -> Variant:
        return partial(Everywhere, [self.modules[name] for name in names], *[1.0] * len(names))

    def _merged(self, *names: str) -> ExpertModule:
        """Return the merged module, fitted to each expert's output on its own text."""
        parts = [Part(str(self.options.work / "runs" / name), self.model) for name in names]
        width = sum(part.manifest.width for part in parts)
        tokens = CALIBRATION_TOKENS // len(parts)
        texts = [(part.module, part.rows("train", tokens)) for part in parts]
        return fitted(self.model, texts, "merged", width).to(self.model.dtype)

    def _armed(self, *names: str) -> Variant:
        def variant() -> Any:
            with self.model.experts.arming(names):
                return self.model.experts.armed()

        return variant


def print_tables(rows: list[dict[str, Any]], kept: list[dict[str, Any]]) -> None:
    """Print the losses of the mixed texts, and the gain that each expert keeps on its own text."""
    print("\n".join(table(rows)))
    print()
    print(
        "\n".join(
            f"{row['text']:10} beside {row['partner']:10} {row['kept_percent']:6.1f} %"
            for row in kept
        )
    )


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    names = list(rows[0]["losses"])
    yield f"{'text':14}" + "".join(f"{name:>11}" for name in names) + "   pair - single"
    for row in rows:
        losses = "".join(f"{row['losses'][name]:11.4f}" for name in names)
        yield f"{row['text']:14}{losses}{row['pair_less_single']:+16.4f}"


if __name__ == "__main__":
    run_main(main)
