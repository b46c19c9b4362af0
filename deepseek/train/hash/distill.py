"""Fit the hashes of LSH attention to a frozen model's attention, without training the model.

Calibration clusters the keys by k-means per key/value head. The metric is that of the queries, M =
E[q q^T] over queries rotated by random distances and weighted by their attention to far keys, so
that the keys of a bucket get similar scores. A query probes buckets by its score with the bucket's
centre plus the logarithm of the bucket's size.

Distillation then trains the probing. With fixed buckets, the attention of a query to each bucket is
known, and its cross-entropy with softmax(W q + b) is convex in each head's W and b. L-BFGS
minimises it from the calibrated start, in seconds and without a learning rate.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek.checkpoint.store import latest_state, load_state, prune, save_state
from deepseek.errors import TrainError
from deepseek.kernels.lsh.intervals import Windows
from deepseek.model.attention.hash import LinearHash, from_named_tensors, named_tensors
from deepseek.model.transformer import DeepSeekModel
from deepseek.train.hash.attention_inputs import (
    HeadInputs,
    attention_scores,
    bucket_mass,
    near_keys,
    recent_in_bucket,
    stream_layers,
)
from deepseek.train.loop.progress import InterruptGuard

Rotate = Callable[[Tensor, Tensor], Tensor]
"""Function of queries `[H, N, K]` and distances `[N]` that returns the queries as seen by keys at
these distances.
"""

DISTANCES = 8
"""Number of random distances per sampled query in the metric."""

LARGEST_SAMPLE = 16_384
"""Maximum keys per head for k-means; more have no measurable effect."""


@dataclass(frozen=True)
class HashSettings:
    """Settings that, with model and text, determine a hash.

    Attributes:
        num_buckets: buckets per key/value head, independent of the text's length.
        bucket_window: keys of a bucket that a query attends to, as in the model that will use the
            hash.
        local_window: length of the local window of that model.
        sinks: number of first keys that are always visible in that model.
        queries: positions per text whose attention is sampled.
        rounds: iterations of k-means.
        solver_steps: iterations of L-BFGS; 0: keep the calibrated hash.
        ridge: penalty on the distance from the calibrated map, in nats per squared unit of a weight
            on normalised queries.
        seed: seed of all sampling.
    """

    num_buckets: int = 64
    bucket_window: int = 40
    local_window: int = 128
    sinks: int = 4
    queries: int = 512
    rounds: int = 12
    solver_steps: int = 40
    ridge: float = 1e-4
    seed: int = 0

    @property
    def windows(self) -> Windows:
        return Windows(self.local_window, self.sinks, self.bucket_window, self.num_buckets)


def distill_hashes(
    model: DeepSeekModel,
    ids_RT: Tensor,
    settings: HashSettings,
    layers: Sequence[int],
    state: Path,
    *,
    identity: str = "",
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> dict[int, LinearHash]:
    """Return a hash for each of `layers`, fitted to the model's attention on R texts of T tokens.

    Args:
        model: model with full attention.
        ids_RT: token ids of the texts.
        settings: settings of the hashes.
        layers: layers that get a hash.
        state: folder of finished layers, from which the same call resumes.
        identity: fingerprint of model and texts; a state with another one is deleted.
        progress: called with finished layers, all layers and a label.

    Raises:
        TrainError: the texts are too short to have keys beyond the local window.
        KeyboardInterrupt: after Ctrl-C; finished layers are stored.
    """
    if ids_RT.shape[1] < 4 * settings.local_window:
        raise TrainError(
            f"Texts of {ids_RT.shape[1]} tokens teach nothing about far keys; give at least "
            f"{4 * settings.local_window}, four times the local window."
        )
    meta = {"settings": asdict(settings), "identity": identity}
    hashes = _finished(state, meta)
    with InterruptGuard() as interrupt:
        for layer, texts in stream_layers(model, ids_RT):
            if layer in layers and layer not in hashes:
                hashes[layer] = fit_hash(texts, settings, _rotation(model))
                save_state(state / f"step-{len(hashes):08d}", named_tensors(hashes), meta)
                prune(state, keep=1)
            progress(layer + 1, len(model.layers), "distil")
            if interrupt.asked:
                raise KeyboardInterrupt(
                    f"stopped after layer {layer}, nothing is lost; the same call resumes the run"
                )
            if layer >= max(layers):
                break
    return {layer: hashes[layer] for layer in layers}


def _finished(state: Path, meta: dict[str, Any]) -> dict[int, LinearHash]:
    newest = latest_state(state)
    if newest is None:
        return {}
    tensors, stored_meta = load_state(newest)
    if stored_meta == meta:
        return from_named_tensors(tensors)
    # Left there, a stale state of more layers would count as the newest one.
    shutil.rmtree(state)
    return {}


def _rotation(model: DeepSeekModel) -> Rotate:
    def rotate(query_HNK: Tensor, distance_N: Tensor) -> Tensor:
        positions = model.positions.prepare(distance_N[None].to(model.device), torch.float32)
        rotated: Tensor = positions(query_HNK[None], query_HNK[None])[0][0]
        return rotated

    return rotate


def fit_hash(texts: Sequence[HeadInputs], settings: HashSettings, rotate: Rotate) -> LinearHash:
    """Return the hash of one layer: calibrated, and distilled unless `solver_steps` is 0."""
    generator = torch.Generator().manual_seed(settings.seed)
    positions = [_positions(text, settings, generator) for text in texts]
    weights = [
        attention_scores(text, at_N).softmax(-1)
        for text, at_N in zip(texts, positions, strict=True)
    ]
    metric_GKK = _metric(texts, positions, weights, settings, rotate, generator)
    calibrated = _calibrate(texts, metric_GKK, settings, generator)
    if not settings.solver_steps:
        return calibrated
    mass = []
    for text, at_N, weights_HNS in zip(texts, positions, weights, strict=True):
        codes_GS = calibrated.key_codes(text.plain_key_GTK[None])[0]
        mass_HNC = bucket_mass(
            weights_HNS, codes_GS, recent_in_bucket(codes_GS, at_N, settings.windows)
        )
        mass.append(
            torch.nn.functional.pad(mass_HNC, (0, settings.num_buckets - mass_HNC.shape[-1]))
        )
    query_HNK = torch.cat(
        [text.plain_query_HTK[:, at_N] for text, at_N in zip(texts, positions, strict=True)], 1
    )
    return distill_queries(calibrated, query_HNK, torch.cat(mass, 1), settings)


def _positions(text: HeadInputs, settings: HashSettings, generator: torch.Generator) -> Tensor:
    """Sample positions that have keys beyond the local window."""
    length = text.key_GTK.shape[1]
    first = 2 * settings.local_window
    shuffled = torch.randperm(length - first, generator=generator)
    return shuffled[: settings.queries].sort().values.to(text.key_GTK.device) + first


def _metric(
    texts: Sequence[HeadInputs],
    at: Sequence[Tensor],
    weights: Sequence[Tensor],
    settings: HashSettings,
    rotate: Rotate,
    generator: torch.Generator,
) -> Tensor:
    """Return `E[q q^T]` `[G, K, K]` of each key/value head, over queries weighted by far
    attention.
    """
    total: Tensor | int = 0
    for text, at_N, weights_HNS in zip(texts, at, weights, strict=True):
        groups, length = text.key_GTK.shape[:2]
        far_HN = (weights_HNS * ~near_keys(at_N, length, settings.windows)).sum(-1)
        for _ in range(DISTANCES):
            share_N = torch.rand(len(at_N), generator=generator).to(at_N.device)
            reach_N = share_N * (at_N - settings.local_window)
            seen_HNK = rotate(text.plain_query_HTK[:, at_N], reach_N.long() + settings.local_window)
            second_HKK = (seen_HNK * far_HN[..., None]).mT @ seen_HNK
            total = total + second_HKK.unflatten(0, (groups, -1)).sum(1)
    assert isinstance(total, Tensor)
    return total / total.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None].clamp(min=1e-30)


def _calibrate(
    texts: Sequence[HeadInputs],
    metric_GKK: Tensor,
    settings: HashSettings,
    generator: torch.Generator,
) -> LinearHash:
    """Return buckets by k-means in the metric; probing scores add the log of the bucket's size."""
    heads = texts[0].plain_query_HTK.shape[0]
    width = texts[0].plain_query_HTK.shape[-1]
    key_GNK = torch.cat([text.plain_key_GTK for text in texts], 1)
    shuffled = torch.randperm(key_GNK.shape[1], generator=generator)
    key_GNK = key_GNK[:, shuffled[:LARGEST_SAMPLE].to(key_GNK.device)]
    mean_G1K = key_GNK.mean(1, keepdim=True)
    values_GK, vectors_GKK = torch.linalg.eigh(
        metric_GKK + 1e-4 * torch.eye(width, device=metric_GKK.device)
    )
    root_GKK = vectors_GKK * values_GK.sqrt()[:, None] @ vectors_GKK.mT
    clusters = [
        kmeans(x_NK, settings.num_buckets, settings.rounds)
        for x_NK in (key_GNK - mean_G1K) @ root_GKK
    ]
    centre_GCK, size_GC = (torch.stack(part) for part in zip(*clusters, strict=True))
    key_weight_GKC = root_GKK @ centre_GCK.mT
    # argmin |x - c|^2 = argmax x.c - |c|^2 / 2
    key_bias_GC = -0.5 * centre_GCK.square().sum(-1) - (mean_G1K @ key_weight_GKC)[:, 0]
    query_weight_GKC = torch.linalg.solve(root_GKK, centre_GCK.mT) * width**-0.5
    share = heads // len(key_GNK)
    query_bias_HC = size_GC.clamp(min=1).log().repeat_interleave(share, 0)
    return LinearHash(
        key_weight_GKC, key_bias_GC, query_weight_GKC.repeat_interleave(share, 0), query_bias_HC
    )


