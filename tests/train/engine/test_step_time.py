"""Detection of slow steps, with given durations."""

from gridcap.train.engine.step_time import StepTimeMonitor


def warnings_of(*windows):
    """Add windows of 20 steps with the given durations, and return the index and text of each warning."""
    monitor, warnings = StepTimeMonitor(), []
    for index, seconds in enumerate(windows):
        warnings += [(index, text) for _ in range(20) if (text := monitor.add(seconds))]
    return warnings


def test_item_29_warns_if_steps_become_much_slower():
    ((index, text),) = warnings_of(0.1, 0.11, 0.09, 0.1, 0.4, 0.4, 0.4)
    assert index == 5, "after two slow windows, and only once"
    assert "takes 0.4 s instead of 0.1 s" in text


def test_item_29_warns_again_after_a_recovery():
    assert [index for index, _ in warnings_of(0.1, 0.1, 0.1, 0.3, 0.3, 0.1, 0.3, 0.3)] == [4, 7]


def test_item_29_constant_or_slightly_slower_steps_cause_no_warning():
    assert warnings_of(*[0.1] * 10) == []
    assert warnings_of(0.1, 0.1, 0.1, *[0.19] * 10) == []


def test_item_29_single_slow_window_causes_no_warning():
    assert warnings_of(0.1, 0.1, 0.1, 0.9, 0.1, 0.1) == []


def test_item_29_slow_start_causes_no_warning():
    assert warnings_of(5.0, 0.1, 0.1, 0.1, 0.1) == []
