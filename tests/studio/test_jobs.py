"""One job at a time: order, cancelling, errors."""

from __future__ import annotations

import threading

import pytest

from personalize.errors import UserError
from personalize.studio.jobs import KEPT, Job, JobQueue


@pytest.fixture
def queue():
    return JobQueue()


def blocked(kind="edit"):
    """A job that runs until its gate is opened, and reports a step whenever it is looked at."""
    gate = threading.Event()

    def work(job):
        with job.part("Sampling", 4) as advance:
            advance()
            while not gate.wait(0.005):
                job.step()
        return "result"

    return Job(kind, "a long job", work), gate


def running(queue, job):
    for _ in range(1000):
        if queue.running is job and job.levels and job.share:
            return True
        threading.Event().wait(0.005)
    return False


def test_jobs_are_carried_out_in_their_order_and_their_position_is_known(queue):
    first, gate = blocked()
    done = []
    second, third = (Job("edit", name, lambda job: done.append(job.title)) for name in "bc")
    for job in (first, second, third):
        queue.submit(job)
    assert running(queue, first)
    assert [queue.position(job) for job in (first, second, third)] == [0, 1, 2]
    gate.set()
    assert third.ended.wait(5) and done == ["b", "c"]
    assert first.result == "result" and first.state == "done"


def test_a_cancelled_job_ends_at_its_next_step_and_the_next_one_begins(queue):
    first, _ = blocked()
    second = Job("edit", "b", lambda job: "b")
    queue.submit(first)
    queue.submit(second)
    assert running(queue, first)
    queue.cancel()
    assert second.ended.wait(5) and second.result == "b"
    assert first.state == "cancelled" and queue.running is None


def test_a_waiting_job_can_be_cancelled_and_is_never_begun(queue):
    first, gate = blocked()
    second = Job("edit", "b", lambda job: pytest.fail("it was cancelled"))
    queue.submit(first)
    queue.submit(second)
    queue.cancel(second)
    gate.set()
    assert first.ended.wait(5) and second.state == "cancelled"
    assert queue.latest("edit") is first


def test_all_that_waits_can_be_cancelled_while_the_running_job_goes_on(queue):
    first, gate = blocked()
    queue.submit(first)
    assert running(queue, first)
    others = [queue.submit(Job("edit", name, lambda job: pytest.fail("it was cancelled"))) for name in "bc"]
    queue.cancel_waiting()
    gate.set()
    assert first.ended.wait(5) and first.state == "done"
    assert [one.state for one in others] == ["cancelled"] * 2 and queue.waiting() == []


def test_an_error_is_one_line_and_the_queue_goes_on(queue, capsys):
    def mistake(job):
        raise UserError("the prompt is empty")

    def fault(job):
        raise ZeroDivisionError("division by zero\nsecond line")

    jobs = [queue.submit(Job("edit", "x", work)) for work in (mistake, fault, lambda job: 3)]
    assert jobs[-1].ended.wait(5) and jobs[-1].result == 3
    assert jobs[0].error == "the prompt is empty"
    assert "ZeroDivisionError: division by zero" in jobs[1].error and "\n" not in jobs[1].error
    assert "Traceback" in capsys.readouterr().err  # of the fault, for the terminal


def test_a_newer_preview_takes_the_place_of_one_that_waits(queue):
    first, gate = blocked()
    queue.submit(first)
    others = queue.submit(Job("preview", "p", lambda job: "other's", page="another"))
    old = queue.submit(Job("preview", "p", lambda job: "old", page="own"))
    new = queue.submit(Job("preview", "p", lambda job: "new", page="own"))
    assert old.state == "cancelled"
    gate.set()
    assert new.ended.wait(5) and new.result == "new"
    assert others.result == "other's", "the preview of another page that waits is not cancelled"


def test_previews_push_no_picture_out_of_the_history_and_are_not_kept(queue):
    """A preview of a photo of 12 megapixels holds 100 MB, and 200 of them were kept in place of the pictures drawn."""
    drawn = queue.submit(Job("edit", "e", lambda job: "drawn"))
    for _ in range(KEPT + 1):
        last = queue.submit(Job("preview", "p", lambda job: "seen", page="own"))
        assert last.ended.wait(5)
    assert queue.history("edit") == [drawn] and queue.latest("edit") is drawn
    assert queue.latest("preview") is None and last.result == "seen", "who waits for it has it"


def test_the_time_left_follows_from_the_steps_so_far(queue):
    job, gate = blocked()
    assert job.seconds_left is None
    queue.submit(job)
    assert running(queue, job)
    assert job.share == 0.25 and job.seconds_left is not None and job.seconds_left >= 0
    with job.part("Decoding", 2) as advance:
        advance()
        assert job.share == 0.375, "half of the second of four steps"
    gate.set()
    assert job.ended.wait(5) and job.seconds_left is None
