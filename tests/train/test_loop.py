"""The loop: batches carry the right weights, steps lower the loss, and a resumed run is the same run."""

import random
import signal
from itertools import cycle

import pytest
import torch

from kvfold.data import training_dialogue
from kvfold.errors import FileError
from kvfold.hf.load import new_llama
from kvfold.train.base.batches import Batch, Samples, make_batch
from kvfold.train.base.loss import TextLoss
from kvfold.train.base.warmstart import look_back
from kvfold.train.interrupt import noted_interrupt
from kvfold.train.loop import LoopSettings, Trainer
from kvfold.train.losses import TokenLoss
from kvfold.train.optimisers import ParameterGroup


def batches(tokenizer, *, source="drill/people", n=3, gaps=0):
    rng, samples = random.Random(0), Samples(tokenizer)
    return [make_batch(samples, source, rung=0, size=2, tokens=300, rng=rng, gaps=gaps) for _ in range(n)]


def test_scored_replies_weigh_one_and_role_tags_nothing(tokenizer):
    messages = training_dialogue("recall", turns=3, seed=1)
    ids, weights = Samples(tokenizer).encode(messages, random.Random(0))
    reply = messages[-1].content
    scored = tokenizer.decode([token for token, weight in zip(ids, weights, strict=True) if weight == 1.0])
    assert scored.rstrip().endswith(reply)
    tags = {tokenizer.token_to_id(tag) for tag in ("<|bos|>", "<|assistant|>")}
    assert all(weight == 0 for token, weight in zip(ids, weights, strict=True) if token in tags)


def test_lengths_are_padded_to_multiples_of_32_with_no_weight(tokenizer):
    for batch in batches(tokenizer):
        assert batch.ids.shape[1] % 32 == 0
        assert not batch.weights[batch.ids == tokenizer.token_to_id("<|pad|>")].any()


def test_positions_only_jump_forward_and_at_messages(tokenizer):
    user, jumps = tokenizer.token_to_id("<|user|>"), 0
    for batch in batches(tokenizer, n=6, gaps=500):
        steps = batch.positions.diff(dim=1)
        assert bool((steps >= 1).all())
        starts = batch.ids[:, 1:][steps > 1]
        jumps += len(starts)
        assert bool((starts == user).all())
    assert jumps > 0


def test_a_jump_in_positions_hides_nothing(tokenizer, llama):
    batch = batches(tokenizer, n=1)[0]
    batch.positions[:, 20:] += 300
    trainer = Trainer(llama, LoopSettings(tokens=1), TextLoss(llama))
    seen = torch.ones(batch.ids.shape[1], batch.ids.shape[1]).tril().bool().expand(len(batch.ids), 1, -1, -1)
    hidden = llama.model(
        input_ids=batch.ids, position_ids=batch.positions, attention_mask=seen, use_cache=False
    ).last_hidden_state
    logs = llama.lm_head(hidden[:, :-1]).log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]
    wanted = -(logs * batch.weights[:, 1:]).sum() / batch.weights[:, 1:].sum()
    trainer.loss.bfloat16 = False
    torch.testing.assert_close(trainer.loss(batch).mean, wanted)
    trainer.loss.bfloat16 = True
    torch.testing.assert_close(trainer.loss(batch).mean, wanted, rtol=0.02, atol=0.02)


def test_training_lowers_the_loss(tokenizer, llama):
    some = batches(tokenizer, n=2)
    settings = LoopSettings(tokens=10**9, warmup_steps=2, batches_a_step=2, matrix_rate=0.02, other_rate=0.003)
    trainer = Trainer(llama, settings, TextLoss(llama))
    seen = []
    for _ in range(12):
        trainer.step(cycle(some), lambda _, loss: seen.append(float(loss.mean.detach())))
    assert seen[-1] < 0.7 * seen[0]
    assert trainer.progress.tokens == 12 * sum(batch.ids.numel() for batch in some)


