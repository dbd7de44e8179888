"""Words in every script: ASCII text as ever, and search, comparison and metrics that work without spaces between words."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from research_rl.config import IndexConfig
from research_rl.embedding.lexical import LexicalEncoder
from research_rl.index import bm25
from research_rl.reward.metrics import contains, exact_match, token_f1
from research_rl.reward.words import terms, words


@given(st.text(st.characters(max_codepoint=127), max_size=200))
def test_ascii_text_is_split_by_one_regular_expression_and_nothing_else(text: str) -> None:
    """What English corpora, embeddings and word indexes were built from."""
    assert words(text) == terms(text) == re.findall(r"\w+", text.lower())
    assert bm25._terms(text) == re.findall(r"(?u)\b\w\w+\b", text.lower())


@pytest.mark.parametrize(
    ("text", "in_order", "searched"),
    [
        ("北京第10区", "北 京 第 10 区", "北 京 第 北京 京第 10 区"),
        ("東京タワー、A棟", "東 京 タ ワ ー a 棟", "東 京 タ ワ ー 東京 京タ タワ ワー a 棟"),
        ("ไทย ๑๒", "ไ ท ย ๑๒", "ไท ทย ไทย ๑๒"),
        ("كِتَابٌ", "كتاب", "كتاب"),
        ("हिन्दी में", "हिन्दी में", "हिन्दी में"),
        ("Cafe\u0301 NAÏVE ❤️", "café naïve", "café naïve"),
        ("서울의 봄", "서울의 봄", "서 울 의 서울 울의 봄"),
        ("Ｗｉｋｉ１２", "wiki12", "wiki12"),
    ],
)
def test_words_of_a_script_are_its_own(text: str, in_order: str, searched: str) -> None:
    assert words(text) == in_order.split() and terms(text) == searched.split()


@dataclass
class Language:
    syllables: str
    passage: str
    question: str
    name: str = "{}{}{}"
    asked: Callable[[str], str] = str


TRADES = range(12)
# ruff: noqa: E501
LANGUAGES = {
    "English": Language(
        "ba do ri ka lem tor wick ness gar fel hum sil", "{a}\n{a} is a town on the river {b}, known for clocks of kind {t}. {c} founded it in {y}.",
        "Who founded the town of {a}?",
    ),
    "Chinese": Language("北 南 京 河 山 海 林 安 宁 德 城 川", "{a}\n{a}是位于{b}河边的城市，以第{t}种钟表闻名，由{c}于{y}年建立。", "{a}这座城市是谁建立的？"),
    "Japanese": Language("東 京 山 川 カ リ ス の み 島 野 崎", "{a}\n{a}は{b}川のほとりにある町で、第{t}種の時計で知られ、{y}年に{c}が建てました。", "{a}という町を建てたのは誰ですか？"),
    "Thai": Language("บาง เมือง นคร ทอง แก้ว ศรี ชัย รัตน์ บุรี ธานี ล้าน เชียง", "{a}\n{a}เป็นเมืองริมแม่น้ำ{b}มีชื่อเสียงด้านนาฬิกาแบบที่{t}ก่อตั้งโดย{c}ในปี{y}", "ใครเป็นผู้ก่อตั้งเมือง{a}"),
    "Arabic": Language(
        "بَا دُو رِي كَا لَم تُور نِس غَر فَل هُم سِل مَن", "{a}\n{a} مَدِينَةٌ عَلَى نَهْرِ {b} تَشْتَهِرُ بِالسَّاعَاتِ {t}، أَسَّسَهَا {c} عَامَ {y}.", "من أسس مدينة {a}؟",
        asked=lambda name: re.sub("[\u064b-\u0652]", "", name),
    ),
    "Hindi": Language("राम पुर नगर गंगा की ज्यो ति शि वा हिन् दू मे", "{a}\n{a} {b} नदी के किनारे एक नगर है, जो घड़ी {t} के लिए प्रसिद्ध है। इसे {c} ने {y} में बसाया।", "{a} को किसने बसाया?"),
    "accented Latin": Language(
        "bé dô rí ça lém tör wîck ñess går fël hüm sìl", "{a}\n{a} est une ville au bord du fleuve {b}, célèbre pour ses horloges {t}. {c} l'a fondée en {y}.",
        "Qui a fondé la ville de {a} ?", asked=lambda name: unicodedata.normalize("NFD", name),
    ),
}  # fmt: skip


class Passages:
    """Texts as a passage store gives them."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def batches(self, size: int) -> Iterator[tuple[int, list[str]]]:
        for start in range(0, len(self.texts), size):
            yield start, self.texts[start : start + size]


