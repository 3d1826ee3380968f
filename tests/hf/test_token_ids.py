"""Ids reach a cache as marks, each thread its own, and a model without tokenizer is cut into pieces of one length."""

import threading

import torch

import kvfold
from driving import feed
from fakes import fresh, text
from kvfold.hf.token_ids import DelimiterTables, IdRecorder, delimiter_classes

PLAN = "sentkv(budget=20, length=5, window=2, recent=2)"


class Tokenizer:
    """Ninety-seven words; every seventh is a full stop."""

    def __len__(self):
        return 97

    def convert_ids_to_tokens(self, ids):
        return [f"Ġw{number}" for number in ids]

    def batch_decode(self, rows, clean_up_tokenization_spaces):
        return ["." if number % 7 == 0 else f"w{number}" for (number,) in rows]


def starts(cache):
    """Where sentences begin in the first head of the first layer."""
    return cache.memory.layers[0].state.folded.table.index.starts[0].tolist()


def test_sentences_end_where_the_text_says_so():
    model, ids = fresh("llama"), torch.full((1, 60), 3)
    ids[0, [4 + 5, 4 + 11, 4 + 15, 4 + 22]] = 7  # the first four are pinned
    cache = kvfold.cache(model, PLAN, tokenizer=Tokenizer())
    feed(model, ids, cache)
    assert starts(cache)[:5] == [0, 6, 12, 16, 23]


def test_without_a_tokenizer_pieces_have_one_length():
    model = fresh("llama")
    cache = kvfold.cache(model, PLAN)
    feed(model, text(1, 60), cache)
    assert starts(cache)[:4] == [0, 5, 10, 15]


def test_two_caches_of_one_model_have_one_recorder():
    model = fresh("llama")
    caches = [kvfold.cache(model, PLAN, tokenizer=Tokenizer()) for _ in range(3)]
    assert len(caches) == 3
    assert len(model.get_input_embeddings()._forward_pre_hooks) == 1
    assert len(fresh("llama").get_input_embeddings()._forward_pre_hooks) == 0


def test_plans_that_read_no_text_leave_the_model_alone():
    model = fresh("llama")
    caches = [kvfold.cache(model, plan, least=0) for plan in ("snapkv(keep=0.5)", PLAN.replace("window=2", "window=0"))]
    assert len(caches) == 2
    assert len(model.get_input_embeddings()._forward_pre_hooks) == 0


def test_each_thread_takes_its_own_ids():
    model, taken = fresh("llama"), {}
    recorder, embedding = IdRecorder(model), model.get_input_embeddings()
    recorder.acquire()
    barrier = threading.Barrier(2)

    def work(number):
        embedding(torch.full((1, 3), number))
        barrier.wait()
        taken[number] = recorder.take(1, 3)

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {number: int(ids[0, 0]) for number, ids in taken.items()} == {1: 1, 2: 2}
    assert recorder.take(1, 3) is None


def test_ids_of_another_shape_are_not_taken():
    model = fresh("llama")
    recorder = IdRecorder(model)
    with recorder.held():
        model.get_input_embeddings()(text(2, 3))
        assert recorder.take(2, 4) is None
        assert recorder.take(2, 3) is None


def test_a_leading_space_that_the_tokenizer_hides_counts():
    classes = delimiter_classes(Tokenizer())
    assert classes.shape == (97,)
    assert int(classes[14]) & 7 == 7
    assert bool(classes[3] & 0b10000)


def test_tokenizers_of_the_same_words_share_a_table_and_others_do_not():
    tables, one = DelimiterTables(), Tokenizer()
    assert tables.of_tokenizer(one) is tables.of_tokenizer(Tokenizer())
    assert tables.of_tokenizer(one) is not tables.of_tokenizer(one, {".": 3, "\n": 7})


def test_an_id_beyond_the_vocabulary_counts_as_the_last_entry():
    table = DelimiterTables().of_tokenizer(Tokenizer())
    found = table.classes_of(torch.tensor([[7, 96, 200]]))[0].tolist()
    assert found[1] == found[2] != found[0]


def test_a_cache_goes_on_reading_by_its_tokenizer_when_another_is_given_later():
    model, ids = fresh("llama"), torch.full((1, 60), 3)
    ids[0, [9, 15, 19, 26]] = 7
    first = kvfold.cache(model, PLAN, tokenizer=Tokenizer())
    second = kvfold.cache(model, PLAN)
    feed(model, ids, first)
    feed(model, ids, second)
    assert starts(first)[:5] == [0, 6, 12, 16, 23]
    assert starts(second)[:4] == [0, 5, 10, 15]
