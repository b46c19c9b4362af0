"""The kinds of packs, and the parser that tells them apart."""

from pydantic import ValidationError

from deepseek.errors import PackError
from deepseek.packs.container import Header
from deepseek.packs.lora import LoraManifest
from deepseek.packs.manifest import Manifest, explain, later_format, parse_json

KEY = "deepseek.expert"
"""Key of the manifest in the metadata of the file."""

FORMAT = 2
"""Version of the pack format that is read and written (`PackManifest.format`)."""

AnyManifest = Manifest | LoraManifest
"""Manifest of an expert module, or of an adapter."""


def manifest_in(header: Header) -> AnyManifest:
    """Return the manifest in the header of a pack.

    Raises:
        PackError: there is none, or it is invalid.
    """
    if header.metadata.keys() != {KEY}:
        raise PackError("its header holds no expert manifest; it is not an expert pack")
    return parse_manifest(header.metadata[KEY])


def parse_manifest(text: str) -> AnyManifest:
    """Return the manifest in a JSON text.

    Raises:
        PackError: the manifest is invalid; the message names the first mistake.
    """
    # `parse_json` also rejects repeated keys and other things that pydantic's parser accepts.
    fields = parse_json(text)
    if isinstance(fields, dict) and fields.get("format") == 1:
        raise PackError(
            "it is of format 1, whose gates do not know conversations; train the expert again"
        )
    newer_format = later_format(fields, FORMAT)
    if newer_format:
        raise PackError(newer_format)
    is_adapter = isinstance(fields, dict) and fields.get("kind") == "lora"
    kind: type[AnyManifest] = LoraManifest if is_adapter else Manifest
    try:
        manifest = kind.model_validate_json(text)
    except ValidationError as error:
        is_unknown = error.errors(include_url=False)[0]["type"] == "extra_forbidden"
        mend = "; if a later version of deepseek wrote it, install that" if is_unknown else ""
        raise PackError(f"its manifest is invalid, {explain(error)}{mend}") from None
    last_layer = max(manifest.layers, default=0)
    if last_layer >= manifest.base.num_layers:
        raise PackError(
            f"layer {last_layer} does not exist in a base of {manifest.base.num_layers} layers"
        )
    return manifest
