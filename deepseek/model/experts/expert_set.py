"""`model.experts`: plug, unplug and arm expert modules on a live model."""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deepseek import checks
from deepseek.checkpoint.models import model_name
from deepseek.errors import ConfigError, PackError, shown
from deepseek.model.attached.sites import ExpertSites
from deepseek.model.experts.adapter import AdapterModule
from deepseek.model.experts.armed import ArmedExperts, Roster
from deepseek.model.experts.arming import AUTO, Arming, ArmingValue
from deepseek.model.experts.linear_hooks import HookTable
from deepseek.model.experts.module import ExpertModule
from deepseek.model.experts.state import (
    ExpertBytes,
    ExpertInfo,
    Plugged,
    PlugState,
    chosen_module,
    fitting,
    module_from,
    roster_of,
    roster_with,
)
from deepseek.model.experts.trace import Trace
from deepseek.model.experts.weight_cache import WeightCache
from deepseek.packs.kinds import AnyManifest
from deepseek.packs.library import find_pack
from deepseek.packs.manifest import BaseDescription
from deepseek.packs.pack import ExpertPack
from deepseek.packs.pack_file import open_pack
from deepseek.packs.policy import PackPolicy


class ExpertSet:
    """The expert modules plugged into a model.

    No `nn.Module`, so that the model's state dict never includes plugged modules. Plugging is safe
    while other threads generate: a sequence keeps the modules that were armed when it started.
    `arming` and `forced` act on the sequences of all threads; their blocks must not overlap.

    Attributes:
        policy: rules by which `plug` accepts packs.
        base_folder: folder that the model was loaded from; packs must name its fingerprint.
        sites: where the experts of an attached model stand; None for a `DeepSeekModel`.
        weight_cache: with a limit, the experts that are plugged from then on stay in their files,
            and their weights are read when they are armed or chosen.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        # Weak: a cycle would keep a dropped model in memory until the next garbage collection.
        self._model = weakref.ref(model)
        self._lock = threading.RLock()
        self._state = PlugState()
        self._forced: Roster | None = None
        self._traces: list[Trace] = []
        self._hooks = HookTable()
        self._base: BaseDescription | None = None
        self.policy = PackPolicy()
        self.base_folder: Path | None = None
        self.sites: ExpertSites | None = None
        self.weight_cache = WeightCache()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExpertSet":
        model = self._live_model()
        copied = ExpertSet(memo.get(id(model), model))
        for name in ("policy", "base_folder", "_base", "sites", "weight_cache", "_state"):
            setattr(copied, name, getattr(self, name))
        return copied

    def __reduce__(self) -> NoReturn:
        raise ConfigError(
            "A model with experts cannot be pickled; write it with save_pretrained, and plug the "
            "packs again once it is loaded."
        )

    @property
    def base(self) -> BaseDescription:
        """Identity of the base model: the fingerprint of its folder, and its shape.

        Set it for a model that was created in memory.

        Raises:
            PackError: it was not set, and the model was not loaded from a folder.
        """
        if self._base is None:
            if self.base_folder is None:
                raise PackError(
                    "This model was not loaded from a folder, so no expert pack can be matched to "
                    "it; save it with save_pretrained and load it with from_pretrained, or set "
                    "model.experts.base."
                )
            model = self._live_model()
            base = BaseDescription.of(self.base_folder, model_name(str(model.config.name_or_path)))
            attached = "" if self.sites is None else self.sites.describe(model)
            self._base = base.model_copy(update={"attached": attached})
        return self._base

    @base.setter
    def base(self, description: BaseDescription) -> None:
        self._base = description

    @property
    def max_experts(self) -> int:
        """Maximum number of modules that fire at one token, from the next sequence on (default 5).

        Setting it raises `ConfigError` unless it is a positive integer.
        """
        return self._state.max_experts

    @max_experts.setter
    def max_experts(self, limit: int) -> None:
        limit = checks.positive("max_experts", limit)
        with self._lock:
            self._state = replace(self._state, max_experts=limit)

    def plug(
        self,
        source: str | Path | ExpertPack,
        prepare: Callable[[ExpertModule | AdapterModule], object] | None = None,
        *,
        in_place: bool = False,
    ) -> ExpertInfo:
        """Check a pack and plug its module or adapter into the model.

        If arming is "auto", a module is armed from the next sequence on, unless its manifest
        reports that it is no better than the base. An adapter is armed only if it is named, unless
        it was imported for "auto".

        Args:
            source: path of a pack file, name of a trained expert, or a pack in memory.
            prepare: called with the module before it is plugged, for set-up that must be complete
                before the module can fire; None: no set-up.
            in_place: replace the plugged module of the same name, if any, in a single step and keep
                its arming.

        Returns:
            The plugged module's details.

        Raises:
            PackError: the pack is damaged, belongs to another base, is refused by `policy`, or has
                the name of a plugged module without `in_place`. Nothing is changed then.
            ConfigError: `source` has another type.
        """
        if not isinstance(source, str | Path | ExpertPack):
            raise ConfigError(f"source={shown(source)} must be a path or an ExpertPack.")
        path_or_pack = find_pack(source) if isinstance(source, str) else source
        keep = self.weight_cache.limit is not None
        pack, file = open_pack(path_or_pack, self.policy, self.base, keep)
        module = module_from(pack, self._live_model(), self._hooks)
        if file is not None and isinstance(module, ExpertModule):
            module.store(file, self.weight_cache)
        elif prepare is not None:
            prepare(module)
        plugged = Plugged(module, pack.manifest)
        with self._lock:
            if module.name in self._state.by_name and not in_place:
                raise PackError(
                    f"An expert named {module.name} is plugged already; unplug it first or train "
                    "this one under another name."
                )
            state = self._current()  # first moves the others: all modules share device and dtype
            self._install(state.having(plugged), state.arming)  # replaces one of the same name
        return self._state.info(plugged)

    def unplug(self, name: str) -> None:
        """Remove a module. Its memory is freed once no sequence in flight uses it.

        Args:
            name: name of the module.

        Raises:
            PackError: no module of that name is plugged.
        """
        with self._lock:
            self._state.require(name)
            names = self._state.by_name.keys() - {name}
            self._install(self._state.without(name), self._state.arming.among(names))

    def arm(self, names: ArmingValue = AUTO) -> tuple[str, ...]:
        """Choose the modules whose gates are evaluated, from the next sequence on.

        An armed module contributes at the tokens where its gate fires, an armed adapter at every
        token. What is not armed costs nothing.

        Args:
            names: "auto" (every plugged module that is better than the base, including modules
                plugged later), one name, several names, or None to disarm all. A mapping sets
                weights, such as {"code": 0.7, "zh": 1.0}: factors above 0 and at most 2 on what a
                module or adapter adds. "auto" may be among the names.

        Returns:
            The names of the armed modules.

        Raises:
            PackError: a named module is not plugged.
            ConfigError: a weight is out of range.
        """
        arming = Arming.parse(names)
        with self._lock:
            for name in arming.named:
                self._state.require(name)
            self._install(self._state.plugged, arming)
            return tuple(self._state.armed_weights)

    @contextmanager
    def arming(self, names: ArmingValue) -> Iterator[None]:
        """Arm `names` within the block and restore the previous arming afterwards."""
        before = self._state.arming
        self.arm(names)
        try:
            yield
        finally:
            with self._lock:
                # Modules may have been unplugged within the block.
                self._install(self._state.plugged, before.among(self._state.by_name))

    @contextmanager
    def forced(
        self, module: str | ExpertModule | AdapterModule
    ) -> Iterator[ExpertModule | AdapterModule]:
        """Within the block, use one module with weight 1 at every token, and no other.

        For training and stand-alone evaluation. Gradients reach the module's parameters.

        Args:
            module: a module, which need not be plugged, or the name of a plugged one; anything else
                raises a `ConfigError` or `PackError`.
        """
        chosen = chosen_module(self._state, module)
        before = self._forced
        self._forced = roster_with([chosen], None)
        try:
            yield chosen
        finally:
            self._forced = before

    @contextmanager
    def record(self) -> Iterator[Trace]:
        """Record the weights of all modules at all tokens within the block."""
        trace = Trace()
        self._traces.append(trace)
        try:
            yield trace
        finally:
            self._traces.remove(trace)

    def armed(self) -> ArmedExperts | None:
        """Return the experts for a sequence that starts now, or None if no module is armed."""
        if self._forced is not None:
            return ArmedExperts(self._forced, self._traces)
        state = self._current()
        if state.roster is None:
            return None
        return ArmedExperts(state.roster, self._traces, weights=state.armed_weights)

    def decided(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> ArmedExperts | None:
        """Return the experts that are admitted for sequences with these prompts.

        Each prompt is scored as one document, as a whole.

        Args:
            input_ids: prompts `[B, T]`.
            attention_mask: 0 at padding, `[B, T]`; None: no padding.

        Returns:
            The experts, or None if no module is armed or admitted.
        """
        armed = self.armed()
        if armed is None or armed.roster.relevance is None:
            return armed
        decided_BM = armed.roster.relevance.document_keeps(input_ids, attention_mask)
        if not bool(decided_BM.any()) and not armed.adapts:
            return None
        return ArmedExperts(armed.roster, self._traces, decided_BM, armed.factors)

    def relevance(self, ids: Sequence[int]) -> dict[str, float]:
        """Return the relevance of a user's text minus the threshold of each armed expert, in nats.

        A value above 0 means that the expert is admitted. Empty if no armed expert has a table.

        Args:
            ids: token ids of the user's messages.
        """
        ids = checks.token_ids("ids", ids)
        armed = self.armed()
        bank = armed.roster.relevance if armed is not None else None
        if armed is None or bank is None:
            return {}
        above_BM = bank.above_threshold(
            torch.tensor([list(ids)], dtype=torch.long, device=bank.offset_M.device)
        )
        return dict(zip(armed.names, above_BM[0].tolist(), strict=True))

    def choose(
        self,
        arm: ArmingValue = AUTO,
        deny: Iterable[str] = (),
        max_experts: int | None = None,
        user_ids: Sequence[int] | None = None,
        document: Sequence[int] | None = None,
        expert_bytes: ExpertBytes | None = None,
    ) -> ArmedExperts | None:
        """Return the experts for one sequence that makes its own choice of modules.

        Args:
            arm: "auto" for the modules that are armed now; else one name, several names, or None.
                A mapping sets weights (see `arm`). Named modules are always admitted, without a
                relevance test; with "auto" among them, those that "auto" admits are added.
            deny: names to exclude in any case; they need not be plugged.
            max_experts: maximum number of modules that fire at one token; None: the limit of this
                set.
            user_ids: token ids of the user's messages in a conversation. With "auto", only experts
                whose relevance exceeds their threshold are admitted, for the whole sequence.
            document: token ids of a text to continue, in place of `user_ids`. With "auto", experts
                that the text rules out are not admitted. Without `user_ids` and `document`,
                relevance is accumulated token by token.
            expert_bytes: returns the memory of a sequence's experts. Of those that "auto" admits,
                at most `CANDIDATES`, the ones that exceed the budget of `weight_cache` are left
                out, those with the least evidence first; None: they all fit.

        Returns:
            The experts, or None if there is no candidate.

        Raises:
            PackError: a name in `arm` is not plugged.
            ConfigError: `max_experts` is below 1, names are not strings, ids are not token ids, or
                a weight is out of range.
        """
        requested = Arming.parse(arm)
        denied = set(checks.texts("deny", deny))
        state = self._current()
        limit = checks.optional(checks.positive)("max_experts", max_experts) or state.max_experts
        if self._forced is not None and requested.auto is not None:
            return self.armed()
        for name in requested.named:
            state.require(name)
        arming = requested.over(state.arming)
        weights = {n: w for n, w in state.weights(arming).items() if n not in denied}
        tested = requested.auto is not None and (user_ids is not None or document is not None)
        names = tuple(weights)
        if tested:
            candidates = roster_of(state, names, limit)
            admitted = [] if candidates is None else candidates.admitted(user_ids, document)
            ranked = dict.fromkeys([*requested.named, *admitted])
            names = tuple(name for name in ranked if name in weights)
            if expert_bytes is not None:
                names = fitting(state, names, requested.named, expert_bytes, self.weight_cache)
        roster = roster_of(state, tuple(sorted(names)), limit)
        if roster is None:
            return None
        decided_BM = None
        if tested or requested.auto is None:
            device = self._live_model().device
            decided_BM = torch.ones(1, len(roster.modules), dtype=torch.bool, device=device)
        return ArmedExperts(roster, self._traces, decided_BM, weights)

    def list(self) -> tuple[ExpertInfo, ...]:
        """Return the details of all plugged modules, sorted by name."""
        return self._state.infos

    @property
    def first_layers(self) -> tuple[int, ...]:
        """The lowest layer of each plugged module; adapters are left out."""
        return self._state.first_layers

    def manifest(self, name: str) -> AnyManifest:
        """Return the manifest of a plugged module; raise `PackError` if it is not plugged."""
        return self._state.require(name).manifest

    def _current(self) -> PlugState:
        """Return the state, after moving the modules to the model's current device and dtype."""
        model = self._live_model()
        place = (model.device, model.dtype)
        if self._state.place not in (None, place):
            with self._lock:
                self._install(self._state.placed(*place), self._state.arming)
        return self._state

    def _install(self, plugged: tuple[Plugged, ...], arming: Arming) -> None:
        """Replace the state in a single assignment, which makes plugging and arming atomic."""
        self._state = PlugState(plugged, arming, self.max_experts)

    def _live_model(self) -> PreTrainedModel:
        model = self._model()
        if model is None:
            raise PackError("The model of this expert set is gone; keep a reference to it.")
        return model
