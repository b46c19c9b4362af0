"""The manifest of an expert pack: a strict schema that determines the tensors of the pack.

`packs/lora.py` has the manifest of the other kind of pack, a LoRA adapter.
"""

import json
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from deepseek.checkpoint.fingerprint import fingerprint
from deepseek.checkpoint.licence import read_licence
from deepseek.checkpoint.store import canonical_json, read_object
from deepseek.errors import CheckpointError, PackError
from deepseek.packs.names import NAME, valid_licence, valid_name

DtypeName = Literal["float32", "bfloat16", "float16"]
MOMENTS = 10
"""Rows of moments per layer: mean, variances, and 8 factors of the covariance of a domain. More
factors do not separate domains better (docs/log/gates.md, 2026-11-25).
"""
PAIR_SLOTS = (1 << 17) - 1
"""Entries of a table of pairs, a prime number. With half as many, where pairs share more entries, 2
to 4 of 100 passages fewer are recognised (docs/log/gates.md, 2026-11-28).
"""
HELD_OUT = "held-out"
"""Name of the metric that decides whether an expert helps: the loss on a held-out set that neither
training nor early stopping used.
"""
LEAST_GAIN = 0.0005
"""Smallest relative gain that counts: a smaller one would be displayed as 0.0 %."""
ADDED_BASE_FIELDS = ("attached", "licence")
"""Fields of a base's description that the first packs of this format do not have."""
ADDED_FIELDS = ("pairs",)
"""Fields of a manifest that the first packs of this format do not have."""


class TensorSpec(NamedTuple):
    """Dtype, by name, and shape of one tensor."""

    dtype: DtypeName
    shape: tuple[int, ...]


def _layers(value: tuple[int, ...]) -> tuple[int, ...]:
    if list(value) != sorted(set(value)):
        raise ValueError("layers must increase, without repetition")
    return value


