"""SONIC's training: the loss is what it says and falls, a resumed run is the same run, what it leaves loads."""

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvfold.adapters.files import load_adapter
from kvfold.cli.main import run as command
from kvfold.data import training_dialogue
from kvfold.hf.load import load
from kvfold.train.loop import LoopSettings
from kvfold.train.sonic.budgets import FixedBudgets
from kvfold.train.sonic.distil import divergence
from kvfold.train.sonic.run import SonicRun
from kvfold.train.sonic.settings import SonicSettings, Terms
from kvfold.train.sonic.soft_selection import HardChoice
from kvfold.train.sonic.talk_batch import REPEATED, batch_talks
from kvfold.train.sonic.talks import Mix, Talks


def a_run(out, **settings):
    loop = LoopSettings(tokens=10**9, matrix_rate=None, other_rate=2e-3, warmup_steps=2, batches_a_step=1, average=0.9)
    return SonicRun(
        SonicSettings(model="tiny", out=out, batch_tokens=500, rank=4, guided_queries=16, loop=loop, **settings)
    )


def test_divergence_in_chunks_is_the_written_out_one(monkeypatch):
    head = torch.nn.Linear(8, 50, bias=False)
    student, teacher = torch.randn(7, 8, requires_grad=True), torch.randn(7, 8)
    targets, weights = torch.randint(0, 50, (7,)), torch.rand(7)
    monkeypatch.setattr("kvfold.train.sonic.distil._CHUNK", 3)
    found = divergence(student, teacher, head, targets, weights)
    logs, wanted = head(student).log_softmax(-1), head(teacher).log_softmax(-1)
    kl = torch.nn.functional.kl_div(logs, wanted, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(found.kl, (kl * weights).sum())
    own = torch.nn.functional.cross_entropy(head(student), targets, reduction="none")
    torch.testing.assert_close(found.cross_entropy, (own * weights).sum())
    (grown,) = torch.autograd.grad(found.kl, student)
    (meant,) = torch.autograd.grad((kl * weights).sum(), student)
    torch.testing.assert_close(grown, meant)


@pytest.fixture(scope="module")
def tokenizer():
    return load("tiny")[1]


def test_a_talk_is_what_the_template_writes_cut_where_turns_end(tokenizer):
    messages = training_dialogue("recall", turns=5, seed=3)
    talk = Talks(tokenizer, Mix(), None).encode(messages, random.Random(5), most=2000)
    plain = [{"role": one.role, "content": one.content} for one in messages]
    assert tokenizer.decode(talk.ids) == tokenizer.apply_chat_template(plain, tokenize=False)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert all(talk.ids[stop - 1] == end for stop in talk.ends)
    assert talk.ends[-1] < len(talk.ids)
    scored = [token for token, weight in zip(talk.ids, talk.weights, strict=True) if weight == 1.0]
    assert messages[-1].content in tokenizer.decode(scored)


def test_a_document_is_folded_before_it_is_asked_about(tokenizer):
    talks, rng = Talks(tokenizer, Mix(), None), random.Random(6)
    for seed in range(6):
        talk = talks._document(rng, seed, talks.borrowed, most=800)
        assert talk is not None
        told, asked = tokenizer.decode(talk.ids[: talk.ends[0]]), tokenizer.decode(talk.ids[talk.ends[0] :])
        replies = tokenizer.decode([token for token, weight in zip(talk.ids, talk.weights, strict=True) if weight])
        numbers = set(re.findall(r"[0-9]{6}", replies))
        assert numbers
        assert all(number in told for number in numbers)
        assert "<|assistant|>" not in told
        assert asked.count("<|assistant|>") == replies.count("<|end|>")


def test_a_repetition_is_the_whole_talk_again_and_stays_open(tokenizer):
    mix = Mix(chats=0.0, drills=0.0, documents=0.0, dialogues=0.0, prose=0.0, repeats=1.0)
    source, drawn = Talks(tokenizer, mix, None).draw(random.Random(7), turns=3, count=4, most=800)
    assert source == REPEATED
    assert len(drawn) == 2
    for talk in drawn:
        half = len(talk.ids) // 2
        assert talk.ids[:half] == talk.ids[half:]
        assert talk.ends[-1] == half
        assert all(talk.weights[half:])


def test_a_repetition_asks_for_every_token_of_the_text(tmp_path, tokenizer):
    run = a_run(tmp_path, terms=Terms(choice=0.0, salience=1.0))
    mix = Mix(chats=0.0, drills=0.0, documents=0.0, dialogues=0.0, prose=0.0, repeats=1.0)
    talks = Talks(tokenizer, mix, None).draw(random.Random(8), turns=3, count=2, most=600)[1]
    batch = batch_talks(talks, sinks=4, longest_jump=0, rng=random.Random(0), pad=0, source=REPEATED)
    predicts = batch.weights[:, 1:] > 0
    chosen = run.loss._query_positions(batch, predicts)
    half = len(talks[0].ids) // 2
    assert set(range(half, 2 * half - 1)) <= set(chosen[0].tolist())


def test_a_family_can_be_left_out(tokenizer):
    talks = Talks(tokenizer, Mix(without="rules"), None)
    assert "rules" not in talks.families
    assert "rules" not in talks.drills


def all_in_float32(run):
    run.loss.bfloat16 = False
    return run


def test_the_base_model_does_not_change_and_the_loss_falls(tmp_path):
    run = a_run(tmp_path, scorer_until=0.0, terms=Terms(salience=0.0))
    before = {name: weight.clone() for name, weight in run.model.named_parameters()}
    batch = run.talks_of(random.Random(1), turns=3)

    def batches():
        while True:
            yield batch

    def cost():
        run.loss.rng.seed(4)  # the same budgets and noise
        with torch.no_grad():
            return float(run.loss(batch).mean)

    first = cost()
    for _ in range(8):
        run.trainer.step(batches(), lambda *_: None)
    assert cost() < first
    assert all(torch.equal(weight, before[name]) for name, weight in run.model.named_parameters())


@pytest.mark.parametrize(("term", "share"), [("salience", 0.0), ("salience", 0.6), ("choice", 0.6)])
def test_every_term_has_a_switch(tmp_path, term, share):
    run = a_run(tmp_path, scorer_until=1.0, terms=replace(Terms(salience=0.0, choice=0.0), **{term: 1.0}))
    batch, run.loss.share = run.talks_of(random.Random(3), turns=4), share
    run.loss(batch).mean.backward()
    assert any(bool(weight.grad.any()) for weight in run.adapter.scorer.layers.parameters())
    run.loss.terms = Terms(salience=0.0, choice=0.0)
    assert float(run.loss(batch).mean.detach()) == 0


def test_a_loss_reaches_updates_gates_embeddings_and_the_scores_of_rows(tmp_path):
    run = all_in_float32(a_run(tmp_path, scorer_until=0.0, terms=Terms(salience=0.0)))
    run.loss(run.talks_of(random.Random(3), turns=4)).mean.backward()
    adapter = run.adapter
    last = f"layers.{run.model.config.num_hidden_layers - 1}."
    for name, up in zip(adapter.names, adapter.up, strict=True):
        # Of the last layer only keys and values of a row are ever read.
        assert bool(up.grad.any()) == (not name.startswith(last) or name.endswith(("k_proj", "v_proj"))), name
    assert bool(adapter.gates.grad[:-1].any())
    assert bool(adapter.embeddings.grad.any())
    assert bool(adapter.scorer.rows.weight.grad.any())


def test_everything_kept_is_the_model_itself(tmp_path):
    run = all_in_float32(a_run(tmp_path))
    batch = run.talks_of(random.Random(2), turns=3)
    found = run.loss.check(batch, run.loss.read(batch), FixedBudgets(slots_of=lambda tokens: tokens), HardChoice())
    assert float(found.mean) == pytest.approx(0.0, abs=1e-4)


def test_untrained_rows_cost_nothing_against_word_for_word(tmp_path):
    run = all_in_float32(a_run(tmp_path))
    batch = run.talks_of(random.Random(2), turns=4)
    budgets = FixedBudgets(slots_of=lambda tokens: tokens // 4)
    rows = HardChoice(verbatim=0.0)
    scores = run.adapter.scorer.rows.bias
    with torch.no_grad():
        scores += 1000.0  # the best tokens by the same scores, as rows
        found = float(run.loss.check(batch, run.loss.read(batch), budgets, rows).mean)
        scores -= 1000.0
    words = float(run.loss.check(batch, run.loss.read(batch), budgets, HardChoice(verbatim=1.0)).mean)
    assert rows.rows == rows.kept
    # Rows run at as many tokens as there are slots, so heads have less to choose from.
    assert found < 2 * words + 0.5


def test_a_run_begins_with_another_ones_scorer(tmp_path):
    run = a_run(tmp_path, start="shipped")
    begun = load_adapter("shipped", run.model, kind="sonic")
    assert torch.equal(run.adapter.scorer.mean, begun.scorer.mean)
    assert run.adapter.has_rows
    assert not run.adapter.gates.any()


def test_a_resumed_run_is_the_same_run(tmp_path):
    one = a_run(tmp_path)
    batches = one.batches()
    one.trainer.step(batches, lambda *_: None)
    one.save()
    one.trainer.step(batches, lambda *_: None)
    again = a_run(tmp_path, resume=True)
    again.trainer.step(again.batches(), lambda *_: None)
    for ours, theirs in zip(again.trainer.parameters, one.trainer.parameters, strict=True):
        assert torch.equal(ours, theirs)


def test_the_command_leaves_an_adapter_that_loads_and_tells_how_it_was_made(tmp_path, capsys):
    assert command(["train", "sonic", "--out", str(tmp_path), "--tokens", "1", "--rank", "2"]) == 0
    assert "the adapter is in" in capsys.readouterr().out
    model, _ = load("tiny")
    assert load_adapter(tmp_path, model, kind="sonic").rank == 2
    words = json.loads((tmp_path / "adapter.json").read_text())
    assert words["training"]["steps"] == 1
    assert set(words["scores"]) == {"0.5", "0.2", "0.1", "0.05", "1.0"}


@pytest.mark.parametrize(
    ("more", "answer"),
    [
        (["--terms", "choice=much"], "write choice=1"),
        (["--terms", "love=1"], "is no number for one of choice"),
        (["--without", "poems"], "choose one of them"),
        ([], "give --minutes or --tokens"),
    ],
)
def test_what_cannot_be_trained_is_one_line(tmp_path, capsys, more, answer):
    length = [] if "--tokens" in answer else ["--tokens", "1"]
    assert command(["train", "sonic", "--out", str(tmp_path), *length, *more]) == 2
    err = capsys.readouterr().err
    assert answer in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_two_processes_train_one_adapter(tmp_path):
    program = Path(sys.executable).parent / "kvfold"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--no-python", str(program)]
    more = ["train", "sonic", "--out", str(tmp_path), "--tokens", "1", "--rank", "2"]
    done = subprocess.run(
        launch + more, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "record.jsonl").read_text().splitlines()[-1])
    one = SonicSettings(model="tiny", out=tmp_path).batch_tokens
    assert record["tokens"] > one // 2
    assert len((tmp_path / "record.jsonl").read_text().splitlines()) == 1
