from statistics import median

import pytest

from kvfold.bench.ask import reader
from kvfold.bench.subject import Subject
from kvfold.bench.suites import chat, find, names
from kvfold.data import FAMILIES
from kvfold.errors import SuiteError
from kvfold.hf.load import SHIPPED, new_llama

SUITE = chat.SUITE


@pytest.fixture(scope="module")
def subject():
    """A model that knows nothing, with the shipped tokenizer."""
    import torch
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = new_llama(**sizes, intermediate_size=64, vocab_size=2048, max_position_embeddings=4096).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(SHIPPED / "tiny"))
    return Subject(name="random", model=model, tokenizer=tokenizer, fingerprint="0", dtype="float32", device="cpu")


class Parrot(reader.AuditedRows):
    """Rows that write down what is done to them and answer with prepared replies. It changes."""

    replies: list[str]
    log: list[tuple]
    tokenizer = None

    def feed(self, chunks):
        self.log.append(("feed", [tuple(chunk) for chunk in chunks]))
        super().feed(chunks)

    def fold(self):
        self.log.append(("fold",))
        super().fold()

    def answer(self, prompts, *, max_new_tokens, stop=()):
        self.log.append(("answer", [tuple(prompt) for prompt in prompts]))
        super().answer(prompts, max_new_tokens=1, stop=stop)
        assert stop == {self.tokenizer.eos_token_id}
        return [self.tokenizer(f" {reply}", add_special_tokens=False)["input_ids"] for reply in self.replies]


@pytest.fixture
def parrot(subject, monkeypatch):
    Parrot.log, Parrot.tokenizer = [], subject.tokenizer
    monkeypatch.setattr(reader, "AuditedRows", Parrot)
    return Parrot


def test_the_suite_is_found_by_the_name_of_its_file():
    assert "chat" in names()
    assert find("chat") is SUITE


def test_an_unknown_suite_names_what_is_near():
    with pytest.raises(SuiteError, match="did you mean chat"):
        find("chta")


def test_samples_follow_from_the_seed_and_take_the_families_in_turn():
    first = SUITE.samples(n=12, seed=5)
    assert first == SUITE.samples(n=12, seed=5)
    assert first[:8] == SUITE.samples(n=8, seed=5)
    assert first[0] != SUITE.samples(n=12, seed=6)[0]
    assert [sample.family for sample in first] == [*FAMILIES] * 3


def test_lengths_and_distances_are_those_that_the_suite_states():
    samples = SUITE.samples(n=180, seed=0)
    turns = {sum(message.role == "user" for message in sample.messages) for sample in samples}
    assert turns == set(range(16, 25))
    assert median(sample.distance for sample in samples) >= 8
    assert all(sample.holders >= 2 for sample in samples)


def test_each_turn_is_fed_once_and_folded_before_the_next(subject, parrot):
    samples = SUITE.samples(n=4, seed=0)
    parrot.replies = [sample.reply for sample in samples]
    SUITE.ask(subject, "streaming_llm(keep=0.5)", samples)
    kinds = [entry[0] for entry in parrot.log]
    most = max(sum(message.role == "assistant" for message in sample.messages) for sample in samples)
    assert kinds == ["feed", "fold"] * most + ["answer"]
    for row, sample in enumerate(samples):
        fed = [chunks[row] for kind, *rest in parrot.log if kind in ("feed", "answer") for chunks in rest]
        plain = [{"role": message.role, "content": message.content} for message in sample.messages]
        text = subject.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        assert list(sum(fed, ())) == subject.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_right_reply_scores_one_and_a_wrong_one_nothing(subject, parrot):
    samples = SUITE.samples(n=8, seed=1)
    parrot.replies = [sample.reply if i % 3 else "I do not know." for i, sample in enumerate(samples)]
    outcomes = SUITE.ask(subject, "full", samples)
    assert [outcome.score for outcome in outcomes] == [float(i % 3 != 0) for i in range(8)]
    assert [outcome.family for outcome in outcomes] == [*FAMILIES] * 2


def test_what_is_held_is_read_before_the_question_is_fed(subject):
    samples = SUITE.samples(n=3, seed=2)
    for keep in (0.5, 0.2):
        for outcome in SUITE.ask(subject, f"streaming_llm(keep={keep})", samples):
            assert keep - 0.03 < outcome.stored <= keep + 0.02
            assert outcome.stored_bytes / outcome.full_bytes == pytest.approx(outcome.stored)
            assert outcome.resident == outcome.stored


def test_rows_are_asked_together_as_they_are_alone(subject):
    samples = SUITE.samples(n=3, seed=4)
    together = SUITE.ask(subject, "streaming_llm(keep=0.3)", samples)
    alone = [SUITE.ask(subject, "streaming_llm(keep=0.3)", [sample])[0] for sample in samples]
    assert sum(one.full_bytes for one in alone) == pytest.approx(sum(one.full_bytes for one in together))
    assert sum(one.stored_bytes for one in alone) == pytest.approx(sum(one.stored_bytes for one in together), rel=0.02)


def test_the_floor_holds_next_to_nothing_and_the_ceiling_everything(subject):
    samples = SUITE.samples(n=2, seed=3)
    assert SUITE.ask(subject, "none", samples)[0].stored < 0.02
    assert SUITE.ask(subject, "full", samples)[0].stored >= 1.0


def test_the_best_shortcut_is_known_for_each_family_and_is_no_solution():
    shortcut = SUITE.shortcut(SUITE.samples(n=80, seed=0))
    assert list(shortcut) == list(FAMILIES)
    assert all(0.0 < score < 0.6 for score in shortcut.values())
