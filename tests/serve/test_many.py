"""Many clients at once under limits of bytes, rows and queue; chats that leave memory, come back, or are on disk."""

import concurrent.futures
import threading
import time

import httpx2
import openai
import pytest
from safetensors.torch import load_file

import kvfold
from kvfold.chat import file
from kvfold.data import Message
from kvfold.hf.storages import storages_of
from kvfold.serve.access import ANYONE
from kvfold.serve.sampling import Sampling
from kvfold.serve.ticket import Asked, Ended, Ticket
from serve.conftest import assistant, sayer, user

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo")


def first(name):
    return [user(f"{name} lives in Turin and has a cat called {name[::-1]}. " * 3)]


def at_once(jobs):
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def test_eight_clients_at_once_get_what_each_gets_alone(serving):
    with serving() as one:
        say = sayer(one)
        alone = [say(first(name)).choices[0].message.content for name in NAMES]
    with serving() as other:
        say = sayer(other)
        together = at_once([lambda name=name: say(first(name)).choices[0].message.content for name in NAMES])
        assert together == alone


def test_chats_beyond_the_budget_go_to_disk_and_come_back_with_what_they_held(serving):
    with serving(memory_bytes=300_000, reply_tokens=8) as one:
        say = sayer(one)
        answers = {name: say(first(name)) for name in NAMES[:5]}
        assert one.shelf.counts[1] > 0
        for name in NAMES[:5]:
            again = say([*first(name), assistant(answers[name]), user(f"Where does {name} live?")])
            assert again.usage.prompt_tokens_details.cached_tokens == answers[name].kvfold["tokens_seen"]
            assert one.shelf.holdings.held_bytes <= 300_000
        assert sum(one.shelf.counts) == 5
        assert one.shelf.moved_to_disk >= 5


def test_the_bytes_that_are_counted_are_those_of_all_distinct_storages(serving):
    with serving() as one:
        say = sayer(one)
        for name in NAMES[:2]:
            messages = first(name)
            for text in ("Where?", "And the cat?"):
                messages += [assistant(say(messages)), user(text)]
        one.rest()
        held = {}
        for entry in one.shelf._entries.values():
            held |= {} if entry.held is None else storages_of(entry.held.cache)
        assert one.shelf.holdings.held_bytes == sum(held.values())
        assert one.shelf.holdings.promised_bytes == 0
        assert one.shelf.counts == (2, 0)


def test_a_turn_that_fits_in_no_memory_is_refused_and_one_that_fits_later_waits_or_is_sent_away(serving):
    with serving(memory_bytes=300_000, reply_tokens=64, wait_seconds=1.0) as one:
        say = sayer(one)
        with pytest.raises(openai.BadRequestError) as caught:
            say([user("word " * 400)])
        assert caught.value.code == "memory_exceeded"
        endless = one.client().completions.create(
            model="tiny", prompt="Once upon a time " * 12, max_tokens=64, temperature=0, stream=True
        )
        next(iter(endless))
        answers = at_once([lambda name=name: sent(say, first(name)) for name in NAMES[:3]])
        assert set(answers) <= {(200, None), (429, 5)}
        list(endless)
        assert sent(say, first("Later")) == (200, None)


def sent(say, messages):
    """The status, and after how many seconds to come again."""
    try:
        say(messages, max_tokens=40)
    except openai.RateLimitError as error:
        return error.status_code, int(error.response.headers["Retry-After"])
    return 200, None


def test_a_full_queue_says_come_later(serving):
    with serving(rows=1, queue=1) as one:
        say = sayer(one)
        answers = at_once([lambda name=name: sent(say, first(name)) for name in NAMES])
        assert answers.count((200, None)) >= 2
        assert (429, 5) in answers


def test_a_client_that_goes_away_frees_its_row_and_undoes_its_turn(serving):
    with serving(rows=1) as one:
        say = sayer(one)
        answer = say(first("Anna"))
        messages = [*first("Anna"), assistant(answer), user("Tell me everything, and do not stop.")]
        body = {"model": "tiny", "messages": messages, "max_tokens": 1000, "temperature": 2.0, "stream": True}
        held = one.shelf.holdings.held_bytes
        with httpx2.stream("POST", f"{one.url}/v1/chat/completions", json=body) as stream:
            next(stream.iter_lines())
        one.rest()
        assert (one.shelf.holdings.held_bytes, one.shelf.holdings.promised_bytes) == (held, 0)
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{one.url}/v1/chat/completions", json={**body, "stream": False}, timeout=0.02)
        one.rest()
        again = say(messages)
        assert again.usage.prompt_tokens_details.cached_tokens == answer.kvfold["tokens_seen"]


def test_a_long_prompt_of_one_client_stalls_no_reply_of_another(serving):
    with serving(stall_seconds=0.05) as one:
        client, times = one.client(), []
        stream = client.completions.create(model="tiny", prompt="Once", max_tokens=40, temperature=1, stream=True)
        next(iter(stream))
        reader = threading.Thread(target=lambda: sayer(one)([user("Anna lives in Turin. " * 150)]))
        reader.start()
        for _ in stream:
            times.append(time.monotonic())
        reader.join()
        assert len(times) > 10


