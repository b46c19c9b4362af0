"""Rules by which an installation accepts packs: base model, licence and signer."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from deepseek import checks
from deepseek.errors import PackError
from deepseek.packs.manifest import BaseDescription, PackManifest
from deepseek.packs.signature import is_valid, trusted_keys

SignaturePolicy = Literal["any", "signed", "trusted"]


@dataclass(frozen=True)
class PackPolicy:
    """Rules by which packs are accepted. A signature that is present must always be valid.

    Attributes:
        signature: accept "any" pack, only "signed" ones, or only those with a "trusted" signer.
        allow: SPDX identifiers of accepted licences, in any case; None: all that are not in `deny`.
        deny: SPDX identifiers of refused licences, in any case.
        trusted: trusted public keys in hexadecimal; None: the keys in the trust folder.
        max_bytes: size of the largest pack file to open, in bytes (default 4 GiB).
    """

    signature: SignaturePolicy = "any"
    allow: frozenset[str] | None = None
    deny: frozenset[str] = frozenset()
    trusted: frozenset[str] | None = None
    max_bytes: int = 4 << 30

    def __post_init__(self) -> None:
        checks.choice("signature", self.signature, get_args(SignaturePolicy))
        checks.whole("max_bytes", self.max_bytes, least=1)
        for name in ("allow", "deny", "trusted"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, frozenset(checks.texts(name, value)))


def check_licence(manifest: PackManifest, policy: PackPolicy) -> None:
    """Raise `PackError` if a licence of the pack or of its base model is not accepted.

    Every identifier in the SPDX expressions must be accepted, including the alternatives of an OR,
    so that the result does not depend on which alternative a user picks.
    """
    words = re.split(r"[\s()]+", f"{manifest.licence} {manifest.base.licence}")
    # SPDX identifiers are case-insensitive, and the base's is spelled as on its model card.
    denied_names = {name.lower() for name in policy.deny}
    allowed_names = None if policy.allow is None else {name.lower() for name in policy.allow}
    for licence in words:
        name = licence.lower()
        if name in ("", "and", "or", "with"):
            continue
        # "+" offers the version or a later one, and is judged as the version.
        names = {name, name.removesuffix("+")}
        if names & denied_names or (allowed_names is not None and not names & allowed_names):
            raise PackError(
                f"its licence {licence} is not accepted here; change the licence policy to use it"
            )


def check_signature(manifest: PackManifest, policy: PackPolicy) -> None:
    """Raise `PackError` if the signature is invalid, or not sufficient for the policy."""
    signature = manifest.signature
    if signature is None:
        if policy.signature != "any":
            raise PackError("it is not signed and the policy asks for a signature")
        return
    if not is_valid(signature, manifest.digest):
        raise PackError("its signature does not match its content; it was changed after signing")
    trusted_signers = (
        trusted_keys()
        if policy.signature == "trusted" and policy.trusted is None
        else policy.trusted
    )
    if policy.signature == "trusted" and signature.public_key not in (trusted_signers or ()):
        raise PackError(
            f"its signer {signature.public_key[:16]} is not trusted; put their .pub into the trust "
            "folder"
        )


def check_base(manifest: PackManifest, base: BaseDescription) -> None:
    """Raise `PackError` unless the pack was made for exactly this base model and tokenizer."""
    fields = ["weights", "tokenizer", "hidden_size", "num_layers"]
    if manifest.base.attached and base.attached:
        fields.append("attached")
    for field in fields:
        expected_value, actual_value = (
            str(getattr(description, field))[:12] or "none" for description in (manifest.base, base)
        )
        if getattr(manifest.base, field) != getattr(base, field):
            raise PackError(
                f"it was made for another base ({manifest.base.name or 'unnamed'}): its {field} "
                f"{expected_value}, this model's {actual_value}; load that base or train the "
                "expert on this one"
            )