def generated(language: Language) -> tuple[Passages, list[str]]:
    """400 passages about towns of invented names, and a question about each; river and founder are names of other towns."""
    draw = random.Random(3)
    syllables = language.syllables.split()
    combinations = [(a, b, c) for a in syllables for b in syllables for c in syllables]
    names = [language.name.format(*parts) for parts in draw.sample(combinations, 400)]

    def passage(name: str) -> str:
        return language.passage.format(
            a=name, b=draw.choice(names), c=draw.choice(names), t=draw.choice(TRADES), y=draw.randint(1000, 1999)
        )

    return Passages([passage(name) for name in names]), [language.question.format(a=language.asked(name)) for name in names]


def recall_at_5(rows: np.ndarray) -> float:
    return float((rows[:, :5] == np.arange(len(rows))[:, None]).any(axis=1).mean())


def by_bm25(language: Language, folder: Path) -> float:
    folder.mkdir()
    passages, questions = generated(language)
    bm25.write(passages, IndexConfig(kind="bm25"), folder)
    return recall_at_5(bm25.Bm25.open(folder, [(0, len(passages))], [0]).search(questions, 5)[1])


def by_vectors(language: Language) -> float:
    passages, questions = generated(language)
    encoder = LexicalEncoder.fit([passages.texts], 2048)
    return recall_at_5(np.argsort(-(encoder.encode_queries(questions) @ encoder.encode_passages(passages.texts).T), axis=1, kind="stable"))


@pytest.mark.parametrize("language", [name for name in LANGUAGES if name != "English"])
def test_passages_are_found_in_every_language_as_well_as_in_english(tmp_path: Path, language: str) -> None:
    english = LANGUAGES["English"]
    assert by_bm25(LANGUAGES[language], tmp_path / language) >= by_bm25(english, tmp_path / "english") - 0.05 > 0.9
    # Hashed into a fixed number of places, the n-grams of scripts without spaces collide more often than words do.
    assert by_vectors(LANGUAGES[language]) >= by_vectors(english) - 0.12 > 0.85


def test_f1_of_unsegmented_scripts_is_by_character_and_of_others_as_published() -> None:
    assert token_f1("北京市", ["北京"]) == pytest.approx(2 * 2 / 5)
    assert token_f1("第10区", ["10区"]) == pytest.approx(2 * 2 / 5), "a number among characters is one word"
    assert exact_match("《紅樓夢》", ["紅樓夢"]) == 1.0 and exact_match("ประเทศ ไทย", ["ประเทศไทย"]) == 1.0
    assert token_f1("東京タワー", ["大阪城"]) == 0.0
    assert token_f1("القاهرة الكبرى", ["القاهرة"]) == pytest.approx(2 / 3)
    assert token_f1("São Paulo", ["Sao Paulo"]) == 0.5, "accents are part of a word, as published"


def test_an_answer_is_contained_by_whole_words() -> None:
    assert contains("21", ["1"]) == contains("I know", ["no"]) == contains("cathedral", ["the"]) == 0.0
    assert contains("there are 21 of them", ["21"]) == contains("The answer is no.", ["no"]) == 1.0
    assert contains("他生于北京市", ["北京"]) == contains("第10区", ["10"]) == contains("อยู่ในประเทศไทย", ["ไทย"]) == 1.0
    assert contains("第10区", ["1"]) == 0.0


@pytest.mark.parametrize("gold", ["A", "The", "!", "an a", "", "。"])
@pytest.mark.parametrize("prediction", ["", "A", "the", "Paris"])
def test_a_gold_answer_that_normalises_to_nothing_is_never_paid(gold: str, prediction: str) -> None:
    assert exact_match(prediction, [gold]) == contains(prediction, [gold]) == token_f1(prediction, [gold]) == 0.0
    assert exact_match("Paris", [gold, "Paris"]) == 1.0
