"""Which samples a run draws of its pictures."""

import pytest
import torch
from torch import Tensor

from personalize.errors import UserError
from personalize.training.data.samples import LatentDataset, SampleShard
from tests.support.samples import picture


def test_forgedit_c21_samples_are_counted_exactly() -> None:
    assert SampleShard(10).updates(400) == 40
    assert SampleShard(10, 1).updates(400) == 40
    assert SampleShard(10, 5, 0, 2).updates(400) == 40
    assert SampleShard(10).updates(409) == 40
    with pytest.raises(UserError, match="one update of 10 samples"):
        SampleShard(10).updates(9)


def test_forgedit_c21_every_way_of_dealing_out_sees_the_same_samples() -> None:
    def drawn(*shares: SampleShard) -> dict[str, Tensor]:
        """Update 3's samples of all processes, in the order of their index."""
        rows = {}
        for share in shares:
            for chunk, batch in zip(share.chunks(), picture().batches(share, 3, 4), strict=True):
                rows |= {index: [v[i] for v in batch.values()] for i, index in enumerate(chunk.indices)}
        assert sorted(rows) == list(range(shares[0].samples))
        return {str(i): torch.cat([v.flatten() for v in rows[i]]) for i in sorted(rows)}

    one = drawn(SampleShard(4))
    for others in (
        [SampleShard(4, 1)],
        [SampleShard(4, 2, rank, 2) for rank in (0, 1)],
        [SampleShard(4, 1, rank, 2) for rank in (0, 1)],
    ):
        many = drawn(*others)
        assert all(torch.equal(one[key], many[key]) for key in one)
    assert len({tuple(row.tolist()) for row in one.values()}) == 4  # no sample twice


def test_timesteps_and_posterior() -> None:
    steps = torch.cat([batch["timesteps"] for batch in picture().batches(SampleShard(50), 0, 40)]).double()
    assert steps.min() >= 0 and steps.max() <= 999
    assert abs(steps.mean() - 499.5) < 4 * 1000 / 12**0.5 / 2000**0.5  # four standard errors of a uniform mean
    fixed = next(picture().batches(SampleShard(2), 0, 1))["latents"]
    assert torch.equal(fixed[0], fixed[1])
    drawn = torch.cat([batch["latents"] for batch in picture(resample=True).batches(SampleShard(50), 0, 4)])
    assert not torch.equal(drawn[0], drawn[1])
    assert (drawn.std(0).mean() - 0.1).abs() < 0.01


def test_several_pictures_take_turns_over_updates_and_batches() -> None:
    mean = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 4, 8, 8)
    several = LatentDataset(mean, torch.zeros(3, 4, 8, 8), 0, rows=(0, 1, 0), weights=torch.ones(3, 1, 8, 8))
    batches = list(several.batches(SampleShard(4, 2), 0, 2))
    seen = torch.cat([batch["latents"][:, 0, 0, 0] for batch in batches]).tolist()
    assert seen == [0, 1, 2, 0, 1, 2, 0, 1] and batches[0]["weights"].shape == (2, 1, 8, 8)
    assert torch.cat([batch["rows"] for batch in batches]).tolist() == [0, 1, 0, 0, 1, 0, 0, 1]


def test_class_pictures_come_behind_and_have_noise_of_their_own() -> None:
    own = picture()
    both = LatentDataset(
        own.mean, own.std, 0, prior=(LatentDataset(own.mean, own.std, 0, rows=(1,), purpose="class "),)
    )
    batch, alone = next(both.batches(SampleShard(2), 0, 1)), next(own.batches(SampleShard(2), 0, 1))
    assert all(torch.equal(batch[name][:2], alone[name]) for name in alone)
    assert batch["rows"].tolist() == [0, 0, 1, 1] and not torch.equal(batch["noise"][:2], batch["noise"][2:])
