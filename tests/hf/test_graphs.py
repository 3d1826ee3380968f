"""The pretended graph is as strict as a real one, and a real one, where there is CUDA, says what ordinary steps say."""

# pyright: reportCallIssue=false, reportArgumentType=false

import copy

import pytest
import torch

import kvfold
from captures import LOSSLESS, LOSSY, PROMPT, SETTINGS, TOKENS, held, said
from driving import error, feed, kept
from fakes import model_of, text
from tape import Tape


def test_a_tape_freezes_numbers_of_the_host_and_reads_memory_again():
    held, count, lengths = torch.zeros(3), torch.zeros(1), iter(range(9))

    def work():
        count.add_(1)
        return held[1:] * count + next(lengths)

    tape = Tape(work)
    held += 1
    tape.replay()
    assert tape.outputs.tolist() == [4.0, 4.0]  # ones times a count of three; the host still says 1
    with pytest.raises(RuntimeError, match="the host waits for the device"):
        Tape(lambda: int(count))
    with pytest.raises(RuntimeError, match="hands it numbers"):
        Tape(lambda: torch.tensor([1, 2]))


@pytest.mark.gpu
@pytest.mark.parametrize("plan", [*LOSSLESS, *LOSSY])
def test_a_graph_on_a_card_says_what_ordinary_steps_say(plan):
    model, ids = copy.deepcopy(model_of("llama")).cuda(), text(2, PROMPT + 40).cuda()
    usual, other, wanted, found, decode = said(model, plan, ids, graph=None)
    assert error(found, wanted) < (0.05 if plan in LOSSY else 1e-3) * error(wanted, 0 * wanted)
    assert held(usual) == held(other)
    if plan in LOSSLESS:
        assert kept(usual) == kept(other)
    assert decode.captures == (4 if usual.memory.rules.folds else 3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", ["full", "streaming_llm(tokens=20)", "int8"])  # rounding does not change their choice
def test_a_graph_in_half_precision_says_what_ordinary_steps_say(plan, dtype):
    model, ids = copy.deepcopy(model_of("llama")).to("cuda", dtype), text(2, PROMPT + 40).cuda()
    usual, other, wanted, found, _ = said(model, plan, ids, graph=None)
    assert error(found, wanted) < 0.1 * error(wanted, 0 * wanted)
    assert held(usual) == held(other)


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ["sonic(keep=0.25)", "dynakv(rate=0.47)", "int8(rotate=True)"])
def test_the_shipped_model_is_captured_on_a_card(plan):
    model, tokenizer = kvfold.load("tiny", dtype="float32", device="cuda")
    words = tokenizer.encode("Anna lives in Turin and has a grey cat called Pixel. The first price was 7. " * 4)
    usual, other, wanted, found, _ = said(model, plan, torch.tensor([words[:TOKENS]]).cuda(), graph=None)
    assert error(found, wanted) < 0.01 * error(wanted, 0 * wanted)
    assert held(usual) == held(other)


@pytest.mark.gpu
def test_a_long_tail_is_captured_on_a_card_and_generation_goes_on():
    model, ids = copy.deepcopy(model_of("llama")).to("cuda", torch.bfloat16), text(1, 340).cuda()
    cache = kvfold.cache(model, "full")
    feed(model, ids[:, :300], cache)
    decode = kvfold.captured(model, cache)
    found = torch.stack([decode.step(ids[:, at : at + 1]) for at in range(300, 340)], dim=1)
    wanted = feed(model, ids)[:, 300:]
    assert error(found, wanted) < 0.1 * error(wanted, 0 * wanted)
    assert decode.captures == 1
    mask = torch.ones(1, 341, dtype=torch.long, device="cuda")
    written = model.generate(ids[:, :1], attention_mask=mask, past_key_values=cache, **SETTINGS)
    assert written.shape[1] == 9
