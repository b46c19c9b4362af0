"""The manifest of a LoRA adapter: low-rank changes to linear layers (arXiv:2106.09685).

An adapter is packed, signed, plugged and armed as an expert module is. It has no gate: where it is
armed, it changes every token.
"""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints

from deepseek.packs.manifest import PackManifest, Sha256, Size, Strict, TensorSpec, Text

MAX_RANK = 1024
"""Highest rank that is accepted; that of published adapters is 4 to 256."""
MAX_SITES = 2048
"""Maximum linear layers of an adapter, so that the header stays below its limit."""

SiteName = Annotated[
    str, StringConstraints(max_length=200, pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*$")
]

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def _sites(value: tuple["LoraSite", ...]) -> tuple["LoraSite", ...]:
    names = [site.name for site in value]
    if names != sorted(set(names)):
        raise ValueError("sites must be sorted by name, without repetition")
    return value


class LoraSite(Strict):
    """A linear layer and its low-rank change: y + scaling * B A x.

    Attributes:
        name: name of the layer in the model that the adapter was trained on.
        inputs, outputs: features of the layer; A is `[rank, inputs]`, B is `[outputs, rank]`.
        rank: rank of the change.
        scaling: factor on the change.
    """

    name: SiteName
    inputs: Size
    outputs: Size
    rank: Annotated[int, Field(ge=1, le=MAX_RANK)]
    scaling: Annotated[float, Field(ge=-1e4, le=1e4)]


class LoraManifest(PackManifest):
    """The manifest of a LoRA adapter.

    Attributes:
        kind: tells the packs of adapters from those of expert modules, which have no such field.
        sites: the changed linear layers, sorted by name.
        auto: whether "auto" arms the adapter; otherwise it is armed only if it is named.
        source: SHA-256 of the imported file of weights; "": not imported.
        trained_on: name of the base model that the imported adapter states.
    """

    kind: Literal["lora"] = "lora"
    sites: Annotated[
        tuple[LoraSite, ...], Field(min_length=1, max_length=MAX_SITES), AfterValidator(_sites)
    ]
    auto: bool = False
    source: Sha256 | Literal[""] = ""
    trained_on: Text = ""

    @property
    def layers(self) -> tuple[int, ...]:
        """Base layers that the adapter changes, ascending."""
        matches = (_LAYER.search(site.name) for site in self.sites)
        return tuple(sorted({int(match[1]) for match in matches if match}))

    @property
    def rank(self) -> int:
        """Highest rank of a change."""
        return max(site.rank for site in self.sites)

    @property
    def helps(self) -> bool:
        """Whether "auto" arms the adapter."""
        return self.auto

    def tensors(self) -> dict[str, TensorSpec]:
        """Return dtype and shape of exactly the tensors that a pack with this manifest holds."""
        specs: dict[str, TensorSpec] = {}
        for site in self.sites:
            specs[f"{site.name}.lora_A"] = TensorSpec(self.dtype, (site.rank, site.inputs))
            specs[f"{site.name}.lora_B"] = TensorSpec(self.dtype, (site.outputs, site.rank))
        return specs
