"""Bars on a terminal, a line each half-minute in a log, nothing with --quiet."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from personalize.cli import progress as module
from personalize.cli.main import main, to_exit_code
from personalize.cli.progress import duration, progress
from personalize.io.progress import listening, part, ticked


class Clock:
    """`time.monotonic` in steps of the test's own."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def console(terminal: bool) -> tuple[io.StringIO, Console]:
    stream = io.StringIO()
    return stream, Console(file=stream, force_terminal=terminal, width=100)


def steps(clock: Clock, count: int, seconds: float, name: str, **about):
    for item in ticked(range(count), name, **about):
        clock.now += seconds
        yield item


def test_a_terminal_shows_bars_with_counts_and_notes():
    stream, screen = console(terminal=True)
    with progress(console=screen), part("Inverting"):
        assert list(ticked(range(3), note=lambda item: f"loss {item}")) == [0, 1, 2]
    assert all(text in stream.getvalue() for text in ("Inverting", "3/3", "loss 0"))


def test_a_part_of_one_step_has_no_bar_and_no_line(clock):
    for terminal in (True, False):
        stream, screen = console(terminal)
        with progress(console=screen):
            for _ in ticked([0], "Reading"):
                clock.now += 100
        assert "Reading" not in stream.getvalue()


def test_a_log_has_a_line_each_half_minute_with_the_time_left(clock):
    stream, screen = console(terminal=False)
    with progress(console=screen):
        list(steps(clock, 10, 12.0, "Learning", note=lambda item: f"loss 0.{item}"))
    assert stream.getvalue().splitlines() == [
        "Learning: 3 of 10, about 1 min left, loss 0.2",
        "Learning: 6 of 10, about 48 s left, loss 0.5",
        "Learning: 9 of 10, about 12 s left, loss 0.8",
    ]


def test_what_takes_less_than_a_half_minute_leaves_no_line(clock):
    stream, screen = console(terminal=False)
    with progress(console=screen):
        list(steps(clock, 10, 2.9, "Sampling"))
    assert stream.getvalue() == ""


def test_a_line_names_the_outermost_part_and_the_innermost_in_brackets(clock):
    stream, screen = console(terminal=False)
    with progress(console=screen):
        for _ in ticked(range(4), "Rows"):
            list(steps(clock, 2, 40.0, "Learning"))
    assert stream.getvalue().splitlines()[:3] == [
        "Rows: 0 of 4 (Learning: 1 of 2, about 40 s left)",
        "Rows: 0 of 4 (Learning: 2 of 2)",
        "Rows: 1 of 4, about 6 min left (Learning: 1 of 2, about 40 s left)",
    ]


def test_the_time_left_of_a_run_that_goes_on_is_by_its_own_steps(clock):
    """3 of 10 are left, each takes 40 s; by all ten the first would be said to take 40/8 s each."""
    stream, screen = console(terminal=False)
    with progress(console=screen):
        list(steps(clock, 3, 40.0, "Learning", total=10, done=7))
    assert stream.getvalue().splitlines()[0] == "Learning: 8 of 10, about 1 min left"


@pytest.mark.parametrize("how", ["quiet", "second process", "somebody listens"])
def test_nothing_is_shown_where_it_is_not_wanted(clock, monkeypatch, how):
    stream, screen = console(terminal=False)
    if how == "second process":
        monkeypatch.setenv("RANK", "1")
    heard = []
    listener = module.Lines(Console(file=io.StringIO())).part
    with listening(lambda *part: heard.append(part) or listener(*part)) if how == "somebody listens" else part("x"):
        with progress(console=screen, quiet=how == "quiet"):
            list(steps(clock, 10, 40.0, "Learning"))
    assert stream.getvalue() == "" and len(heard) == (how == "somebody listens")


def test_bars_end_with_an_error_whose_loop_is_still_open():
    """The traceback keeps the loop's frame, and so the generator, until it is dropped."""
    _, screen = console(terminal=True)
    with pytest.raises(ZeroDivisionError) as caught, progress(console=screen):
        for _ in ticked(range(3)):
            raise ZeroDivisionError
    live = screen._live_stack if hasattr(screen, "_live_stack") else screen._live  # of rich from 14.1 on, and before
    assert not live and caught.value.__traceback__ is not None


def test_output_that_goes_into_a_file_is_not_drawn_into_the_bars(capsys):
    stream, screen = console(terminal=True)
    with progress(console=screen):
        for item in ticked(range(2)):
            print("a result", item)
    assert capsys.readouterr().out == "a result 0\na result 1\n"
    assert "a result" not in stream.getvalue() and not isinstance(sys.stdout, io.StringIO)


@pytest.mark.parametrize("words", [["--quiet", "work"], ["work", "--quiet"], ["work"]])
def test_quiet_stands_before_the_command_or_behind_it(clock, capsys, monkeypatch, words):
    monkeypatch.setattr(
        "personalize.cli.main.dispatch", lambda args, _: len(list(steps(clock, 2, 40.0, "Working"))) - 2
    )
    assert main(words) == 0
    assert ("Working: 1 of 2" in capsys.readouterr().err) is (len(words) == 1)


def test_every_command_takes_quiet(capsys):
    for words in (["inspect"], ["edit"], ["train", "single_image"], ["export", "merge"]):
        assert main([*words, "--quiet", "--rnk", "4"]) == 2
        assert "unknown option --rnk" in capsys.readouterr().err
    assert main(["--quiet", "nothing"]) == 2 and "unknown command nothing" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "1 s"), (59.4, "59 s"), (61, "1 min"), (7140, "119 min"),
                                               (7500, "2 h 5 min")])  # fmt: skip
def test_durations_are_in_words(seconds, text):
    assert duration(seconds) == text


def test_a_result_is_printed_after_the_bars_are_gone(capsys):
    def call() -> int:
        list(ticked(range(3)))
        print("done")
        return 0

    assert to_exit_code(call) == 0 and capsys.readouterr().out == "done\n"
