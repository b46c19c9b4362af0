"""What an expert pack says about itself: a strict schema, and the exact set of tensors that follows
from it.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from deepseek.checkpoint.fingerprint import fingerprint
from deepseek.checkpoint.store import canonical_json, read_json
from deepseek.errors import CheckpointError, PackError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOMENTS = 10
"""Rows that say what a domain looks like at a layer: mean, variances, and 8 factors of the
covariance. More tell domains apart no better (docs/log/gates.md, 2026-11-25)."""
HELD_OUT = "held-out"
"""Name of the metric that tells better from worse: the loss on text that training neither saw nor
was stopped by.
"""
LEAST_GAIN = 0.0005
"""Share by which a loss must fall to count as lower: what would be written as 0.0 % is no gain."""
RESERVED_NAMES = frozenset(
    {"all", "auto", "none"}
)  # words that `--experts` and `arm` give a meaning of their own


class TensorSpec(NamedTuple):
    """Dtype and shape of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def _name(value: str) -> str:
    if value in RESERVED_NAMES:
        raise ValueError(f"{value!r} is a reserved word")
    return value


def _layers(value: tuple[int, ...]) -> tuple[int, ...]:
    if list(value) != sorted(set(value)):
        raise ValueError("layers must increase, without repetition")
    return value


def _licence(value: str) -> str:
    try:
        return canonicalize_license_expression(value)
    except InvalidLicenseExpression:
        raise ValueError(
            "not an SPDX licence expression (a private licence is written LicenseRef-Name)"
        ) from None


Name = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"), AfterValidator(_name)
]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[
    str, StringConstraints(max_length=200, pattern=r"^\P{C}*$")
]  # \P{C}: no control characters
Layer = Annotated[int, Field(ge=0, lt=1024)]
Size = Annotated[int, Field(ge=1, le=1 << 17)]
Rate = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class BaseDescription(_Strict):
    """The base model that an expert belongs to: what `checkpoint.fingerprint` gives, and its
    shape.
    """

    name: Text = ""
    weights: Sha256
    tokenizer: Sha256 | Literal[""]
    hidden_size: Size
    num_layers: Annotated[int, Field(ge=1, le=1024)]

    @staticmethod
    def of(folder: Path, name: str) -> "BaseDescription":
        """Describe the model in `folder`, known as `name`; raise `CheckpointError` if its config
        says too little.
        """
        config = read_json(folder / "config.json")
        mark = fingerprint(folder)
        try:
            size = config["hidden_size"]
            layers = config["num_hidden_layers"]
        except (KeyError, TypeError):
            raise CheckpointError(
                f"{folder}/config.json names no hidden_size and num_hidden_layers."
            ) from None
        return BaseDescription(
            name=name,
            weights=mark.weights,
            tokenizer=mark.tokenizer,
            hidden_size=size,
            num_layers=layers,
        )


class Metric(_Strict):
    """A held-out figure (a loss in nats per token, unless its name says otherwise) without and with
    the expert.
    """

    before: float
    after: float

    @property
    def gain(self) -> float:
        """Share by which the figure is lower with the expert, negative where it is higher."""
        return 1 - self.after / self.before if self.before else 0.0

    @property
    def verdict(self) -> str:
        """What to tell a person: better or worse, and by how much."""
        if abs(self.gain) < LEAST_GAIN:
            return "no better than the base"
        return f"{'better' if self.gain > 0 else 'worse'} by {abs(self.gain):.1%}".replace(
            "%", " %"
        )