Name = Annotated[str, StringConstraints(pattern=rf"^{NAME.pattern}$"), AfterValidator(valid_name)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# \P{C}: no control characters.
Text = Annotated[str, StringConstraints(max_length=200, pattern=r"^\P{C}*$")]
Layer = Annotated[int, Field(ge=0, lt=1024)]
Size = Annotated[int, Field(ge=1, le=1 << 17)]
Rate = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class BaseDescription(Strict):
    """Identity of the base model that an expert belongs to.

    Attributes:
        name: name of the model, for messages only.
        weights, tokenizer: SHA-256 digests (see `checkpoint.fingerprint`).
        hidden_size: width D of the residual stream.
        num_layers: number of layers.
        attached: class of a stock model, and names of the modules that experts stand beside in it;
            "" for our own model, or if only the folder is known.
        licence: SPDX expression of the base's licence, whose restrictions can bind the expert too;
            "" if its folder states none.
    """

    name: Text = ""
    weights: Sha256
    tokenizer: Sha256 | Literal[""]
    hidden_size: Size
    num_layers: Annotated[int, Field(ge=1, le=1024)]
    attached: Text = ""
    licence: Text = ""

    @staticmethod
    def of(folder: Path, name: str) -> "BaseDescription":
        """Return the description of a model folder.

        Args:
            folder: folder of the model.
            name: name of the model.

        Raises:
            CheckpointError: a file is missing or malformed, or the config lacks the model's shape.
        """
        size, layers = shape_of(folder)
        digests = fingerprint(folder)
        try:
            return BaseDescription(
                name="".join(letter for letter in name if letter.isprintable())[:200],
                weights=digests.weights,
                tokenizer=digests.tokenizer,
                hidden_size=size,
                num_layers=layers,
                licence=read_licence(folder).name[:200],
            )
        except ValueError:
            raise _no_shape(folder) from None


def shape_of(folder: Path) -> tuple[int, int]:
    """Return the width and the number of layers that a model folder's `config.json` states.

    Raises:
        CheckpointError: it is missing or malformed, or lacks them.
    """
    config = read_object(folder / "config.json")
    if "hidden_size" in config and "num_hidden_layers" in config:
        return config["hidden_size"], config["num_hidden_layers"]
    from transformers import AutoConfig

    try:
        # Some families have other names for them, or nest the language model's config.
        model_config = AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        model_config = model_config.get_text_config(decoder=True)
        return model_config.hidden_size, model_config.num_hidden_layers
    except Exception:  # each family's config has errors of its own, such as of division
        raise _no_shape(folder) from None


def _no_shape(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"{folder}/config.json names no hidden_size and num_hidden_layers of a model."
    )


class Metric(Strict):
    """A metric on a held-out set without and with the expert.

    It is a loss in nats per token unless its name says otherwise.

    Attributes:
        before: value of the base.
        after: value of the base with the expert.
    """

    before: float
    after: float

    @property
    def gain(self) -> float:
        """Relative reduction of the metric by the expert; negative if the metric is higher."""
        return 1 - self.after / self.before if self.before else 0.0

    @property
    def verdict(self) -> str:
        """The result in words: better or worse, and by how many per cent."""
        if abs(self.gain) < LEAST_GAIN:
            return "no better than the base"
        return f"{'better' if self.gain > 0 else 'worse'} by {abs(self.gain):.1%}".replace(
            "%", " %"
        )


class GateSettings(Strict):
    """Calibration of the gates and of relevance (see docs/concepts/experts.md).

    Attributes:
        half_life: half-life of past scores in the running mean, in tokens.
        alpha: target false-positive rate of the threshold: share of public tokens that fire.
        ridge, rho: regularisation, and weight of the public text, in the closed form.
        tokens: number of tokens of the domain that the statistics were computed from.
        false_positives: measured share of firing tokens on held-out public text.
        recall: measured share of firing tokens on held-out text of the domain.
        relevance_threshold, relevance_offset: see `model/experts/relevance.py`, in nats.
        admitted_chats: share of held-out everyday conversations that admit the expert if it is the
            only one plugged.
        admitted_own: share of pieces of held-out text of the domain that admit the expert.
    """

    half_life: Annotated[float, Field(gt=0, le=1e6)] = 64.0
    alpha: Rate | None = None
    ridge: Annotated[float, Field(ge=0)] | None = None
    rho: Annotated[float, Field(ge=0)] | None = None
    tokens: Annotated[int, Field(ge=0)] | None = None
    false_positives: Rate | None = None
    recall: Rate | None = None
    relevance_threshold: Annotated[float, Field(ge=-1e4, le=1e4)] = 0.0
    relevance_offset: Annotated[float, Field(ge=-1e4, le=1e4)] = 0.0
    admitted_chats: Rate | None = None
    admitted_own: Rate | None = None


class Signature(Strict):
    """An Ed25519 public key and signature (RFC 8032), in hexadecimal."""

    public_key: Sha256
    value: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]


class PackManifest(Strict, ABC):
    """Fields of every kind of pack: its origin, its base model and its licence.

    Attributes:
        format: version of the pack format.
        name: name of the expert.
        domain: short description of its domain.
        base: the base model that the expert belongs to.
        dtype: dtype of the weights.
        data: SHA-256 digests of the training data.
        licence: SPDX expression.
        metrics: name of a held-out text -> loss before and after.
        digest, signature: see `packs/pack.py`.
    """

    format: Literal[2] = 2
    name: Name
    domain: Text = ""
    base: BaseDescription
    dtype: DtypeName
    data: tuple[Sha256, ...] = ()
    licence: Annotated[str, StringConstraints(max_length=200), AfterValidator(valid_licence)]
    metrics: dict[Text, Metric] = {}
    digest: Sha256 | Literal[""] = ""
    signature: Signature | None = None

    @property
    def verdict(self) -> str:
        """The result on the held-out set in words."""
        metric = self.metrics.get(HELD_OUT)
        return metric.verdict if metric else "not measured"

    @property
    @abstractmethod
    def helps(self) -> bool:
        """Whether "auto" arms the expert."""

    @abstractmethod
    def tensors(self) -> dict[str, TensorSpec]:
        """Return dtype and shape of exactly the tensors that a pack with this manifest holds."""

    def signed_part(self) -> bytes:
        """Return the canonical JSON of the manifest without digest and signature.

        Fields that packs of earlier versions lack are included only if they are not empty, so that
        the digests of those packs stay valid.
        """
        fields = self.model_dump(mode="json", exclude={"digest", "signature"})
        for name in ADDED_BASE_FIELDS:
            if not fields["base"][name]:
                del fields["base"][name]
        for name in ADDED_FIELDS:
            if not fields.get(name):
                fields.pop(name, None)
        return canonical_json(fields)


