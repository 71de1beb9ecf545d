"""The speed bench's own instruments: turns, ratios, exponents, refusals; and that its arms are what they say."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from personalize.adapters import lora_layers
from personalize.models.fast_paths import fast_paths
from tests.bench.speed import arms
from tests.bench.speed import bench as speed
from tests.bench.speed import drawing as speed_drawing
from tests.bench.speed import growth as speed_growth
from tests.bench.speed import jobs as speed_jobs
from tests.bench.speed import pages as speed_pages
from tests.bench.speed import parts as speed_parts
from tests.bench.speed import reference as speed_reference
from tests.bench.speed import setup as speed_setup
from tests.bench.speed.arms import Arm, exponent, measure, ratio, refuse_if_busy, table
from tests.bench.speed.setup import freed_memory, pefts_layers, plain_unet
from tests.support.tiny import tiny_folder, tiny_sd1


def test_arms_take_turns_in_their_own_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of its own: arm b takes half of a's time, and the machine slows down all the while."""
    seen, now, state = [], [0.0], ["none"]

    @contextmanager
    def inside(name: str):
        state[0] = name
        yield
        state[0] = "none"

    def run(name: str, takes: float):
        assert state[0] == name
        seen.append(name)
        now[0] += takes * 1.1 ** len(seen)

    monkeypatch.setattr(arms.time, "perf_counter", lambda: now[0])
    both = [
        Arm("a", lambda: run("a", 2.0), lambda: inside("a")),
        Arm("b", lambda: run("b", 1.0), lambda: inside("b"), {"why": "half"}),
    ]
    first, second = measure("part", both, groups=4, warmup=0)
    assert "".join(seen) == "abba" * 2 and state == ["none"]
    assert (first["ratio"], first["ratio_to"], second["why"], second["groups"]) == (1.0, "a", "half", 4)
    assert second["ratio"] == pytest.approx(2, rel=0.02)  # slower by a tenth a call, which turns average out
    measured = measure("part", both, groups=9, warmup=0, seconds=1e-9)
    assert measured[0]["groups"] == 2  # no further group after that long


def test_ratios_have_intervals_and_costs_exponents() -> None:
    found = ratio([2.0, 2.2, 1.8, 2.0], [1.0, 1.0, 1.0, 1.0])
    assert found["ratio"] == 2.0 and found["ratio_ci95"][0] < 2.0 < found["ratio_ci95"][1]
    assert exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)


def test_a_busy_machine_is_refused_unless_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "foreign_load", lambda: 0.8)
    with pytest.raises(SystemExit, match="0.8 cores are busy"):
        refuse_if_busy(False)
    assert refuse_if_busy(True) == 0.8


def test_parts_are_measured_once_and_one_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def fine(bench: speed.SpeedBench) -> list[dict]:
        calls.append(bench.batch)
        return measure("fine", [Arm("one", lambda: None)], groups=2)

    def failing(bench: speed.SpeedBench) -> list[dict]:
        raise RuntimeError("no room\nfor more")

    monkeypatch.setattr(speed, "refuse_if_busy", lambda force: 0.0)
    monkeypatch.setattr(speed_parts, "PARTS", {"failing": failing, "fine": fine})
    bench = speed.SpeedBench(only=["failing", "fine"], output_dir=tmp_path, batch=3)
    for _ in range(2):
        text = speed.main(bench)
    assert (
        calls == [3] and "| fine | one |" in text and "part failing was left out: no room\n" in capsys.readouterr().out
    )
    rows = [json.loads(line) for line in (tmp_path / "embedded-no-3-native.jsonl").read_text().splitlines()]
    assert rows[1]["arm"] == "one" and {"commit", "torch", "load_average", "wall_s", "foreign_load"} <= set(rows[1])
    assert (tmp_path / "embedded-no-3-native.md").read_text() == text == table(rows[1:2])
    with pytest.raises(SystemExit, match="no part 'nothing'"):
        speed.main(speed.SpeedBench(only=["nothing"], output_dir=tmp_path))


def test_memory_is_kept_as_the_innermost_arm_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[bool] = []
    monkeypatch.setattr(speed_setup, "_set_memory", states.append)
    with pytest.raises(KeyError), freed_memory(True):
        with freed_memory(False):
            pass
        raise KeyError
    assert states == [True, False, True, False]


def test_arms_are_what_they_say() -> None:
    unet = tiny_sd1().unet
    plain = {name: set(vars(module)) for name, module in unet.named_modules()}
    with fast_paths(unet):
        assert any(
            type(vars(m).get("output_scale_factor")) is not float for m in unet.modules() if "time_emb_proj" in dir(m)
        )
        with plain_unet(unet):
            assert {name: set(vars(module)) for name, module in unet.named_modules()} == plain
    ours = lora_layers.LoraLinear.forward
    with pefts_layers():
        assert lora_layers.LoraLinear.forward is not ours
    assert lora_layers.LoraLinear.forward is ours


