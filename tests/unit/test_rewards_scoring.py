"""The scorer: paper's sum, verdicts, streams that overlap and lose nothing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from r1mega.config import PRESETS, ConfigError, JudgeConfig, RewardConfig
from r1mega.rewards import scoring
from r1mega.rewards.endpoint import EndpointFault
from r1mega.rewards.scoring import Scorer
from r1mega.rewards.sums import check_sums
from r1mega.rewards.terms import ACCURACY, REWARDS
from r1mega.rewards.workers import WorkerError
from r1mega.samples import Prompt, Rollout, ScoredRollout

GOOD = "<think>3+4=7</think><answer>{}</answer>"


def rollout(
    text: str, answer: str = "7", *, task: str = "math", finish: str = "stop", index: int = 0
) -> Rollout:
    prompt = Prompt("p", "3+4", answer, task, "Q:3+4=?A:", (1, 2, 3))
    return Rollout(prompt, index, (4, 5), (-0.1, -0.2), text, finish, 0)


async def stream(rollouts: list[Rollout]) -> AsyncIterator[Rollout]:
    for item in rollouts:
        yield item


def test_the_reward_is_the_weighted_sum_of_accuracy_and_format() -> None:
    async def scenario() -> None:
        async with Scorer(RewardConfig(weights={"accuracy": 1.0, "format": 0.25})) as scorer:
            cases = [
                (rollout(GOOD.format("7")), 1.25, "equal", "ok"),
                (rollout(GOOD.format("8")), 0.25, "unequal", "ok"),
                (rollout("<think>a</think> it is <answer>7</answer>"), 1.0, "equal", "between_text"),
                (rollout("<think>a</think> It is \\boxed{7}."), 1.0, "equal", "missing_answer"),
                (rollout("7"), 0.0, "missing", "missing_think"),
                (rollout(GOOD.format("7"), finish="length"), 0.0, "truncated", "truncated"),
                (rollout(GOOD.format("2\\sqrt{2}"), "\\sqrt{8}"), 1.25, "equal", "ok"),
                (rollout(GOOD.format("9" * 10**5)), 0.25, "too_long", "ok"),
            ]
            for item, total, accuracy, form in cases:
                reward = await scorer.score(item)
                assert reward.total == pytest.approx(total), item.response_text[:80]
                assert reward.verdicts == {"accuracy": accuracy, "format": form}
                assert reward.terms == {
                    "accuracy": float(accuracy == "equal"),
                    "format": float(form == "ok"),
                }
            counts = scorer.verdict_counts()
            assert counts["accuracy"]["equal"] == 4
            assert sum(counts["format"].values()) == len(cases)
            assert scorer.verdict_counts() == {}

    asyncio.run(scenario())


def test_a_term_of_weight_zero_is_still_measured() -> None:
    async def scenario() -> None:
        async with Scorer(RewardConfig(weights={"accuracy": 1.0, "format": 0.0})) as scorer:
            reward = await scorer.score(rollout(GOOD.format("7")))
            assert (reward.total, reward.terms["format"]) == (1.0, 1.0)

    asyncio.run(scenario())


def test_each_task_has_its_own_sum() -> None:
    rewards = RewardConfig(task_weights={"general": {"format": 2.0}})

    async def scenario() -> None:
        async with Scorer(rewards) as scorer:
            ruled, general = [
                await scorer.score(rollout(GOOD.format("7"), task=t)) for t in ("math", "general")
            ]
            assert (ruled.total, set(ruled.terms)) == (2.0, {"accuracy", "format"})
            assert (general.total, general.terms, general.verdicts) == (
                2.0,
                {"format": 1.0},
                {"format": "ok"},
            )

    asyncio.run(scenario())


def complaint(tasks: set[str], rewards: RewardConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        check_sums(rewards, JudgeConfig(), tasks, terms=REWARDS, ruled=ACCURACY)
    return str(caught.value)


def test_a_sum_that_cannot_be_computed_is_refused_before_the_run() -> None:
    check_sums(RewardConfig(), JudgeConfig(), {"math"}, terms=REWARDS, ruled=ACCURACY)
    general = RewardConfig(task_weights={"general": {"format": 1.0}})
    check_sums(general, JudgeConfig(), {"math", "general"}, terms=REWARDS, ruled=ACCURACY)
    assert "did you mean accuracy" in complaint({"math"}, RewardConfig(weights={"accuracies": 1.0}))
    assert "no rule knows the right answer of task 'chat'" in complaint({"math", "chat"}, RewardConfig())
    helpful = RewardConfig(task_weights={"chat": {"helpful": 1.0}})
    assert "needs rewards.helpful_model=" in complaint({"chat"}, helpful)
    assert "needs judge.url=" in complaint({"chat"}, RewardConfig(weights={"judge": 1.0}))


def test_a_model_that_rewards_reasoning_must_be_asked_for_by_name() -> None:
    rewards = RewardConfig(weights={"accuracy": 1.0, "helpful": 0.5}, helpful_model="some/model")
    assert "which a rule can verify" in complaint({"math"}, rewards)
    named = replace(rewards, model_on_reasoning=True)
    check_sums(named, JudgeConfig(), {"math"}, terms=REWARDS, ruled=ACCURACY)
    measured = replace(rewards, weights={"accuracy": 1.0, "helpful": 0.0})
    check_sums(measured, JudgeConfig(), {"math"}, terms=REWARDS, ruled=ACCURACY)


def test_every_preset_has_known_terms_and_the_contradicted_ones_say_so() -> None:
    for name, weights in PRESETS.items():
        assert set(weights) <= set(REWARDS)
        equal = len(set(weights.values())) == 1
        assert name.startswith("contradicted_by_the_paper") != equal


def test_an_unknown_task_is_refused_by_name() -> None:
    async def scenario() -> None:
        async with Scorer(RewardConfig()) as scorer:
            with pytest.raises(
                ValueError, match="prompt p: task 'chat' has no rule; known are math, code, choice, logic"
            ):
                await scorer.score(rollout("x", task="chat"))

    asyncio.run(scenario())


def test_a_stream_gives_back_every_rollout_once() -> None:
    rng = random.Random()
    hard = "\\frac{2}{\\sqrt{8}}"
    items = [
        rollout(
            GOOD.format(hard if rng.random() < 0.3 else rng.randrange(10)), "\\frac{1}{\\sqrt{2}}", index=i
        )
        for i in range(120)
    ]

    async def scenario() -> list[ScoredRollout]:
        async with Scorer(RewardConfig()) as scorer:
            return [scored async for scored in scorer.score_stream(stream(items), in_flight=16)]

    scored = asyncio.run(scenario())
    assert sorted(s.rollout.index for s in scored) == list(range(120))
    for item in scored:
        expected = hard in item.rollout.response_text
        assert item.reward.terms["accuracy"] == float(expected)


def test_scoring_begins_before_the_last_rollout_is_there() -> None:
    async def scenario() -> None:
        scored_first = asyncio.Event()

        async def slow_source() -> AsyncIterator[Rollout]:
            yield rollout(GOOD.format("7"), index=0)
            await asyncio.wait_for(scored_first.wait(), 30)  # decoding goes on until the first score is out
            yield rollout(GOOD.format("7"), index=1)

        async with Scorer(RewardConfig()) as scorer:
            indices = []
            async for scored in scorer.score_stream(slow_source()):
                indices.append(scored.rollout.index)
                scored_first.set()
            assert indices == [0, 1]

    asyncio.run(scenario())


def test_a_stream_takes_no_more_than_its_bound_from_the_source() -> None:
    async def scenario() -> None:
        taken = handed = 0

        async def source() -> AsyncIterator[Rollout]:
            nonlocal taken
            for index in range(200):
                taken += 1
                assert taken - handed <= 8 + 2  # those in flight, the one handed on, the one that waits
                yield rollout(GOOD.format("7"), index=index)

        async with Scorer(RewardConfig()) as scorer:
            async for _ in scorer.score_stream(source(), in_flight=8):
                handed += 1
                await asyncio.sleep(0)
        assert handed == taken == 200

    asyncio.run(scenario())


def test_an_error_of_the_source_rises_from_the_stream() -> None:
    async def scenario() -> None:
        async def broken() -> AsyncIterator[Rollout]:
            yield rollout(GOOD.format("7"))
            raise ConnectionError("the engine is gone")

        async with Scorer(RewardConfig()) as scorer:
            with pytest.raises(ConnectionError, match="the engine is gone"):
                async for _ in scorer.score_stream(broken()):
                    pass
            with pytest.raises(ValueError, match="task 'chat'"):
                async for _ in scorer.score_stream(stream([rollout("x", task="chat")])):
                    pass

    asyncio.run(scenario())


def test_a_stream_left_early_leaves_no_task_behind() -> None:
    async def scenario() -> None:
        async with Scorer(RewardConfig()) as scorer:
            scores = scorer.score_stream(stream([rollout(GOOD.format("7"), index=i) for i in range(50)]))
            async for _ in scores:
                break
            await scores.aclose()  # type: ignore[attr-defined]
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())


def test_a_scorer_that_mostly_faults_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "MAX_FAULTS", 1)

    async def scenario() -> None:
        async with Scorer(RewardConfig(cpu_seconds=1000.0)) as scorer:
            scorer.services.pool.wall_seconds = (
                0.05  # so that endless work loses its worker without reaching the CPU limit
            )
            endless = rollout(GOOD.format("9^{9^{9^{9}}}"))
            assert (await scorer.score(endless)).verdicts["accuracy"] == "fault"
            with pytest.raises(WorkerError, match="2 of 2 answers could not be judged"):
                await scorer.score(endless)

    asyncio.run(scenario())


def test_generation_ends_before_slow_scoring_does() -> None:
    """What lets the reference model run while rewards are computed."""
    release = asyncio.Event()

    async def held(_: Rollout) -> tuple[float, str]:
        await release.wait()
        return 1.0, "ok"

    async def scenario() -> None:
        items = [rollout("x", index=i) for i in range(40)]
        async with (
            Scorer(RewardConfig(weights={"held": 1.0}), extra={"held": held}) as scorer,
            scorer.begin(stream(items), in_flight=4) as scoring,
        ):
            assert list(await scoring.rollouts()) == items
            assert scoring.spans == []
            release.set()
            scored = await scoring.scored()
            assert [item.rollout for item in scored] == items
            assert len(scoring.spans) == 40

    asyncio.run(scenario())


@pytest.mark.parametrize("wait_for", ["rollouts", "scored"])
def test_a_failing_term_stops_a_step_at_once(wait_for: str) -> None:
    async def failing(_: Rollout) -> tuple[float, str]:
        raise ConnectionError("the judge is gone")

    async def endless() -> AsyncIterator[Rollout]:
        yield rollout("x")
        await asyncio.sleep(1000)

    async def scenario() -> None:
        async with (
            Scorer(RewardConfig(weights={"failing": 1.0}), extra={"failing": failing}) as scorer,
            scorer.begin(endless()) as scoring,
        ):
            with pytest.raises(ConnectionError, match="the judge is gone"):
                await getattr(scoring, wait_for)()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())


def test_a_judge_that_is_down_is_named_with_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run of RL ends with exit code 2 and that line (cli.py), and goes on when the judge is back."""
    monkeypatch.setattr("r1mega.rewards.endpoint.MAX_TRIES", 1)
    monkeypatch.setattr("r1mega.rewards.scoring.MAX_FAULTS", 1)
    monkeypatch.setattr("r1mega.rewards.endpoint.LONGEST_WAIT", 0.01)
    url = "http://127.0.0.1:9/v1"

    async def scored() -> None:
        rewards = RewardConfig(weights={"judge": 1.0}, workers=1)
        async with Scorer(rewards, judge=JudgeConfig(url=url, model="v3")) as scorer:
            for index in range(2):
                prompt = Prompt("p", "why?", "because", "essay", "why?", ())
                await scorer.score(Rollout(prompt, index, (), (), "<think>a</think>b", "stop", 0))

    with pytest.raises(EndpointFault, match=f"^{url}, model v3: no verdict of the judge, and 2 of 2 answers"):
        asyncio.run(scored())