class Manifest(PackManifest):
    """The manifest of an expert module: feed-forward networks beside those of some layers.

    Attributes:
        layers: base layers that have an expert layer, ascending.
        width: width F of the feed-forward network at each layer.
        gate: calibration of the gates.
        commit: commit of the repository that the expert was trained on.
        vocabulary: length of the relevance table; 0: the pack has none.
        pairs: whether it has one of pairs of tokens too, of `PAIR_SLOTS` entries.
        profile: free text; this version neither writes nor reads it.
    """

    layers: Annotated[tuple[Layer, ...], Field(min_length=1), AfterValidator(_layers)]
    width: Size
    gate: GateSettings = GateSettings()
    commit: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}([0-9a-f]{24})?$")] | None = (
        None
    )
    vocabulary: Annotated[int, Field(ge=0, le=1 << 21)] = 0
    pairs: bool = False
    profile: Text | None = None

    @property
    def helps(self) -> bool:
        """Whether "auto" arms the expert: unless it was measured to be no better than the base."""
        metric = self.metrics.get(HELD_OUT)
        return metric is None or metric.gain >= LEAST_GAIN

    def tensors(self) -> dict[str, TensorSpec]:
        """Return dtype and shape of exactly the tensors that a pack with this manifest holds."""
        dtype = self.dtype
        hidden_size = self.base.hidden_size
        specs: dict[str, TensorSpec] = {}
        for layer in self.layers:
            specs[f"ffn.{layer}.gate_up_proj"] = TensorSpec(dtype, (2 * self.width, hidden_size))
            specs[f"ffn.{layer}.down_proj"] = TensorSpec(dtype, (hidden_size, self.width))
            specs[f"gate.{layer}"] = TensorSpec("float32", (hidden_size + 1,))
            specs[f"moments.{layer}"] = TensorSpec("float32", (MOMENTS, hidden_size))
        if self.vocabulary:
            specs["relevance"] = TensorSpec("float16", (self.vocabulary,))
            if self.pairs:
                specs["pairs"] = TensorSpec("float16", (PAIR_SLOTS,))
        return specs


def explain(error: ValidationError, whole: str = "manifest") -> str:
    """Return the first mistake in a pydantic error as one printable line.

    Args:
        error: the error.
        whole: name of the whole object, for a mistake in no single field; "": it is not named.
    """
    first_error = error.errors(include_url=False, include_input=False)[0]
    location = ".".join(str(part) for part in first_error["loc"]) or whole
    message = first_error["msg"].removeprefix("Value error, ")
    return printable(f"{location}: {message}" if location else message)


def later_format(fields: object, known: int) -> str:
    """Return why a file of a later format is refused; "": it is of none.

    Args:
        fields: the JSON value that states its format.
        known: the format that this version reads.
    """
    stated = fields.get("format") if isinstance(fields, dict) else None
    if isinstance(stated, bool) or not isinstance(stated, int) or stated <= known:
        return ""
    return (
        f"it is of format {printable(stated, 20)} and this version of deepseek reads format "
        f"{known}; install a later version"
    )


def printable(text: object, limit: int = 160) -> str:
    """Return text as printable ASCII, so that a file cannot send escape codes to a terminal.

    Args:
        text: text or object from an untrusted file.
        limit: maximum length in characters.
    """
    beginning = str(text)[: limit + 1]  # no character becomes shorter
    ascii_text = re.sub(r"[^ -~]", lambda match: ascii(match[0])[1:-1], beginning)
    return ascii_text if len(ascii_text) <= limit else f"{ascii_text[:limit]}..."


def parse_json(text: str | bytes) -> Any:
    """Return the value of an untrusted JSON text.

    Raises:
        PackError: the text is malformed, repeats a key, contains NaN or infinity, is nested too
            deeply or has a number that is too long.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_reject_repeated_keys, parse_constant=_reject_constant
        )
    except RecursionError:
        raise PackError("its JSON is nested too deeply") from None
    except ValueError as error:
        raise PackError(f"its JSON is malformed, {printable(error)}") from None


def _reject_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key is repeated")
    return table


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
