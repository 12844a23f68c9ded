"""Language consistency: what is prose, what language it is in, and what a policy might try."""

# ruff: noqa: RUF001  (look-alike characters are part of the data)

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from r1mega.bench.reward_text import grade_language, grade_mixed
from r1mega.rewards.language import CHARACTERS_PER_WORD, consistency, detect, language_code, language_shares
from r1mega.rewards.prose import chain_of_thought, prose, summary

SHARED = Path(os.environ.get("R1MEGA_SHARED", Path(__file__).parents[3] / "shared"))


def shared(name: str) -> Path:
    path = SHARED / "data" / name
    if not path.exists():
        pytest.skip(f"no {path}")
    return path


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("First we compute the sum of the two numbers.", "en"),
        ("Zuerst berechnen wir die Summe der beiden Zahlen.", "de"),
        ("Nous calculons d'abord la somme des deux nombres.", "fr"),
        ("Primero calculamos la suma de los dos números.", "es"),
        ("Kwanza tunahesabu jumla ya namba hizo mbili.", "sw"),
        ("Prima calcoliamo la somma dei due numeri.", "it"),
        ("Primeiro calculamos a soma dos dois números.", "pt"),
        ("Eerst berekenen we de som van de twee getallen.", "nl"),
        ("Svaret är tolv eftersom tre gånger fyra är tolv.", "sv"),
        ("Odpowiedź to dwanaście, ponieważ trzy razy cztery to dwanaście.", "pl"),
        ("Cevap on ikidir çünkü üç kere dört on iki eder.", "tr"),
        ("Câu trả lời là mười hai vì ba nhân bốn là mười hai.", "vi"),
        ("Først beregner vi summen af de to tal, og derefter ganger vi den med tre.", "da"),
        ("Răspunsul este doisprezece, deoarece trei ori patru fac doisprezece.", "ro"),
        ("Odgovor je dvanaest jer je tri puta četiri dvanaest.", "hr"),
        ("उत्तर बारा आहे कारण तीन गुणिले चार म्हणजे बारा होते.", "mr"),
        ("首先我们计算两个数的和。", "zh"),
        ("首先我們計算兩個數的和。", "zh"),
        ("まず二つの数の和を計算します。", "ja"),
        ("먼저 두 수의 합을 계산합니다.", "ko"),
        ("Сначала вычислим сумму двух чисел.", "ru"),
        ("Відповідь дванадцять, тому що три помножити на чотири.", "uk"),
        ("Πρώτα υπολογίζουμε το άθροισμα.", "el"),
        ("أولا نحسب مجموع العددين", "ar"),
        ("پاسخ دوازده است زیرا سه ضربدر چهار", "fa"),
        ("קודם נחשב את הסכום", "he"),
        ("पहले हम योग निकालते हैं", "hi"),
        ("প্রথমে আমরা যোগফল বের করি", "bn"),
        ("ముందుగా మొత్తాన్ని లెక్కిద్దాం", "te"),
        ("ขั้นแรกเราคำนวณผลรวม", "th"),
        ("முதலில் கூட்டுத்தொகையைக் கணக்கிடுவோம்", "ta"),
        ("Find $x$ if $\\frac{1}{x} = 5$.", "en"),
        ("求 $\\sqrt{x+1} = 3$ 的解。", "zh"),
        ("print('hello')  # nothing but code", "en"),
        ("12 + 34 = 46", "und"),
        ("，。！？", "und"),
        ("", "und"),
    ],
)
def test_the_language_of_a_question_is_detected(text: str, language: str) -> None:
    assert detect(text) == language
    if language != "und":
        value, verdict = consistency(text, language)
        assert verdict in ("consistent", "mixed")
        assert value >= 0.7


