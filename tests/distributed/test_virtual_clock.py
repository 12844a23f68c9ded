"""The real executor under virtual clocks takes the time that the simulator computes, whatever the machine does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from r1mega.bench import virtual_run
from r1mega.bench.schedules import order_of
from r1mega.parallel.dualpipe import dualpipe_v
from r1mega.parallel.messages import AHEAD
from r1mega.parallel.simulator import DEEPSEEK_V3, Durations, simulate

NAMES = ("1f1b", "interleaved", "zb1p", "zb-v", "dualpipev", "searched")


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), pytest.param(4, 8, marks=pytest.mark.slow)])
def test_virtual_time_is_simulated_time(ranks: int, micro_batches: int) -> None:
    durations = (Durations(), DEEPSEEK_V3, replace(DEEPSEEK_V3, early=0.5))
    jobs = [(order_of(name, ranks, micro_batches), d) for name in NAMES for d in durations]
    for (schedule, durations_of), ran in zip(jobs, virtual_run.run(jobs), strict=True):
        computed = simulate(schedule, durations_of)
        assert ran.makespan == pytest.approx(computed.makespan, rel=1e-12), schedule.name
        assert [len(rank) for rank in ran.spans] == [len(rank) for rank in computed.spans]
        for rank, wanted in zip(ran.spans, computed.spans, strict=True):
            assert [span.action for span in rank] == [span.action for span in wanted]
            assert [span.start for span in rank] == pytest.approx([span.start for span in wanted])


@pytest.mark.distributed
def test_more_messages_than_are_posted_ahead_arrive() -> None:
    schedule = dualpipe_v(2, 8 * AHEAD)
    (ran,) = virtual_run.run([(schedule, Durations())])
    assert ran.makespan == pytest.approx(simulate(schedule, Durations()).makespan)
