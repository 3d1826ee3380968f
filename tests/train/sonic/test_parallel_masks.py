"""The parallel pass of training is the turn-by-turn run: same logits, same Nexus keys and values, layer by layer."""

import random

import pytest
import torch

import kvfold
from fakes import model_of, text
from folding import adapter_for
from kvfold.adapters.adapter import Adapter
from kvfold.adapters.files import load_adapter
from kvfold.hf.binding import ModelBinding
from kvfold.hf.probe import observe_attention, parallel_forward, replace_attention
from kvfold.train.sonic.budgets import DrawnBudgets, FixedBudgets
from kvfold.train.sonic.parallel_masks import Layout
from kvfold.train.sonic.row_attention import RowAttention
from kvfold.train.sonic.soft_selection import HardChoice, folded_segments, log_weights, places_of_rows
from kvfold.train.sonic.talk_batch import Talk, batch_talks

TURNS = ((0, 21), (21, 34), (34, 60), (60, 71))
SLOTS = 5


def known_scores(positions, layers, heads):
    """Scores of slots and rows that follow from where a token stands, so that both ways of folding know the same."""
    at = positions[:, None, None].double()
    layer = torch.arange(layers)[:, None, None]
    head = torch.arange(heads)[:, None]
    # Numbers that look drawn at random: no two are equal, which would be a matter of order.
    slots = (torch.sin(at * 12.9898 + layer * 78.233 + head * 37.719) * 43758.5453) % 1.0
    rows = (torch.sin(at * 63.7264 + layer * 10.873 + head * 21.331) * 43758.5453) % 1.0
    return torch.stack([slots, rows]).float()  # kinds B L H S


@pytest.fixture
def with_known_scores(monkeypatch):
    def score(self, keys, values, positions, real):
        slots, rows = known_scores(positions.clamp(min=0), keys.shape[2], keys.shape[3])
        return slots, rows

    monkeypatch.setattr(Adapter, "score", score)


def talk(ids, *, turns=TURNS):
    return Talk(ids=ids, weights=[1.0] * len(ids), ends=[stop for _, stop in turns[:-1]])


def batched(talks):
    return batch_talks(talks, sinks=4, longest_jump=0, rng=random.Random(0), pad=0)


class Pass:
    """A parallel pass of some talks under known scores."""

    def __init__(self, model, adapter, talks, *, slots=SLOTS, verbatim=None):
        self.model, self.adapter, self.batch = model, adapter, batched(talks)
        binding = ModelBinding.of(model)
        self.folding = sorted(binding.folding_layers)
        scores = known_scores(self.batch.positions, len(self.folding), binding.kv_heads)
        folded = folded_segments(self.batch, FixedBudgets(slots_of=lambda tokens: slots), random.Random(0))
        self.choice = HardChoice(verbatim=verbatim)
        places = [[] for _ in talks] if verbatim == 1 else places_of_rows(scores[1], folded)
        self.layout = Layout.of(self.batch, places)
        self.logs = log_weights(self.layout, scores, folded, self.choice)
        self.rows = {}

    def run(self):
        """Logits of the tokens; keys and values of the Nexus rows go to `rows`."""
        layout, tokens = self.layout, self.layout.count
        texts = self.model.get_input_embeddings()(self.batch.ids)
        columns = layout.column[:, tokens:]
        rows = texts.gather(1, columns[..., None].expand(-1, -1, texts.shape[-1]))
        rows = rows + self.adapter.embed(torch.zeros_like(columns))
        attend = RowAttention(self.adapter, layout, self.logs, self.folding)

        def look(layer, queries, keys, values, scale):
            self.rows[layer] = (keys[:, :, tokens:], values[:, :, tokens:])

        with (
            torch.no_grad(),
            self.adapter.active(first=tokens),
            replace_attention(self.model, attend),
            observe_attention(self.model, look),
        ):
            hidden = parallel_forward(
                self.model,
                embeddings=torch.cat([texts, rows], dim=1),
                positions=layout.positions,
                masks=self._sliding(),
            )
            return self.model.get_output_embeddings()(hidden[:, :tokens])

    def _sliding(self):
        config = ModelBinding.of(self.model).text_config
        sliding = [index for index in range(config.num_hidden_layers) if index not in self.folding]
        return {index: self.layout.window_mask(config.sliding_window) for index in sliding}


