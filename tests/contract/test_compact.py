"""Contract of compact positions: every method goes on beyond a model's last position, with keys turned as they should.

Slots are known again by their values, which no position changes: so the key of each is compared with the one that the
model would have rotated to where the slot stands now, straight from its projection, however often it was moved.
"""

from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf

import kvfold
from driving import close, exact, feed
from fakes import POSITIONS, fresh, model_of, text
from kvfold.errors import CacheError, ModelError, PlanError
from kvfold.memory.tail import PAD
from kvfold.plan import Plan, members
from plans import lossy

TURN = 40
MAKES = ("mean_pool", "summary", "sonic")  # slots that are no token's
PHI = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.3,
}
SCALED = {
    "plain": {"rope_type": "default", "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128},
}


def evicting():
    """A plan of every method that evicts, such as compact positions take."""
    plans = {name: plan for name, plan in lossy().items() if plan == Plan(select=plan.select) != Plan()}
    for name, scope in (("h2o", "history"), ("h2o-turn", "turn")):
        plans[name] = Plan.parse(f"h2o(tokens=14, normalise=False, scope={scope!r})")
    return plans


EVICTING = evicting()


def made(rotation):
    """A random model of one kind of rotations."""
    if rotation == "partial":
        torch.manual_seed(0)
        config: Any = hf.PhiConfig
        return hf.PhiForCausalLM(config(**PHI, partial_rotary_factor=0.5)).eval()
    return fresh("llama", rope_parameters=SCALED[rotation])


@contextmanager
def projected(model):
    """What each layer projects, keys before rotation and values, [tokens, heads, size]; it grows with every forward."""
    found = {index: ([], []) for index in range(len(model.model.layers))}
    handles = []
    for index, layer in enumerate(model.model.layers):
        for side, name in enumerate(("k_proj", "v_proj")):
            size = layer.self_attn.head_dim

            def note(module, args, output, keep=found[index][side], size=size):
                keep.append(output[0].unflatten(-1, (-1, size)).detach())

            handles.append(getattr(layer.self_attn, name).register_forward_hook(note))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def rotated_to(model, keys, positions):
    """Keys [S, D] as the model rotates them at positions [S], in float32, by its own function."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cosines, sines = model.model.rotary_emb(keys.float(), positions[None])
    turns = cosines.shape[-1]
    turned = apply_rotary_pos_emb(keys[None, None, :, :turns], keys[None, None, :, :turns], cosines, sines)[1]
    return torch.cat([turned[0, 0], keys[:, turns:]], dim=-1)


def slots_of(state, head):
    """Keys, values and positions of all that one head holds, in order."""
    tail = state.tail
    real = tail.positions[0, : tail.length] != PAD
    sides = [
        (
            tail.keys[0, head, : tail.length][real],
            tail.values[0, head, : tail.length][real],
            tail.positions[0, : tail.length][real],
        )
    ]
    for part in (state.folded, state.sinks):
        if part is not None and part.counts[0][head]:
            start = sum(part.counts[0][:head])
            span = slice(start, start + part.counts[0][head])
            whole = part.without_room()
            sides.insert(0, (whole.payload["keys"][span], whole.payload["values"][span], whole.positions[span]))
    return [torch.cat(side) for side in zip(*sides, strict=True)]


def errors(model, cache, found):
    """Of every slot that is a token's: how far its key is from what its position wants; and how many are none's."""
    worst, strange = 0.0, 0
    for index, layer in cache.memory.layers.items():
        projections = [torch.cat(side) for side in found[index]]  # tokens H D
        for head in range(projections[0].shape[1]):
            keys, values, positions = slots_of(layer.state, head)
            raw_keys, raw_values = (side[:, head] for side in projections)
            same = (values[:, None] == raw_values[None]).all(dim=-1)  # slots, tokens
            known = same.any(dim=1)
            strange += int((~known).sum())
            wanted = rotated_to(model, raw_keys[same.int().argmax(dim=1)], positions.long())
            worst = max(worst, float((keys - wanted)[known].abs().max() / wanted.abs().max()))
    return worst, strange


def talk(model, cache, ids, *, sizes=TURN):
    """Feed turns and fold after each."""
    for start in range(0, ids.shape[1], sizes):
        logits = feed(model, ids[:, start : start + sizes], cache)
        cache.fold()
    return logits


def compact(model, plan, **more):
    """A cache that folds on request."""
    return kvfold.cache(model, plan, positions="compact", **{"prompt_tokens": 0, "least": 0, **more})


def test_every_method_that_evicts_is_here():
    assert {type(plan.select) for plan in EVICTING.values()} == set(members("select").values()) - {type(Plan().select)}


@pytest.mark.parametrize("name", EVICTING)
def test_a_text_longer_than_the_model_goes_on_with_keys_where_they_should_be(name):
    model = fresh("llama") if name not in MAKES else model_of("llama")
    cache, ids = compact(model, EVICTING[name]), text(1, POSITIONS + 3 * TURN, seed=3)
    with projected(model) as found:
        assert talk(model, cache, ids).isfinite().all()
        worst, strange = errors(model, cache, found)
    assert worst < 1e-5
    assert not strange or name.removesuffix("-turn") in MAKES
    assert cache.memory.fed == ids.shape[1] > POSITIONS
    assert cache.next_position <= 4 + 14 * 6  # what a head may hold where heads share a budget


@pytest.mark.parametrize("plan", ["snapkv(tokens=24)", "streaming_llm(tokens=24)"])
@pytest.mark.parametrize("rotation", [*SCALED, "partial"])
def test_keys_of_every_kind_of_rotation_are_those_of_their_new_position(rotation, plan):
    model, ids = made(rotation), text(1, 6 * TURN, seed=5)
    cache = compact(model, plan)
    with projected(model) as found:
        talk(model, cache, ids)
        assert errors(model, cache, found) < (1e-5, 1)
    for layer in cache.memory.layers.values():
        assert layer.state.folded.positions.tolist() == [*range(4, 24)] * 2, "behind the sinks, in both heads"
        assert layer.state.next_positions == (24,)


def test_half_precision_drifts_by_its_rounding_and_no_more():
    ids = text(1, 12 * TURN, seed=5)
    half = fresh("llama").bfloat16()
    cache = compact(half, "snapkv(tokens=24)")
    with projected(half) as found:
        talk(half, cache, ids)
        worst, strange = errors(half, cache, found)
    assert strange == 0
    assert worst < 12 * torch.finfo(torch.bfloat16).eps, "a rounding a fold at most"


@pytest.mark.parametrize(
    "plan", ["full", "snapkv(tokens=1000)", "sonic(keep=1.0)", "h2o(tokens=1000, normalise=False)"]
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_with_room_for_everything_it_is_the_base_model(family, plan):
    model, ids = model_of(family), text(2, 60, seed=1)
    cache = kvfold.cache(model, plan, positions="compact", stride=6)
    found = feed(model, ids, cache, sizes=(20, 1, 1, 5, 10))
    wanted = exact(family, ids)
    assert close(found, wanted, family=family)
    assert cache.next_position == 60


@pytest.mark.parametrize("plan", ["snapkv(tokens=24)", "kvzip(keep=0.3)", "sonic(keep=0.3)", "none"])
def test_generate_says_the_same_in_one_go_and_in_pieces(plan):
    model: Any = model_of("llama")
    ids = text(1, 150, seed=2)

    def said(*, more=(), **settings):
        cache = kvfold.cache(model, plan, positions="compact", stride=16, least=0)
        given, out = {"do_sample": False, "eos_token_id": None, **settings}, ids
        for count in (*more, 60 - sum(more)):
            mask = torch.ones_like(out)  # what was said may hold the id of pads
            out = model.generate(out, attention_mask=mask, max_new_tokens=count, **given, **cache.keyword)
        return out.tolist(), cache

    whole, cache = said()
    assert cache.next_position < 209 - 60, "folds moved the text"
    assert said(prefill_chunk_size=32)[0] == whole
    assert said(more=(1, 30))[0] == whole
    assert said(prompt_lookup_num_tokens=3)[0] == whole


def test_rows_of_a_padded_batch_say_what_they_say_alone():
    model: Any = model_of("llama")
    rows = [text(1, count, seed=count) for count in (50, 90)]
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}

    def cached():
        return kvfold.cache(model, "snapkv(tokens=24)", positions="compact", stride=16, least=0)

    alone = [model.generate(row, **settings, **cached().keyword)[0, row.shape[1] :].tolist() for row in rows]
    padded = torch.cat([torch.nn.functional.pad(row, (90 - row.shape[1], 0)) for row in rows])
    cache = cached()
    both = model.generate(padded, attention_mask=(padded != 0).long(), **settings, **cache.keyword)
    assert both[:, 90:].tolist() == alone


def test_beams_over_a_roomy_plan_are_those_of_the_stock_cache():
    model: Any = model_of("llama")
    ids = text(1, 50, seed=9)
    settings = {"max_new_tokens": 20, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    cache = kvfold.cache(model, "snapkv(tokens=1000)", positions="compact", stride=8)
    assert model.generate(ids, **settings, **cache.keyword).tolist() == model.generate(ids, **settings).tolist()
    small = kvfold.cache(model, "snapkv(tokens=20)", positions="compact", stride=8, least=0)
    assert model.generate(ids, **settings, **small.keyword).shape == (1, 70)
    assert small.next_position < 40


def test_save_load_fork_and_marks_hold(tmp_path):
    model, ids = model_of("llama"), text(1, 8 * TURN, seed=4)
    cache = compact(model, "snapkv(tokens=24)")
    talk(model, cache, ids[:, : 4 * TURN])
    feed(model, ids[:, 4 * TURN : 5 * TURN], cache)  # raw, behind a fold
    cache.save(tmp_path / "talk.kvfold")
    mark, twin = cache.mark(), cache.fork()
    again = kvfold.load_cache(tmp_path / "talk.kvfold", model)
    assert again.positions == "compact"
    rest = ids[:, 5 * TURN :]
    wanted = talk(model, cache, rest)
    assert torch.equal(talk(model, twin, rest), wanted)
    assert torch.equal(talk(model, again, rest), wanted)
    cache.restore(mark)
    assert torch.equal(talk(model, cache, rest), wanted)
    assert cache.next_position == twin.next_position == again.next_position == 24


def test_a_forward_that_fails_behind_a_fold_leaves_no_trace():
    model, ids = model_of("llama"), text(1, 5 * TURN, seed=4)
    caches = [compact(model, "snapkv(tokens=24)", prompt_tokens=TURN, stride=TURN) for _ in range(2)]
    for cache in caches:
        feed(model, ids[:, : 2 * TURN], cache, sizes=(TURN,))

    def fail(module, args):
        raise RuntimeError("interrupted")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        feed(model, ids[:, 2 * TURN : 3 * TURN], caches[0])
    handle.remove()
    answers = [feed(model, ids[:, 2 * TURN :], cache) for cache in caches]
    assert torch.equal(*answers)


def test_a_smaller_budget_moves_slots_at_once():
    model, ids = model_of("llama"), text(1, 4 * TURN, seed=6)
    cache = compact(model, "streaming_llm(tokens=60)")
    with projected(model) as found:
        talk(model, cache, ids[:, : 3 * TURN])
        assert cache.next_position == 60
        cache.rebudget(tokens=30)
        assert cache.next_position == 30
        talk(model, cache, ids[:, 3 * TURN :])
        assert errors(model, cache, found) < (1e-5, 1)


REFUSED = {
    "snapkv(tokens=24) + int8": "int8 would round them anew; leave int8 away",
    "sonic(keep=0.2) + dynakv": "dynakv would round them anew; leave dynakv away",
    "h2o(tokens=24)": "give normalise=False",
    "snapkv(tokens=24) + sentkv": "leave sentkv away",
}


@pytest.mark.parametrize("plan", REFUSED)
def test_plans_whose_slots_cannot_move_are_refused_in_a_line(plan):
    with pytest.raises(PlanError, match='positions="compact"') as refusal:
        kvfold.cache(model_of("llama"), plan, positions="compact")
    assert str(refusal.value).endswith(REFUSED[plan])
    assert "\n" not in str(refusal.value)


def strangers():
    """Models whose keys do not turn with their position, or not all of them."""
    gpt2 = hf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4)
    no_rope = hf.SmolLM3Config(**PHI, no_rope_layers=[1, 0], pad_token_id=0)
    cohere = hf.CohereConfig(**PHI, pad_token_id=0)
    return {
        "learned positions": lambda: hf.GPT2LMHeadModel(gpt2),
        "a layer without rotation": lambda: hf.SmolLM3ForCausalLM(no_rope),
        "neighbours paired": lambda: hf.CohereForCausalLM(cohere),
        "windows": lambda: model_of("gemma3"),
        "rotations of the length": lambda: fresh(
            "llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        ),
    }


@pytest.mark.parametrize("kind", strangers())
def test_models_whose_keys_cannot_move_are_refused_in_a_line(kind):
    with pytest.raises(ModelError, match='positions="compact" was asked for') as refusal:
        kvfold.cache(strangers()[kind]().eval(), "snapkv(tokens=24)", positions="compact")
    assert str(refusal.value).endswith('leave positions="kept"')
    assert "\n" not in str(refusal.value)


def test_another_word_and_other_positions_are_refused_in_a_line(tmp_path):
    model, ids = model_of("llama"), text(1, 2 * TURN)
    with pytest.raises(PlanError, match="give 'kept' or 'compact'"):
        kvfold.cache(model, positions="moved")  # pyright: ignore[reportArgumentType]
    cache = compact(model, "snapkv(tokens=24)")
    talk(model, cache, ids)
    with pytest.raises(CacheError, match="the next token is number 80; leave position_ids away"):
        model(input_ids=ids[:, :1], position_ids=torch.tensor([[24]]), past_key_values=cache)
    cache.save(tmp_path / "talk.kvfold")
    with pytest.raises(CacheError, match="it was saved with positions='compact'"):
        kvfold.load_cache(tmp_path / "talk.kvfold", model, positions="kept")


def test_a_plan_that_drops_nothing_ends_at_the_last_position():
    model = model_of("llama")
    cache = kvfold.cache(model, "full", positions="compact")
    feed(model, text(1, POSITIONS), cache)
    with pytest.raises(ModelError, match="give it a budget in tokens"):
        feed(model, text(1, 1), cache)


def test_what_is_still_raw_moves_with_the_fold():
    model, ids = model_of("llama"), text(1, 4 * TURN, seed=8)
    cache = compact(model, "snapkv(tokens=24, window=8)")
    with projected(model) as found:
        for turn in range(4):
            feed(model, ids[:, turn * TURN : (turn + 1) * TURN], cache)
            cache.fold(until=cache.memory.fed - 12)
            assert cache.next_position == 24 + 12
            assert errors(model, cache, found) < (1e-5, 1)
    for layer in cache.memory.layers.values():
        window = layer.state.recent
        assert window.positions.tolist() == [[*range(28, 36)]], "the queries of the newest raw tokens"