@pytest.mark.parametrize(
    "chain",
    ["", " \n", "3 * 4 = 12", "$x^2 = 4$", "\\[ x = 2 \\text{ since it is positive} \\]", "😀 🎉", "x = y, z"]
    + ["```python\nprint('the answer is here')\n```", "`the answer`", "```\nthe words of an open fence"]
    + ["https://example.com/the/answer", "\\begin{align} the &= answer \\end{align}", "，。！？"],
)
def test_a_chain_without_words_earns_nothing(chain: str) -> None:
    assert consistency(chain, "en") == (0.0, "no_words")
    assert consistency(chain, "zh") == (0.0, "no_words")


def test_a_chain_in_another_language_earns_nothing() -> None:
    assert consistency("首先我们计算两个数的和。", "en") == (0.0, "other_language")
    assert consistency("We compute the sum first.", "zh") == (0.0, "other_language")


def test_a_mixed_chain_earns_its_share() -> None:
    chain = "First we compute the sum of both. Dann berechnen wir das Produkt der beiden."
    shares = language_shares(chain).words
    assert shares == {"de": 7.0, "en": 7.0}
    assert consistency(chain, "en")[0] == pytest.approx(0.5)


def test_a_clause_inside_a_sentence_shows() -> None:
    shares = language_shares("Wait, das ist doch falsch, so we need to compute it again.").words
    assert shares["de"] == 4.0
    assert shares["en"] == 8.0


def test_names_and_short_words_do_not_break_a_language() -> None:
    assert consistency("Tom und Claire kaufen 3 Pizzas. Wie viel zahlt Tom?", "de") == (1.0, "consistent")
    assert consistency("Dan. OK. Hmm, so Janet has 16 eggs and sells them at $2 each.", "en")[0] == 1.0


def test_units_identifiers_and_acronyms_are_no_words() -> None:
    assert language_shares("他跑了 60 km，用了 max_len 和 GPU，即 x1 = 3 cm。").words.keys() == {"zh"}
    assert consistency("设 x = 5，则 y = 10，所以 x + y = 15。", "zh") == (1.0, "consistent")


def test_words_of_another_script_count() -> None:
    shares = language_shares("我们使用 Adam optimizer 训练这个模型").words
    assert shares["en"] == 2.0
    assert shares["zh"] == pytest.approx(10 / CHARACTERS_PER_WORD["zh"])


def test_kana_make_a_sentence_japanese_and_a_heading_with_it() -> None:
    assert set(language_shares("問題解決\n\nまず、この問題を考えます。").words) == {"ja"}
    assert set(language_shares("首先我们来看这个问题。然后计算结果。").words) == {"zh"}
    shares = language_shares("“ありがとう”的意思是谢谢，我们来看下一题。").words
    assert shares["zh"] > shares["ja"] > 0


def test_tricks_with_characters_change_nothing() -> None:
    plain = language_shares("The answer is clear").words
    assert language_shares("Ｔｈｅ ａｎｓｗｅｒ ｉｓ ｃｌｅａｒ").words == plain
    assert language_shares("Th\u200be ans\u2060wer is\ufeff cl\u00adear").words == plain
    assert language_shares("The answer 😀 is 🎉 clear").words == plain


def test_look_alike_letters_are_not_the_target_language() -> None:
    fake = "Тhе аnswеr tо thе quеstiоn is thе numbеr оf аpplеs"
    assert consistency(fake, "en")[0] < 0.3


def test_romanised_chinese_is_not_chinese() -> None:
    assert consistency("wo men xian kan zhe ge wen ti, ran hou ba shu zi jia qi lai", "zh")[0] == 0.0


def test_one_repeated_word_is_of_its_language() -> None:
    assert consistency("the " * 50, "en") == (1.0, "consistent")


def test_jieba_counts_chinese_exactly() -> None:
    assert language_shares("我们来看这个问题", exact_chinese=True).words == {"zh": 4.0}
    assert language_shares("我们来看这个问题").words == {"zh": 5.0}


def test_language_names_are_checked() -> None:
    assert language_code("zh-Hant") == "zh"
    assert language_code("EN_us") == "en"
    with pytest.raises(ValueError, match="english"):
        consistency("The answer.", "english")
    assert consistency("The answer.", "und") == (0.0, "no_target")


