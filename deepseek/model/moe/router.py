"""Routers: choose the experts of each token and their weights."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softmax

from deepseek import checks
from deepseek.errors import ConfigError
from deepseek.model.config import ModelConfig
from deepseek.model.field_checks import BALANCE_RATE, TEMPERATURE, size
from deepseek.model.moe.balance import Balance
from deepseek.model.moe.stats import Dispatch, RoutingDecision
from deepseek.registry import pick


class Router(nn.Module, ABC):
    """A linear map from a token to one logit per expert. Subclasses turn logits into a dispatch.

    Args:
        num_experts: number E of experts.
        input_dim: width D of the input.
        balance_rate, target_experts, temperature: see `Balance`.

    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(
        self,
        num_experts: int,
        input_dim: int,
        balance_rate: float = 1e-2,
        target_experts: float | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts = size("num_experts", num_experts)
        self.input_dim = input_dim = size("input_dim", input_dim)
        balance_rate = BALANCE_RATE("balance_rate", balance_rate)
        temperature = TEMPERATURE("temperature", temperature)
        self.weight = nn.Parameter(torch.empty(num_experts, input_dim))
        self.balance = Balance(num_experts, balance_rate, target_experts, temperature)
        nn.init.normal_(self.weight, std=0.02)

    def logits(self, x: Tensor) -> Tensor:
        """Return `W_r x` in fp32, `[..., E]` for x `[..., D]`, also under autocast.

        Raises:
            ConfigError: x has another width or is not floating point.
        """
        checks.tensor("x", x, "real", width=self.input_dim, empty=True)
        checks.same_device(x=x, weight=self.weight)
        with torch.autocast(x.device.type, enabled=False):
            return linear(x.float(), self.weight.float())

    def forward(self, x: Tensor) -> Tensor:
        """Return softmax weights over all experts, fp32 `[..., E]`, for x `[..., D]`."""
        return softmax(self.logits(x) / self.balance.temperature, dim=-1)

    def route(self, x: Tensor, choice: RoutingDecision | None = None) -> Dispatch:
        """Return the experts and weights of every token.

        Args:
            x: inputs `[..., D]`; N is the product of the leading sizes.
            choice: routing decision to replay: experts come from it, weights from the logits. None:
                choose experts.

        Raises:
            ConfigError: x has another width or is not floating point, or `choice` does not match
                the number of tokens, or this router's experts or `choice_width`.
        """
        checks.tensor("x", x, "real", width=self.input_dim, empty=True)
        if choice is not None:
            self._check_choice(choice, x[..., 0].numel())
        return self.choose(self.logits(x.reshape(-1, x.shape[-1])), choice)

    def _check_choice(self, choice: RoutingDecision, tokens: int) -> None:
        """Raise `ConfigError` unless a decision names this router's experts for these tokens."""
        checks.instance("choice", choice, RoutingDecision)
        ids_NC = checks.tensor(
            "choice.ids_NC", choice.ids_NC, "whole", dims=(2,), width=self.choice_width, empty=True
        )
        if len(ids_NC) != tokens:
            raise ConfigError(
                f"choice.ids_NC has {len(ids_NC)} rows; it must have one for each of the {tokens} "
                "tokens."
            )
        checks.within("choice.ids_NC", ids_NC, 0, self.num_experts - 1, "ids of experts")

    @property
    @abstractmethod
    def choice_width(self) -> int:
        """Number C of experts per token in a `RoutingDecision`."""

    @abstractmethod
    def choose(self, logits_NE: Tensor, choice: RoutingDecision | None = None) -> Dispatch:
        """Return the dispatch for router logits `[N, E]`.

        Args:
            logits_NE: router logits.
            choice: routing decision to replay; None: choose experts.
        """


class DynamicRouter(Router):
    """Routes each token to as many experts as its cumulative weight needs to reach a threshold.

    The candidates C are the experts with the highest sigmoid(z) + b, for logits z and balance bias
    b. Let q = softmax(z_C / T), sorted by z. Expert j is active if j < `min_experts` or the q
    before j sum to less than `threshold`, up to `max_experts` experts. Its weight is q_j without
    renormalisation, which would make the weight of a single expert the constant 1 and leave the
    router without a gradient.

    Args:
        num_experts: number E of experts.
        input_dim: width D of the input.
        threshold: cumulative weight in (0, 1]. It stays fixed: the controller of `target_experts`
            changes T instead.
        min_experts, max_experts: bounds on the number of experts per token.
        candidates: number of candidates C.
        balance_rate, target_experts, temperature: see `Balance`.

    Raises:
        ConfigError: sizes or bounds contradict each other.
    """

    def __init__(
        self,
        num_experts: int,
        input_dim: int,
        *,
        threshold: float = 0.7,
        min_experts: int = 1,
        max_experts: int = 5,
        candidates: int = 8,
        balance_rate: float = 1e-2,
        target_experts: float | None = None,
        temperature: float = 1.0,
    ) -> None:
        self.threshold = checks.number("threshold", threshold, above=0, most=1)
        self.min_experts = size("min_experts", min_experts)
        if target_experts is not None:
            upper = size("max_experts", max_experts)
            checks.number("target_experts", target_experts, least=min_experts, most=upper)
        super().__init__(num_experts, input_dim, balance_rate, target_experts, temperature)
        self.max_experts = min(size("max_experts", max_experts), num_experts)
        self.candidates = min(size("candidates", candidates), num_experts)
        if not 1 <= min_experts <= self.max_experts <= self.candidates:
            raise ConfigError(
                f"min_experts={min_experts}, max_experts={max_experts}, candidates={candidates} "
                "must satisfy 1 <= min_experts <= max_experts <= candidates for "
                f"{num_experts} experts."
            )

    @property
    def choice_width(self) -> int:
        return self.candidates

    def _check_choice(self, choice: RoutingDecision, tokens: int) -> None:
        super()._check_choice(choice, tokens)
        active_N = checks.tensor("choice.active_N", choice.active_N, "whole", dims=(1,), empty=True)
        checks.shape("choice.active_N", active_N, (tokens,), "[tokens]")
        checks.within("choice.active_N", active_N, 1, self.max_experts, "numbers of experts")

    def choose(self, logits_NE: Tensor, choice: RoutingDecision | None = None) -> Dispatch:
        ids_NC, logits_NC = self._candidates(logits_NE, choice)
        q_NC = softmax(logits_NC / self.balance.temperature, dim=-1)
        active_N = None if choice is None else choice.active_N
        if active_N is None:
            active_N = count_active(q_NC, self.threshold, self.min_experts, self.max_experts)
        q_NA = q_NC[:, : self.max_experts]
        kept_NA = torch.arange(self.max_experts, device=q_NA.device) < active_N[:, None]
        return Dispatch(
            ids_NC[:, : self.max_experts], q_NA.where(kept_NA, 0.0), active_N, logits_NE, ids_NC
        )

    def _candidates(
        self, logits_NE: Tensor, choice: RoutingDecision | None
    ) -> tuple[Tensor, Tensor]:
        """Return the candidates `[N, C]` and their logits, descending or in the order of `choice`.

        An order from `choice` makes `active_N` select the same experts when routing is replayed.
        """
        if choice is not None:
            return choice.ids_NC, logits_NE.gather(1, choice.ids_NC)
        candidates_NC = (logits_NE.sigmoid() + self.balance.bias).topk(self.candidates).indices
        logits_NC, order_NC = logits_NE.gather(1, candidates_NC).sort(
            dim=-1, descending=True, stable=True
        )
        return candidates_NC.gather(1, order_NC), logits_NC


def count_active(q_NC: Tensor, threshold: float, min_experts: int, max_experts: int) -> Tensor:
    """Return the number of active experts of each token `[N]` under the threshold rule.

    Args:
        q_NC: weights of the candidates, in descending order.
        threshold, min_experts, max_experts: see `DynamicRouter`.
    """
    cumulative_NC = q_NC.cumsum(-1)
    # Plus one for the first expert, before which the cumulative weight is 0.
    below_N = (cumulative_NC[:, :-1] < threshold).sum(-1) + 1
    return below_N.clamp(min_experts, max_experts)


class TopKRouter(Router):
    """Routes every token to the same number of experts (Mixtral, Qwen-MoE, OLMoE, DeepSeek-V3).

    Args:
        num_experts: number E of experts.
        input_dim: width D of the input.
        top_k: number of experts per token.
        score: "softmax" over all experts, or "sigmoid" of each.
        renormalize: whether a token's weights are divided by their sum.
        groups, max_groups: experts are split into `groups` groups, and only the `max_groups` groups
            whose two best experts have the highest sum of scores are eligible (DeepSeek-V3,
            arXiv:2412.19437).
        scale: factor on the weights.
        balance_rate: see `Balance`.

    Raises:
        ConfigError: sizes contradict each other, or the score is unknown.
    """

    def __init__(
        self,
        num_experts: int,
        input_dim: int,
        *,
        top_k: int,
        score: str = "softmax",
        renormalize: bool = True,
        groups: int = 1,
        max_groups: int = 1,
        scale: float = 1.0,
        balance_rate: float = 1e-2,
    ) -> None:
        super().__init__(num_experts, input_dim, balance_rate)
        self.top_k = size("top_k", top_k)
        self.renormalize = checks.flag("renormalize", renormalize)
        self.scale = checks.number("scale", scale, above=0)
        self.groups = size("groups", groups)
        self.max_groups = size("max_groups", max_groups)
        self.score = pick(SCORES, score, "router_score")
        if num_experts % groups or not 1 <= max_groups <= groups:
            raise ConfigError(
                f"{groups} groups of which {max_groups} are used do not fit {num_experts} experts."
            )
        if not 1 <= top_k <= num_experts // groups * max_groups:
            raise ConfigError(
                f"top_k={top_k} must lie between 1 and the number of experts that the groups allow."
            )

    @property
    def choice_width(self) -> int:
        return self.top_k

    def choose(self, logits_NE: Tensor, choice: RoutingDecision | None = None) -> Dispatch:
        scores_NE = self.score(logits_NE)
        ids_NA = self._best_experts(scores_NE.detach()) if choice is None else choice.ids_NC
        weights_NA = scores_NE.gather(1, ids_NA)
        if self.renormalize:
            weights_NA = weights_NA / (weights_NA.sum(-1, keepdim=True) + 1e-20)
        if self.scale != 1.0:
            weights_NA = weights_NA * self.scale
        return Dispatch(ids_NA, weights_NA, None, logits_NE)

    def _best_experts(self, scores_NE: Tensor) -> Tensor:
        """Return the experts with the highest biased scores `[N, A]`."""
        choice_NE = scores_NE + self.balance.bias
        if self.max_groups < self.groups:
            choice_NE = choice_NE.masked_fill(~self._allowed_experts(choice_NE), float("-inf"))
        return choice_NE.topk(self.top_k).indices

    def _allowed_experts(self, choice_NE: Tensor) -> Tensor:
        """Return whether each expert is in one of the best groups, boolean `[N, E]`."""
        grouped = choice_NE.unflatten(1, (self.groups, -1))
        strength = grouped.topk(min(2, grouped.shape[-1])).values.sum(-1)
        best = strength.topk(self.max_groups).indices
        allowed = torch.zeros_like(strength, dtype=torch.bool).scatter_(1, best, True)
        return allowed.repeat_interleave(grouped.shape[-1], dim=1)


SCORES = {"softmax": lambda logits: softmax(logits, dim=-1), "sigmoid": torch.sigmoid}


def _dynamic(config: ModelConfig) -> Router:
    return DynamicRouter(
        config.num_experts,
        config.hidden_size,
        threshold=config.routing_threshold,
        min_experts=config.min_experts,
        max_experts=config.max_experts,
        candidates=config.candidate_experts,
        balance_rate=config.balance_rate,
        target_experts=config.target_experts,
        temperature=config.router_temperature,
    )


def _topk(config: ModelConfig) -> Router:
    return TopKRouter(
        config.num_experts,
        config.hidden_size,
        top_k=config.max_experts,
        score=config.router_score,
        renormalize=config.router_renormalize,
        groups=config.num_expert_groups,
        max_groups=config.max_expert_groups,
        scale=config.router_scale,
        balance_rate=config.balance_rate,
    )


def _dense(config: ModelConfig) -> Router:
    """Return a router that sends every token to every expert, the upper bound of sparse routing."""
    return TopKRouter(
        config.num_experts, config.hidden_size, top_k=config.num_experts, balance_rate=0.0
    )


ROUTING = {"dense": _dense, "dynamic": _dynamic, "topk": _topk}


def build_router(config: ModelConfig) -> Router:
    """Return the router that `config.routing_strategy` names."""
    return pick(ROUTING, config.routing_strategy, "routing_strategy")(config)
