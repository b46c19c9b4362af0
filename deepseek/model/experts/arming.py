"""Which plugged experts are armed, and how much each adds."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from deepseek import checks
from deepseek.errors import ConfigError, shown

AUTO = "auto"
MAX_WEIGHT = 2.0
"""Largest weight of an expert: twice what it was trained to add."""

ArmingValue = str | Iterable[str] | Mapping[str, float] | None
"""Values that `ExpertSet.arm` and `choose` accept."""


@dataclass(frozen=True)
class Arming:
    """A choice of experts with their weights.

    Attributes:
        auto: weight of the experts that "auto" arms and that are not named; None: only the named
            ones are armed.
        named: name -> weight of the experts that are armed by name.
    """

    auto: float | None = None
    named: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def parse(value: ArmingValue) -> "Arming":
        """Return the choice that a user's value describes.

        Args:
            value: "auto", a name, several names, or name -> weight, where "auto" may be among the
                names; None: no expert.

        Raises:
            ConfigError: a name is not a string, or a weight is not a number above 0 and at most
                `MAX_WEIGHT`.
        """
        if value is None:
            return Arming()
        if isinstance(value, str):
            value = (value,)
        if isinstance(value, Mapping):
            weights = checks.mapping("names", value)
        else:
            weights = dict.fromkeys(checks.texts("names", value), 1.0)
        for name, weight in weights.items():
            check_weight(name, weight)
        auto = weights.pop(AUTO, None)
        return Arming(auto, weights)

    @property
    def value(self) -> dict[str, float]:
        """The choice as name -> weight, which `parse` accepts."""
        auto = {} if self.auto is None else {AUTO: self.auto}
        return {**self.named, **auto}

    def weight(self, name: str, helps: bool) -> float | None:
        """Return the weight of an expert; None: it is not armed.

        Args:
            name: name of the expert.
            helps: whether "auto" arms it.
        """
        return self.named.get(name, self.auto if helps else None)

    def over(self, default: "Arming") -> "Arming":
        """Return this choice of a request, with "auto" replaced by the default choice.

        The weight of "auto" multiplies the default's weights, up to `MAX_WEIGHT`.

        Args:
            default: the choice for requests that make none.
        """
        if self.auto is None:
            return self
        named = {n: min(w * self.auto, MAX_WEIGHT) for n, w in default.named.items()}
        auto = None if default.auto is None else min(default.auto * self.auto, MAX_WEIGHT)
        return Arming(auto, {**named, **self.named})

    def among(self, names: Iterable[str]) -> "Arming":
        """Return this choice without the experts that are not in `names`."""
        kept = set(names)
        return Arming(self.auto, {name: w for name, w in self.named.items() if name in kept})


EVERY_EXPERT = Arming(auto=1.0)
"""The choice "auto"."""


def check_weight(name: str, weight: float) -> None:
    """Raise `ConfigError` unless the weight of an expert is above 0 and at most `MAX_WEIGHT`."""
    try:
        checks.number("weight", weight, above=0, most=MAX_WEIGHT)
    except ConfigError:
        raise ConfigError(
            f"The weight {shown(weight)} of expert {shown(name)} is out of range; it "
            f"must be above 0 and at most {MAX_WEIGHT:g}, and an expert that is to add nothing is "
            "left out."
        ) from None
