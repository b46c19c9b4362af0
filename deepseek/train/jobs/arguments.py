"""Arguments of all training jobs, each declared once.

A field is an argument of the Python function, an option of the command line, and a key of a recipe.
Its docstring is the text of `--help`, `help()` and the reference page.

To add an argument, add a field with type, range, default and docstring, and use it in the job. If
the default depends on other values, the field is None and its docstring states the rule. The
docstring of a class is the title of its group of arguments.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from deepseek.errors import ConfigError
from deepseek.train.jobs.declaration import DECLARED, Declaration, arguments_of

if TYPE_CHECKING:
    from deepseek.train.text.corpus import Source

Mode = Literal["last-n", "lora", "full", "expert"]
Method = Literal["ppo", "dpo", "rloo"]
AnyPath = str | Path | None

LAYERS = r"^(all|last:[0-9]{1,4}|[0-9]{1,4}(-[0-9]{1,4})?(, ?[0-9]{1,4}(-[0-9]{1,4})?)*)$"

PRINTABLE = r"^[^\x00-\x1f\x7f]*$"
"""No control characters, as in a pack's manifest."""

UNKNOWN_LICENCE = "LicenseRef-Unknown"


@dataclass(kw_only=True, frozen=True, config=DECLARED)
class JobArguments(Declaration):
    """Every job"""

    seed: int = 0
    """Seed of initial values, order, sampling and split"""

    quiet: bool = False
    """Show no progress"""


@dataclass(kw_only=True, frozen=True, config=DECLARED)
class RunArguments(JobArguments):
    """Run"""

    run_folder: AnyPath = None
    """Folder of the run's state and metrics; default: `runs/<name>` in the library's home"""

    dry_run: bool = False
    """Check the arguments and estimate memory and time, without changing anything"""


@dataclass(kw_only=True, frozen=True, config=DECLARED)
class TextArguments(RunArguments):
    """Text (at least one source)"""

    unstored: ClassVar[frozenset[str]] = RunArguments.unstored | {
        "from_git",
        "from_folder",
        "from_jsonl",
        "from_parquet",
        "held_out",
        "split",
        "questions",
    }

    base: str = Field(default="smollm2-135m", kw_only=False)
    """Base model: a known name, a folder, a GGUF file or a hub id"""

    name: str = ""
    """Name of the result and of its run folder; default: that of the source"""

    from_git: AnyPath = None
    """Git repository to learn from; default: none"""

    from_folder: AnyPath = None
    """Folder of text files to learn from; default: none"""

    from_jsonl: AnyPath = None
    """JSONL file to learn from; default: none"""

    from_parquet: AnyPath = None
    """Parquet file to learn from; default: none"""

    held_out: float = Field(default=0.1, ge=0.01, le=0.9)
    """Share of the documents that is held out, never trained on"""

    held_out_tokens: int = Field(default=8192, ge=1)
    """Most held-out tokens in the report, and most validation tokens for choosing the best state"""

    row_length: int = Field(default=512, ge=2)
    """Tokens per packed row"""

    batch_rows: int | None = Field(default=None, ge=1)
    """Rows per batch; default: 4, or 2 for an expert that begins at layer 0"""

    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate; default: 4e-3 for an expert, 3e-3 for one that begins at layer 0;
    otherwise 1e-3 for last-n, 8e-3 for lora and 2e-4 for full
    """

    @property
    def source(self) -> "Source":
        """The text source, with the rule for its held-out set."""
        from deepseek.train.text.corpus import Source

        paths = (self.from_git, self.from_folder, self.from_jsonl, self.from_parquet)
        return Source.at(*paths, held_out=self.held_out, seed=self.seed)

    def check(self) -> None:
        """Raise `ConfigError` if there is neither a name nor a source to take it from."""
        self.named()

    def named(self) -> str:
        """Return `name`, or else the name of the source."""
        return self.name or source_name(
            self.from_git, self.from_folder, self.from_jsonl, self.from_parquet
        )

    def as_json(self) -> dict[str, Any]:
        """Return the arguments that decide the result, with absolute paths for the text."""
        source = vars(self.source)
        return super().as_json() | {
            "source": {k: str(v) if isinstance(v, Path) else v for k, v in source.items()}
        }


@dataclass(kw_only=True, frozen=True, config=DECLARED)
class ExpertArguments(TextArguments):
    """Expert"""

    layers: str = Field(default="last:3", pattern=LAYERS, examples=["all", "last:3", "0-9,20"])
    """Layers that get an expert: last:3 is fast, all is strongest; also last:N, or indices such as
    0-9,20
    """

    width: int | None = Field(default=None, ge=1)
    """Width of the expert's feed-forward network in each layer; default: 512, or 256 if it begins
    at layer 0
    """

    minutes: float | None = Field(default=None, gt=0)
    """Time budget for trunk, training and evaluation, in minutes; default: 5 if `tokens` is not
    given
    """

    tokens: int | None = Field(default=None, ge=0)
    """Distinct tokens to train on, 0 for all; default: as many as fit into `minutes`"""

    epochs: int | None = Field(default=None, ge=1)
    """Passes over the text; default: chosen by the amount of text"""

    split: Literal["file", "directory", "time"] = "file"
    """What to hold out: whole files, whole directories, or with time the latest commits of a git
    history
    """

    questions: float | None = Field(default=None, ge=0, le=0.9)
    """Share of the training tokens that are questions generated from the text; default: 0, none"""

    licence: str = Field(default=UNKNOWN_LICENCE, pattern=PRINTABLE, max_length=200)
    """Licence of the pack, an SPDX expression"""

    domain: str = Field(default="", pattern=PRINTABLE, max_length=200)
    """What the expert knows, in a few words; default: empty"""

    out: AnyPath = None
    """Pack file to write; default: `<name>.safetensors` in the folder of trained experts"""

    @property
    def source(self) -> "Source":
        """The text source, with the split of the held-out set and the share of questions."""
        from dataclasses import replace

        from deepseek.train.text.question_mix import QUESTIONS

        questions = QUESTIONS if self.questions is None else self.questions
        return replace(super().source, by=self.split, questions=questions)


@dataclass(kw_only=True, frozen=True, config=DECLARED)
class AdaptArguments(TextArguments):
    """Adaptation"""

    unstored: ClassVar[frozenset[str]] = TextArguments.unstored | {"name"}

    mode: Mode = "last-n"
    """What to train: last-n trains the last layers on a cached trunk; lora trains adapters of at
    most 0.1 % of the parameters and merges them; full trains all parameters; expert trains a module
    beside the model, as `train_expert` does
    """

    last: int = Field(default=3, ge=1)
    """Number of last layers to train in the modes last-n and expert"""

    tokens: int = Field(default=0, ge=0)
    """Distinct tokens to train on, 0 for all"""

    epochs: int = Field(default=2, ge=1)
    """Passes over the text"""

    out: AnyPath = None
    """Folder of the new model; default: `models/<name>` in the library's home"""

    def for_expert(self) -> ExpertArguments:
        """Return the arguments of mode "expert": all that the two jobs share, and the last
        layers.
        """
        shared = arguments_of(ExpertArguments).keys() & arguments_of(AdaptArguments).keys()
        return ExpertArguments(
            **{name: getattr(self, name) for name in shared}, layers=f"last:{self.last}"
        )


