"""Searched pipeline orders: the saved ones are what they say, and a search keeps its promises."""

import json
import random
import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from r1mega.parallel.dualpipe import dualpipe_v
from r1mega.parallel.order_anneal import NEVER, change_rank
from r1mega.parallel.order_search import Problem, search
from r1mega.parallel.schedule import ScheduleError, check, peak_activations
from r1mega.parallel.searched import (
    FOLDER,
    NAMED,
    bound_at,
    deepseek_v3_steps,
    from_letters,
    load_searched,
    read,
    saved,
    table,
    to_text,
    write,
)
from r1mega.parallel.simulator import Durations, bound, simulate

FILES = sorted(FOLDER.glob("P*.json"))


@pytest.fixture(scope="module")
def rows():
    return saved()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_saved_order_is_what_it_says(path):
    found = read(path)
    assert path.name == found.file_name
    check(found.schedule)
    timeline = simulate(found.schedule, NAMED[found.durations])
    assert timeline.makespan == pytest.approx(found.makespan, rel=1e-12)
    assert max(timeline.peaks) == found.peak <= found.memory


def test_no_saved_order_is_slower_than_dualpipev_nor_faster_than_the_bounds():
    for row in table():
        assert row.dualpipev is not None
        assert row.searched < row.dualpipev
        assert row.bound <= row.bound_at <= row.searched + 1e-9


def test_more_memory_is_saved_only_where_it_is_faster(rows):
    for one, other in pairwise(rows):  # sorted by memory last
        if (one.durations, one.ranks, one.micro_batches) == (
            other.durations,
            other.ranks,
            other.micro_batches,
        ):
            assert one.memory < other.memory
            assert one.makespan > other.makespan


@pytest.mark.parametrize(
    ("ranks", "micro_batches", "memory", "makespan"),
    [(8, 16, 10.5, 49.1), (8, 16, 8.5, 49.1), (4, 8, 4.5, 24.4)],
)
def test_the_known_marks_are_beaten(ranks, micro_batches, memory, makespan):
    schedule = load_searched(ranks, micro_batches, memory)
    assert schedule is not None
    assert simulate(schedule, Durations()).makespan < makespan - 1e-9
    assert max(peak_activations(schedule)) <= memory


def test_deepseek_v3_steps_in_less_than_19_seconds():
    steps = {(step.what, step.memory): step.seconds for step in deepseek_v3_steps()}
    assert min(s for (what, _), s in steps.items() if what == "searched, early sends") < 19.0
    assert steps["DualPipeV, sends at the end", 16.5] == pytest.approx(21.29, abs=0.005)
    assert steps["DualPipeV, early sends", 16.5] == pytest.approx(19.39, abs=0.005)
    assert steps["DualPipeV, if a hop took no time", 16.5] == pytest.approx(18.75, abs=0.005)


def test_what_is_not_saved_is_none_and_what_needs_more_memory_is_not_given():
    assert load_searched(3, 7, 100.0) is None
    assert load_searched(8, 16, 8.0) is None
    with pytest.raises(ValueError, match="deepseek-v3-early"):
        load_searched(8, 16, 8.5, "fast")


DURATIONS = [
    Durations(),
    Durations(58, 85, 42, 139, hop=9, early=0.5),
    Durations(58, 85, 42, 139, hop=9, early=0.25, prefetch=False),
]


@pytest.mark.parametrize("durations", DURATIONS, ids=["unit", "early", "no prefetch"])
def test_the_compiled_simulator_gives_the_makespan_of_the_simulator(durations):
    rng = random.Random(7)
    ranks, micro_batches = 3, 7
    costs = [1 + rng.random() for _ in range(2 * ranks)]
    problem = Problem.of(ranks, micro_batches, durations, costs)
    order = problem.from_schedule(dualpipe_v(ranks, micro_batches))
    ended = stuck = 0
    for _ in range(400):
        candidate = order.copy()
        rank = rng.randrange(ranks)
        length = change_rank(candidate.kinds[rank], candidate.lengths[rank])
        if length < 0:
            continue
        candidate.lengths[rank] = length
        makespan = problem.makespan(candidate)
        try:
            schedule = from_letters(candidate.letters, micro_batches)
        except ValueError:
            continue  # W before its I
        if makespan == NEVER:
            stuck += 1
            with pytest.raises(ScheduleError, match="dead-lock"):
                check(schedule)
            continue
        check(schedule)
        assert simulate(schedule, durations, costs).makespan == makespan
        ended += 1
        order = candidate
    assert ended > 50
    assert stuck > 5