def test_a_resumed_run_is_the_same_run(tokenizer, llama, tmp_path):
    some, rng = batches(tokenizer, n=4), random.Random(3)
    settings = LoopSettings(tokens=10**6, warmup_steps=2, batches_a_step=2)
    trainer = Trainer(llama, settings, TextLoss(llama))
    trainer.step(iter(some), lambda *_: None)
    trainer.save(tmp_path / "checkpoint.pt", rng=rng, more={"a": (1, 0.5, 2)})
    expected = rng.random()
    trainer.step(iter(some), lambda *_: None)

    twin = new_llama(**llama.config.to_dict())
    again = Trainer(twin, settings, TextLoss(twin))
    other = random.Random(99)
    assert again.resume(tmp_path / "checkpoint.pt", rng=other) == {"a": (1, 0.5, 2)}
    assert other.random() == expected
    again.step(iter(some), lambda *_: None)
    assert again.progress.step == 2
    for ours, theirs in zip(again.parameters, trainer.parameters, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(again.averaged, trainer.averaged, strict=True):
        assert torch.equal(ours, theirs)
    assert not (tmp_path / "checkpoint.new").exists()


def test_resuming_from_nothing_says_what_to_do(llama, tmp_path):
    with pytest.raises(FileError, match="leave out --resume"):
        Trainer(llama, LoopSettings(tokens=1), TextLoss(llama)).resume(tmp_path / "checkpoint.pt", rng=random.Random(0))


@pytest.mark.parametrize("damage", [lambda held: b"", lambda held: b"nothing", lambda held: held[: len(held) // 2],
                                    lambda held: held[:900] + bytes(4000) + held[4900:]])  # fmt: skip
def test_a_checkpoint_that_is_none_is_one_line(llama, tmp_path, damage):
    trainer = Trainer(llama, LoopSettings(tokens=1), TextLoss(llama))
    path = tmp_path / "checkpoint.pt"
    trainer.save(path, rng=random.Random(1), more={})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FileError, match=r"no whole checkpoint of this training .*leave out --resume to start$"):
        trainer.resume(path, rng=random.Random(0))


def test_the_rate_warms_up_stays_and_falls(llama):
    trainer = Trainer(llama, LoopSettings(tokens=100, warmup_steps=4, flat_until=0.5, last_rate=0.1), TextLoss(llama))
    rates = []
    for step, tokens in ((0, 0), (50, 40), (75, 75), (100, 100)):
        trainer.progress.step, trainer.progress.tokens = step, tokens
        rates.append(trainer.rate())
    assert rates == pytest.approx([0.25, 1.0, 0.55, 0.1])


def test_the_rate_may_fall_by_a_cosine_over_a_number_of_steps(llama):
    settings = LoopSettings(steps=8, warmup_steps=1, flat_until=0.0, fall="cosine", last_rate=0.0)
    trainer, rates = Trainer(llama, settings, TextLoss(llama)), []
    for step in (0, 2, 4, 6, 8):
        trainer.progress.step = step
        rates.append(trainer.rate())
    assert rates == pytest.approx([1.0, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5, 0.0], abs=1e-9)
    assert trainer.share == 1


def test_every_group_has_its_rate_and_what_is_frozen_stays(llama):
    head, embeddings = llama.model.layers[0].self_attn.q_proj.weight, llama.model.embed_tokens.weight
    norm = llama.model.norm.weight.requires_grad_(False)
    groups = [ParameterGroup(parameters=[head, norm], rate=0.1), ParameterGroup(parameters=[embeddings], rate=0.0)]
    settings = LoopSettings(steps=4, warmup_steps=1, average=None, batches_a_step=1)
    before = [weight.detach().clone() for weight in (head, norm, embeddings)]

    def cost(batch):
        return TokenLoss(mean=head.square().sum() + embeddings.square().sum(), right=0, scored=0)

    trainer = Trainer(llama, settings, cost, groups)
    trainer.step(iter([Batch(source="any", rung=0, ids=torch.ones(1, 2).long(), weights=torch.ones(1, 2),
                             positions=torch.ones(1, 2).long())]), lambda *_: None)  # fmt: skip
    moved = [not torch.equal(old, new) for old, new in zip(before, (head, norm, embeddings), strict=True)]
    assert moved == [True, False, False]
    assert trainer.parameters == [head, embeddings]
    assert not trainer.averaged


def test_the_warm_start_looks_one_and_two_tokens_back():
    model = new_llama(
        vocab_size=300,
        hidden_size=192,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        intermediate_size=64,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    look_back(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        first = model(input_ids=torch.randint(0, 300, (1, 40)), output_attentions=True).attentions[0][0]
    assert float(first[0].diagonal(-1)[1:].mean()) > 0.8
    assert float(first[1].diagonal(-2)[1:].mean()) > 0.8


@pytest.fixture
def usual_ctrl_c():
    """The handler that a program in a terminal has; test runners may ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("usual_ctrl_c")
def test_ctrl_c_is_noted_once_and_then_ends_as_it_always_does():
    with noted_interrupt() as came:
        assert not came()
        signal.raise_signal(signal.SIGINT)
        assert came()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
