"""Scores are what a person would count by hand, what jiwer counts, and their intervals mean what they say."""

import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import metrics


def cer(reference, hypothesis):
    counts = metrics.count([metrics.normalise(reference)], [metrics.normalise(hypothesis)])
    return int(counts.substitutions[0]), int(counts.deletions[0]), int(counts.insertions[0]), int(counts.lengths[0])


@pytest.mark.parametrize(
    ("reference", "hypothesis", "by_hand"),
    [
        ("您好", "您好", (0, 0, 0, 2)),
        ("您好", "喂您好吗", (0, 0, 2, 2)),  # insertions at both edges
        ("您好", "", (0, 2, 0, 2)),
        ("", "嗯", (0, 0, 1, 0)),
        ("", "", (0, 0, 0, 0)),
        ("我的订单号是123", "我的账单号是13", (1, 1, 0, 9)),
        ("您好，张先生。", "您好张先生！", (0, 0, 0, 5)),  # punctuation is not heard
        ("ＡＰＰ登录", "app 登录", (0, 0, 0, 5)),  # width, case and spaces are not heard
        ("用APP还款", "用a p p还款", (0, 0, 0, 6)),
    ],
)
def test_cer_is_what_a_person_counts(reference, hypothesis, by_hand):
    assert cer(reference, hypothesis) == by_hand


def test_wer_counts_a_chinese_character_as_a_word_and_a_latin_word_as_one():
    assert metrics.words(metrics.normalise("请打开VIP Club的APP，谢谢")) == [
        "请", "打", "开", "vip", "club", "的", "app", "谢", "谢"]
    counts = metrics.count(["打开vip club"], ["打开vip"], "word")
    assert (counts.errors[0], counts.lengths[0]) == (1, 4)


@pytest.mark.parametrize(
    ("raw", "normalised"),
    [
        ("涨了3.5%。", "涨了3.5%"), ("1,000元", "1000元"), ("I don't know.", "i dont know"), ("退 款 了", "退款了"),
        ("<|zh|>你好", "你好"), ("...", ""), ("", ""), ("第①步", "第1步"), ("1,2345", "1 2345"),
        ("好❤️的1️⃣", "好的1"), ("葛\U000e0100先生", "葛先生"),  # what follows a sign to say how it looks is no character
    ],
)
def test_normalisation_keeps_what_is_heard(raw, normalised):
    assert metrics.normalise(raw) == normalised
    assert metrics.normalise(normalised) == normalised


def test_numerals_can_be_compared_in_chinese():
    written, spoken = (metrics.normalise(text, chinese_numerals=True) for text in ("一共12元", "一共十二元"))
    assert written == spoken
    written, spoken = (metrics.normalise(text, chinese_numerals=True) for text in ("1,000元", "一千元"))
    assert written == spoken
    written, spoken = (metrics.normalise(text, chinese_numerals=True) for text in ("尾号007", "尾号零零七"))
    assert written == spoken, "the zeros of a number that is read digit by digit"


def test_a_keyword_with_a_number_is_found_however_numbers_are_compared(tmp_path):
    (tmp_path / "k.txt").write_text("12期\n", "utf-8-sig")
    for chinese in (False, True):
        keywords = metrics.read_keywords(tmp_path / "k.txt", chinese)
        assert metrics.keyword_counts([metrics.normalise("分12期还", chinese)], keywords).tolist() == [[1]]


TEXT = st.text(alphabet="甲乙丙丁ab c", max_size=12)


@settings(max_examples=200, deadline=None)
@given(pairs=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5))
def test_rates_equal_jiwer_on_the_same_strings(pairs):
    references, hypotheses = ([metrics.normalise(text) for text in side] for side in zip(*pairs, strict=True))
    if not any(references):
        return
    counts = metrics.count(references, hypotheses)
    output = jiwer.process_characters(
        [metrics.characters(text) for text in references], [metrics.characters(text) for text in hypotheses])
    assert metrics.rate(counts.errors, counts.lengths) == pytest.approx(output.cer)
    assert (counts.substitutions.sum(), counts.deletions.sum(), counts.insertions.sum()) == (
        output.substitutions, output.deletions, output.insertions)
    counts = metrics.count(references, hypotheses, "word")
    expected = jiwer.wer(
        [" ".join(metrics.words(t)) for t in references], [" ".join(metrics.words(t)) for t in hypotheses])
    assert metrics.rate(counts.errors, counts.lengths) == pytest.approx(expected)


def kwer(keywords, reference, hypothesis):
    wanted, heard = metrics.keyword_counts([reference], keywords), metrics.keyword_counts([hypothesis], keywords)
    return wanted.sum(), np.minimum(wanted, heard).sum(), heard.sum()


