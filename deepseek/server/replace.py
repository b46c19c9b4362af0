"""Replace a plugged expert by another pack of its name, armed as it was."""

from contextlib import ExitStack
from pathlib import Path

from deepseek.engine.engine import Engine
from deepseek.model.experts import ExpertInfo, ExpertModule
from deepseek.model.experts.adapter import AdapterModule
from deepseek.packs.lora import LoraManifest
from deepseek.packs.pack import read_pack
from deepseek.server.fleet import Fleet


def plug_in_place(owner: Engine | Fleet, path: Path) -> ExpertInfo:
    """Plug a pack in place of the plugged expert of its name, if there is one; return its details.

    The former one serves until the pack has been read and checked and its module is prepared; if
    the pack is refused, it stays. With `--expert-gib`, weights stay in their file and nothing is
    prepared: the former one is unplugged once the new file has been read and checked, just before
    the new one is plugged. Replicas unplug the former one first, and plug it again if one of them
    refuses the pack.

    It arms temporarily, so that no other change may run meanwhile (see `Service.change`).

    Args:
        owner: the engine, or all replicas.
        path: the pack file.

    Raises:
        PackError: the pack cannot be read, or does not fit the base model.
        ApiError: not all replicas confirmed (503); nothing has changed.
    """
    if isinstance(owner, Fleet):
        return owner.plug(path, in_place=True)
    experts = owner.model.experts
    manifest = read_pack(path, experts.policy, experts.base).manifest
    with ExitStack() as stack:

        def unplug_former() -> None:
            plugged = experts.list()
            if manifest.name in {info.name for info in plugged}:
                weights = {info.name: info.weight for info in plugged if info.armed}
                # The end of this context arms all experts as they are now, the new one too.
                stack.enter_context(experts.arming(weights))
                experts.unplug(manifest.name)

        def prepare(module: ExpertModule | AdapterModule) -> None:
            owner.runner.prepare(module)
            unplug_former()

        if experts.weight_cache.limit is not None and not isinstance(manifest, LoraManifest):
            unplug_former()  # weights that stay in the file are not prepared
        experts.plug(path, prepare)
    return next(info for info in experts.list() if info.name == manifest.name)
