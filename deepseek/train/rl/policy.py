"""A language model as a policy: its trained layers, frozen reference and value head."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from deepseek.errors import ConfigError
from deepseek.model.language_model import output_head
from deepseek.model.moe.stats import RoutingDecision
from deepseek.model.passes import UpperLayers, begin, resume
from deepseek.model.precision import autocast
from deepseek.model.transformer import DeepSeekModel
from deepseek.train.loop.layers import parse_layers, trained_prefixes
from deepseek.train.rl.rollout import Responses

VALUE_PACES = dict.fromkeys(("value_head.weight", "value_head.bias"), 10.0)
"""Learning rates of the value head as multiples of the layers': it starts at zero, and a poor one
leaves the advantages noisy.
"""


@dataclass(frozen=True)
class Scored:
    """Scores of each response token, all `[B, T]` and 0 at padding.

    Attributes:
        logprobs_BT: log-probability of the sampled token.
        values_BT: expected future reward before the token is sampled.
        entropy_BT: entropy of the next-token distribution, in nats.
    """

    logprobs_BT: Tensor
    values_BT: Tensor
    entropy_BT: Tensor


class Policy:
    """A model whose last layers are trained.

    The trunk below, the embeddings and the head are frozen and shared with the reference, a frozen
    copy of the initial trained layers. A linear value head reads the policy's last hidden state. No
    gradient flows from it into the policy.

    Attributes:
        parameters: trained parameters in fp32: layers, final norm and value head.
        first: first trained layer.
    """

    def __init__(self, model: DeepSeekModel, layers: str = "all", temperature: float = 1.0) -> None:
        """Freeze `model` except for `layers`.

        Args:
            model: model to train, changed in place.
            layers: "all" or "last:N".
            temperature: sampling temperature, at which log-probabilities are taken.

        Raises:
            ConfigError: no such layers, or they share experts with a layer below them.
        """
        self.model = model.eval().requires_grad_(False)
        self.temperature = temperature
        chosen = parse_layers(layers, len(model.layers))
        self.first = chosen[0]
        if chosen != tuple(range(self.first, len(model.layers))):
            raise ConfigError(f"layers={layers!r} are not the last layers; write all or last:N.")
        self.value_head = nn.Linear(model.config.hidden_size, 1, device=model.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        check_sharing(model, self.first)
        trained = trained_prefixes(model, self.first)
        self.parameters: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            if name.startswith(trained):
                parameter.data = parameter.data.float()  # bf16 would round the updates away
                parameter.requires_grad_(True)
                self.parameters[name] = parameter
        self.reference = copy.deepcopy(self.upper()).requires_grad_(False)
        self.parameters |= {
            f"value_head.{name}": p for name, p in self.value_head.named_parameters()
        }

    def upper(self) -> UpperLayers:
        """Return the trained layers and the final norm."""
        return UpperLayers(self.model, self.first)

    @torch.no_grad()
    def trunk(self, responses: Responses) -> Tensor:
        """Return the residual stream `[B, S - 1, D]` that enters the first trained layer; it never
        changes.
        """
        ids_BS = responses.input_ids_BS[:, :-1]
        real_BS = responses.real_BS[:, :-1]
        return below(self.model, self.first, ids_BS, real_BS, responses.routing(self.model))

    def score(self, responses: Responses, stream_BSD: Tensor) -> Scored:
        """Return the scores of responses; differentiable if gradients are enabled.

        Args:
            responses: responses to score.
            stream_BSD: their residual stream, from `trunk`.
        """
        hidden_BTD = self.above(self.upper(), responses, stream_BSD)
        values_BT = self.value_head(hidden_BTD.detach().float())[..., 0]
        logprobs_BT, entropy_BT = self.logprobs(hidden_BTD, responses)
        return Scored(logprobs_BT, torch.where(responses.mask_BT > 0, values_BT, 0.0), entropy_BT)

    @torch.no_grad()
    def reference_logprobs(self, responses: Responses, stream_BSD: Tensor) -> Tensor:
        """Return the log-probabilities `[B, T]` under the reference."""
        return self.logprobs(self.above(self.reference, responses, stream_BSD), responses)[0]

    def above(self, upper: UpperLayers, responses: Responses, stream_BSD: Tensor) -> Tensor:
        """Return the final normed hidden states `[B, T, D]` that predict the response tokens."""
        with autocast(self.model, cached=False):
            step = resume(
                self.model,
                stream_BSD,
                self.first,
                input_ids=responses.input_ids_BS[:, :-1],
                attention_mask=responses.real_BS[:, :-1],
                routing=responses.routing(self.model),
                upper=upper,
            )
            return step.finish(last=responses.mask_BT.shape[1])

    def logprobs(self, hidden_BTD: Tensor, responses: Responses) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of the sampled tokens and entropies, `[B, T]` each, in fp32.

        In bf16, logits near 20 have a spacing of 0.125, as large as the changes that clipping
        allows.
        """
        real_BT = responses.mask_BT > 0
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            head = output_head(self.model)
            logits_NV = replace(head, weight_VD=head.weight_VD.float()).logits(
                hidden_BTD[real_BT].float()
            )
            log_p_NV = (logits_NV / self.temperature).log_softmax(-1)
        taken_N = log_p_NV.gather(1, responses.targets_BT[real_BT][:, None])[:, 0]
        with torch.no_grad():
            entropy_N = -(log_p_NV.exp() * log_p_NV).sum(-1)
        zeros_BT = torch.zeros_like(responses.mask_BT)
        return zeros_BT.masked_scatter(real_BT, taken_N), zeros_BT.masked_scatter(
            real_BT, entropy_N
        )


@torch.no_grad()
def below(
    model: DeepSeekModel,
    layer: int,
    ids_BS: Tensor,
    real_BS: Tensor,
    routing: Mapping[int, RoutingDecision],
) -> Tensor:
    """Return the residual stream `[B, S, D]` that enters block `layer`.

    Tokens follow the routing decisions in `routing`; layers without one choose anew.
    """
    with autocast(model, cached=False):
        return begin(model, ids_BS, attention_mask=real_BS, routing=routing).run_to(layer)


def check_sharing(model: DeepSeekModel, first: int) -> None:
    """Raise `ConfigError` if layer `first` shares experts with layers below it."""
    sharing = model.config.expert_sharing if len(model.expert_pools) else 1
    if first % sharing:
        raise ConfigError(
            f"Layer {first} shares its experts with layers below it, which stay frozen; "
            f"begin at a multiple of {sharing} or take all layers."
        )
