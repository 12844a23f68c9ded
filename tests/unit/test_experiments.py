"""The pure parts of tools/experiments: steps and their labels, reranking, tree search."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest

from r1mega.data.chain import ChainProblem
from r1mega.samples import Prompt, Rollout

FOLDER = str(Path(__file__).parents[2] / "tools" / "experiments")


@pytest.fixture(scope="module")
def tools():
    sys.path.insert(0, FOLDER)
    names = ("toy_steps", "command", "reranking", "search_tree", "process_reward", "mcts")
    yield {name: importlib.import_module(name) for name in names}
    sys.path.remove(FOLDER)
    for name in names:
        del sys.modules[name]


@pytest.fixture
def toy_steps(tools):
    return tools["toy_steps"]


@pytest.fixture
def reranking(tools):
    return tools["reranking"]


@pytest.fixture
def search_tree(tools):
    return tools["search_tree"]


@pytest.fixture
def process_reward(tools):
    return tools["process_reward"]


@pytest.fixture
def mcts(tools):
    return tools["mcts"]


PROBLEM = ChainProblem(3, (("+", 4), ("*", 2)))
"""3 plus 4 is 7, times 2 is 4."""


@pytest.mark.parametrize(
    ("response", "labels"),
    [
        ("<think>3 plus 4 is 7 times 2 is 4</think><answer>4</answer>", [True, True, True]),
        ("<think>3加4得7 times 2 is 4</think><answer>4</answer>", [True, True, True]),
        ("<think>3 plus 4 is 6 times 2 is 2</think><answer>2</answer>", [False, False, False]),
        ("<think>3 plus 4 is 6 times 2 is 4</think><answer>4</answer>", [False, True, True]),
        ("<think>3 plus 5 is 7 times 2 is 4</think><answer>4</answer>", [False, True, True]),
        ("<think>3 plus 4 is 7 times 2 is 4</think><answer>9</answer>", [True, True, False]),
        ("3 plus 4 is 7 times 2 is 4. The answer is 4", [True, True, False]),
        (
            "<think>3 plus 4 is 7 times 2 is 4 plus 1 is 5</think><answer>4</answer>",
            [True, True, False, True],
        ),
        ("<think></think><answer>4</answer>", [True]),
        ("", [False]),
    ],
)
def test_a_step_is_right_if_its_operation_is_asked_and_its_result_true(toy_steps, response, labels):
    assert toy_steps.step_labels(PROBLEM, response) == labels


def test_the_prefixes_end_after_each_step_and_the_last_is_the_whole(toy_steps):
    response = "<think>3 plus 4 is 7乘2得4</think><answer>4</answer>"
    assert toy_steps.prefixes(response) == ["<think>3 plus 4 is 7", "<think>3 plus 4 is 7乘2得4", response]
    assert toy_steps.prefixes("3 plus 4 is 7") == ["3 plus 4 is 7"]


def prompt_of(problem):
    return Prompt(f"chain:{problem.question}", "Q", problem.answer, "math", "Q", (1,))


def sampled(texts):
    prompt = prompt_of(PROBLEM)
    return {prompt.id: [Rollout(prompt, i, (1,) * 20, (), text, "stop", 0) for i, text in enumerate(texts)]}


def test_a_generated_prompt_names_its_chain(toy_steps):
    assert toy_steps.problem_of(prompt_of(PROBLEM)) == PROBLEM


def test_step_labels_are_given_once_and_outcomes_to_every_sample(process_reward):
    right = "<think>3 plus 4 is 7 times 2 is 4</think><answer>4</answer>"
    slip = "<think>3 plus 4 is 7 times 2 is 5</think><answer>5</answer>"
    samples = sampled([right, right, slip, ""])
    steps = process_reward.labelled_rows([prompt_of(PROBLEM)], samples)
    assert [row["safe"] for row in steps] == [True, True, True, False, False]
    outcomes = process_reward.labelled_rows([prompt_of(PROBLEM)], samples, "outcome")
    first = [row["safe"] for row in outcomes if row["response"] == "<think>3 plus 4 is 7"]
    assert first == [True, True, False]


def test_a_product_of_step_scores_prefers_fewer_steps(reranking):
    short, long = [0.6], [0.9, 0.9, 0.9, 0.8]
    chosen = {name: max(short, long, key=f) is short for name, f in reranking.AGGREGATES.items()}
    assert chosen == {"min": False, "product": True, "mean": False, "last": False}


def test_reranking_takes_the_best_of_each_group_of_k(reranking):
    steps = [[[0.9, 0.1], [0.5], [0.2], [0.8, 0.7]]]
    right, votes = [[False, True, True, False]], [["7", "4", "4", None]]
    worked = [[1.0, 0.0, 0.0, 1.0]]
    pairs, whole = (reranking.reranked(k, steps, right, votes, worked) for k in (2, 4))
    assert pairs["min"]["accuracy"]["value"] == 0.5
    assert pairs["min"]["score"] == pytest.approx((0.5 + 0.7) / 2)
    assert pairs["product"]["worked"] == 0.5
    assert pairs["cons"]["value"] == pytest.approx((0.5 + 1.0) / 2)
    assert whole["min"]["accuracy"]["value"] == 0.0
    assert whole["cons"]["value"] == whole["oracle"]["value"] == 1.0


def test_auc_counts_pairs_and_half_of_the_ties(reranking):
    scores, labels = [0.1, 0.4, 0.4, 0.8, 0.4], [False, True, False, True, True]
    pairs = [(s, t) for s, right in zip(scores, labels, strict=True) if right
             for t, other in zip(scores, labels, strict=True) if not other]  # fmt: skip
    by_hand = sum(1.0 if s > t else 0.5 if s == t else 0.0 for s, t in pairs) / len(pairs)
    assert reranking.auc(scores, labels) == pytest.approx(by_hand)


# ---------------------------------------------------------------- tree search


def test_puct_takes_the_likely_child_first_and_the_good_one_in_the_end(search_tree):
    likely, good = search_tree.Node("likely", prior=0.9), search_tree.Node("good", prior=0.1)
    root = search_tree.Node("", visits=1, children=[likely, good])
    values = {"likely": 0.2, "good": 0.9}
    first = search_tree.select(root, c=1.0)[-1]
    assert first is likely
    for _ in range(200):
        path = search_tree.select(root, c=1.0)
        search_tree.back_up(path, values[path[-1].text])
    assert good.visits > 5 * likely.visits
    assert root.visits == 201
    assert good.mean == pytest.approx(0.9)


def test_without_exploration_the_search_stays_where_it_was_lucky(search_tree):
    """The local optimum that the paper names."""
    first = search_tree.Node("a", prior=0.5, visits=1, total=0.3)
    better = search_tree.Node("b", prior=0.5)
    root = search_tree.Node("", visits=1, children=[first, better])
    assert search_tree.select(root, c=0.0)[-1] is first
    assert search_tree.select(root, c=2.0)[-1] is better


def test_a_continuation_is_cut_after_its_first_step(search_tree):
    assert search_tree.next_step("", "<think>3 plus 4 is 7", False) == ("<think>3 plus 4 is 7", False)
    assert search_tree.next_step("", "3 plus 4 is 7 times", False) == ("3 plus 4 is 7", False)
    assert search_tree.next_step("3 plus 4 is 7", " times 2 is 4", False) == (
        "3 plus 4 is 7 times 2 is 4",
        False,
    )
    ended = search_tree.next_step("<think>3 plus 4 is 7", "</think><answer>7</answer>", False)
    assert ended == ("<think>3 plus 4 is 7</think><answer>7</answer>", True)
    assert search_tree.next_step("3 plus 4 is 7", ". The answer is 7", True)[1]


def test_children_are_the_different_steps_with_their_shares(search_tree):
    node = search_tree.Node("3")
    search_tree.expand(node, [(" plus 4 is 7", False)] * 3 + [(" plus 4 is 8", False)], depth=1)
    assert [(child.text, child.prior) for child in node.children] == [
        ("3 plus 4 is 7", 0.75),
        ("3 plus 4 is 8", 0.25),
    ]


def test_the_answer_has_most_visits_over_all_ended_nodes(search_tree):
    def end(answer, visits, value):
        return search_tree.Node(f"<answer>{answer}</answer>", ended=True, visits=visits, value=value)

    branch = search_tree.Node("3 plus 4 is 7", visits=9, children=[end(4, 3, 0.6), end(9, 4, 0.9)])
    root = search_tree.Node("", visits=12, children=[branch, end(4, 2, 0.1)])
    assert search_tree.answer_of(root) == "4"
    assert search_tree.answer_of(search_tree.Node("", children=[search_tree.Node("3 plus")])) is None


def test_a_vote_counts_the_samples_that_fit_into_the_budget(mcts):
    group = sampled([f"<answer>{digit}</answer>" for digit in (4, 9, 9, 4)])["chain:3 + 4 * 2"]
    assert mcts.votes_within(60, group, [0.9, 0.3, 0.4, 0.9]) == ("9", "4")
    assert mcts.votes_within(19, group, [0.9, 0.3, 0.4, 0.9]) == (None, None)


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize("name", ["process_reward", "mcts"])
def test_bad_input_is_one_line_and_exit_code_2(tools, name, tmp_path, capsys):
    main = tools[name].main
    model = str(Path(FOLDER).parents[1] / "configs/tiny/model_bilingual")
    for arguments, word in (
        (["nowhere", "--out", str(tmp_path / "out")], "nowhere"),
        ([model, "--out", str(tmp_path / "out")], "no weights"),
    ):
        assert main(arguments) == 2
        message = capsys.readouterr().err
        assert message.startswith(f"{name}: ")
        assert message.count("\n") == 1
        assert word in message
    assert not (tmp_path / "out").exists()


def test_a_wrong_model_count_folder_or_scorer_is_refused(tools, tmp_path, capsys):
    command, tiny = tools["command"], Path(FOLDER).parents[1] / "configs/tiny"
    models = {}
    for name in ("model", "model_bilingual"):
        models[name] = str(shutil.copytree(tiny / name, tmp_path / name))
        (tmp_path / name / "model.safetensors").touch()
    right, out = models["model_bilingual"], ["--out", str(tmp_path / "out")]
    for arguments, message in (
        ([models["model"], *out], "no token for"),
        ([right, "--out", str(tmp_path)], "not empty"),
        ([right, *out, "--epochs", "0"], "--epochs 0"),
        ([right, *out, "--scorer", right], "no readable reward_model.json"),
    ):
        options = command.parser("").parse_args(arguments)
        assert command.command("tool", lambda _: pytest.fail("ran"), options) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_in_the_package_imports_the_experiments():
    package = Path(FOLDER).parents[1] / "r1mega"
    assert not [file for file in package.rglob("*.py") if "toy_steps" in file.read_text(encoding="utf-8")]