def kmeans(x_NK: Tensor, clusters: int, rounds: int) -> tuple[Tensor, Tensor]:
    """Return centres `[C, K]` and sizes `[C]` of Lloyd's algorithm, started from the first rows.

    The rows must be shuffled. A centre without points is moved to another row. With fewer points
    than clusters, the surplus centres stay at points.
    """
    first_C = torch.arange(clusters, device=x_NK.device)
    centre_CK = x_NK[first_C % len(x_NK)].clone()
    size_C = x_NK.new_zeros(clusters)
    for number in range(rounds):
        nearest_N = (x_NK @ centre_CK.T - 0.5 * centre_CK.square().sum(-1)).argmax(-1)
        size_C = torch.bincount(nearest_N, minlength=clusters).float()
        sum_CK = torch.zeros_like(centre_CK).index_add_(0, nearest_N, x_NK)
        again_CK = x_NK[(first_C + (number + 1) * clusters) % len(x_NK)]
        centre_CK = torch.where(
            size_C[:, None] > 0, sum_CK / size_C[:, None].clamp(min=1), again_CK
        )
    return centre_CK, size_C


def distill_queries(
    start: LinearHash, query_HNK: Tensor, mass_HNC: Tensor, settings: HashSettings
) -> LinearHash:
    """Return `start` with query maps trained to predict the attention to each bucket.

    Args:
        start: calibrated hash.
        query_HNK: queries before positions are applied.
        mass_HNC: attention of each query to the reachable keys of each bucket; its sum is the
            query's weight.
        settings: solver settings.
    """
    norm_H11 = query_HNK.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-6)
    query_HNK = query_HNK / norm_H11
    total = mass_HNC.sum().clamp(min=1e-6)
    first_HKC = start.query_weight * norm_H11
    weight_HKC, bias_HC = (part.clone().requires_grad_() for part in (first_HKC, start.query_bias))
    solver = torch.optim.LBFGS(
        [weight_HKC, bias_HC],
        max_iter=settings.solver_steps,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        logits_HNC = query_HNK @ weight_HKC + bias_HC[:, None]
        entropy = -(mass_HNC * logits_HNC.log_softmax(-1)).sum() / total
        loss = entropy + settings.ridge * (weight_HKC - first_HKC).square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    return LinearHash(start.key_weight, start.key_bias, weight_HKC / norm_H11, bias_HC)
