"""A save whose process is killed leaves the old files or the new ones, and the next save removes temporary files."""

import os
import random
import signal
import time

import pytest
import torch

from personalize.adapters.adapter import Adapter
from personalize.io import atomic
from personalize.io.atomic import write_file, write_folder
from tests.support.lora_states import paths, random_lora
from tests.support.tiny import tiny

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def adapters():
    model = tiny("sd1")
    shapes = paths(model.unet, lambda path: path.startswith("mid_block") and ".attn" in path)
    info = {"base": model.identity, "caption": "a cat"}
    return [Adapter(random_lora(shapes, seed=seed), 4, 4.0, None, info) for seed in range(2)]


def counting(hit):
    """Call `hit` before every step of a save that touches the disk."""

    def wrapped(function):
        def call(*args, **kwargs):
            hit()
            return function(*args, **kwargs)

        return call

    for place, name in (
        (atomic, "create_file"), (os, "fsync"), (os, "replace"), (os, "rename"), (os, "link"), (os, "unlink"),
        (atomic, "sync_folder"), (atomic.shutil, "rmtree"),
    ):  # fmt: skip
        setattr(place, name, wrapped(getattr(place, name)))


def forked(save, *, at=None, delay=None):
    """Run `save` in a fork that dies before step `at`, or after `delay` seconds; returns the number of steps done."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        steps = 0

        def hit():
            nonlocal steps
            if steps == at:
                os.kill(os.getpid(), signal.SIGKILL)
            steps += 1
            os.write(writer, b".")

        try:
            torch.set_num_threads(1)  # the parent's threads were not copied
            counting(hit)
            save()
        finally:
            os._exit(0)
    os.close(writer)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reader, "rb") as stream:
        done = len(stream.read())
    os.waitpid(child, 0)
    return done


def moments(count, steps):
    return [round(number * (steps - 1) / max(1, count - 1)) for number in range(count)]


def same(adapter, other):
    return all(torch.equal(adapter.lora[key], other.lora[key]) for key in other.lora)


@pytest.mark.parametrize("count", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_a_killed_save_leaves_the_old_adapter_or_the_new_one(tmp_path, adapters, count):
    old, new = adapters
    old.save(tmp_path / "dry")
    steps = forked(lambda: new.save(tmp_path / "dry"))
    folder, seen = tmp_path / "mine", set()
    for at in moments(count, steps):
        old.save(folder)
        (folder / "theirs").write_text("kept")
        forked(lambda: new.save(folder), at=at)
        found = Adapter.load(folder)
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".personalize")]
        assert (folder / "theirs").read_text() == "kept"
        seen.add((same(found, old), same(found, new)))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["dry", "mine"]
    assert seen == {(True, False), (False, True)}
    old.save(folder)
    assert same(Adapter.load(folder), old)


@pytest.mark.slow
def test_a_save_killed_at_any_time_leaves_the_old_adapter_or_the_new_one(tmp_path, adapters):
    old, new = adapters
    begun = time.monotonic()
    forked(lambda: new.save(tmp_path / "mine"))
    length, draw = time.monotonic() - begun, random.Random(0)
    for _ in range(100):
        old.save(tmp_path / "mine")
        forked(lambda: new.save(tmp_path / "mine"), delay=draw.uniform(0, length))
        found = Adapter.load(tmp_path / "mine")  # which completes what was decided
        assert same(found, old) or same(found, new)
    old.save(tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("count", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_a_killed_write_leaves_the_old_file_or_the_new_one(tmp_path, count):
    path, old, new = tmp_path / "f.safetensors", b"old" * 1000, b"new" * 1000
    steps = forked(lambda: write_file(path, [new[:100], new[100:]]))
    for at in moments(count, steps):
        write_file(path, old)
        forked(lambda: write_file(path, [new[:100], new[100:]]), at=at)
        assert path.read_bytes() in (old, new)
    write_file(path, old)
    assert [entry.name for entry in tmp_path.iterdir()] == ["f.safetensors"]


def test_temporary_files_of_ended_processes_are_removed_and_those_of_running_ones_kept(tmp_path, monkeypatch):
    target = tmp_path / "mine"
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    dead = atomic.hidden_name(target).name.replace(f"-{os.getpid()}-", f"-{child}-")
    elsewhere = dead.replace(atomic._machine_id(), "00000000")
    inside = atomic.hidden_name(target / atomic.JOURNAL).name.replace(f"-{os.getpid()}-", f"-{child}-")
    target.mkdir()
    for name in (inside, f"{inside}---"):  # of one that was killed while it tried the folder
        (target / name).write_bytes(b"personalize")
    names = [atomic.hidden_name(target).name, dead, elsewhere, ".mine.notes.partial", ".other" + dead[5:], ".mine"]
    for name in names:
        (tmp_path / name).mkdir()
    write_folder(target, {"a": b"1"})
    assert {path.name for path in tmp_path.iterdir()} == {*names, "mine"} - {dead}
    assert [path.name for path in target.iterdir()] == ["a"]
    monkeypatch.setattr(atomic, "DAY", -1)
    write_folder(target, {"a": b"2"})
    assert not (tmp_path / elsewhere).exists() and (tmp_path / names[0]).exists()
