"""The arguments of all training jobs, each declared once: a field is an argument of the Python
function, an option of the command line, and a key of a recipe; its docstring is what `--help`,
`help()` and the reference page say of it.

To add an argument, add a field here with type, range, default and docstring, and use it in the job.
Where the default depends on other things the field is None, and its docstring says what is taken
then. The docstring of a class is the title of its group of arguments.
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
"""No control characters, as the manifest of a pack has none."""

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
    """Check everything, estimate memory and time, change nothing"""


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
    """Base model: a known name, a folder or a hub id"""

    name: str = ""
    """Name of what is made and of its run folder; default: that of the source"""

    from_git: AnyPath = None
    """Git repository to learn from; default: none"""

    from_folder: AnyPath = None
    """Folder of text files to learn from; default: none"""

    from_jsonl: AnyPath = None
    """JSONL file to learn from; default: none"""

    from_parquet: AnyPath = None
    """Parquet file to learn from; default: none"""

    held_out: float = Field(default=0.1, ge=0.01, le=0.9)
    """Share of the documents that is never trained on"""

    held_out_tokens: int = Field(default=8192, ge=1)
    """Most held-out tokens that the result is reported on, and most that the best state is chosen
    by
    """

    row_length: int = Field(default=512, ge=2)
    """Tokens of a packed row"""

    batch_rows: int | None = Field(default=None, ge=1)
    """Rows of a batch; default: 4, or 2 for an expert that begins at layer 0"""

    learning_rate: float | None = Field(default=None, gt=0)
    """Peak of the learning rate; default: 4e-3 for an expert, 3e-3 for one that begins at layer 0,
    and of the other modes 1e-3 for last-n, 8e-3 for lora, 2e-4 for full"""

    @property
    def source(self) -> "Source":
        """The text, and how some of it is held out."""
        from deepseek.train.text.corpus import Source

        paths = (self.from_git, self.from_folder, self.from_jsonl, self.from_parquet)
        return Source.at(*paths, held_out=self.held_out, seed=self.seed)

    def check(self) -> None:
        """Raise `ConfigError` if there is neither a name nor a source that gives one."""
        self.named()

    def named(self) -> str:
        """Return the name, or that of the source."""
        return self.name or source_name(
            self.from_git, self.from_folder, self.from_jsonl, self.from_parquet
        )

    def as_json(self) -> dict[str, Any]:
        """Return what decides the result, the paths of the text absolute."""
        source = vars(self.source)
        return super().as_json() | {
            "source": {k: str(v) if isinstance(v, Path) else v for k, v in source.items()}
        }


@dataclass(kw_only=True, frozen=True, config=DECLARED)
class ExpertArguments(TextArguments):
    """Expert"""

    layers: str = Field(default="last:3", pattern=LAYERS, examples=["all", "last:3", "0-9,20"])
    """Layers that get an expert: last:3 is fast, all is strong; also last:N, or indices such as
    0-9,20
    """

    width: int | None = Field(default=None, ge=1)
    """Width of the expert's feed-forward network at each layer; default: 512, or 256 if it begins
    at layer 0
    """

    minutes: float | None = Field(default=None, gt=0)
    """Minutes for trunk, training and evaluation; default: 5 if `tokens` is not given"""

    tokens: int | None = Field(default=None, ge=0)
    """Distinct tokens to train on instead of `minutes`, 0 for all; default: as many as the minutes
    suffice for
    """

    epochs: int | None = Field(default=None, ge=1)
    """Passes over the text; default: as many as its amount is worth"""

    split: Literal["file", "directory", "time"] = "file"
    """What is held out: whole files, whole directories, or with time what came last in a git
    history
    """

    questions: float | None = Field(default=None, ge=0, le=0.9)
    """Share of the training tokens that are questions about the text, made from it; default: 0,
    none
    """

    licence: str = Field(default=UNKNOWN_LICENCE, pattern=PRINTABLE, max_length=200)
    """Licence of the pack, an SPDX expression"""

    domain: str = Field(default="", pattern=PRINTABLE, max_length=200)
    """What the expert knows, in a few words; default: nothing is said"""

    out: AnyPath = None
    """Pack file to write; default: `<name>.safetensors` in the folder of trained experts"""

    @property
    def source(self) -> "Source":
        """The text, how some of it is held out, and how much is asked about it."""
        from dataclasses import replace

        from deepseek.train.text.question_mix import QUESTIONS

        questions = QUESTIONS if self.questions is None else self.questions
        return replace(super().source, by=self.split, questions=questions)


@dataclass(kw_only=True, frozen=True, config=DECLARED)
class AdaptArguments(TextArguments):
    """Adaptation"""

    unstored: ClassVar[frozenset[str]] = TextArguments.unstored | {"name"}

    mode: Mode = "last-n"
    """What is trained: last-n the last layers on a cached trunk; lora adapters of at most 0.1 % of
    the parameters, merged at the end; full everything; expert a module beside the model, as
    `train_expert` does"""

    last: int = Field(default=3, ge=1)
    """Layers that the modes last-n and expert train"""

    tokens: int = Field(default=0, ge=0)
    """Distinct tokens to train on, 0 for all"""

    epochs: int = Field(default=2, ge=1)
    """Passes over them"""

    out: AnyPath = None
    """Folder of the new model; default: `models/<name>` in the library's home"""

    def for_expert(self) -> ExpertArguments:
        """Return what mode "expert" trains: every argument that an expert has too, and the last
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
    """Model to align: a known name, a folder or a hub id"""

    prefs: AnyPath = None
    """Preference database; default: `preferences.db` in the library's home"""

    name: str = "aligned"
    """Name of the new model and of its run folder"""

    method: Method = "ppo"
    """How it learns: ppo is RLPO; dpo and rloo are those of TRL"""

    reward: str = "model"
    """What judges answers: model fits a reward model to the pairs; clean, willing and varied are
    judges
    """

    layers: str = Field(default="last:6", pattern=LAYERS, examples=["all", "last:3", "0-9,20"])
    """Layers that are trained: last:N or all; the reward model reads what enters the first of
    them
    """

    rollouts: int = Field(default=40, ge=1)
    """How often the model answers prompts and learns from it"""

    rollout_size: int = Field(default=48, ge=1)
    """Prompts answered each time"""

    learning_rate: float = Field(default=5e-5, gt=0)
    """Peak of the learning rate"""

    new_tokens: int = Field(default=32, ge=1)
    """Most tokens of an answer"""

    temperature: float = Field(default=0.8, ge=0.1)
    """Temperature at which answers are sampled"""

    target_kl: float = Field(default=8.0, ge=0.01)
    """Distance to keep to the untouched base, in nats an answer"""

    out: AnyPath = None
    """Folder of the new model; default: `models/<name>` in the library's home"""


