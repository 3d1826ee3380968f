"""The parallel pass of training is the turn-by-turn run: same logits, same Nexus keys and values, layer by layer."""

import random

import pytest
import torch

from fakes import model_of, text
from folding import adapter_for
from kvfold.adapters.files import load_adapter
from kvfold.hf.binding import ModelBinding
from kvfold.hf.probe import observe_attention, parallel_forward
from kvfold.open import cache
from kvfold.train.sonic.budgets import DrawnBudgets, FixedBudgets
from kvfold.train.sonic.parallel_masks import fold_batch
from kvfold.train.sonic.talk_batch import Talk, batch_talks

TURNS = ((0, 21), (21, 34), (34, 60), (60, 71))
SLOTS = 3


def talk(ids, *, turns=TURNS):
    return Talk(ids=ids, weights=[1.0] * len(ids), ends=[stop for _, stop in turns[:-1]])


def laid(talks, *, slots=SLOTS):
    rng = random.Random(0)
    batch = batched(talks, rng)
    return batch, fold_batch(batch, None, budgets=FixedBudgets(slots_of=lambda tokens: slots), rng=rng)


def batched(talks, rng):
    return batch_talks(talks, sinks=4, longest_jump=0, rng=rng, pad=0)


def in_parallel(model, adapter, laid_out):
    """Logits of the tokens, and the Nexus rows' keys and values of every layer."""
    batch, layout = laid_out
    tokens, seen = layout.count, {}
    texts = model.get_input_embeddings()(batch.ids)
    embedded = torch.cat([texts, adapter.embed(layout.nexus)], dim=1)

    def look(layer, queries, keys, values, scale):
        seen[layer] = (keys[:, :, tokens:], values[:, :, tokens:])

    masks = masks_of(model, layout)
    with torch.no_grad(), adapter.active(first=tokens), observe_attention(model, look):
        hidden = parallel_forward(model, embeddings=embedded, positions=layout.positions, masks=masks)
        logits = model.get_output_embeddings()(hidden[:, :tokens])
    return logits, seen


def masks_of(model, layout):
    """Of every layer; sliding ones see their window."""
    config = ModelBinding.of(model).text_config
    folding = ModelBinding.of(model).folding_layers
    masks = layout.masks(folding)
    for index in set(range(config.num_hidden_layers)) - set(folding):
        masks[index] = layout.window_mask(config.sliding_window)
    return masks


def turn_by_turn(model, plan, ids):
    past, logits = cache(model, plan, prompt_tokens=0), []
    for number, (start, stop) in enumerate(TURNS):
        with torch.no_grad():
            logits.append(model(ids[:, start:stop], past_key_values=past).logits)
        if number < len(TURNS) - 1:
            past.fold()
    return torch.cat(logits, dim=1), past


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3"])
def test_a_parallel_pass_is_the_turn_by_turn_run(family, tmp_path):
    model, folder = model_of(family), adapter_for(family, tmp_path)
    ids = text(1, TURNS[-1][1])
    logits, past = turn_by_turn(model, f"sonic(slots={SLOTS}, verbatim=0.0, adapter={str(folder)!r})", ids)
    layout = laid([talk(ids[0].tolist())])
    wanted, seen = in_parallel(model, load_adapter(folder, model, kind="sonic"), layout)
    torch.testing.assert_close(logits, wanted[:, : ids.shape[1]], rtol=1e-4, atol=1e-4)
    made = SLOTS * (len(TURNS) - 1)
    for index, layer in past.memory.layers.items():
        payload = layer.state.folded.payload
        for name, parallel_rows in zip(("keys", "values"), seen[index], strict=True):
            rows = payload[name].view(parallel_rows.shape[1], made, -1)
            torch.testing.assert_close(rows, parallel_rows[0, :, :made], rtol=1e-4, atol=1e-4)


def test_rows_of_different_length_do_not_meet(tmp_path):
    model, folder = model_of("llama"), adapter_for("llama", tmp_path)
    adapter = load_adapter(folder, model, kind="sonic")
    long, short = text(1, 71, seed=1)[0].tolist(), text(1, 40, seed=2)[0].tolist()
    both = laid([talk(long), talk(short, turns=(*TURNS[:2], (34, 40)))])
    alone = laid([talk(short, turns=(*TURNS[:2], (34, 40)))])
    together, _ = in_parallel(model, adapter, both)
    single, _ = in_parallel(model, adapter, alone)
    torch.testing.assert_close(together[1, :40], single[0, :40], rtol=1e-5, atol=1e-5)


def test_without_slots_nothing_of_a_segment_is_seen(tmp_path):
    model, folder = model_of("llama"), adapter_for("llama", tmp_path)
    adapter = load_adapter(folder, model, kind="sonic")
    first = text(1, 71, seed=1)[0].tolist()
    other = [*first[:10], *text(1, 50, seed=3)[0].tolist(), *first[60:]]
    logits = [in_parallel(model, adapter, laid([talk(ids)], slots=0))[0][0, 60:71] for ids in (first, other)]
    assert torch.equal(*logits)


def test_tokens_are_untouched_by_the_adapter(tmp_path):
    model, folder = model_of("llama"), adapter_for("llama", tmp_path)
    adapter = load_adapter(folder, model, kind="sonic")
    ids, positions = text(2, 30), torch.arange(30)[None].expand(2, -1)
    with torch.no_grad():
        plain = parallel_forward(model, ids=ids, positions=positions)
        with adapter.active(first=20):
            updated = parallel_forward(model, ids=ids, positions=positions)
    assert torch.equal(plain[:, :20], updated[:, :20])
    assert not torch.equal(plain[:, 20:], updated[:, 20:])


def test_what_a_segment_keeps_is_seen_as_it_is_and_drawn_budgets_stay_inside():
    budgets, rng = DrawnBudgets(raw=1.0, gone=0.0), random.Random(1)
    layout = fold_batch(batched([talk(list(range(71)))], rng), None, budgets=budgets, rng=rng)
    assert layout.stays[..., :60].all()
    assert not layout.folded.any()
    drawn = [DrawnBudgets(raw=0.0, gone=0.0).slots(rng, 0.05 + 0.45 * rng.random(), 40) for _ in range(200)]
    assert min(drawn) >= 1
    assert max(drawn) <= 30


def test_the_most_salient_tokens_stay_beside_the_rows(tmp_path):
    rng = random.Random(0)
    batch = batched([talk(list(range(71)))], rng)
    scores = torch.zeros(1, 2, 3, batch.ids.shape[1])
    scores[0, :, 0, 4:16] = 1.0  # one head has much to remember of the first turn
    scores[..., [25, 26, 50, 51]] = 1.0
    layout = fold_batch(batch, scores, budgets=FixedBudgets(slots_of=lambda tokens: 4, verbatim=0.5), rng=rng)
    assert int(layout.stays[0, :, 0, 4:16].sum()) == 2 * 3 * 2
    assert layout.stays[0, 1, 2].nonzero().flatten().tolist() == [0, 1, 2, 3, 25, 26, 50, 51]
    assert int(layout.stays.sum()) == 2 * 3 * (4 + 3 * 2)
    assert int((layout.segment[0, layout.count :] >= 0).sum()) == 3 * 2
