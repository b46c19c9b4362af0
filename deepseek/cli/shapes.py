"""Shapes of what commands print with `--json`: one object per command, with a JSON schema.

`docs/cli_reference.py` writes the schemas into the reference page.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

from deepseek.claims.evaluation import ClaimRow, ClaimTable
from deepseek.cli.output import echo
from deepseek.terminal import unicode_only


class JsonShape(BaseModel):
    """Base of all shapes: no further fields, docstrings of fields in the schema, Unicode alone."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _unicode(cls, value: object) -> object:
        """Replace what no JSON text can hold: a file's name may have bytes that are no UTF-8."""
        if isinstance(value, str):
            return unicode_only(value)
        if isinstance(value, dict):
            return {cls._unicode(key): cls._unicode(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [cls._unicode(part) for part in value]
        return value


def print_json(shape: BaseModel) -> None:
    """Print an object on standard output, on several lines."""
    echo(shape.model_dump_json(indent=2), lines=True)


class Loss(JsonShape):
    """A loss on held-out text, in nats per token."""

    before: float
    """Loss of the base"""

    after: float
    """Loss of the base with the expert"""


class ExpertRow(JsonShape):
    """One trained expert. Of a file that is no valid pack, only the first fields say something."""

    name: str
    """Name of the expert"""

    path: str
    """File of the pack"""

    bytes: int
    """Size of the file"""

    problem: str | None = None
    """Why the file cannot be used; null: it can"""

    kind: str | None = None
    """`module` or `lora`"""

    base: str | None = None
    """Name of the base model"""

    layers: list[int] = []
    """Layers of the base that it changes"""

    domain: str = ""
    """What it is for"""

    licence: str = ""
    """SPDX expression"""

    verdict: str = ""
    """Result on its held-out text in words"""

    armed_by_auto: bool = False
    """Whether it is armed where no expert is named"""

    signer: str | None = None
    """Public key that signed it; null: not signed"""

    metrics: dict[str, Loss] = {}
    """Losses by the name of a held-out text"""


class ExpertList(JsonShape):
    """`deepseek expert list --json`"""

    folder: str
    """Folder of the trained experts"""

    experts: list[ExpertRow]
    """The experts, by name"""


class ModelRow(JsonShape):
    """One model in the library's home."""

    name: str
    """Name for `--base`"""

    path: str
    """Folder of the model"""

    bytes: int
    """Size of its files"""

    architecture: str
    """Its class, as config.json states it; empty: unknown"""

    licence: str
    """SPDX expression; empty: not stated"""

    experts: list[str]
    """Trained experts that need it"""


class ModelList(JsonShape):
    """`deepseek models list --json`"""

    folder: str
    """Folder of the models"""

    models: list[ModelRow]
    """The models, by name"""


class RunRow(JsonShape):
    """One run."""

    name: str
    """Name of the run"""

    path: str
    """Its folder"""

    state: str
    """`finished`, `unfinished` or `damaged`"""

    figures: dict[str, str | int | float | bool | None] = {}
    """Figures of a finished run: seconds, bytes, nats per token; null: not finite"""

    problem: str | None = None
    """Why a damaged one cannot be read"""


class RunList(JsonShape):
    """`deepseek runs list --json`, and `runs compare --json` of two"""

    runs: list[RunRow]
    """The runs, by name"""


class PreferenceCounts(JsonShape):
    """`deepseek prefs stats --json`"""

    pairs: int
    """Number of pairs"""

    prompts: int
    """Number of distinct prompts"""

    revisions: int
    """Number of changes made to pairs"""

    splits: dict[str, int]
    """Pairs by split"""

    sources: dict[str, int]
    """Pairs by source"""

    labels: dict[str, int]
    """Pairs by label"""

    agreement: dict[str, float]
    """Share of its scored pairs in which a judge scores the chosen answer higher"""


class PreferenceRow(JsonShape):
    """One pair."""

    id: int
    """Its number in the database"""

    source: str
    """Where it is from"""

    labels: list[str]
    """Topics and flags"""

    prompt: list[dict[str, Any]]
    """The conversation before the answers"""

    chosen: str
    """The better answer"""

    rejected: str
    """The worse answer"""


class PreferenceList(JsonShape):
    """`deepseek prefs search --json`"""

    pairs: list[PreferenceRow]
    """The pairs, newest first"""


class EvaluationRow(JsonShape):
    """Losses on one text, in nats per token."""

    text: str
    """Name of the text"""

    tokens: int
    """Predicted tokens"""

    base: float
    """Loss of the base"""

    plugged: float
    """Loss with the plugged experts"""

    alone: float | None
    """Loss with the text's own expert forced on; null: it has none"""


class PassRates(JsonShape):
    """HumanEval, pass@1."""

    problems: int
    """Number of problems"""

    base: float
    """Share that the base solves"""

    plugged: float
    """Share that it solves with the plugged experts"""


class Evaluation(JsonShape):
    """`deepseek eval --json`"""

    base: str
    """Name of the base"""

    experts: list[str]
    """The plugged experts"""

    texts: list[EvaluationRow]
    """The texts"""

    human_eval: PassRates | None = None
    """With `--human-eval`"""


class ScaleRow(JsonShape):
    """Needs of one training step on a number of devices."""

    gpus: int
    """Number of devices"""

    memory: float
    """Bytes per device"""

    fits: bool
    """Whether they are at most the device's memory"""

    gathered: float
    """Bytes that each device receives for weights"""

    reduced: float
    """Bytes that each device sends for gradients"""

    seconds: float
    """Duration of the step"""

    efficiency: float
    """Throughput per device, relative to one that never waits for communication"""


class TrainingEstimate(JsonShape):
    """`deepseek plan --json`"""

    model: str
    """Preset, name or folder, or file of the configuration"""

    parameters: int
    """Total parameters"""

    active: int
    """Parameters that a token uses"""

    gpus: int
    """Number of devices"""

    tokens: float
    """Training tokens"""

    days: float
    """Duration of the run"""

    memory: dict[str, float]
    """Bytes per device by part"""

    fits: bool
    """Whether a device has so much"""

    scaling: list[ScaleRow]
    """Needs for growing numbers of devices"""


class InferenceEstimate(JsonShape):
    """`deepseek plan --inference --json`"""

    model: str
    """Preset, name or folder, or file of the configuration"""

    fields: dict[str, Any]
    """Fields of `ModelConfig` that the profile sets"""

    parameters: int
    """Total parameters"""

    active: int
    """Parameters that a token uses"""

    gpus: int
    """Devices that share the model"""

    length: int
    """Tokens per sequence"""

    batch: int
    """Sequences at a time"""

    weight_bits: int
    """Bits per weight of the layers"""

    memory: dict[str, float]
    """Bytes per device by part"""

    fits: bool
    """Whether a device has so much"""

    prefill_seconds: float
    """Seconds until the first token of a sequence"""

    token_seconds: float
    """Seconds per decoding step"""


class BenchmarkRow(JsonShape):
    """One benchmark."""

    name: str
    """Name for `deepseek bench`"""

    about: str
    """What it measures"""


class BenchmarkList(JsonShape):
    """`deepseek bench --json`"""

    benchmarks: list[BenchmarkRow]
    """The benchmarks, by name"""


SHAPES: dict[str, type[BaseModel]] = {
    "expert list": ExpertList,
    "models list": ModelList,
    "runs list": RunList,
    "runs show": RunRow,
    "runs compare": RunList,
    "prefs stats": PreferenceCounts,
    "prefs search": PreferenceList,
    "eval": Evaluation,
    "bench": BenchmarkList,
    "claims": ClaimTable,
    "claims show": ClaimRow,
    "plan": TrainingEstimate,
    "plan --inference": InferenceEstimate,
}
"""Commands with `--json`, and what they print with it."""
