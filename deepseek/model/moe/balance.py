"""Load balancing of experts and control of their mean number, without an auxiliary loss."""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepseek.model.exact_buffers import ExactBuffers
from deepseek.model.moe.stats import Dispatch

# Gains of the temperature controller. Its error is that of the mean number of experts, clamped to
# one expert. The gains were tuned on simulated routers with logits of standard deviation 0.02 to 3,
# where they settle within 100 steps without oscillating.
PROPORTIONAL_GAIN = 0.3
INTEGRAL_GAIN = 0.15
LOG_TEMPERATURE_RANGE = 7.0


class Balance(ExactBuffers):
    """The control state of a router: a bias on the choice of experts, and a softmax temperature.

    Forward passes only count expert calls. `update` applies the counts once per optimiser step, so
    that a layer recomputed in the backward pass (activation checkpointing) routes exactly as it did
    the first time. The buffers stay fp32 in a bf16 model, where steps of 1e-3 would be lost.

    Args:
        num_experts: number E of experts.
        rate: step size of the bias.
        target: mean number of experts per token to aim at; None: no temperature control.
        temperature: initial temperature.

    Buffers:
        bias: added to the scores when experts are chosen `[E]`, but never part of a weight
            (arXiv:2408.15664). Its step is proportional to the relative shortfall from the mean
            load. The paper's steps of constant size make loads swing from one expert to another in
            short runs.
        temperature: divisor of the logits, a scalar.
        integral: sum of the controller's past errors, a scalar.
        counts: expert calls since the last update, then the number of tokens, int64 `[E + 1]`; not
            saved.
    """

    bias: Tensor
    temperature: Tensor
    integral: Tensor
    counts: Tensor

    def __init__(
        self, num_experts: int, rate: float, target: float | None, temperature: float
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.rate = rate
        self.target = target
        self.start = temperature
        for name, value in self._initial_values().items():
            self.register_buffer(name, value, persistent=name != "counts")

    def reset_buffers(self) -> None:
        """Initialise the buffers that are still on the meta device."""
        for name, value in self._initial_values().items():
            if getattr(self, name).is_meta:
                setattr(self, name, value)

    def record(self, dispatch: Dispatch, token_mask_N: Tensor | None) -> None:
        """Count the expert calls of a forward pass in training mode.

        A pass that activation checkpointing recomputes is not counted again.

        Args:
            dispatch: the routing result.
            token_mask_N: False at padding; None: no padding.
        """
        if not self.training or _recomputing():
            return
        tokens = (
            token_mask_N.sum()
            if token_mask_N is not None
            else self.counts.new_tensor(len(dispatch.ids_NA))
        )
        self.counts.add_(torch.cat([dispatch.load_E(token_mask_N), tokens.reshape(1)]))

    @torch.no_grad()
    def update(self, group: dist.ProcessGroup | None = None, pace: float = 1.0) -> None:
        """Apply the counts to bias and temperature, then clear them.

        Args:
            group: process group whose counts are summed if torch.distributed is initialised; None:
                the default group.
            pace: factor on the step size of the bias.
        """
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.counts, group=group)
        load_E = self.counts[:-1].float()
        tokens = self.counts[-1]
        seen = (tokens > 0).float()
        missing_E = 1 - load_E / load_E.mean().clamp(min=1)
        self.bias += seen * pace * self.rate * missing_E.clamp(-1, 1)
        self.bias -= self.bias.mean()
        if self.target is not None:
            self._steer(
                seen * (self.target - load_E.sum() / tokens.clamp(min=1)).clamp(-1, 1), seen
            )
        self.counts.zero_()

    def _steer(self, error: Tensor, seen: Tensor) -> None:
        """Run one step of a proportional-integral controller on the log of the temperature."""
        limit = LOG_TEMPERATURE_RANGE / INTEGRAL_GAIN
        self.integral.add_(error).clamp_(-limit, limit)
        log_t = math.log(self.start) + PROPORTIONAL_GAIN * error + INTEGRAL_GAIN * self.integral
        self.temperature.copy_(torch.where(seen > 0, log_t.exp(), self.temperature))

    def _initial_values(self) -> dict[str, Tensor]:
        return {
            "bias": torch.zeros(self.num_experts, dtype=torch.float32),
            "temperature": torch.tensor(self.start, dtype=torch.float32),
            "integral": torch.tensor(0.0, dtype=torch.float32),
            "counts": torch.zeros(self.num_experts + 1, dtype=torch.int64),
        }


def update_routers(
    model: nn.Module, group: dist.ProcessGroup | None = None, pace: float = 1.0
) -> None:
    """Update the bias and temperature of all routers. Call it once after every optimiser step.

    Args:
        model: the model whose routers to update.
        group: process group whose counts are summed if torch.distributed is initialised; None: the
            default group.
        pace: factor on `balance_rate` (default 1). Lower it with the learning rate, so that the
            biases settle together with the weights.
    """
    for module in model.modules():
        if isinstance(module, Balance):
            module.update(group, pace)


def _recomputing() -> bool:
    """Return whether this forward pass runs inside a backward pass (activation checkpointing)."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