def test_what_was_finished_is_there_after_a_restart_and_a_damaged_file_is_set_aside(serving, tmp_path, capsys):
    with serving(store=tmp_path) as one:
        say = sayer(one)
        answers = {name: say(first(name), metadata={"session": name}) for name in NAMES[:3]}
        assert len(list(tmp_path.rglob("*.kvfold"))) == 3
        more = [*first("Anna"), assistant(answers["Anna"]), user("Where?")]
        say(more)
    assert len(list(tmp_path.rglob("*.kvfold"))) == 3  # of the same conversation, the newest state
    spoilt = sorted(tmp_path.rglob("*.kvfold"), key=lambda path: path.stat().st_mtime)[0]
    spoilt.write_bytes(spoilt.read_bytes()[:-100])
    with serving(store=tmp_path) as other:
        say = sayer(other)
        found = []
        for name in NAMES[1:3]:
            messages = [*first(name), assistant(answers[name]), user("Where?")]
            found.append(say(messages).usage.prompt_tokens_details.cached_tokens)
        assert found == [0, answers[NAMES[2]].kvfold["tokens_seen"]]
    assert "set aside" in capsys.readouterr().err
    assert len(list(tmp_path.rglob("*.damaged"))) == 1


def test_a_file_that_rots_while_the_server_runs_is_set_aside_and_the_text_is_read_anew(serving, tmp_path):
    with serving(store=tmp_path, memory_bytes=200_000, reply_tokens=8) as one:
        say = sayer(one)
        answers = {name: say(first(name)) for name in NAMES[:4]}
        assert one.shelf.counts[1] > 0
        for path in tmp_path.rglob("*.kvfold"):
            path.write_bytes(b"nothing")
        again = say([*first("Anna"), assistant(answers["Anna"]), user("Where?")])
        assert again.usage.prompt_tokens_details.cached_tokens == 0
        assert list(tmp_path.rglob("*.damaged"))


def test_a_file_that_reaches_for_others_or_answers_no_numbers_is_set_aside(serving, tmp_path, tiny, capsys):
    with serving(store=tmp_path) as one:
        say = sayer(one)
        answers = {name: say(first(name)) for name in NAMES[:2]}
    reaching, broken = sorted(tmp_path.rglob("*.kvfold"), key=lambda path: path.stat().st_mtime)
    header, tensors = file.read_header(reaching), load_file(reaching)
    del header["seal"]
    plan = f"sentkv(budget=0.5, tier='disk', directory={str(tmp_path / 'theirs')!r})"
    file.CHAT.write(reaching, header | {"plan": plan}, tensors)
    header, tensors = file.read_header(broken), {name: tensor.clone() for name, tensor in load_file(broken).items()}
    del header["seal"]
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
    file.CHAT.write(broken, header, tensors)
    with serving(store=tmp_path) as other:
        say = sayer(other)
        for name in NAMES[:2]:
            again = say([*first(name), assistant(answers[name]), user("Where?")])
            assert again.usage.prompt_tokens_details.cached_tokens == 0
    said = capsys.readouterr().err
    assert "give a plan of the same members" in said
    assert "the model answers no numbers" in said
    assert len(list(tmp_path.rglob("*.damaged"))) == 2


def test_the_chats_used_longest_ago_are_removed_beyond_the_stores_limit(serving, tmp_path):
    def left_after(names, limit):
        with serving(store=tmp_path, store_bytes=limit, reply_tokens=8) as one:
            for name in names:
                sayer(one)(first(name), metadata={"session": name})
        return list(tmp_path.rglob("*.kvfold"))

    (newest,) = left_after(NAMES[:3], 1)
    limit = 2 * newest.stat().st_size + 1000
    left = left_after(NAMES[3:6], limit)
    assert 0 < sum(path.stat().st_size for path in left) <= limit
    assert newest not in left


def test_a_stored_chat_is_one_that_the_library_loads(serving, tmp_path, tiny):
    with serving(store=tmp_path) as one:
        answer = sayer(one)(first("Anna"))
    (path,) = tmp_path.rglob("*.kvfold")
    assert path.stat().st_mode & 0o077 == 0
    chat = kvfold.Chat.load(path, *tiny)
    assert chat.messages == [*first("Anna"), assistant(answer)]
    assert "".join(chat.send("Where does Anna live?"))


def test_the_state_before_a_turn_stays_on_disk_until_its_answer_has_gone_out(serving, tmp_path):
    with serving(store=tmp_path) as one:
        answer = sayer(one)(first("Anna"))
        one.rest()
        (before,) = tmp_path.rglob("*.kvfold")
        said = [*first("Anna"), assistant(answer), user("Where?")]
        over = threading.Event()
        asked = Asked(
            owner=ANYONE,
            messages=tuple(Message(role=one["role"], content=one["content"]) for one in said),
            sampling=Sampling(temperature=0.0),
            longest=4,
        )
        ticket = Ticket(asked, lambda event: over.set() if isinstance(event, Ended) else None)
        one.made.scheduler.submit(ticket)
        assert over.wait(60)
        assert before.exists()
        assert len(list(tmp_path.rglob("*.kvfold"))) == 2
        ticket.close()
    assert not before.exists()
    assert len(list(tmp_path.rglob("*.kvfold"))) == 1


class ClosesLate:
    """A ticket that another thread closes right after it was looked at."""

    looks = 0

    @property
    def is_closed(self):
        self.looks += 1
        return self.looks > 1


def test_a_file_whose_ticket_is_closed_while_it_is_looked_at_goes_the_next_time(serving, tmp_path):
    with serving(store=tmp_path) as one:
        sayer(one)(first("Anna"))
        one.rest()
        (entry,) = one.shelf._entries.values()
        one.shelf._outdated.append((entry.place, ClosesLate()))
        one.shelf.remove_outdated()
        one.shelf.remove_outdated()
        assert not entry.place.path.exists()
