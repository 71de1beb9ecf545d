"""Checkpoint folders: whole or passed over, limited in number, exact."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from personalize.errors import Notice, UserError
from personalize.training import checkpoints
from personalize.training.checkpoints import Checkpoint


def trained(steps: int) -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    parameters = {"a": torch.nn.Parameter(torch.arange(4.0)), "b.c": torch.nn.Parameter(torch.ones(2, 3))}
    optimizer = torch.optim.Adam([{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(parameters.values())])
    for _ in range(steps):
        optimizer.zero_grad()
        sum((p**3).sum() for p in parameters.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    return parameters, optimizer


def checkpoint(update: int) -> Checkpoint:
    parameters, optimizer = trained(update)
    return Checkpoint(update, {n: p.detach() for n, p in parameters.items()}, optimizer.state_dict(), {"rank": 2})


def test_round_trip_goes_on_exactly(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, checkpoint(2))
    parameters, optimizer = trained(0)
    found = checkpoints.find(tmp_path, "latest")
    assert found is not None and found.update == 2 and found.metadata == {"rank": 2} and found.name == "checkpoint-2"
    checkpoints.restore(found, parameters, optimizer)
    optimizer.zero_grad()
    sum((p**3).sum() for p in parameters.values()).backward()  # type: ignore[union-attr]
    optimizer.step()
    for name, parameter in trained(3)[0].items():
        assert torch.equal(parameter, parameters[name])


def test_limit_keeps_the_newest_and_never_a_former_runs_later_ones(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-notes").mkdir()
    for update in (9, 1, 2, 3, 10):
        checkpoints.save(tmp_path, checkpoint(update), limit=2 if update != 9 else None)
        if update == 3:
            assert [number for number, _ in checkpoints.numbered(tmp_path)] == [2, 3, 9]
    assert [number for number, _ in checkpoints.numbered(tmp_path)] == [9, 10]


def test_latest_is_one_of_at_most_so_many_updates_if_there_is_one(tmp_path: Path) -> None:
    """Behind a longer run in the same folder a shorter one could not go on: it was told to make more updates."""
    for update in (2, 3, 9):
        checkpoints.save(tmp_path, checkpoint(update))
    for most, expected in ((9, 9), (8, 3), (3, 3), (1, 9)):  # of the last the run says that it has more than it makes
        found = checkpoints.find(tmp_path, "latest", {"rank": 2}, most)
        assert found is not None and found.update == expected


def test_those_of_another_run_are_neither_taken_nor_destroyed(tmp_path: Path) -> None:
    """Not by equal numbers, not by the limit, and no message says to throw them away."""
    for update in (1, 2, 9):
        checkpoints.save(tmp_path, checkpoint(update))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = {"rank": 4}
    with pytest.raises(UserError, match="made with rank = 2, this run has 4; use the same, or train into another"):
        checkpoints.find(tmp_path, "latest", other)
    for update in (1, 2, 3):
        checkpoints.save(tmp_path, replace(checkpoint(update), metadata=other), limit=1)
    found = checkpoints.find(tmp_path, "latest", other)
    assert found is not None and (found.update, found.metadata, found.name) == (3, other, "checkpoint-3")
    assert {path: path.read_bytes() for path in before} == before
    older = checkpoints.find(tmp_path, "latest", {"rank": 2})
    assert older is not None and older.update == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{n}" for n in (1, 2, 3, 9)]
    again = checkpoints.save(tmp_path, replace(checkpoint(9), metadata=other), limit=2)
    assert checkpoints.NAME.fullmatch(again.name) and again.name.startswith("checkpoint-9-")
    assert checkpoints.load(again).update == 9 and {path: path.read_bytes() for path in before} == before


def test_the_limit_removes_no_file_of_another_program(tmp_path: Path) -> None:
    first = checkpoints.save(tmp_path, checkpoint(1), limit=1, extra={"adapter": b"ours"})
    (first / "notes").write_text("theirs")
    checkpoints.save(tmp_path, checkpoint(2), limit=1)
    assert [path.name for path in first.iterdir()] == ["notes"]


@pytest.mark.parametrize("update", [10**9, -3, 2])
@pytest.mark.parametrize("sealed", [False, True], ids=["altered", "with its checksum"])
def test_an_update_that_cannot_be_is_not_believed(tmp_path: Path, update: int, sealed: bool) -> None:
    path = checkpoints.save(tmp_path, checkpoint(1)) / checkpoints.STATE
    state = json.loads(path.read_text()) | {"update": update}
    del state["checksum"]
    path.write_text(json.dumps(state | {"checksum": checkpoints._hash(state) if sealed else "0"}))
    with pytest.raises(UserError, match=f"damaged: update {update} in state.json"):
        checkpoints.load(tmp_path / "checkpoint-1")


def test_an_altered_state_shows(tmp_path: Path) -> None:
    path = checkpoints.save(tmp_path, checkpoint(1)) / checkpoints.STATE
    path.write_text(path.read_text().replace('"rank": 2', '"rank": 3'))
    with pytest.raises(UserError, match="is damaged: an entry in state.json is not what was written"):
        checkpoints.load(tmp_path / "checkpoint-1")


def test_half_written_ones_are_passed_over(tmp_path: Path) -> None:
    for update in (1, 2, 3, 4):
        checkpoints.save(tmp_path, checkpoint(update))
    (tmp_path / "checkpoint-4" / checkpoints.STATE).unlink()
    damaged = tmp_path / "checkpoint-3" / checkpoints.OPTIMIZER
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")
    (tmp_path / "checkpoint-2" / checkpoints.TRAINABLE).write_bytes(b"")
    found = checkpoints.find(tmp_path, "latest")
    assert found is not None and found.update == 1
    with pytest.raises(UserError, match="optimizer.safetensors is not what was written"):
        checkpoints.find(tmp_path, "checkpoint-3")


@pytest.mark.parametrize(
    ("key", "value"),
    [("about", None), ("update", "two"), ("update", True), ("optimizer", {"values": {}, "param_groups": []}),
     ("optimizer", {"values": {}, "param_groups": [3]}), ("scaler", []), ("sha256", None)],
)  # fmt: skip
def test_a_state_of_another_shape_is_passed_over_and_named(tmp_path: Path, key: str, value: object) -> None:
    for update in (1, 2):
        checkpoints.save(tmp_path, checkpoint(update))
    path = tmp_path / "checkpoint-2" / checkpoints.STATE
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.warns(Notice, match=f"passed over: checkpoint .*checkpoint-2 is damaged: {key} in state.json"):
        found = checkpoints.find(tmp_path, "latest")
    assert found is not None and found.update == 1
    with pytest.raises(UserError, match="is damaged"):
        checkpoints.find(tmp_path, "checkpoint-2")


def test_a_sealed_state_with_entries_of_another_form_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.save(tmp_path, checkpoint(1))
    state = json.loads((folder / checkpoints.STATE).read_text())
    state["optimizer"]["values"] = {"no_slash": 1}
    state["checksum"] = checkpoints._hash({key: value for key, value in state.items() if key != "checksum"})
    (folder / checkpoints.STATE).write_text(json.dumps(state))
    with pytest.raises(UserError, match="checkpoint-1 is incomplete"):
        checkpoints.load(folder)


def test_missing_ones(tmp_path: Path) -> None:
    assert checkpoints.find(tmp_path, None) is None
    assert checkpoints.find(tmp_path / "nowhere", "latest") is None
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoints.find(tmp_path, "checkpoint-7")


def test_one_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    parameters, optimizer = trained(0)
    parameters["b.c"] = torch.nn.Parameter(torch.ones(5))
    with pytest.raises(UserError, match=r"b.c is \(2, 3\) there, \(5,\) here"):
        checkpoints.restore(checkpoint(1), parameters, optimizer)
    with pytest.raises(UserError, match="rank = 2, this run has 4"):
        checkpoints.check_same_run(checkpoint(1), {"rank": 4})
    other = Checkpoint(1, {}, {}, {"rank": 2, "data_sha256": "ab"})
    with pytest.raises(UserError, match="made with other pictures, masks or captions; use the same, or train into"):
        checkpoints.check_same_run(other, {"rank": 2, "data_sha256": "cd"})
    unfit = replace(checkpoint(1), optimizer={"state": {}, "param_groups": [{"params": [0]}]})
    with pytest.raises(UserError, match="optimizer does not fit this run"):
        checkpoints.restore(unfit, *trained(0))


def test_a_copy_of_the_base_in_another_place_is_the_same_base(tmp_path: Path) -> None:
    """It was called another base model: by the name of its folder, or where the hub's id had been given before."""
    metadata = {"rank": 2, "base": {"name": "stable-diffusion-v1-5", "family": "sd1", "sha256": "ab"}}
    checkpoints.save(tmp_path, replace(checkpoint(1), metadata=metadata))
    moved = metadata | {"base": {"name": "sd15", "family": "sd1", "sha256": "ab"}}
    found = checkpoints.find(tmp_path, "latest", moved)
    assert found is not None
    checkpoints.check_same_run(found, moved)
    assert found.run == replace(found, metadata=moved).run and found.metadata == metadata
    for other in ({"name": "sd15", "family": "sd1", "sha256": "cd"}, {"name": "sd15", "family": "sd1"}):
        with pytest.raises(UserError, match="made with another base model; use the same"):
            checkpoints.check_same_run(found, moved | {"base": other})


def test_a_run_goes_on_with_the_optimizer_of_its_own_device() -> None:
    """One that had begun on a GPU went on with a GPU's ways of computing, and the other way round."""

    def started(steps: int) -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
        parameters = {"a": torch.nn.Parameter(torch.arange(4.0))}
        optimizer = torch.optim.AdamW([*parameters.values()], lr=0.1, fused=True)
        for _ in range(steps):
            parameters["a"].grad = torch.ones(4)
            optimizer.step()
        return parameters, optimizer

    before, optimizer = started(2)
    stored = optimizer.state_dict()
    stored["param_groups"][0] |= {"fused": None, "capturable": True, "foreach": None}  # as if on another device
    made = Checkpoint(2, {"a": before["a"].detach()}, stored)
    parameters, again = started(0)
    checkpoints.restore(made, parameters, again)
    ways = [again.param_groups[0][name] for name in ("fused", "capturable", "foreach")]
    assert ways == [True, False, None]
    parameters["a"].grad = torch.ones(4)
    again.step()
    assert torch.equal(parameters["a"], started(3)[0]["a"])
