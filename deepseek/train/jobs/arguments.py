"""Arguments of all training jobs, each declared once.

A field is an argument of the Python function, an option of the command line, and a key of a recipe.
Its docstring is the text of `--help`, `help()` and the reference page.

To add an argument, add a field with type, range, default and docstring, and use it in the job. If
the default depends on other values, the field is None and its docstring states the rule. The
docstring of a class is the title of its group of arguments.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pydantic import Field
from pydantic.dataclasses import dataclass

from deepseek.checkpoint.files import located
from deepseek.checkpoint.store import home
from deepseek.errors import ConfigError
from deepseek.packs.library import SUFFIX, experts_folder
from deepseek.packs.names import valid_name
from deepseek.train.jobs.declaration import DECLARED, arguments_of
from deepseek.train.jobs.device_arguments import PrecisionArguments
from deepseek.train.jobs.limits import (
    LAYERS,
    MAX_COUNT,
    MAX_LENGTH,
    MAX_MINUTES,
    MAX_RATE,
    MAX_TOKENS,
    MAX_WIDTH,
    PRINTABLE,
    UNKNOWN_LICENCE,
    BaseModelName,
    ModelName,
    ResultName,
    SpdxLicence,
    model_name,
)
from deepseek.train.jobs.pack_place import refuse_other_place
from deepseek.train.jobs.run_arguments import AnyPath, RunArguments

if TYPE_CHECKING:
    from deepseek.train.text.corpus import Source

Mode = Literal["last-n", "lora", "full", "expert"]
Method = Literal["ppo", "grpo", "gspo", "dpo", "rloo"]
Reward = Literal["model", "clean", "willing", "varied"]
"""A reward model that is fitted, or a judge; a test compares them with `JUDGES`."""

UNUSED: dict[Method, tuple[str, ...]] = {
    "dpo": ("reward", "target_kl", "new_tokens", "temperature"),
    "rloo": ("target_kl",),
}
"""Arguments that a method of alignment has no use for."""

LAST = 3
"""Default number of last layers to train."""

LAST_LAYERS = re.compile(r"all|last:\d+", re.ASCII)
"""Values of `layers` for a job that trains no layers but the last."""


@dataclass(kw_only=True, frozen=True, config=DECLARED)
class TextArguments(RunArguments):
    """Text (at least one source)"""

    lighter: ClassVar[str] = "fewer --batch-rows, a shorter --row-length or --layers last:3"

    unstored: ClassVar[frozenset[str]] = RunArguments.unstored | {
        "from_git",
        "from_folder",
        "from_jsonl",
        "from_parquet",
        "held_out",
        "split",
        "questions",
        "infill",
    }

    base: BaseModelName = Field(default="smollm2-135m", kw_only=False)
    """Base model: a known name, a folder, a GGUF file or a hub id"""

    name: ResultName = ""
    """Name of the result and of its run folder; default: that of the source"""

    from_git: AnyPath = None
    """Git repository to learn from, or a folder of one; default: none"""

    from_folder: AnyPath = None
    """Folder of text files to learn from; default: none"""

    from_jsonl: AnyPath = None
    """JSONL file to learn from; default: none"""

    from_parquet: AnyPath = None
    """Parquet file to learn from; default: none"""

    held_out: float = Field(default=0.1, ge=0.01, le=0.9)
    """Share of the documents that is held out, never trained on"""

    held_out_tokens: int = Field(default=8192, ge=1, le=MAX_TOKENS)
    """Maximum held-out tokens in the report, and maximum validation tokens for choosing the best
    state"""

    row_length: int | None = Field(default=None, ge=2, le=MAX_LENGTH)
    """Tokens per packed row; default: 512, or the base's context if that is shorter"""

    batch_rows: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    """Rows per batch; default: 4, or 2 for an expert that begins at layer 0"""

    learning_rate: float | None = Field(default=None, gt=0, le=MAX_RATE)
    """Peak learning rate; default: 4e-3 for an expert, 3e-3 for one that begins at layer 0;
    otherwise 1e-3 for last-n, 8e-3 for lora, less for ranks above 5, and 2e-4 for full; of fewer
    than 40,000 distinct tokens, 5e-4 for last-n and, in four or more passes, 2e-3 for an expert
    above layer 0"""

    def text_paths(self) -> list[str | Path]:
        """Return the paths of the text."""
        paths = (self.from_git, self.from_folder, self.from_jsonl, self.from_parquet)
        return [path for path in paths if path]

    @property
    def source(self) -> "Source":
        """The text source, with the rule for its held-out set."""
        from deepseek.train.text.corpus import Source

        paths = (self.from_git, self.from_folder, self.from_jsonl, self.from_parquet)
        return Source.at(*paths, held_out=self.held_out, seed=self.seed)

    def check(self) -> None:
        """Raise `ConfigError` if there is neither a name nor a source to take it from, or the
        source has a name that the result cannot have.
        """
        super().check()
        try:
            valid_name(self.named())
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"name: {error}.") from None

    def named(self) -> str:
        """Return `name`, or else the name of the source."""
        return self.name or source_name(
            self.from_git, self.from_folder, self.from_jsonl, self.from_parquet
        )

    def as_json(self) -> dict[str, Any]:
        """Return the arguments that decide the result, with absolute paths for the text."""
        return super().as_json() | {"source": self.source.as_json()}


