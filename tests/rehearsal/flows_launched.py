"""Two processes on two GPUs, launched as `accelerate launch` does it; gloo stands for NCCL, which needs real ones."""

import csv
import os

import pytest
import torch
from PIL import Image

from personalize.adapters.adapter import Adapter
from personalize.cli.launch import load_script, scripts
from personalize.cli.parser import parse
from tests.support.children import in_child, run_processes
from tests.support.tiny import tiny_folder

ROWS = 5
INITIALIZE = torch.distributed.init_process_group


def _gloo(backend=None, *args, **kwargs):
    return INITIALIZE("gloo", *args, **kwargs)


@pytest.fixture
def shop(tmp_path):
    """A tiny base, and a table of pictures."""
    tiny_folder("sd1", tmp_path)
    rows = ["image,caption,name"]
    for number in range(ROWS):
        Image.new("RGB", (64, 64), (40 * number, 80, 60)).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,a cat,n{number}")
    (tmp_path / "items.csv").write_text("\n".join(rows))
    return tmp_path


def _catalogue(shop, output):
    """Learn the table; returns the bytes that the run put on each GPU at most."""
    script = load_script(scripts("train")["catalogue"])
    words = [str(shop / "items.csv"), "--pretrained_model_name_or_path", str(shop / "tiny-sd1"), "--output_dir",
             str(output), "--rank", "2", "--targets", "attention", "--max_train_samples", "2"]  # fmt: skip
    script.main(parse(script.Config, words, prog="catalogue"))
    return [torch.cuda.max_memory_allocated(number) for number in range(2)]


def flow_catalogue_of_two_ranks(shop):
    """The ranks share the rows, each on the GPU of its own; the adapters are those of one process."""

    def rank(index):
        os.environ.pop("ACCELERATE_USE_CPU")
        torch.distributed.init_process_group = _gloo
        torch.cuda.set_device(0)
        return _catalogue(shop, shop / "two")

    used = run_processes(rank, 2)
    assert used[0][0] > 1e6 and used[1][1] > 1e6, "each has its base on its own GPU"
    assert used[0][1] == 0 and used[1][0] == 0, "and nothing on the other's"
    alone = in_child(lambda: _catalogue(shop, shop / "one"))[0]
    assert alone[0] > 1e6 and alone[1] == 0
    with open(shop / "two" / "results.csv", newline="") as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["done"] * ROWS
    for number in range(ROWS):
        two, one = (Adapter.load(shop / kind / f"n{number}") for kind in ("two", "one"))
        assert all(torch.equal(two.lora[key], one.lora[key]) for key in one.lora)
