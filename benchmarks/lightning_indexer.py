"""The learned indexer of DeepSeek Sparse Attention, as a rival of the hash (`hash_recall.py`).

A few small heads score every key for every query, `I(t, s) = sum_j w_tj ReLU(q_tj . k_s)`, and the
keys with the highest scores are attended to (DeepSeek-V3.2-Exp, equation 1). It is trained with the
model frozen, on the KL divergence of the softmax of its scores from the model's attention (equation
3). As published, half of each head's width is rotated and all heads of a layer share one choice of
keys. With one indexer per key/value head, each chooses for its own queries, as a hash does.

Like the hash, it is trained on the attention beyond the local window and the sinks, which are
attended to anyway.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from deepseek import DeepSeekModel
from deepseek.evaluate.attention_recall import Choose, best_keys
from deepseek.kernels.lsh.intervals import Windows
from deepseek.train.hash.attention_inputs import HeadInputs, attention_scores, near_keys

Rotate = Callable[[Tensor, Tensor], Tensor]
"""Function of heads `[..., N, K]` and positions `[N]` that returns the heads rotated."""


@dataclass(frozen=True)
class IndexerSettings:
    """Size and training of an indexer.

    Attributes:
        heads: heads per choice of keys.
        per_group: whether each key/value head has its own indexer; default: one per layer.
        steps: training steps, each on `queries` queries of one text.
        queries: queries per step.
        learning_rate: peak learning rate of Adam, with cosine decay to zero.
        seed: seed of weights and queries.
    """

    heads: int = 4
    per_group: bool = False
    steps: int = 300
    queries: int = 64
    learning_rate: float = 2e-3
    seed: int = 0


class Indexer(nn.Module):
    """Scores the keys of one layer, for U choices of keys with J heads of width K each.

    Its input is the concatenated queries of all heads before positions are applied. In SmolLM2
    these are a square linear map of the layer's input, which the published indexer reads.
    """

    def __init__(self, choices: int, heads: int, inputs: HeadInputs, rotate: Rotate) -> None:
        super().__init__()
        width = inputs.plain_query_HTK.shape[-1]
        features_TD = features(inputs)
        self.rotate = rotate
        self.scale = float(features_TD.square().mean().rsqrt())
        self.query = random_weight(choices, features_TD.shape[1], heads * width)
        self.key = random_weight(choices, features_TD.shape[1], width)
        self.gate = random_weight(choices, features_TD.shape[1], heads)

    def forward(self, inputs: HeadInputs, at_N: Tensor) -> Tensor:
        """Return the scores `[U, N, S]` of all keys for the queries at positions `at_N`."""
        x_SD = features(inputs) * self.scale
        x_ND = x_SD[at_N]
        width = self.key.shape[-1]
        query_UJNK = (x_ND @ self.query).unflatten(-1, (-1, width)).transpose(1, 2)
        key_USK = layer_norm(x_SD @ self.key, (width,))
        turned_UJNK = self.half_rotated(query_UJNK, at_N)
        turned_USK = self.half_rotated(key_USK, torch.arange(len(x_SD)))
        gate_UNJ = (x_ND @ self.gate) / math.sqrt(self.gate.shape[-1] * width)
        matches_UJNS = (turned_UJNK @ turned_USK.mT[:, None]).relu()
        return torch.einsum("unj,ujns->uns", gate_UNJ, matches_UJNS)

    def half_rotated(self, heads: Tensor, positions_N: Tensor) -> Tensor:
        """Return heads with only the faster half of the frequencies rotated."""
        half = heads.shape[-1] // 2
        fast_K = torch.arange(2 * half) % half < half // 2
        return torch.where(fast_K, self.rotate(heads, positions_N), heads)

    def multiply_adds(self, length: int) -> int:
        """Return the number of multiply-adds for a query with `length` keys."""
        choices, inputs, width = self.key.shape
        heads = self.gate.shape[-1]
        projections = inputs * (heads * width + width + heads)
        return choices * (projections + length * heads * (width + 1))


def features(inputs: HeadInputs) -> Tensor:
    """Return the input of an indexer, `[T, D]`."""
    return inputs.plain_query_HTK.transpose(0, 1).flatten(1)


def random_weight(choices: int, inputs: int, outputs: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(choices, inputs, outputs) * inputs**-0.5)


def rotation(model: DeepSeekModel) -> Rotate:
    """Return the function that applies the model's rotary positions to heads."""

    def rotate(heads: Tensor, positions_N: Tensor) -> Tensor:
        positions = model.positions.prepare(positions_N[None], torch.float32)
        flat = heads.flatten(0, -3)[None]
        return positions(flat, flat)[0].view_as(heads)

    return rotate


def fit_indexer(
    texts: Sequence[HeadInputs], settings: IndexerSettings, windows: Windows, rotate: Rotate
) -> Indexer:
    """Train the indexer of one layer on the attention to far keys in texts."""
    torch.manual_seed(settings.seed)
    choices = len(texts[0].key_GTK) if settings.per_group else 1
    indexer = Indexer(choices, settings.heads, texts[0], rotate)
    optimizer = torch.optim.Adam(indexer.parameters(), settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for step in range(settings.steps):
        inputs = texts[step % len(texts)]
        length = inputs.key_GTK.shape[1]
        first = 2 * windows.local
        at_N = torch.randperm(length - first)[: settings.queries].sort().values + first
        loss = divergence(indexer(inputs, at_N), inputs, at_N, windows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return indexer.requires_grad_(False)


def divergence(index_UNS: Tensor, inputs: HeadInputs, at_N: Tensor, windows: Windows) -> Tensor:
    """Return the cross-entropy between the attention to far keys and the softmax of scores, in
    nats.

    It equals the KL divergence up to a term that does not depend on the indexer. Each query is
    weighted by its attention to far keys.
    """
    length = index_UNS.shape[-1]
    age_NS = at_N[:, None] - torch.arange(length)
    far_NS = ~near_keys(at_N, length, windows) & (age_NS >= 0)
    weights_HNS = attention_scores(inputs, at_N).softmax(-1) * far_NS
    target_UNS = weights_HNS.unflatten(0, (len(index_UNS), -1)).sum(1)
    log_shares_UNS = index_UNS.masked_fill(~far_NS, -torch.inf).log_softmax(-1)
    entropy = -(target_UNS * log_shares_UNS.masked_fill(~far_NS, 0)).sum()
    return entropy / target_UNS.sum().clamp(min=1e-6)


def indexed_keys(windows: Windows, count: int, indexers: Mapping[int, Indexer]) -> Choose:
    """Return a function that chooses the local window, the sinks and the keys that an indexer
    scores highest, `count` in total.
    """
    highest = best_keys(windows, count)

    def choose(layer: int, inputs: HeadInputs, at_N: Tensor, scores_HNS: Tensor) -> Tensor:
        index_UNS = indexers[layer](inputs, at_N)
        index_HNS = index_UNS.repeat_interleave(len(scores_HNS) // len(index_UNS), 0)
        visible_HNS = index_HNS.masked_fill(scores_HNS.isinf(), -torch.inf)
        return highest(layer, inputs, at_N, visible_HNS)

    return choose