def turn_by_turn(model, plan, ids):
    past, logits = kvfold.cache(model, plan, prompt_tokens=0), []
    for number, (start, stop) in enumerate(TURNS):
        with torch.no_grad():
            logits.append(model(ids[:, start:stop], past_key_values=past).logits)
        if number < len(TURNS) - 1:
            past.fold()
    return torch.cat(logits, dim=1), past


@pytest.mark.parametrize("verbatim", [None, 0.0, 0.6, 1.0])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3"])
def test_a_parallel_pass_is_the_turn_by_turn_run(family, verbatim, tmp_path, with_known_scores):
    model, folder = model_of(family), adapter_for(family, tmp_path)
    ids = text(1, TURNS[-1][1])
    plan = f"sonic(slots={SLOTS}, verbatim={verbatim}, adapter={str(folder)!r})"
    logits, past = turn_by_turn(model, plan, ids)
    run = Pass(model, load_adapter(folder, model, kind="sonic"), [talk(ids[0].tolist())], verbatim=verbatim)
    wanted = run.run()[:, : ids.shape[1]]
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    held = sum(sum(map(sum, layer.state.folded.counts)) for layer in past.memory.layers.values())
    assert held == run.choice.kept
    assert (run.choice.rows > 0) == (verbatim != 1)


def test_rows_of_different_length_do_not_meet(tmp_path):
    model, folder = model_of("llama"), adapter_for("llama", tmp_path)
    adapter = load_adapter(folder, model, kind="sonic")
    long, short = text(1, 71, seed=1)[0].tolist(), text(1, 40, seed=2)[0].tolist()
    both = Pass(model, adapter, [talk(long), talk(short, turns=(*TURNS[:2], (34, 40)))])
    alone = Pass(model, adapter, [talk(short, turns=(*TURNS[:2], (34, 40)))])
    torch.testing.assert_close(both.run()[1, :40], alone.run()[0, :40], rtol=1e-5, atol=1e-5)


def test_without_slots_nothing_of_a_segment_is_seen(tmp_path):
    model, folder = model_of("llama"), adapter_for("llama", tmp_path)
    adapter = load_adapter(folder, model, kind="sonic")
    first = text(1, 71, seed=1)[0].tolist()
    other = [*first[:10], *text(1, 50, seed=3)[0].tolist(), *first[60:]]
    logits = [Pass(model, adapter, [talk(ids)], slots=0).run()[0, 60:71] for ids in (first, other)]
    assert torch.equal(*logits)


def test_an_untrained_row_is_the_slot_of_its_token():
    model = model_of("llama")
    adapter = Adapter.for_model(model, rank=2).requires_grad_(False)
    ids = text(1, TURNS[-1][1])
    run = Pass(model, adapter, [talk(ids[0].tolist())], slots=8)
    seen = {}

    def look(layer, queries, keys, values, scale):
        seen.setdefault(layer, (keys, values))

    with observe_attention(model, look):
        run.run()
    columns = run.layout.column[0, run.layout.count :]
    real = run.layout.segment[0, run.layout.count :] >= 0
    assert int(real.sum()) == 8 * 3
    for keys, values in seen.values():
        for side in (keys, values):
            rows = side[0, :, run.layout.count :][:, real]
            torch.testing.assert_close(rows, side[0][:, columns[real]], rtol=1e-4, atol=1e-5)


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


def test_drawn_budgets_stay_inside():
    budgets, rng = DrawnBudgets(raw=1.0, gone=0.0), random.Random(1)
    (segments,) = folded_segments(batched([talk(list(range(71)))]), budgets, rng)
    assert not any(one.shrinks for one in segments)
    drawn = [DrawnBudgets(raw=0.0, gone=0.0).slots(rng, 0.05 + 0.45 * rng.random(), 40) for _ in range(200)]
    assert min(drawn) >= 1
    assert max(drawn) <= 30
