"""Copies to a device for which the host need not wait; the device is "meta", which any build of torch has."""

import torch

from personalize.models.transfer import HostNumbers


def test_single_numbers_stay_on_the_host():
    number, row, dtype = torch.tensor(2.0), torch.ones(3), torch.float64
    with HostNumbers():
        moved = [
            number.to("meta"), number.to(device="meta", dtype=dtype), number.to(torch.ones(2, device="meta")),
            torch.ones((), device="meta"), torch.tensor(3.0, device="meta"), torch.full((), 3.0, device="meta"),
        ]  # fmt: skip
        rows = [row.to("meta"), row.to(torch.device("meta"), dtype), torch.tensor([3.0], device="meta")]
        rows += [row.to("meta").to("meta"), torch.ones(3, device="meta")]
        assert number.to(dtype).dtype == row.to(dtype).dtype == dtype
    assert [one.device.type for one in moved] == ["cpu"] * 6 and moved[1].dtype == dtype
    assert [one.device.type for one in rows] == ["meta"] * 5 and rows[1].dtype == dtype
    assert number.to("meta").device.type == "meta"  # outside the block nothing is left
