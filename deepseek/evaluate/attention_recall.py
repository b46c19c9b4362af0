"""Recall of sparse attention per layer and head, and the error of its output."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deepseek.checkpoint.store import atomic_write
from deepseek.kernels.lsh.intervals import Windows
from deepseek.model.attention.lsh import Hash
from deepseek.model.transformer import DeepSeekModel
from deepseek.train.hash.attention_inputs import (
    HeadInputs,
    attention_scores,
    near_keys,
    recent_in_bucket,
    stream_layers,
)

Choose = Callable[[int, HeadInputs, Tensor, Tensor], Tensor]
"""Function of layer, inputs, positions `[N]` and scores `[H, N, S]` that returns True `[H, N, S]`
at the keys to attend to.
"""


@dataclass(frozen=True)
class Kept:
    """Means over queries, each `[H]`.

    Attributes:
        recall: share of the full attention that falls on the chosen keys.
        error: norm of the output's error relative to the exact output.
        keys: number of chosen keys.
    """

    recall: Tensor
    error: Tensor
    keys: Tensor


def local_keys(windows: Windows) -> Choose:
    """Choose the local window and the sinks."""
    return lambda _, __, at_N, scores_HNS: near_keys(at_N, scores_HNS.shape[-1], windows).expand_as(
        scores_HNS
    )


def best_keys(windows: Windows, count: int) -> Choose:
    """Choose the local window, the sinks and the keys of highest score, `count` in total.

    This is an upper bound on the recall of any hash with a budget of `count` keys. All hashes
    include the window and the sinks, so `count` must exceed both together.
    """

    def choose(_: int, __: HeadInputs, at_N: Tensor, scores_HNS: Tensor) -> Tensor:
        near_NS = near_keys(at_N, scores_HNS.shape[-1], windows)
        chosen_HNS = scores_HNS.masked_fill(near_NS, torch.inf).topk(count, -1).indices
        return (
            torch.zeros_like(scores_HNS, dtype=torch.bool).scatter_(2, chosen_HNS, True)
            & scores_HNS.isfinite()
        )

    return choose


def hashed_keys(
    windows: Windows, probes: int, hashes: Mapping[int, Hash], positioned: bool = False
) -> Choose:
    """Choose the keys of LSH attention.

    Args:
        windows: local window, sinks and bucket window.
        probes: buckets that each query probes.
        hashes: hash of each layer.
        positioned: let the hash read queries and keys after positions are applied; default: before.
    """

    def choose(layer: int, inputs: HeadInputs, at_N: Tensor, scores_HNS: Tensor) -> Tensor:
        query = inputs.query_HTK if positioned else inputs.plain_query_HTK
        key = inputs.key_GTK if positioned else inputs.plain_key_GTK
        codes_GS = hashes[layer].key_codes(key[None])[0]
        codes_HNP = hashes[layer].query_codes(query[None, :, at_N], probes)[0]
        share = len(codes_HNP) // len(codes_GS)
        probed_HNC = torch.zeros(
            *codes_HNP.shape[:2], windows.num_buckets, dtype=torch.bool, device=codes_HNP.device
        )
        probed_HNC.scatter_(2, codes_HNP, True)
        codes_HNS = codes_GS.repeat_interleave(share, 0)[:, None].expand_as(scores_HNS)
        recent_HNS = recent_in_bucket(codes_GS, at_N, windows).repeat_interleave(share, 0)
        return probed_HNC.gather(2, codes_HNS) & recent_HNS | near_keys(
            at_N, scores_HNS.shape[-1], windows
        )

    return choose


@torch.no_grad()
def attention_kept(
    model: DeepSeekModel,
    ids_RT: Tensor,
    key_choices: Mapping[str, Choose],
    queries: int = 64,
    first_layer: int = 0,
) -> Iterator[tuple[int, dict[str, Kept]]]:
    """Yield each layer's index with the recall of each way of choosing keys, from `first_layer` on.

    Args:
        model: model with full attention.
        ids_RT: R texts of T tokens.
        key_choices: functions that choose keys, by name.
        queries: positions per text, evenly spaced in its second half.
        first_layer: first layer to measure.
    """
    length = ids_RT.shape[1]
    at_N = torch.linspace(length // 2, length - 1, queries, device=model.device).long()
    for layer, texts in stream_layers(model, ids_RT):
        if layer >= first_layer:
            parts = [_measure_kept(layer, inputs, at_N, key_choices) for inputs in texts]
            means = {}
            for name in key_choices:
                means[name] = _mean([part[name] for part in parts])
            yield layer, means


def _measure_kept(
    layer: int, inputs: HeadInputs, at_N: Tensor, key_choices: Mapping[str, Choose]
) -> dict[str, Kept]:
    scores_HNS = attention_scores(inputs, at_N)
    weights_HNS = scores_HNS.softmax(-1)
    value_HSK = inputs.value_GTK.repeat_interleave(len(scores_HNS) // len(inputs.value_GTK), 0)
    exact_HNK = weights_HNS @ value_HSK
    results = {}
    for name, choose in key_choices.items():
        chosen_HNS = choose(layer, inputs, at_N, scores_HNS)
        sparse_HNK = scores_HNS.masked_fill(~chosen_HNS, -torch.inf).softmax(-1) @ value_HSK
        error_HN = (sparse_HNK - exact_HNK).norm(dim=-1) / exact_HNK.norm(dim=-1)
        recall_HN = (weights_HNS * chosen_HNS).sum(-1)
        results[name] = Kept(
            recall_HN.mean(-1), error_HN.mean(-1), chosen_HNS.sum(-1).float().mean(-1)
        )
    return results


def _mean(parts: list[Kept]) -> Kept:
    return Kept(
        *(
            torch.stack([getattr(part, name) for part in parts]).mean(0)
            for name in ("recall", "error", "keys")
        )
    )


def draw_recall(path: Path, recall_LH: Tensor, layers: list[int], title: str) -> None:
    """Plot recall by layer and head to a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(1.5 + 0.5 * recall_LH.shape[1], 1.5 + 0.25 * len(layers)), layout="constrained"
    )
    axes = figure.add_subplot(xlabel="head", ylabel="layer", title=title)
    image = axes.imshow(recall_LH.cpu().numpy(), aspect="auto", vmin=0.5, vmax=1.0, cmap="viridis")
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=7)
    axes.set_xticks(range(recall_LH.shape[1]))
    figure.colorbar(image, label="share of the attention kept (0.5 and less: darkest)")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
