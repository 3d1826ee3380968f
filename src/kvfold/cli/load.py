"""`python -m kvfold.cli.load URL`: a table of how a server does under load, one row for so many clients at once.

The server may be ours or another that speaks OpenAI's API. Given its process, the table has its memory too. What is
sent stands in serve/load.py.
"""

import sys
from typing import Annotated

import typer

Url = Annotated[str, typer.Argument(metavar="URL", help="The server's address, such as http://127.0.0.1:8000/v1.")]
Clients = Annotated[str, typer.Option(help="How many clients at once, a row for each number.")]
Notes = Annotated[int, typer.Option(min=1, help="How long a chat's first message is, in notes of some 50 tokens.")]
Pid = Annotated[int | None, typer.Option(help="The process of the server: its memory is read from /proc.")]

_COLUMNS = (
    "| clients | first token | tokens/s | replies as in the first row | sent again | memory of the process "
    "| at most | chats hold | in full | chats in memory, on disk |"
)


def load(
    url: Url,
    model: Annotated[str, typer.Option(help="The model's name there.")] = "smollm2",
    clients: Clients = "1,4,8,16",
    chats: Annotated[int, typer.Option(min=1, help="How many chats each row sends.")] = 16,
    turns: Annotated[int, typer.Option(min=1, help="How many turns a chat has.")] = 2,
    notes: Notes = 3,
    tokens: Annotated[int, typer.Option(min=1, help="The longest reply, in tokens.")] = 48,
    api_key: Annotated[str, typer.Option(help="The token to send.")] = "none",
    pid: Pid = None,
) -> None:
    """Send the same chats, so many clients at a time, and print a table."""
    from kvfold.serve.load import Load, Row, resident_bytes, send

    sent = Load(url=url, model=model, chats=chats, turns=turns, notes=notes, tokens=tokens, api_key=api_key)
    print(_COLUMNS)
    print("|" + "---|" * (_COLUMNS.count("|") - 1))
    first: Row | None = None
    for count in map(int, clients.split(",")):
        row = send(sent, count)
        first = first or row
        now, most = ("", "") if pid is None else map(_megabytes, resident_bytes(pid))
        held = _held(row.memory)
        print(
            f"| {count} | {row.first_seconds:.2f} s | {row.tokens_per_second:.1f} | {row.same(first)} of {chats} "
            f"| {row.sent_away} | {now} | {most} | {held[0]} | {held[1]} | {held[2]} |",
            flush=True,
        )


def _held(memory: dict[str, float]) -> tuple[str, str, str]:
    """Write what a server says of its chats; nothing for one that does not say it."""
    if not memory:
        return "", "", ""
    inside, outside = (int(memory.get(f'chats{{where="{place}"}}', 0)) for place in ("memory", "disk"))
    return _megabytes(memory["held_bytes"]), _megabytes(memory["full_bytes"]), f"{inside}, {outside}"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.0f} MB"


def main() -> int:
    """Run it; what kvfold refuses is one line and code 2."""
    from kvfold.cli.main import REFUSED, complain
    from kvfold.errors import KvfoldError

    try:
        typer.run(load)
    except KvfoldError as error:
        complain(str(error))
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