def test_keywords_are_matched_as_a_multiset(tmp_path):
    (tmp_path / "k.txt").write_text("# comment\n逾期|预期\n退款\n退款申请  # said at the end\nAPP\n\n", "utf-8")
    keywords = metrics.read_keywords(tmp_path / "k.txt")
    assert list(keywords) == ["逾期", "退款", "退款申请", "APP"]
    assert kwer(keywords, "逾期了", "预期了") == (1, 1, 1)  # an alias is the keyword
    assert kwer(keywords, "退款退款退款", "退款") == (3, 1, 1)  # repeated: each occurrence counts
    assert kwer(keywords, "退款", "退款退款") == (1, 1, 2)  # said once too often: precision suffers, recall does not
    assert kwer(keywords, "退款申请", "退款声请") == (2, 1, 1)  # overlapping: each keyword on its own
    assert kwer(keywords, "app", "happy") == (1, 0, 0)  # a Latin keyword is a whole word
    assert kwer(keywords, "用app登录", "用app登录") == (1, 1, 1)
    (tmp_path / "mixed.txt").write_text("2期\n办VIP\n", "utf-8")
    mixed = metrics.read_keywords(tmp_path / "mixed.txt")
    assert kwer(mixed, "分12期办vips", "分2期办vip") == (0, 0, 2)  # nor is the Latin end of a mixed one
    assert kwer(keywords, "无", "无") == (0, 0, 0)
    (tmp_path / "wide.txt").write_text("逾期｜预期＃又叫\n", "utf-8")
    assert kwer(metrics.read_keywords(tmp_path / "wide.txt"), "逾期了", "预期了") == (1, 1, 1)


def test_a_keyword_on_two_lines_is_one(tmp_path):
    (tmp_path / "k.txt").write_text("逾期|预期\nAPP\n逾期|愈期\napp|应用\n", "utf-8")
    keywords = metrics.read_keywords(tmp_path / "k.txt")
    assert list(keywords) == ["逾期", "APP"]
    assert kwer(keywords, "逾期预期愈期，用app应用", "") == (5, 0, 0)


def test_recall_precision_and_f1_of_keywords_by_hand():
    wanted, heard = np.array([2, 1]), np.array([1, 3])
    rates = metrics.keyword_rates(wanted, heard, np.minimum(wanted, heard))
    assert rates == {"keyword_recall": 2 / 3, "keyword_precision": 2 / 4, "keyword_f1": 4 / 7}


def test_rate_of_nothing_is_none():
    assert metrics.rate(np.array([3]), np.array([0])) is None
    assert metrics.bootstrap(["a"], np.array([1]), np.array([4])) == (None, None)


@pytest.mark.parametrize("calls", [30, 150])
def test_intervals_cover_the_true_rate_in_93_to_97_percent_of_cases(calls):
    """Calls differ in difficulty (a beta distribution around 10 %), utterances of a call share it."""
    rng, runs, covered = np.random.default_rng(calls), 1200, 0
    for _ in range(runs):
        difficulty = np.repeat(rng.beta(2, 18, calls), 3)
        lengths = rng.integers(5, 40, difficulty.size)
        errors = rng.binomial(lengths, difficulty)
        clusters = np.repeat([f"call{i}" for i in range(calls)], 3)
        low, high = metrics.bootstrap(clusters, errors, lengths, resamples=500)
        covered += low <= 0.1 <= high
    assert 0.93 <= covered / runs <= 0.97


def test_p_value_tells_a_better_model_from_an_equal_one():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 40, 300)
    base, equal = rng.binomial(lengths, 0.2), rng.binomial(lengths, 0.2)
    better = rng.binomial(lengths, 0.1)
    clusters = [str(i) for i in range(300)]
    assert metrics.paired_p_value(clusters, better, base, lengths) < 0.01
    assert metrics.paired_p_value(clusters, equal, base, lengths) > 0.05
    assert metrics.paired_p_value(clusters, base, base, lengths) == 1.0


def test_fewer_than_five_calls_have_no_interval_and_no_p_value():
    errors, lengths = np.arange(8), np.full(8, 20)
    assert metrics.bootstrap([f"call{i % 4}" for i in range(8)], errors, lengths) == (None, None)
    assert metrics.paired_p_value([f"call{i % 4}" for i in range(8)], errors, errors[::-1], lengths) is None
    low, high = metrics.bootstrap([f"call{i % 5}" for i in range(8)], errors, lengths)
    assert low < errors.sum() / lengths.sum() < high


@pytest.mark.parametrize("calls", [5, 12])
def test_equal_models_seldom_differ_however_few_the_calls(calls):
    """Two models of the same rate, which differ from call to call: below 0.05 in one of twenty cases or fewer."""
    rng, runs, found = np.random.default_rng(calls), 400, 0
    for _ in range(runs):
        lengths = rng.integers(20, 60, calls)
        first, second = (rng.binomial(lengths, rng.beta(2, 8, calls)) for _ in "ab")
        clusters = [f"call{i}" for i in range(calls)]
        found += metrics.paired_p_value(clusters, first, second, lengths, resamples=300) < 0.05
    assert found / runs <= 0.08


def test_a_loop_is_told_from_a_repetitive_reference():
    assert metrics.has_loop("好的", "好的" * 8)
    assert metrics.has_loop("", "啊啊啊啊啊啊")
    assert not metrics.has_loop("88888888", "88888888")
    assert not metrics.has_loop("好的", "好的好的")
