"""Task for training a language model, or some of its parameters, on packed rows.

Pre-training and adaptation use it.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from deepseek.data.text.loader import Batch
from deepseek.device.transfer import to_device
from deepseek.kernels.cross_entropy import IGNORED_LABEL, linear_cross_entropy, token_losses
from deepseek.model.language_model import output_head
from deepseek.model.moe.balance import Balance, update_routers
from deepseek.model.precision import autocast, compute_dtype
from deepseek.model.transformer import DeepSeekModel
from deepseek.train.loop.backends import SINGLE, Backend
from deepseek.train.loop.loop import Hooks, LossOutput
from deepseek.train.loop.packed import begin_rows


class NextToken(nn.Module):
    """Model and loss as one module, so that FSDP can gather the parameters around its forward
    pass.
    """

    def __init__(self, model: DeepSeekModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, load_LE: Tensor | None = None) -> Tensor:
        """Return the mean loss of a batch, or the exact loss `[N]` of every token.

        Args:
            batch: packed rows.
            load_LE: if given, the tokens routed to each expert are added to it, and the losses are
                exact and per token.
        """
        model = self.model
        step = begin_rows(model, batch)
        hidden_BTD = step.finish()
        labels_N = to_device(batch.labels.flatten(), model.device)
        head = output_head(model)
        if load_LE is None:
            hidden_ND = hidden_BTD.flatten(0, 1)
            dtype = compute_dtype(model)
            return linear_cross_entropy(
                hidden_ND, head.weight_VD, labels_N, cap=head.cap, dtype=dtype
            )
        for layer, stats in enumerate(step.ctx.router_stats):
            load_LE[layer] += stats.dispatch.load_E().cpu()
        return token_losses(hidden_BTD.flatten(0, 1), head.weight_VD, labels_N, head.cap)


class LanguageTask:
    """Next-token prediction with all parameters of a model that require gradients.

    Attributes:
        parameters: trainable parameters by name.
        hooks: router state to checkpoint, and the routers' update after each step.
    """

    def __init__(
        self,
        model: DeepSeekModel,
        held_out: Mapping[str, Sequence[Batch]],
        backend: Backend = SINGLE,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Create the task.

        Args:
            model: model to train.
            held_out: held-out batches by domain.
            backend: shards the model over processes; default: a single process.
            weights: weights of the domains in the mix; default: equal ones.
        """
        self.model = model
        self.held_out = held_out
        self.backend = backend
        total = sum(weights.values()) if weights else len(held_out)
        self.weights = {name: (weights[name] if weights else 1) / total for name in held_out}
        self.module = NextToken(model)
        backend.shard(self.module, [*model.layers, *model.expert_pools], compute_dtype(model))
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.routers = [module for module in model.modules() if isinstance(module, Balance)]
        buffers = {name: value for name, value in model.named_buffers() if ".balance." in name}
        self.hooks = Hooks(buffers=buffers, stepped=self.balance)

    def loss(self, batch: Batch, step: int) -> LossOutput:
        """Return the mean loss of one batch."""
        with autocast(self.model):
            loss = self.module(batch)
        return LossOutput(loss, int((batch.labels != IGNORED_LABEL).sum()))

    def balance(self, pace: float) -> dict[str, float]:
        """Update the routers' biases once from the load of this step; return the load's imbalance.

        Args:
            pace: learning rate as a share of its peak. The biases' rate is its square root:
                proportional to the learning rate, they would always lag behind the weights; at a
                constant rate, they would follow the domains of the last few rows.
        """
        if not self.routers:
            return {}
        load_LE = torch.stack([router.counts[:-1] for router in self.routers]).double()
        update_routers(self.model, pace=math.sqrt(pace))
        return {"max_violation": max_violation(self.backend.mean(load_LE))}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the exact held-out loss of each domain and of the mix, and the expert load of the
        mix.

        Domains have the weights of the training mix, whatever their numbers of held-out tokens,
        since the routers balance the load over the training mix.
        """
        self.model.eval()
        load_LE = torch.zeros(len(self.routers), self.model.config.num_experts, dtype=torch.float64)
        losses = {}
        for name, batches in self.held_out.items():
            domain_LE = torch.zeros_like(load_LE)
            total, targets = self._sum(batches, domain_LE).tolist()
            losses[name] = total / targets
            load_LE += self.weights[name] / targets * self.backend.mean(domain_LE)
        self.model.train()
        figures = {"held_out_loss": sum(self.weights[name] * loss for name, loss in losses.items())}
        figures |= {f"held_out_loss.{name}": loss for name, loss in losses.items()}
        if self.routers:
            figures |= {
                "held_out_max_violation": max_violation(load_LE),
                "idle_experts": float((load_LE == 0).sum()),
            }
        return figures

    @torch.no_grad()
    def loss_on(self, batches: Sequence[Batch]) -> float:
        """Return the exact mean loss on batches, in nats per token."""
        self.model.eval()
        load_LE = torch.zeros(len(self.routers), self.model.config.num_experts, dtype=torch.float64)
        total, targets = self._sum(batches, load_LE).tolist()
        self.model.train()
        return float(total / targets)

    def _sum(self, batches: Sequence[Batch], load_LE: Tensor) -> Tensor:
        """Return the sum of losses and the number of targets, as means over processes, and add the
        expert load to `load_LE`.
        """
        pair = torch.zeros(2, dtype=torch.float64)
        for whole in batches:
            batch = self.backend.share(whole)
            with autocast(self.model):
                losses_N = self.module(batch, load_LE)
            pair += torch.stack(
                [losses_N.cpu().double().sum(), (batch.labels != IGNORED_LABEL).sum()]
            )
        return self.backend.mean(pair)


def max_violation(load_LE: Tensor) -> float:
    """Return by how much the busiest expert exceeds the mean load, averaged over layers.

    This is MaxVio of arXiv:2408.15664.
    """
    mean_L = load_LE.mean(-1).clamp(min=1e-9)
    return float((load_LE.amax(-1) / mean_L - 1).mean())
