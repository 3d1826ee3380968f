import json
import os
from pathlib import Path

import pytest
import torch
from strangers import stranger

from kvfold.bench.ask.prompts import expected, prompt
from kvfold.bench.choices import choose
from kvfold.bench.suites import find, longqa
from kvfold.bench.suites.longqa import token_f1
from kvfold.errors import DataError, SuiteError

REAL = Path(os.environ.get("KVFOLD_DATA", "/nowhere")) / "eval"


def story(number, questions):
    return {
        "text": f"Story {number}. " + f"The king of land {number} had a hat. " * 20,
        "qa": [
            {"question": f"What had king {number} for  the {i}th time?", "answer": f"hat {i}", "kind": "thing"}
            for i in range(questions)
        ],
    }


@pytest.fixture(autouse=True)
def short_replies(monkeypatch):
    monkeypatch.setattr(longqa, "REPLY_TOKENS", 8)  # the stranger never stops by itself


@pytest.fixture
def tales(tmp_path):
    """Three documents with five questions, two, and none."""
    path = tmp_path / "tales.jsonl"
    path.write_text("".join(json.dumps(story(number, many)) + "\n" for number, many in enumerate((5, 2, 0))))
    return path


def suite_of(path, *given):
    return choose(longqa.SUITE, given=["tokens=300", "questions=2", *given], data=path)


def test_questions_of_one_document_come_together_and_none_comes_twice(tales):
    suite = suite_of(tales)
    samples = suite.samples(n=7, seed=0)
    assert len({sample.question for sample in samples}) == 7
    documents = [sample.document for sample in samples]
    assert documents[0] == documents[1] != documents[2] == documents[3]
    assert documents[4:] == [0, 0, 0]
    assert suite.rows == 2
    assert suite.samples(n=7, seed=0) == samples
    assert [sample.question for sample in suite.samples(n=7, seed=1)] != [sample.question for sample in samples]
    assert suite.samples(n=3, seed=0) == samples[:3]


def test_too_many_samples_say_how_many_there_are(tales):
    with pytest.raises(SuiteError, match=r"8 samples were asked for; tales\.jsonl has 7 questions"):
        suite_of(tales).samples(n=8, seed=0)


def counted(monkeypatch):
    fed = []
    read = longqa.read_once

    def watching(subject, plans, contexts):
        fed.append([len(context) for context in contexts])
        return read(subject, plans, contexts)

    monkeypatch.setattr(longqa, "read_once", watching)
    return fed


def test_unseen_questions_share_one_fold_and_seen_ones_have_their_own(tales, monkeypatch):
    samples = suite_of(tales).samples(n=4, seed=0)
    fed = counted(monkeypatch)
    unseen = suite_of(tales).ask(stranger(), "snapkv(keep=0.3)", samples)
    assert len(fed) == 2
    fed.clear()
    seen = suite_of(tales, "question=seen")
    assert seen.query_aware
    assert not suite_of(tales).query_aware
    outcomes = seen.ask(stranger(), "snapkv(keep=0.3)", samples)
    assert len(fed) == 4
    assert [o.metrics["log_likelihood"] for o in outcomes] != [o.metrics["log_likelihood"] for o in unseen]


def test_a_question_is_answered_alone_as_among_others(tales):
    suite = suite_of(tales)
    samples = suite.samples(n=4, seed=0)
    together = suite.ask(stranger(), "snapkv(keep=0.3)", samples)
    alone = [suite.ask(stranger(), "snapkv(keep=0.3)", [sample])[0] for sample in samples]
    for one, other in zip(together, alone, strict=True):
        assert one.score == other.score
        assert one.metrics == pytest.approx(other.metrics, rel=1e-5)