@dataclass(kw_only=True, frozen=True, config=DECLARED)
class DistillHashArguments(JobArguments):
    """Hash distillation"""

    base: str = Field(default="smollm2-135m", kw_only=False)
    """Base model: a known name, a folder or a hub id"""

    data: tuple[str | Path, ...] = ()
    """Texts to learn from: folders, JSONL or Parquet files; default: Python's own pages and
    library
    """

    texts: int = Field(default=6, ge=1)
    """Number of texts"""

    length: int = Field(default=4096, ge=512)
    """Tokens of each text"""

    buckets: int = Field(default=64, ge=2)
    """Buckets of keys of every head; `lsh_num_buckets` of the model that will use them"""

    window: int = Field(default=40, ge=1)
    """Keys of a bucket that a query looks at; `lsh_bucket_window` of that model"""

    exact: int = Field(default=2, ge=0)
    """First layers that keep exact attention"""

    calibrate_only: bool = False
    """Group keys, but do not learn what to probe"""

    out: AnyPath = None
    """File to write; default: beside the model"""


def source_name(*paths: AnyPath) -> str:
    """Return a name for what is made from the first path given: `~/src/My Project` gives
    `My-Project`.
    """
    source = next((Path(path) for path in paths if path), None)
    if source is None:
        raise ConfigError(
            "no text to learn from; give from_git, from_folder, from_jsonl or from_parquet."
        )
    return re.sub(r"[^A-Za-z0-9._-]+", "-", source.resolve().stem).strip("-._") or "expert"
