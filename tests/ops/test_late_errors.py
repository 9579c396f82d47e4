"""Errors that are raised late, with events of the test's own in place of a GPU's."""

from contextlib import nullcontext

import pytest
import torch

from pymtl import ops
from pymtl.ops import late_errors
from pymtl.ops.late_errors import late_errors_about, refuse_where, report


class Event:
    def __init__(self):
        self.happened, self.recorded = False, False

    def record(self):
        self.recorded = True

    def query(self):
        assert self.recorded
        return self.happened

    def synchronize(self):
        self.happened = True


@pytest.fixture
def events(monkeypatch):
    made = []

    def make():
        made.append(Event())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Event", make)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    yield made
    while True:
        try:
            ops.raise_late_errors()
            return
        except IndexError:
            pass


def tell(*rows, name="call"):
    report(
        torch.tensor(rows), lambda rows: "; ".join(f"{name}: {k} at {row}" for k, row in enumerate(rows) if row >= 0)
    )


def test_an_error_is_raised_once_when_its_event_has_happened(events):
    tell(-1, 5)
    ops.raise_late_errors(wait=False)
    events[0].happened = True
    with pytest.raises(IndexError, match=r"call: 1 at 5$"):
        ops.raise_late_errors(wait=False)
    ops.raise_late_errors(wait=False)
    ops.raise_late_errors()


def test_waiting_finds_all_errors_one_after_the_other(events):
    tell(-1)
    tell(0, name="second")
    tell(-1, -1)
    tell(-1, 3, name="fourth")
    for message in ("second: 0 at 0", "fourth: 1 at 3"):
        with pytest.raises(IndexError, match=message):
            ops.raise_late_errors()
    ops.raise_late_errors()
    assert all(event.happened for event in events)


def test_a_later_event_does_not_overtake(events):
    tell(1)
    tell(2)
    events[1].happened = True
    ops.raise_late_errors(wait=False)
    events[0].happened = True
    for row in (1, 2):
        with pytest.raises(IndexError, match=f"at {row}"):
            ops.raise_late_errors(wait=False)


def test_an_error_tells_of_all_tasks(events):
    tell(3, -1, 5)
    with pytest.raises(IndexError, match=r"^call: 0 at 3; call: 2 at 5$"):
        ops.raise_late_errors()


def test_nothing_is_noted_or_asked_for_while_a_graph_is_recorded(events, monkeypatch):
    tell(3)
    events[0].happened = True
    with monkeypatch.context() as recording:
        recording.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        tell(4)
        ops.raise_late_errors(wait=False)
    assert len(events) == 1
    with pytest.raises(IndexError, match="at 3"):
        ops.raise_late_errors(wait=False)


def test_calls_that_found_nothing_are_forgotten_where_nobody_asks(events):
    for _ in range(5):
        tell(-1)
        events[-1].happened = True
    tell(3)
    events[-1].happened = True
    for _ in range(5):
        tell(-1)
        events[-1].happened = True
    assert len(late_errors._reports) == 2  # what is wrong, and the last, which nobody has looked at since
    with pytest.raises(IndexError, match="at 3"):
        ops.raise_late_errors()


def refuse(wrong, values, error=IndexError):
    refuse_where(wrong, values, lambda got: f"expected ones, got {got}", error)


def test_on_the_cpu_the_first_wrong_value_is_refused_at_once(events):
    refuse(torch.tensor([[False, False]]), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"^expected ones, got 7$"):
        refuse(torch.tensor([[False, True], [True, False]]), torch.tensor([[1, 7], [8, 1]]), ValueError)
    assert not events


@pytest.mark.parametrize("error", [IndexError, ValueError])
def test_on_a_gpu_it_is_refused_late_by_its_name(error, events, monkeypatch):
    monkeypatch.setattr(late_errors, "has_cuda", lambda tensor: True)
    with late_errors_about("targets['slots']"):
        refuse(torch.tensor([[False, True], [True, False]]), torch.tensor([[1, 7], [8, 1]]), error)
    refuse(torch.tensor([False]), torch.ones(1))
    refuse(torch.zeros(0, dtype=torch.bool), torch.ones(0))
    assert len(events) == 2
    with pytest.raises(error, match=r"^targets\['slots'\]: expected ones, got 7, in an earlier call on the GPU$"):
        ops.raise_late_errors()
    ops.raise_late_errors()