class GateSettings(_Strict):
    """How the gates decide, and how they were calibrated (see docs/concepts/experts.md).

    half_life: tokens after which a past score counts half in the running mean of scores.
    alpha: share of public tokens that the threshold lets fire by design.
    ridge, rho: regularisation and weight of the public text in the closed form.
    tokens: tokens of the own domain that the statistics were taken from.
    false_positives, recall: shares of firing tokens measured on held-out public and own text.
    relevance_threshold, relevance_offset: see `model/experts/relevance.py`, in nats.
    admitted_chats: share of everyday conversations, held out, that admit the expert where it is the
    only one plugged. admitted_own: share of pieces of held-out own text that do not rule it out.
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


class Signature(_Strict):
    """Ed25519 (RFC 8032) public key and signature, in hexadecimal."""

    public_key: Sha256
    value: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]


class Manifest(_Strict):
    """What is in a pack, where it comes from and what it fits.

    width: width F of the feed-forward network at each of `layers`.
    data: SHA-256 digests of the training data. licence: SPDX expression. commit: of the repository
    learned from. vocabulary: length of the table of relevance; 0: the pack has none.
    metrics: name of a held-out text -> loss before and after. digest, signature: see
    `packs/pack.py`.
    """

    format: Literal[2] = 2
    name: Name
    domain: Text = ""
    base: BaseDescription
    layers: Annotated[tuple[Layer, ...], Field(min_length=1), AfterValidator(_layers)]
    width: Size
    dtype: Literal["float32", "bfloat16", "float16"]
    gate: GateSettings = GateSettings()
    data: tuple[Sha256, ...] = ()
    licence: Annotated[str, StringConstraints(max_length=200), AfterValidator(_licence)]
    commit: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}([0-9a-f]{24})?$")] | None = (
        None
    )
    vocabulary: Annotated[int, Field(ge=0, le=1 << 21)] = 0
    metrics: dict[Text, Metric] = {}
    profile: Text | None = None
    digest: Sha256 | Literal[""] = ""
    signature: Signature | None = None

    @property
    def verdict(self) -> str:
        """What the held-out loss says of the expert, in words."""
        metric = self.metrics.get(HELD_OUT)
        return metric.verdict if metric else "not measured"

    @property
    def helps(self) -> bool:
        """Whether to arm the expert where it is not named: not if it was measured to be no better
        than the base.
        """
        metric = self.metrics.get(HELD_OUT)
        return metric is None or metric.gain >= LEAST_GAIN

    def tensors(self) -> dict[str, TensorSpec]:
        """Return the tensors that a pack with this manifest holds, no more and no fewer."""
        dtype = DTYPES[self.dtype]
        hidden_size = self.base.hidden_size
        specs: dict[str, TensorSpec] = {}
        for layer in self.layers:
            specs[f"ffn.{layer}.gate_up_proj"] = TensorSpec(dtype, (2 * self.width, hidden_size))
            specs[f"ffn.{layer}.down_proj"] = TensorSpec(dtype, (hidden_size, self.width))
            specs[f"gate.{layer}"] = TensorSpec(torch.float32, (hidden_size + 1,))
            specs[f"moments.{layer}"] = TensorSpec(torch.float32, (MOMENTS, hidden_size))
        if self.vocabulary:
            specs["relevance"] = TensorSpec(torch.float16, (self.vocabulary,))
        return specs

    def signed_part(self) -> bytes:
        """Return the canonical JSON of everything but digest and signature."""
        return canonical_json(self.model_dump(mode="json", exclude={"digest", "signature"}))


def parse_manifest(text: str) -> Manifest:
    """Return the manifest written in `text`; raises `PackError` with one sentence about the first
    mistake.
    """
    fields = parse_json(
        text
    )  # it also refuses repeated keys and other liberties that the next line would let pass
    if isinstance(fields, dict) and fields.get("format") == 1:
        raise PackError(
            "it is of format 1, whose gates do not know conversations; train the expert again"
        )
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise PackError(f"its manifest is invalid, {explain(error)}") from None
    if manifest.layers[-1] >= manifest.base.num_layers:
        raise PackError(
            f"layer {manifest.layers[-1]} does not exist in a base of {manifest.base.num_layers} layers"
        )
    return manifest


def explain(error: ValidationError) -> str:
    """Return the first mistake of a pydantic error in one printable line."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "manifest"
    return printable(f"{where}: {first['msg'].removeprefix('Value error, ')}")


def printable(text: object, limit: int = 160) -> str:
    """Return `text` in ASCII without control characters, cut to `limit`, so that no file can write
    to a terminal.
    """
    plain = re.sub(r"[^ -~]", lambda match: ascii(match[0])[1:-1], str(text))
    return plain if len(plain) <= limit else f"{plain[:limit]}..."


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text; refuses repeated keys, NaN, excessive nesting and
    numbers.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise PackError("its JSON is nested too deeply") from None
    except ValueError as error:
        raise PackError(f"its JSON is malformed, {printable(error)}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key is repeated")
    return table


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
