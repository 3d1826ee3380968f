import pytest
from strangers import stranger

from kvfold.bench.ask.asking import Answer
from kvfold.bench.ask.prompts import length
from kvfold.bench.choices import choose
from kvfold.bench.suites import find, names, needle
from kvfold.data import NEEDLES
from kvfold.errors import DataError, SuiteError

SUITE = choose(needle.SUITE, given=["tokens=400"])
COST = dict.fromkeys(
    ("stored", "resident", "attended", "stored_bytes", "resident_bytes", "full_bytes", "ttft_seconds", "tpot_seconds"),
    1.0,
)


def documents(suite=SUITE, n=10, seed=0):
    return [sample.document(stranger().tokenizer) for sample in suite.samples(n=n, seed=seed)]


@pytest.fixture
def parrot(monkeypatch):
    """Answers with prepared replies, and writes down what was asked."""
    asked = []

    def say(subject, plans, prompts):
        asked.extend(prompts)
        for number, said in enumerate(say.replies):
            tokens = subject.tokenizer(f" {said}", add_special_tokens=False)["input_ids"]
            yield plans[0], {number: Answer(tokens=tokens, cost=COST)}

    say.asked = asked
    monkeypatch.setattr(needle, "ask_each", say)
    return say


def test_the_suite_is_found_by_the_name_of_its_file():
    assert "needle" in names()
    assert find("needle") is needle.SUITE


def test_samples_follow_from_the_seed_and_take_the_kinds_in_turn():
    assert documents() == documents()
    assert documents(seed=1)[0] != documents()[0]
    assert [one.kind for one in documents()] == [*NEEDLES, *NEEDLES]
    assert [one.kind for one in documents(choose(SUITE, given=["kinds=variable"]), n=3)] == ["variable"] * 3


def test_more_samples_begin_with_the_same_ones():
    assert SUITE.samples(n=7, seed=3)[:4] == SUITE.samples(n=4, seed=3)


@pytest.mark.parametrize("tokens", [400, 1000])
def test_documents_are_as_long_as_the_models_own_tokenizer_counts(tokens):
    for one in documents(choose(SUITE, given=[f"tokens={tokens}"]), n=5):
        assert 0.9 * tokens < length(stranger().tokenizer, one.prompt) <= tokens


def test_real_text_hides_the_needles_where_it_is_given(tmp_path):
    path = tmp_path / "novels.jsonl"
    path.write_text('{"text": "It was a dark and stormy night. The old captain sang of the sea all day."}')
    suite = choose(SUITE, data=path)
    for one in documents(suite, n=5):
        assert one.prompt.count("The old captain sang of the sea all day.") > 5
    assert suite.settings["data"].startswith("novels.jsonl ")


def test_the_canonical_replies_score_and_a_rivals_number_does_not(parrot):
    made = documents(n=5)
    parrot.replies = [one.reply for one in made]
    assert [o.score for o in SUITE.ask(stranger(), "full", SUITE.samples(n=5, seed=0))] == [1.0] * 5
    parrot.replies = [f"{one.reply} {one.rivals[0] if one.rivals else ''}" for one in made]
    outcomes = SUITE.ask(stranger(), "full", SUITE.samples(n=5, seed=0))
    assert {o.family: o.score for o in outcomes} == {one.kind: float(not one.rivals) for one in made}
    parrot.replies = ["I do not know."] * 5
    assert [o.score for o in SUITE.ask(stranger(), "full", SUITE.samples(n=5, seed=0))] == [0.0] * 5


@pytest.mark.parametrize("question", ["seen", "unseen"])
def test_the_question_is_folded_only_where_it_is_seen(parrot, question):
    suite = choose(SUITE, given=[f"question={question}"])
    assert suite.query_aware == (question == "seen")
    parrot.replies = ["no"] * 5
    suite.ask(stranger(), "full", suite.samples(n=5, seed=0))
    for one, document in zip(parrot.asked, documents(suite, n=5), strict=True):
        folded, asked = (stranger().tokenizer.decode(list(part)) for part in (one.context, one.question))
        assert (document.question in folded) == (question == "seen")
        assert (document.question in asked) == (question == "unseen")
        told = sum(answer in folded for answer in document.answers)
        assert told == len(document.answers)


def test_guessing_scores_as_often_as_there_are_needles_to_guess_from():
    shortcut = SUITE.shortcut(SUITE.samples(n=10, seed=0))
    assert shortcut == {"single": 1.0, "multikey": 1 / 4, "multivalue": 1 / 2, "multiquery": 1 / 6, "variable": 1 / 2}
    longer = choose(SUITE, given=["tokens=2048", "kinds=multikey"])
    chances = [1 / (1 + len(one.rivals)) for one in documents(longer, n=8)]
    assert longer.shortcut(longer.samples(n=8, seed=0)) == pytest.approx({"multikey": sum(chances) / 8})


def test_the_folded_document_answers_within_its_size(monkeypatch):
    monkeypatch.setattr(needle, "REPLY_TOKENS", 8)  # the stranger never stops by itself
    outcomes = SUITE.ask(stranger(), "snapkv(keep=0.25)", SUITE.samples(n=2, seed=0))
    assert all(0.2 < outcome.stored <= 0.25 for outcome in outcomes)


@pytest.mark.parametrize("given", ["kinds=haystack", "kinds="])
def test_an_unknown_kind_lists_the_real_ones(given):
    with pytest.raises(SuiteError, match="single, multikey"):
        choose(SUITE, given=[given])


def test_too_short_a_document_says_how_long_it_must_be():
    with pytest.raises(DataError, match="needles alone take"):
        documents(choose(SUITE, given=["tokens=40"]), n=5)
