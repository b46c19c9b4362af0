"""Advantages and ratios without a value function, as pure functions on tensors.

GRPO compares the answers to one prompt with each other (arXiv:2402.03300); GSPO clips the ratio of
whole answers (arXiv:2507.18071), which does not change when a mixture of experts routes some tokens
differently. Names and shapes are those of `ppo.py`.
"""

import torch
from torch import Tensor

from deepseek.train.rl.ppo import k3


def group_advantages(scores_B: Tensor, group_size: int) -> Tensor:
    """Return the scores `[B]` standardised within each group (arXiv:2402.03300, section 4.1.2).

    Answers of a group whose scores are all equal get 0.

    Args:
        scores_B: score of each response; the responses to a prompt lie next to each other.
        group_size: responses to each prompt; it divides B.
    """
    scores_GK = scores_B.view(-1, group_size)
    centred_GK = scores_GK - scores_GK.mean(dim=1, keepdim=True)
    deviation_G1 = centred_GK.square().mean(dim=1, keepdim=True).sqrt()
    return (centred_GK / (deviation_G1 + 1e-4)).flatten()


def sequence_log_ratio(log_ratio_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return at every response token the mean log ratio of its response `[B, T]`, 0 at padding.

    Its exponential is the likelihood ratio of whole responses, normalised by their lengths
    (arXiv:2507.18071, eq. 7).

    Args:
        log_ratio_BT: log p - log p_old of each token, 0 at padding.
        mask_BT: response tokens.
    """
    lengths_B1 = mask_BT.sum(dim=1, keepdim=True).clamp(min=1.0)
    mean_B1 = log_ratio_BT.sum(dim=1, keepdim=True) / lengths_B1
    return torch.where(mask_BT > 0, mean_B1, 0.0)


def reference_kl(logprobs_BT: Tensor, reference_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the k3 estimate of KL(policy || reference) in nats per token, a scalar
    (arXiv:2402.03300, eq. 4).

    Args:
        logprobs_BT: log-probabilities under the policy; gradients flow through them.
        reference_BT: log-probabilities under the reference.
        mask_BT: response tokens.
    """
    log_ratio_BT = torch.where(mask_BT > 0, reference_BT - logprobs_BT, 0.0)
    return k3(log_ratio_BT, mask_BT)