@pytest.mark.slow  # every arm of every part, some of thirty steps
@pytest.mark.parametrize("part", list(speed_parts.DEFAULT))
def test_a_part_measures_every_arm(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_sd1()
    for room in (speed_drawing, speed_parts, speed_setup):
        monkeypatch.setattr(room, "model_of", lambda bench: model)
    monkeypatch.setattr(speed_parts, "base", lambda name: model)
    before = {name: p.detach().clone() for name, p in model.unet.named_parameters()}
    rows = speed_parts.DEFAULT[part](speed.SpeedBench(batch=1, rank=2, groups=1))
    assert len(rows) == len({row["arm"] for row in rows}) > 1 and all(row["ms_median"] > 0 for row in rows)
    after = dict(model.unet.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow  # fifteen sizes
def test_growth_is_measured_for_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_sd1()
    monkeypatch.setattr(speed_growth, "base", lambda name: model)
    rows = speed_growth.growth(speed.SpeedBench(batch=1, rank=2, groups=1, output_dir=tmp_path))
    kinds = ["samples", "pixels", "rank", "concepts", "catalogue rows"]
    assert [row["arm"] for row in rows] == [f"{kind}, exponent" for kind in kinds]
    assert all(min(row["ms"]) > 0 and row["ratio"] == exponent(row["sizes"], row["ms"]) for row in rows)
    assert (tmp_path / "growth.png").is_file()


@pytest.mark.slow  # nine adapters
def test_jobs_are_done_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_sd1()
    for room in (speed_jobs, speed_setup):
        monkeypatch.setattr(room, "model_of", lambda bench: model)
    monkeypatch.setattr(speed_jobs, "UPDATES", 1)
    monkeypatch.setattr(speed_jobs, "STEPS", 2)
    monkeypatch.setattr(speed_jobs, "ROWS", 2)
    rows = speed_jobs.jobs(speed.SpeedBench(batch=1, rank=2, groups=1))
    names = ["one adapter", "2 rows of a catalogue", "an edit of 2 guided steps", "a drag"]
    assert [row["arm"] for row in rows] == names and all(row["ms_median"] > 0 for row in rows)


@pytest.mark.slow  # two processes that import everything
@pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU's memory")
def test_kept_memory_is_measured_in_processes_of_their_own(tmp_path: Path) -> None:
    bench = speed.SpeedBench(base=str(tiny_folder("sd1", tmp_path)), batch=1, rank=2, groups=1)
    rows = speed_pages.kept(bench)
    assert [row["arm"] for row in rows] == list(speed_pages.ARMS) and all(row["ms_median"] > 0 for row in rows)
    assert rows[0]["ratio"] == 1.0


def test_their_script_gets_our_modules_and_whole_batches(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"config = dict(\n    {speed_reference.TARGETS}\n)\n")
    (tmp_path / "picture.jpg").write_bytes(b"picture")
    copy = speed_reference.patch(script, tiny_sd1(), tmp_path, 4)
    assert copy.read_text().count(".attn1.to_q'") == 13 and len(list((tmp_path / "pictures").iterdir())) == 12
    script.write_text("nothing of the kind")
    with pytest.raises(SystemExit, match="another version"):
        speed_reference.patch(script, tiny_sd1(), tmp_path, 4)


def test_growth_is_drawn(tmp_path: Path) -> None:
    file = speed_growth.plot(
        {"samples: 1.00": ([1, 2, 4], [1, 2, 4]), "rank: 0.10": ([4, 8], [1.0, 1.1])}, tmp_path / "g.png"
    )
    assert file.is_file() and file.read_bytes()[:4] == b"\x89PNG"


def test_the_reference_child_marks_beginning_updates_and_saving(tmp_path: Path) -> None:
    from tests.bench.speed.reference_child import main

    script = tmp_path / "theirs.py"
    script.write_text(
        "import sys, torch\n"
        "from diffusers import UNet2DConditionModel\n"
        "from diffusers.loaders import StableDiffusionLoraLoaderMixin as Saver\n"
        "from peft import LoraConfig\n"
        "from peft.utils import get_peft_model_state_dict\n"
        "from tests.support.tiny import tiny_sd1\n"
        "unet = tiny_sd1().unet\n"
        "unet.add_adapter(LoraConfig(r=2, target_modules=['to_q']))\n"
        "o = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad])\n"
        "for _ in range(int(sys.argv[1])):\n    o.step()\n"
        "Saver.save_lora_weights(sys.argv[2], unet_lora_layers=get_peft_model_state_dict(unet))\n"
    )
    before = torch.optim.AdamW.step
    main(tmp_path / "marks.json", script, ["3", str(tmp_path)])
    assert torch.optim.AdamW.step is before
    marks = json.loads((tmp_path / "marks.json").read_text())
    (began,), (saved,) = marks["began"], marks["saved"]
    assert len(marks["steps"]) == 3 and [began, *marks["steps"], saved] == sorted([began, *marks["steps"], saved])


def test_a_run_is_timed_whole_and_from_update_to_update() -> None:
    run = speed_reference.run_of_marks(10.0, [13.0, 14.0, 16.0], 19.0)
    assert run.whole == pytest.approx(3000) and run.updates == pytest.approx([1000, 2000])
