"""Errors that are raised late, with events of the test's own in place of a GPU's."""

from contextlib import nullcontext

import pytest
import torch

from pymtl import ops
from pymtl.ops.late_errors import report


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
    report(torch.tensor(rows), lambda k, row: f"{name}: {k} at {row}")


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