@dataclass(kw_only=True, frozen=True, config=DECLARED)
class ExpertArguments(TextArguments):
    """Expert"""

    command: ClassVar[str] = "expert train"

    makes_file: ClassVar[bool] = True

    unstored: ClassVar[frozenset[str]] = TextArguments.unstored | {"update"}

    going_on: ClassVar[frozenset[str]] = frozenset(
        {"update", "minutes", "tokens", "epochs", "learning_rate", "device", "dtype"}
        | {"quiet", "dry_run"}
    )
    """Arguments that go with `update`. All others are those of the first training."""

    update: ResultName = ""
    """Name of a trained expert to continue with what is new in its source; default: none. Its other
    arguments stay, but `minutes` is 1 by default
    """

    layers: str = Field(default="last:3", pattern=LAYERS, examples=["all", "last:3", "0-9,20"])
    """Layers that get an expert: last:3 is fast, all is strongest; also last:N, or indices such as
    0-9,20
    """

    width: int | None = Field(default=None, ge=1, le=MAX_WIDTH)
    """Width of the expert's feed-forward network in each layer; default: 512, or 256 if it begins
    at layer 0
    """

    minutes: float | None = Field(default=None, gt=0, le=MAX_MINUTES)
    """Time budget for trunk, training and evaluation, in minutes; default: 5 if `tokens` is not
    given
    """

    tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    """Distinct tokens to train on, 0 for all; default: as many as fit into `minutes`"""

    epochs: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    """Passes over the text; default: chosen by the amount of text"""

    split: Literal["file", "directory", "time"] = "file"
    """What to hold out: whole files, whole directories, or with time the latest commits of a git
    history
    """

    questions: float | None = Field(default=None, ge=0, le=0.9)
    """Share of the training tokens that are questions generated from the text; default: 0, none"""

    infill: float = Field(default=0.0, ge=0, le=0.9)
    """Share of the code files to train on as texts with gaps, for completion in an editor"""

    licence: SpdxLicence = Field(default=UNKNOWN_LICENCE, max_length=200, examples=["MIT"])
    """Licence of the pack, an SPDX expression"""

    domain: str = Field(default="", pattern=PRINTABLE, max_length=200)
    """What the expert knows, in a few words; default: empty"""

    out: AnyPath = None
    """Pack file to write; default: `<name>.safetensors` in the folder of trained experts"""

    def check(self) -> None:
        """Raise `ConfigError` if `update` is given with an argument that the expert keeps, or if
        the expert is trained already and its pack is elsewhere than `out`.
        """
        if not self.update:
            super().check()
            run = located(self.run_folder or home() / "runs" / self.named())
            refuse_other_place(
                run, located(self.out or experts_folder() / f"{self.named()}{SUFFIX}")
            )
            return
        PrecisionArguments.check(self)
        for name, argument in arguments_of(ExpertArguments).items():
            if name not in self.going_on and getattr(self, name) != argument.default:
                raise ConfigError(
                    f"{name} does not go with update: {self.update} keeps the one that it was "
                    "trained with; leave it out."
                )

    @property
    def source(self) -> "Source":
        """The text source, with the rule of its split and the shares of questions and gaps."""
        from dataclasses import replace

        from deepseek.train.text.question_mix import QUESTIONS

        questions = QUESTIONS if self.questions is None else self.questions
        return replace(super().source, by=self.split, questions=questions, infill=self.infill)


