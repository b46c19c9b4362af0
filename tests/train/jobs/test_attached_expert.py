"""Experts on stock models: trained, cached, packed and plugged by the same jobs."""

from pathlib import Path

import pytest
import torch
from attached_fixtures import attached
from tiny_families import FAMILIES, tiny_family

from deepseek.data import Batch
from deepseek.kernels.cross_entropy import CandidateHead
from deepseek.model.language_model import expert_beside, output_head
from deepseek.packs.pack import write_pack
from deepseek.train.jobs.expert_task import ExpertTask
from deepseek.train.loop.losses import held_out_loss
from deepseek.train.text.trunk_cache import run_trunk


def rows(seed: int = 0) -> Batch:
    """Return two packed rows of documents that repeat a few tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 20, (2, 32), generator=generator)
    positions = torch.cat([torch.arange(n) for n in (10, 22)]).expand(2, -1)
    labels = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
    labels = labels.masked_fill(torch.arange(32) == 31, -100).masked_fill(
        torch.arange(32) == 9, -100
    )
    return Batch(ids, labels, positions, torch.arange(2))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_an_expert_learns_from_a_trunk_cache_as_without_one(family: str, tmp_path: Path) -> None:
    model = attached(tiny_family(family)).requires_grad_(False)
    layers = model.experts.sites.indices[-2:]
    batch = rows()
    losses = []
    for cached in (True, False):
        module = expert_beside(model, "words", layers, 24)
        stored = run_trunk(model, layers[0], batch)
        stream = lambda rows: stored if cached else run_trunk(model, layers[0], rows)  # noqa: B023, E731
        labels = batch.labels[batch.labels >= 0]
        head = output_head(model)
        candidates = CandidateHead(head.weight_VD, labels, 64, 0, head.cap)
        task = ExpertTask(
            model, module, candidates, stream=stream, held_out=[batch], held_out_stream=stream
        )
        before = task.evaluate()["held_out_loss"]
        assert before == pytest.approx(held_out_loss(model, [batch]).loss, rel=2e-3)
        optimizer = torch.optim.AdamW(task.parameters.values(), lr=1e-2)
        for step in range(12):
            optimizer.zero_grad()
            task.loss(batch, step).loss.backward()
            optimizer.step()
        after = task.evaluate()["held_out_loss"]
        assert after < 0.99 * before
        losses.append(after)
    assert losses[0] == losses[1]

    write_pack(
        tmp_path / "pack", module.to_pack(model.experts.base, "Apache-2.0", dtype=torch.float32)
    )
    model.experts.plug(tmp_path / "pack")
    with model.experts.forced("words"):
        assert held_out_loss(model, [batch]).loss == pytest.approx(losses[1], rel=2e-3)