def test_the_likelihood_is_that_of_the_reference_under_the_plain_model(tales):
    subject, suite = stranger(), suite_of(tales)
    (sample,) = suite.samples(n=1, seed=0)
    (outcome,) = suite.ask(subject, "full", [sample])
    text = longqa.shortened(subject.tokenizer, sample.text, 300)
    last = f"Question: {sample.question}"
    asked = prompt(subject.tokenizer, f"{longqa.HEAD}\n\n{text}\n\n{last}", question=last, seen=False, reply_tokens=1)
    answer = expected(subject.tokenizer, sample.answer)
    ids = torch.tensor([[*asked.context, *asked.question, *answer]])
    with torch.no_grad():
        shares = subject.model(ids).logits[0, -len(answer) - 1 : -1].double().log_softmax(-1)
    likely = shares[torch.arange(len(answer)), list(answer)].mean()
    assert outcome.metrics["log_likelihood"] == pytest.approx(float(likely), rel=1e-4)
    assert outcome.score == outcome.metrics["f1"]
    (other,) = choose(suite, given=["score=likelihood"]).ask(subject, "full", [sample])
    assert other.score == pytest.approx(float(likely.exp()), rel=1e-3)
    assert other.metrics == outcome.metrics


def test_documents_are_cut_at_the_stated_length_and_records_say_so(tales):
    samples = suite_of(tales).samples(n=2, seed=0)
    cut = suite_of(tales, "tokens=50").ask(stranger(), "full", samples)
    whole = suite_of(tales, "tokens=2000").ask(stranger(), "full", samples)
    assert [o.metrics["cut"] for o in cut] == [1.0, 1.0]
    assert [o.metrics["cut"] for o in whole] == [0.0, 0.0]
    assert cut[0].full_bytes < whole[0].full_bytes


def test_a_model_that_does_not_chat_is_asked_too(tales):
    suite = suite_of(tales)
    outcomes = suite.ask(stranger(chats=False), "full", suite.samples(n=2, seed=0))
    assert [outcome.family for outcome in outcomes] == ["thing", "thing"]


def test_what_was_said_by_speakers_is_a_document(tmp_path):
    path = tmp_path / "talk.jsonl"
    said = [{"speaker": "A", "content": "We meet on Monday ."}, {"speaker": "B", "content": "Fine ."}]
    path.write_text(json.dumps({"messages": said, "qa": [{"question": "When?", "answer": "on Monday"}]}))
    (sample,) = suite_of(path).samples(n=1, seed=0)
    assert sample.text == "A: We meet on Monday .\nB: Fine ."
    assert sample.family == "question"


@pytest.mark.parametrize(
    ("said", "answer", "score"),
    [
        ("The red hat.", "a red hat", 1.0),
        ("red", "a red hat", 2 / 3),
        ("a blue coat", "red hat", 0.0),
        ("", "red hat", 0.0),
        ("red red", "red hat", 0.5),
        ("the", "a", 1.0),
    ],
)
def test_token_f1_counts_shared_words(said, answer, score):
    assert token_f1(said, answer) == pytest.approx(score)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "no qa"),
        ({"qa": [{"question": "a", "answer": "b"}]}, "no text or messages"),
        ({"text": "a", "qa": [{"question": "a"}]}, "row 1"),
        ({"text": "a", "qa": []}, "none of its rows asks"),
    ],
)
def test_rows_of_the_wrong_shape_are_one_clear_line(tmp_path, row, said):
    path = tmp_path / "tales.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(DataError, match=said):
        suite_of(path).samples(n=1, seed=0)


def test_without_data_there_is_nothing_to_ask():
    with pytest.raises(DataError, match="give --data"):
        longqa.SUITE.samples(n=1, seed=0)
    with pytest.raises(SuiteError, match="set 1 or more"):
        choose(longqa.SUITE, given=["questions=0"])
    assert find("longqa") is longqa.SUITE


@pytest.mark.skipif(not REAL.is_dir(), reason="KVFOLD_DATA names no folder with eval/")
@pytest.mark.parametrize(("name", "many"), [("fairytaleqa.val", 1025), ("qmsum.val", 272)])
def test_the_real_questions_are_read(name, many):
    suite = choose(longqa.SUITE, data=REAL / f"{name}.jsonl.xz")
    with pytest.raises(SuiteError, match=r"has \d+ questions"):
        suite.samples(n=10_000, seed=0)
    assert len({(s.document, s.question, s.answer) for s in suite.samples(n=200, seed=0)}) == 200
