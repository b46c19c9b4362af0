"""The base model of named experts, for commands whose `--base` is not given."""

from pathlib import Path
from typing import TYPE_CHECKING

from deepseek.cli.options import weights
from deepseek.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from deepseek.packs.kinds import AnyManifest


def base_of(experts: str) -> str | None:
    """Return the base that the experts of the option `--experts` were made for, as `--base` takes
    it.

    Args:
        experts: names or pack files, comma-separated, perhaps with weights.

    Returns:
        The base; None if no expert is named: "all", "none" or nothing.

    Raises:
        ConfigError: the experts were made for different bases, or their base is not on this
            machine.
        PackError: there is no such expert, or its pack is damaged.
    """
    from deepseek.packs.library import find_pack
    from deepseek.packs.listing import read_manifest

    expert_names = [] if experts.strip() in ("all", "none") else weights(experts)
    manifests = [read_manifest(find_pack(name)) for name in expert_names]
    if not manifests:
        return None
    first = manifests[0]
    for other in manifests[1:]:
        if other.base.weights != first.base.weights:
            raise ConfigError(
                f"{first.name} was made for the base {first.base.name or 'unnamed'} and "
                f"{other.name} for {other.base.name or 'unnamed'}; name experts of one base."
            )
    base = _stored_base(first)
    if base is None:
        raise ConfigError(
            f"{first.name} was made for the base {first.base.name or 'unnamed'}, which is not on "
            "this machine under that name; give its folder or hub id with --base."
        )
    return base


def _stored_base(manifest: "AnyManifest") -> str | None:
    """Return the base of a pack if it can be loaded by name, None otherwise.

    A pack has the name of its base only; the run that made the pack knows its folder or hub id.
    """
    from deepseek.checkpoint.hub import HUB_ID, KNOWN, home
    from deepseek.checkpoint.store import read_object

    name = manifest.base.name
    if name in KNOWN or (name and (home() / "models" / name).is_dir()):
        return name
    try:
        request = read_object(home() / "runs" / manifest.name / "request.json")
    except CheckpointError:  # the pack was made elsewhere, or its run is gone
        return None
    base = str(request.get("base", ""))
    return base if base and (Path(base).exists() or HUB_ID.fullmatch(base)) else None