def test_counting_is_the_same_in_every_thread() -> None:
    texts = [
        "First the sum. Dann das Produkt der Zahlen.",
        "我们 compute 这个",
        "Primero la suma de todo.",
    ] * 20
    expected = [language_shares(text, exact_chinese=True).words for text in texts]
    found: list[list[dict[str, float]]] = []

    def count() -> None:
        found.append([language_shares(text, exact_chinese=True).words for text in texts])

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


@pytest.mark.parametrize(
    ("response", "opened", "chain"),
    [
        ("<think>a</think><answer>b</answer>", False, "a"),
        ("<think>a", False, "a"),
        ("a</think>b", False, "a"),
        ("a</think>b", True, "a"),
        ("a", True, "a"),
        ("a", False, ""),
        ("<think>a</think>x<think>b</think>c", False, "a</think>x<think>b"),
        ("", True, ""),
    ],
)
def test_the_chain_of_thought_is_what_the_think_block_holds(response: str, opened: bool, chain: str) -> None:
    assert chain_of_thought(response, opened=opened) == chain


def test_the_summary_follows_the_chain() -> None:
    assert summary("<think>a</think>\n b ") == "b"
    assert summary("b") == "b"
    assert summary("<think>a") == ""


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a $x$ b $$y$$ c \\(z\\) d \\[w\\] e", "a b c d e"),
        ("It costs $5 and then $10 more", "It costs $ and then $ more"),
        ("see `code here` and ```\nmore\n``` end", "see and end"),
        ("an <b>old</b> <a href='x'>tag</a>", "an old tag"),
        ("if a < b and c > d", "if a < b and c > d"),
        ("\\textbf{gone} and \\boxed{7} stays", "and stays"),
        ("use my_list and camelCase or x2", "use and or"),
        ("mail me@example.com now", "mail now"),
        ("\\begin{pmatrix} a \\\\ b \\end{pmatrix} is", "is"),
    ],
)
def test_prose_is_what_is_left(text: str, left: str) -> None:
    assert " ".join(prose(text).split()) == left


HOSTILE = [
    "a",
    "$a",
    "\\[",
    "\\(",
    "\\begin{a}",
    "\\a{",
    "\\a[",
    "<a b=",
    "`",
    "a-",
    "1 ",
    "我",
    "あ我。",
    "а-",
]
HOSTILE += ["한 ", "\u0301", "\u200b", " ", "\n", "\ud800", "\x00", "x1@", "www.", "the und "]


@pytest.mark.parametrize("piece", HOSTILE)
def test_a_long_hostile_chain_is_counted(piece: str) -> None:
    text = piece * (300_000 // len(piece))
    value, _ = consistency(text, "en")
    assert 0.0 <= value <= 1.0


def test_the_labelled_set_is_told_apart() -> None:
    assert grade_language(shared("language/labelled_open.jsonl")).accuracy >= 0.99


@pytest.mark.parametrize("exact", [False, True])
def test_the_share_of_chinese_is_right_on_mixed_documents(exact: bool) -> None:
    assert grade_mixed(shared("language/mixed_open.jsonl"), exact_chinese=exact) <= 0.03


@pytest.mark.parametrize("language", ["en", "zh", "de", "fr", "ja", "ru"])
def test_school_problems_are_told_apart_and_consistent(language: str) -> None:
    lines = shared(f"mgsm/mgsm_{language}.tsv").read_text(encoding="utf-8").splitlines()
    questions = [line.split("\t")[0] for line in lines]
    assert sum(detect(question) == language for question in questions) >= 0.99 * len(questions)
    values = [consistency(question, language)[0] for question in questions]
    assert sum(values) / len(values) >= 0.99


def test_english_full_of_latex_is_english() -> None:
    rows = [json.loads(line) for line in shared("math/math500.jsonl").read_text().splitlines()]
    assert sum(detect(row["problem"]) == "en" for row in rows) >= 0.99 * len(rows)
