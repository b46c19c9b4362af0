"""Which packs this installation accepts: their base, their licence and their signer."""

import re
from dataclasses import dataclass
from typing import Literal

from deepseek.errors import PackError
from deepseek.packs.manifest import BaseDescription, Manifest
from deepseek.packs.signature import is_valid, trusted_keys

SignaturePolicy = Literal["any", "signed", "trusted"]


@dataclass(frozen=True)
class PackPolicy:
    """Rules for packs. A signature that is present must be valid under every rule.

    signature: "any" pack, only "signed" ones, or only those signed with a "trusted" key.
    allow: licences (SPDX identifiers) that are accepted; None accepts all that `deny` does not
    name. trusted: public keys in hexadecimal; None reads those in the trust folder.
    max_bytes: size of the largest file that is opened.
    """

    signature: SignaturePolicy = "any"
    allow: frozenset[str] | None = None
    deny: frozenset[str] = frozenset()
    trusted: frozenset[str] | None = None
    max_bytes: int = 4 << 30


def check_licence(manifest: Manifest, policy: PackPolicy) -> None:
    """Raise `PackError` if a licence in the manifest's expression is not accepted.

    Every identifier counts, also the alternatives of an OR: a policy should not depend on which one
    a reader picks.
    """
    words = re.split(r"[\s()]+", manifest.licence)
    for licence in [word for word in words if word and word not in ("AND", "OR", "WITH")]:
        if licence in policy.deny or (policy.allow is not None and licence not in policy.allow):
            raise PackError(
                f"its licence {licence} is not accepted here; change the licence policy to use it"
            )


def check_signature(manifest: Manifest, policy: PackPolicy) -> None:
    """Raise `PackError` if the signature is wrong, or missing or unknown where the policy asks for
    it.
    """
    signature = manifest.signature
    if signature is None:
        if policy.signature != "any":
            raise PackError("it is not signed and the policy asks for a signature")
        return
    if not is_valid(signature, manifest.digest):
        raise PackError("its signature does not match its content; it was changed after signing")
    trusted = (
        trusted_keys()
        if policy.signature == "trusted" and policy.trusted is None
        else policy.trusted
    )
    if policy.signature == "trusted" and signature.public_key not in (trusted or ()):
        raise PackError(
            f"its signer {signature.public_key[:16]} is not trusted; put their .pub into the trust folder"
        )


def check_base(manifest: Manifest, base: BaseDescription) -> None:
    """Raise `PackError` unless the pack was made for exactly this base model and tokenizer."""
    for field in ("weights", "tokenizer", "hidden_size", "num_layers"):
        made_for, found = (str(getattr(one, field))[:12] or "none" for one in (manifest.base, base))
        if getattr(manifest.base, field) != getattr(base, field):
            raise PackError(
                f"it was made for another base ({manifest.base.name or 'unnamed'}), whose {field} is {made_for} where "
                f"this model's is {found}; load that base or train the expert on this one"
            )
