"""`model.experts`: plug, unplug and arm expert modules on a live model."""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deepseek.errors import ConfigError, PackError
from deepseek.model.experts.armed import ArmedExperts, Roster, Trace
from deepseek.model.experts.module import ExpertModule
from deepseek.model.experts.state import AUTO, ExpertInfo, Plugged, PlugState, roster_of
from deepseek.packs.manifest import BaseDescription, Manifest
from deepseek.packs.pack import ExpertPack, check_pack, read_pack
from deepseek.packs.policy import PackPolicy


class ExpertSet:
    """The expert modules plugged into a model. It is no `nn.Module`: the model's own tensors never
    include them.

    Plugging is safe while other threads generate: a sequence keeps the modules that were armed when
    it started.

    Attributes:
        policy: which packs `plug` accepts.
        base_folder: folder that the model's weights came from, whose fingerprint packs must name.
        max_experts: most modules that one token is given to.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(
            model
        )  # a plain reference would keep a dropped model alive until the next collection
        self._lock = threading.RLock()
        self._state = PlugState()
        self._forced: Roster | None = None
        self._traces: list[Trace] = []
        self._base: BaseDescription | None = None
        self.policy = PackPolicy()
        self.base_folder: Path | None = None
        self.max_experts = 5

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExpertSet":
        model = self._live_model()
        copied = ExpertSet(memo.get(id(model), model))
        copied.policy = self.policy
        copied.base_folder = self.base_folder
        copied._base = self._base
        copied.max_experts = self.max_experts
        copied._state = self._state
        return copied

    @property
    def base(self) -> BaseDescription:
        """What identifies the model: the fingerprint of its folder. It can be set for a model made
        in memory.

        Raises `PackError` if there is neither.
        """
        if self._base is None:
            if self.base_folder is None:
                raise PackError(
                    "This model was not loaded from a folder, so no expert pack can be matched to it; save it with "
                    "save_pretrained and load it with from_pretrained, or set model.experts.base."
                )
            self._base = BaseDescription.of(
                self.base_folder, Path(str(self._live_model().config.name_or_path)).name
            )
        return self._base

    @base.setter
    def base(self, description: BaseDescription) -> None:
        self._base = description

    def plug(
        self,
        source: str | Path | ExpertPack,
        prepare: Callable[[ExpertModule], object] | None = None,
    ) -> ExpertInfo:
        """Check a pack and plug its module in; it takes part from the next sequence on if arming is
        "auto".

        With "auto", a module whose papers say that it is no better than the base is plugged and not
        armed.

        Args:
            prepare: is given the module before it is plugged: for what must be done until it can
                speak.

        Raises `PackError`, with nothing changed, if the pack is damaged, does not belong to this
        base, is refused by `policy`, or has the name of a module that is plugged already.
        """
        if isinstance(source, ExpertPack):
            check_pack(source, self.policy, self.base)
            pack = source
        else:
            pack = read_pack(source, self.policy, self.base)
        model = self._live_model()
        plugged = Plugged(ExpertModule.from_pack(pack, model.dtype, model.device), pack.manifest)
        if prepare is not None:
            prepare(plugged.module)
        with self._lock:
            if pack.manifest.name in self._state.names:
                raise PackError(
                    f"An expert named {pack.manifest.name} is plugged already; unplug it first or train this one under "
                    "another name."
                )
            together = sorted((*self._state.plugged, plugged), key=lambda one: one.manifest.digest)
            self._install(tuple(together), self._state.arming)
            return self._info(plugged)

    def unplug(self, name: str) -> None:
        """Remove a module and free its memory once no sequence in flight uses it. Raises
        `PackError` if unknown.
        """
        with self._lock:
            self._state.require(name)
            rest = tuple(one for one in self._state.plugged if one.manifest.name != name)
            arming = self._state.arming
            if not isinstance(arming, str):
                arming = tuple(armed for armed in arming if armed != name)
            self._install(rest, arming)

    def arm(self, names: str | Iterable[str] | None = AUTO) -> tuple[str, ...]:
        """Choose the candidates: "auto" (every plugged module that helps, also later ones), one
        name, several, or None.

        Candidates speak at the tokens that their gates recognise. Without any, nothing of them is
        read. Returns the candidates' names; raises `PackError` if one is not plugged.
        """
        with self._lock:
            arming = _arming(names)
            for name in arming if not isinstance(arming, str) else ():
                self._state.require(name)
            self._install(self._state.plugged, arming)
            return tuple(name for name in self._state.names if self._state.arms(name))

    @contextmanager
    def arming(self, names: str | Iterable[str] | None) -> Iterator[None]:
        """Arm `names` within the block, and what was armed before after it."""
        before = self._state.arming
        self.arm(names)
        try:
            yield
        finally:
            with self._lock:
                still = (
                    before
                    if isinstance(before, str)
                    else tuple(n for n in before if n in self._state.names)
                )
                self._install(self._state.plugged, still)

    @contextmanager
    def forced(self, module: str | ExpertModule) -> Iterator[ExpertModule]:
        """Within the block, switch one module on at every token with weight 1, and every other one
        off.

        For training and stand-alone evaluation; `module` need not be plugged. Gradients reach its
        parameters.
        """
        chosen = self._state.require(module).module if isinstance(module, str) else module
        before = self._forced
        self._forced = Roster((chosen,), None)
        try:
            yield chosen
        finally:
            self._forced = before

    @contextmanager
    def record(self) -> Iterator[Trace]:
        """Record within the block which module speaks at which token, over all forward passes."""
        trace = Trace()
        self._traces.append(trace)
        try:
            yield trace
        finally:
            self._traces.remove(trace)

    def armed(self) -> ArmedExperts | None:
        """Return the experts for a sequence that starts now, or None if there is no candidate."""
        roster = self._forced or self._current().roster
        return None if roster is None else ArmedExperts(roster, self._traces)

    def decided(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> ArmedExperts | None:
        """Return the experts for sequences that begin with these prompts, each judged as a
        document, as a whole.

        Args:
            input_ids: prompts `[B, T]`.
            attention_mask: 0 at padding, `[B, T]`.
        """
        armed = self.armed()
        if armed is None or armed.roster.relevance is None:
            return armed
        counted_BT = (
            None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :].bool()
        )
        decided_BM = armed.roster.relevance.document_keeps(input_ids, counted_BT)
        if not bool(decided_BM.any()):
            return None
        return ArmedExperts(armed.roster, self._traces, decided_BM)

    def relevance(self, ids: Sequence[int]) -> dict[str, float]:
        """Return by how many nats what a user says is above the threshold of each armed expert;
        above 0 it is admitted.

        Args:
            ids: tokens of what the user says.
        """
        armed = self.armed()
        bank = armed.roster.relevance if armed is not None else None
        if armed is None or bank is None:
            return {}
        above_BM = bank.above_threshold(
            torch.tensor([list(ids)], dtype=torch.long, device=bank.table_MV.device)
        )
        return dict(zip(armed.names, above_BM[0].tolist(), strict=True))

    def choose(
        self,
        arm: str | Iterable[str] | None = AUTO,
        deny: Iterable[str] = (),
        max_experts: int | None = None,
        user_ids: Sequence[int] | None = None,
        document: Sequence[int] | None = None,
    ) -> ArmedExperts | None:
        """Return the experts for one sequence with a choice of its own, or None if there is no
        candidate.

        Args:
            arm: "auto" for those armed now; else one name, several, or None. Experts that are named
                are admitted: whoever names them knows that the text is about their domain.
            deny: names that are no candidates, whatever `arm` says; they need not be plugged.
            max_experts: most modules that one token is given to; None takes the set's own limit.
            user_ids: tokens of what the user of a conversation says; with "auto", only experts that
                they ask for take part, until the sequence ends.
            document: tokens of a text that is to be continued, in place of `user_ids`; with "auto",
                experts that they rule out take no part. With neither, each token is judged by those
                before it.

        Raises `PackError` if a name in `arm` is not plugged, `ConfigError` if `max_experts` is
        below 1.
        """
        wanted = _arming(arm)
        denied = set(deny)
        state = self._current()
        if max_experts is not None and max_experts < 1:
            raise ConfigError(f"max_experts={max_experts} is out of range; it must be at least 1.")
        if self._forced is not None and wanted == AUTO:
            return self.armed()
        for name in wanted if wanted != AUTO else ():
            state.require(name)
        chooser = state if wanted == AUTO else replace(state, arming=wanted)
        names = tuple(name for name in state.names if chooser.arms(name) and name not in denied)
        most = max_experts or self.max_experts
        roster = roster_of(state, names, most)
        if roster is None or (wanted == AUTO and user_ids is None and document is None):
            return None if roster is None else ArmedExperts(roster, self._traces)
        if wanted == AUTO and roster.relevance is not None:
            roster = roster_of(state, _admitted(roster, user_ids, document), most)
        if roster is None:
            return None
        return ArmedExperts(
            roster, self._traces, torch.ones(1, len(roster.modules), dtype=torch.bool)
        )

    def list(self) -> tuple[ExpertInfo, ...]:
        """Return what is plugged, sorted by name."""
        return tuple(
            sorted((self._info(one) for one in self._state.plugged), key=lambda info: info.name)
        )

    def manifest(self, name: str) -> Manifest:
        """Return the papers of a plugged module. Raises `PackError` if it is not plugged."""
        return self._state.require(name).manifest

    def _current(self) -> PlugState:
        """Return the state, its modules moved after the model if that changed device or dtype
        since.
        """
        state = self._state
        model = self._live_model()
        first = next(state.plugged[0].module.parameters()) if state.plugged else None
        if first is not None and (first.dtype != model.dtype or first.device != model.device):
            with self._lock:
                for one in self._state.plugged:
                    one.module.to(model.device, model.dtype)
                self._install(self._state.plugged, self._state.arming)
        return self._state

    def _install(self, plugged: tuple[Plugged, ...], arming: tuple[str, ...] | str) -> None:
        """Make `plugged` and `arming` the state in one assignment, which is what makes plugging
        atomic.
        """
        state = PlugState(plugged, arming)
        modules = tuple(one.module for one in plugged if state.arms(one.manifest.name))
        if modules:
            roster = Roster(modules, self.max_experts)
            names = tuple(sorted(module.name for module in modules))
            state = replace(state, roster=roster, rosters={(names, self.max_experts): roster})
        self._state = state

    def _info(self, one: Plugged) -> ExpertInfo:
        manifest = one.manifest
        return ExpertInfo(
            name=manifest.name,
            domain=manifest.domain,
            layers=manifest.layers,
            width=manifest.width,
            licence=manifest.licence,
            digest=manifest.digest,
            signer=manifest.signature.public_key if manifest.signature else None,
            num_bytes=sum(parameter.nbytes for parameter in one.module.parameters()),
            armed=self._state.arms(manifest.name),
            verdict=manifest.verdict,
        )

    def _live_model(self) -> PreTrainedModel:
        model = self._model()
        if model is None:
            raise PackError("The model of this expert set is gone; keep a reference to it.")
        return model


def _admitted(
    roster: Roster, user_ids: Sequence[int] | None, document: Sequence[int] | None
) -> tuple[str, ...]:
    """Return the names, sorted, of the modules that a conversation asks for or a document does not
    rule out.
    """
    bank = roster.relevance
    assert bank is not None
    ids = document if user_ids is None else user_ids
    ids_BT = torch.tensor([list(ids or ())], dtype=torch.long, device=bank.table_MV.device)
    admitted_BM = (
        bank.document_keeps(ids_BT) if user_ids is None else bank.above_threshold(ids_BT) > 0
    )
    names = [
        module.name
        for module, yes in zip(roster.modules, admitted_BM[0].tolist(), strict=True)
        if yes
    ]
    return tuple(sorted(names))


def _arming(names: str | Iterable[str] | None) -> tuple[str, ...] | str:
    if names is None:
        return ()
    if isinstance(names, str):
        return AUTO if names == AUTO else (names,)
    return tuple(names)