@dataclass(kw_only=True, frozen=True, config=DECLARED)
class AlignArguments(RunArguments):
    """Alignment"""

    unstored: ClassVar[frozenset[str]] = RunArguments.unstored | {"name"}

    base: str = Field(default="smollm2-135m", kw_only=False)
    """Model to align: a known name, a folder, a GGUF file or a hub id"""

    prefs: AnyPath = None
    """Preference database; default: `preferences.db` in the library's home"""

    name: str = "aligned"
    """Name of the new model and of its run folder"""

    method: Method = "ppo"
    """Algorithm: ppo is RLPO; dpo and rloo are TRL's"""

    reward: str = "model"
    """Reward: model fits a reward model to the pairs; clean, willing and varied are rule-based
    judges
    """

    layers: str = Field(default="last:6", pattern=LAYERS, examples=["all", "last:3", "0-9,20"])
    """Layers to train: last:N or all; the reward model reads the hidden states that enter the first
    one
    """

    rollouts: int = Field(default=40, ge=1)
    """Number of rollouts, each followed by updates"""

    rollout_size: int = Field(default=48, ge=1)
    """Prompts per rollout"""

    learning_rate: float = Field(default=5e-5, gt=0)
    """Peak learning rate"""

    new_tokens: int = Field(default=32, ge=1)
    """Most tokens per answer"""

    temperature: float = Field(default=0.8, ge=0.1)
    """Sampling temperature of the answers"""

    target_kl: float = Field(default=8.0, ge=0.01)
    """Target KL divergence from the untouched base, in nats per answer"""

    out: AnyPath = None
    """Folder of the new model; default: `models/<name>` in the library's home"""


@dataclass(kw_only=True, frozen=True, config=DECLARED)
class DistillHashArguments(JobArguments):
    """Hash distillation"""

    base: str = Field(default="smollm2-135m", kw_only=False)
    """Base model: a known name, a folder, a GGUF file or a hub id"""

    data: tuple[str | Path, ...] = ()
    """Texts to learn from: folders, JSONL or Parquet files; default: the documentation and standard
    library of Python
    """

    texts: int = Field(default=6, ge=1)
    """Number of texts"""

    length: int = Field(default=4096, ge=512)
    """Tokens per text"""

    buckets: int = Field(default=64, ge=2)
    """Key buckets per head; must equal the model's `lsh_num_buckets`"""

    window: int = Field(default=40, ge=1)
    """Keys that a query attends to in each bucket; must equal the model's `lsh_bucket_window`"""

    exact: int = Field(default=2, ge=0)
    """Number of first layers that keep exact attention"""

    calibrate_only: bool = False
    """Cluster the keys, but don't train the probing"""

    out: AnyPath = None
    """File to write; default: beside the model"""


def source_name(*paths: AnyPath) -> str:
    """Return a name made from the first path that is set: `~/src/My Project` gives `My-Project`.

    Raises:
        ConfigError: no path is set.
    """
    source = next((Path(path) for path in paths if path), None)
    if source is None:
        raise ConfigError(
            "no text to learn from; give from_git, from_folder, from_jsonl or from_parquet."
        )
    return re.sub(r"[^A-Za-z0-9._-]+", "-", source.resolve().stem).strip("-._") or "expert"
