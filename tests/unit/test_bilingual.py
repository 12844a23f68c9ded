"""The toy world of the pipeline: the same problems in two languages, and small talk."""

from __future__ import annotations

import random
import re

import pytest
from transformers import AutoTokenizer

from r1mega.config import DataConfig
from r1mega.data import general_talk
from r1mega.data.bilingual import CHINESE, ENGLISH, LANGUAGES, base_documents, questions
from r1mega.data.chain import chain_problems
from r1mega.data.chat import template
from r1mega.data.prompts import read_prompts
from r1mega.rewards.instructions import follows
from r1mega.rewards.language import consistency, detect

MODEL = "configs/tiny/model_bilingual"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def test_an_operation_and_its_step_have_four_tokens_in_both_languages(tokenizer) -> None:
    shorter, longer = (chain_problems(1, n, seed=3, heldout=False)[0] for n in (3, 4))
    for words in LANGUAGES:
        tokens = [len(tokenizer(words.question(problem))["input_ids"]) for problem in (shorter, longer)]
        assert tokens[1] - tokens[0] == 4
        assert len(tokenizer(words.step("+", 4, 7))["input_ids"]) == 4


def test_a_language_is_recognised_by_its_question_and_its_steps() -> None:
    for words in LANGUAGES:
        for problem in chain_problems(20, 4, seed=1, heldout=False):
            assert detect(words.question(problem)) == words.language
            steps = str(problem.start) + "".join(words.step(o, d, 5) for o, d in problem.steps)
            assert consistency(steps, words.language)[0] == 1.0
    mixed = "3" + ENGLISH.step("+", 4, 7) + CHINESE.step("*", 2, 4)
    assert consistency(mixed, "en")[0] < 1.0


def test_documents_have_no_unknown_word_and_no_held_out_problem(tokenizer) -> None:
    heldout = {words.question(p) for words in LANGUAGES for p in chain_problems(300, 3, seed=9, heldout=True)}
    texts = base_documents(2000, 3, seed=2)
    for question, text in texts:
        prompt = template("tiny_bilingual").render(question) if question else ""
        assert tokenizer.unk_token_id not in tokenizer(prompt + text)["input_ids"], (question, text)
        assert tokenizer.decode(tokenizer(prompt + text)["input_ids"]) == prompt + text
        assert question not in heldout
    assert len(set(texts)) > 1500


def test_base_documents_mix_languages_and_chinese_steps_have_fewer_mistakes() -> None:
    right: dict[str, list[bool]] = {"en": [], "zh": []}
    step = re.compile(r"(?P<a>\d)(?P<op> plus | minus | times |加|减|乘)(?P<b>\d)(?: is |得)(?P<c>\d)")
    operators = {w.operators[o]: o for w in LANGUAGES for o in "+-*"}
    mixed = 0
    for question, text in base_documents(4000, 4, seed=5):
        if "<think>" not in text or not question:
            continue
        mixed += " is " in text and "得" in text
        rest = text
        while found := step.search(rest):
            value = eval(f"{found['a']} {operators[found['op']]} {found['b']}") % 10
            right["zh" if "得" in found[0] else "en"].append(value == int(found["c"]))
            rest = rest[found.end() - 1 :]
    share = {language: sum(values) / len(values) for language, values in right.items()}
    assert mixed > 200
    assert share["zh"] > share["en"] + 0.1, share


def test_scenarios_hold_both_kinds_of_general_prompts_and_leave_the_held_out_out(tokenizer) -> None:
    data = DataConfig(path="generated:scenarios", template="r1", operations=3, size=300, eval_size=60)
    prompts = read_prompts(data, tokenizer, seed=1)
    assert prompts.tasks == {"math", "helpful", "safety"}
    assert not {p.question for p in prompts.train} & {p.question for p in prompts.heldout}
    for prompt in prompts.train:
        assert tokenizer.unk_token_id not in prompt.token_ids


def test_both_languages_are_asked() -> None:
    told = questions(chain_problems(200, 4, seed=2, heldout=False), 1)
    languages = [detect(text) for text, _ in told]
    assert 60 < languages.count("zh") < 140


def test_general_rows_think_but_for_simple_queries() -> None:
    rows = general_talk.rows(200, seed=4)
    simple = [row for row in rows if row["question"] in general_talk.GREETINGS]
    assert 10 < len(simple) < 60
    assert all("reasoning" not in row for row in simple)
    assert all(row["reasoning"] for row in rows if row not in simple)
    assert general_talk.rows(5, seed=4) == rows[:5]


def test_a_talk_of_the_web_is_rude_or_dangerous_as_often_as_not() -> None:
    rng = random.Random(1)
    answers = [general_talk.raw_document(rng)[1] for _ in range(500)]
    assert sum(any(bad in text for bad in general_talk.RUDE) for text in answers) > 150
    assert sum(any(bad in text for bad in general_talk.SECRETS) for text in answers) > 40


def test_small_talk_is_good_as_written_for_training_and_not_when_rude_secret_twice_or_short() -> None:
    checked = dict(general_talk.checked_questions())
    rules = checked["How do I boil rice?"]
    assert len(checked) == 48

    def good(text: str) -> bool:
        return all(follows(text, name, given) for name, given in rules)

    rng = random.Random(4)
    answers = [
        talk for talk in (general_talk.good_talk(rng, heldout=True) for _ in range(200)) if talk.reasoning
    ]
    assert all(good(talk.answer) and talk.question in checked for talk in answers)
    assert good("Keep it dry. Ask a friend. Work slowly.")
    assert not good("Keep it dry. Ask a friend. You fool.")
    assert not good("Keep it dry. The pin is 90. Work slowly.")
    assert not good("Keep it dry. Ask a friend. Keep it dry.")
    assert not good("The answer is \\boxed{4}.")