@dataclass(kw_only=True, frozen=True, config=DECLARED)
class AdaptArguments(TextArguments):
    """Adaptation"""

    command: ClassVar[str] = "adapt"

    lighter: ClassVar[str] = "fewer --batch-rows, a shorter --row-length or --mode last-n --last 3"

    unstored: ClassVar[frozenset[str]] = TextArguments.unstored | {"name"}

    mode: Mode = "last-n"
    """What to train: last-n trains the last layers on a cached trunk; lora trains low-rank adapters
    and merges them; full trains all parameters; expert trains a module beside the model, as
    `train_expert` does
    """

    last: int = Field(default=LAST, ge=1, le=1024)
    """Number of last layers to train in the modes last-n and expert"""

    rank: int | None = Field(default=None, ge=1, le=1024)
    """Rank of the adapters of mode lora; default: the largest for which they have at most 0.1 % of
    the model's parameters
    """

    tokens: int = Field(default=0, ge=0, le=MAX_TOKENS)
    """Distinct tokens to train on, 0 for all"""

    epochs: int = Field(default=2, ge=1, le=MAX_COUNT)
    """Passes over the text"""

    out: AnyPath = None
    """Folder of the new model; default: `models/<name>` in the library's home"""

    def check_paths(self) -> None:
        """Raise `UserError` if the text is missing, or run folder or result cannot be written."""
        if self.mode == "expert":
            self.for_expert().check_paths()
        else:
            super().check_paths()

    def check(self) -> None:
        """Raise `ConfigError` if `last` or `rank` would be ignored, or the name is not possible."""
        super().check()
        if self.mode in ("lora", "full") and self.last != LAST:
            raise ConfigError("last goes with mode last-n or expert; leave it out.")
        if self.mode != "lora" and self.rank is not None:
            raise ConfigError("rank goes with mode lora; leave it out.")
        if self.mode != "expert":
            try:
                model_name(self.named())
            except ValueError as error:
                raise ConfigError(f"name: {error}.") from None

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

    command: ClassVar[str] = "align"

    lighter: ClassVar[str] = "a smaller --rollout-size, fewer --new-tokens or --layers last:3"

    unstored: ClassVar[frozenset[str]] = RunArguments.unstored | {"name"}

    base: BaseModelName = Field(default="smollm2-135m", kw_only=False)
    """Model to align: a known name, a folder, a GGUF file or a hub id"""

    prefs: AnyPath = None
    """Preference database; default: `preferences.db` in the library's home"""

    name: ModelName = "aligned"
    """Name of the new model and of its run folder"""

    method: Method = "ppo"
    """Algorithm: ppo, grpo and gspo are RLPO's; dpo and rloo are TRL's"""

    reward: Reward = "model"
    """Reward: model fits a reward model to the pairs; clean (a classifier), willing and varied
    (rules) are judges
    """

    layers: str = Field(default="last:6", pattern=LAYERS, examples=["all", "last:3"])
    """Layers to train: last:N or all; the reward model reads the hidden states that enter the first
    one
    """

    rollouts: int = Field(default=40, ge=1, le=MAX_COUNT)
    """Number of rollouts, each followed by updates"""

    rollout_size: int = Field(default=48, ge=1, le=MAX_COUNT)
    """Answers per rollout: one to each prompt, or four with grpo and gspo"""

    learning_rate: float = Field(default=5e-5, gt=0, le=MAX_RATE)
    """Peak learning rate"""

    new_tokens: int = Field(default=32, ge=1, le=MAX_LENGTH)
    """Maximum tokens per answer"""

    temperature: float = Field(default=0.8, ge=0.1, le=100)
    """Sampling temperature of the answers"""

    target_kl: float = Field(default=8.0, ge=0.01, le=1e4)
    """Target KL divergence from the untouched base, in nats per answer"""

    out: AnyPath = None
    """Folder of the new model; default: `models/<name>` in the library's home"""

    def check(self) -> None:
        """Raise `ConfigError` if `layers` are not the last ones, with or without a number, or the
        method would ignore an argument.
        """
        super().check()
        declared = arguments_of(AlignArguments)
        for name in UNUSED.get(self.method, ()):
            if getattr(self, name) != declared[name].default:
                users = [
                    method for method in get_args(Method) if name not in UNUSED.get(method, ())
                ]
                raise ConfigError(
                    f"{name} has no effect with method {self.method}; leave it out, or take method "
                    f"{' or '.join(users)}."
                )
        if not LAST_LAYERS.fullmatch(self.layers):
            raise ConfigError(
                f"layers={self.layers!r} are not the last layers, which alone can be aligned; "
                "write all or last:N."
            )

    def text_paths(self) -> list[str | Path]:
        """Return the path of the preference database, if one is given."""
        return [self.prefs] if self.prefs else []


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
    return re.sub(r"[^A-Za-z0-9._-]+", "-", source.resolve().stem)[:64].strip("-._") or "expert"