@pytest.mark.parametrize(
    ("ranks", "micro_batches", "memory"), [(2, 4, 2.5), (2, 6, 3.5), (4, 8, 4.5), (4, 8, 6.25)]
)
def test_a_search_is_reproducible_keeps_its_memory_and_is_not_slower_than_dualpipev(
    ranks, micro_batches, memory
):
    durations = Durations(hop=0.05)
    first, again = (
        search(ranks, micro_batches, durations, memory, trials=1500, rounds=2, seed=3) for _ in range(2)
    )
    assert first == again
    check(first)
    assert max(peak_activations(first)) <= memory
    published = simulate(dualpipe_v(ranks, micro_batches), durations).makespan
    assert simulate(first, durations).makespan < published
    assert simulate(first, durations).makespan >= bound_at(ranks, micro_batches, durations, memory)


def test_a_search_with_one_trial_gives_no_worse_than_dualpipev():
    found = search(4, 9, Durations(), 4.5, trials=1, rounds=1)
    assert simulate(found, Durations()).makespan <= simulate(dualpipe_v(4, 9), Durations()).makespan


@pytest.mark.parametrize("memory", [1.0, 1.5, 3.0])
def test_a_search_keeps_memory_that_dualpipev_does_not_fit_in(memory):
    found = search(3, 4, Durations(), memory, trials=500, rounds=1)
    check(found)
    assert max(peak_activations(found)) <= memory


def test_a_search_knows_the_costs_of_stages():
    costs = [0.5, 1.0, 1.0, 1.5]
    found = search(2, 8, Durations(), 3.0, costs=costs, trials=3000, rounds=2)
    assert (
        simulate(found, Durations(), costs).makespan < simulate(dualpipe_v(2, 8), Durations(), costs).makespan
    )


def test_a_split_backward_of_dualpipev_is_never_slower():
    for durations in DURATIONS:
        problem = Problem.of(4, 10, durations)
        published = dualpipe_v(4, 10)
        split = problem.makespan(problem.from_schedule(published))
        assert split <= simulate(published, durations).makespan


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((1, 4, 2.0), {}, "1 ranks"),
        ((2, 0, 2.0), {}, "0 micro-batches"),
        ((2, 4, 0.5), {}, "memory 0.5"),
        ((2, 4, float("nan")), {}, "memory nan"),
        ((2, 4, 2.5), {"costs": [1.0]}, "4 stages"),
        ((2, 4, 2.5), {"trials": 0}, "0 trials"),
    ],
)
def test_a_search_refuses_what_it_cannot_do(arguments, options, message):
    ranks, micro_batches, memory = arguments
    with pytest.raises(ValueError, match=message):
        search(ranks, micro_batches, Durations(), memory, **options)


def test_letters_survive_shortening():
    rng = random.Random(0)
    for _ in range(50):
        count = rng.randrange(1, 9)
        letters = "".join(rng.choice("Ff") for _ in range(count)) + "Xx" * count + "xy" * rng.randrange(5)
        assert from_letters([to_text(letters)], 99).orders == from_letters([letters], 99).orders
    assert to_text("FXxXxXxXxf") == "F(Xx)4f"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"makespan": 1.0}, "makespan"),
        ({"peak": 2.0}, "peak"),
        ({"memory": 2.0}, "limit 2.0"),
        ({"durations": "slow"}, "'slow'"),
        ({"orders": ["F"]}, "1 orders for 2 ranks"),
        ({"orders": ["F?", "F"]}, "rank 0, character 1: '[?]'"),
        ({"orders": ["(Ff)999999999", "F"]}, "more than 24 actions"),
        ({"orders": ["Fw", "F"]}, "w after 1 actions has no i before it"),
        ({"orders": ["F", "F"]}, "happens 0 times"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, change, message):
    path = tmp_path / "P2_M4_A2.5_unit.json"
    shutil.copy(FOLDER / path.name, path)
    assert read(path).ranks == 2
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert path.name in str(caught.value)


def test_what_is_written_is_read_and_nothing_else_stays(tmp_path, rows):
    found = rows[0]
    path = write(found, tmp_path)
    assert read(path) == found
    assert list(tmp_path.iterdir()) == [path]
    assert (
        load_searched(found.ranks, found.micro_batches, found.peak, found.durations, tmp_path)
        == found.schedule
    )


def test_the_bound_with_memory_is_tighter_with_less_of_it():
    d = Durations()
    assert bound(8, 16, d) < bound_at(8, 16, d, 100.0) == pytest.approx(48.3)
    assert bound_at(8, 16, d, 8.5) == pytest.approx(48.3)
    assert bound_at(8, 16, d, 4.0) > bound_at(8, 16, d, 8.5)
    assert bound_at(8, 16, replace(d, hop=0.1), 8.5) > bound_at(8, 16, d, 8.5)


def test_orders_have_the_room_of_all_actions_apart():
    problem = Problem.of(2, 3, Durations())
    assert problem.order([[0]] * 2).kinds.shape == (2, 18)
    assert problem.order([[0]] * 2).kinds.dtype == np.int8
