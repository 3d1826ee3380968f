"""`kvfold chat`: talk with a model whose history is folded after every turn.

Replies go to standard output, everything else (prompt of the terminal, status, errors) to standard error, so it also
works in a pipe: a line in, a reply out. What a chat is stands in `chat/`; this file reads lines and prints.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvfold.errors import BudgetError, DataError, FileError, KvfoldError, PlanError

if TYPE_CHECKING:
    from kvfold.budget.ledger import Ledger
    from kvfold.chat.chat import Chat

PLAN = "snapkv(keep=0.5)"

_COMMANDS = "/save [FILE]  /ledger  /budget 0.2 (a fraction) or 512 (tokens)  /help  /quit"


def chat(
    model: Annotated[
        str, typer.Option(help="`smollm2`, `tiny`, a folder, a GGUF file, or a name on the Hub.")
    ] = "tiny",
    plan: Annotated[str | None, typer.Option(help=f"How the history is folded; {PLAN} unless a file says so.")] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt; it is never folded.")] = None,
    load: Annotated[Path | None, typer.Option(help="Go on with a saved chat, of the same model.")] = None,
    save: Annotated[Path | None, typer.Option(help="Save the chat here when leaving.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest reply.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling, where the temperature is not 0.")] = 0,
) -> None:
    """Talk with a model; after each turn a line says what the history takes."""
    from kvfold.chat.chat import Chat
    from kvfold.hf.generation import reply_settings
    from kvfold.hf.load import load as load_model

    _refuse_early(plan=plan, system=system, load=load, save=save)
    base, tokenizer = load_model(model)
    generation = reply_settings(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    if load is None:
        talk = Chat(base, tokenizer, plan or PLAN, system=system, generation=generation)
    else:
        talk = Chat.load(load, base, tokenizer, generation=generation)
        _tell(_status(talk.ledger()))
    try:
        failed = _talk(talk, save)
    finally:
        if save is not None:
            talk.save(save)
    if failed and not sys.stdin.isatty():
        raise typer.Exit(2)


def _refuse_early(*, plan: str | None, system: str | None, load: Path | None, save: Path | None) -> None:
    """What can be known to fail before a model is read."""
    from kvfold.chat.file import read_header
    from kvfold.plan import Plan

    if plan is not None:
        Plan.parse(plan)
    if load is not None:
        for name, value in (("--plan", plan), ("--system", system)):
            if value is not None:
                raise PlanError(f"{name} was given with --load; a saved chat brings its own; leave {name} away")
        read_header(load)
    if save is not None and not save.expanduser().absolute().parent.is_dir():
        raise FileError(f"{save} was to be written; its folder is not there; make the folder first")


def _talk(talk: "Chat", save: Path | None) -> bool:
    """Turn after turn until the input ends; whether any of them failed, or a script said nothing but empty lines."""
    prompt, failed, said, empty = ("> " if sys.stdin.isatty() else ""), False, False, False
    if prompt:
        _tell(f"{talk.plan}; commands: {_COMMANDS}; Ctrl-D leaves")
    while True:
        try:
            line = _read(prompt)
        except EOFError:
            if empty and not said and not prompt:
                raise DataError("an empty message was sent; there is nothing to reply to; say something") from None
            return failed
        said, empty = said or bool(line.strip()), empty or not line.strip()
        try:
            if line.strip() == "/quit":
                return failed
            if line.startswith("/"):
                _command(talk, line, save)
            elif line.strip():
                _turn(talk, line)
        except KvfoldError as error:
            failed = True
            _tell(f"kvfold: {' '.join(str(error).split())}")


def _read(prompt: str) -> str:
    """A line of input; the prompt goes where replies do not."""
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()


def _turn(talk: "Chat", text: str) -> None:
    """One turn. Ctrl-C stops the reply and undoes the turn; who types goes on, a script ends."""
    turns = len(talk.turns)
    pieces = talk.send(text)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)
    except KeyboardInterrupt:
        pieces.close()
        print(flush=True)
        if not sys.stdin.isatty():
            raise
        kept = "stopped while folding; the turn stays" if len(talk.turns) > turns else "stopped; the turn is undone"
        _tell(kept)
        return
    _tell(_status(talk.ledger()))


def _command(talk: "Chat", line: str, save: Path | None) -> None:
    """What begins with a slash."""
    name, _, value = line[1:].strip().partition(" ")
    known: dict[str, Callable[[], None]] = {
        "save": lambda: _save(talk, value.strip(), save),
        "ledger": lambda: _tell(str(talk.ledger())),
        "budget": lambda: _budget(talk, value.strip()),
        "help": lambda: _tell(_COMMANDS),
    }
    if name not in known:
        raise KvfoldError(f"/{name} was given; there is no such command; give one of {_COMMANDS}")
    known[name]()


def _save(talk: "Chat", given: str, save: Path | None) -> None:
    path = Path(given) if given else save
    if path is None:
        raise FileError("/save was given without a file; --save named none either; write /save FILE")
    talk.save(path)
    _tell(f"saved: {path}")


def _budget(talk: "Chat", value: str) -> None:
    try:
        number = float(value)
        whole = int(number)  # no number says how many inf and nan are
    except (ValueError, OverflowError) as error:
        raise BudgetError(f"/budget {value} was given; it takes a number; write /budget 0.2 or /budget 512") from error
    if number <= 1:
        talk.rebudget(keep=number)
    else:
        talk.rebudget(tokens=whole)
    _tell(_status(talk.ledger()))


def _status(ledger: "Ledger") -> str:
    every = ledger.seen * ledger.layers * ledger.kv_heads
    return (
        f"[{ledger.seen:,} tokens seen, {ledger.slots:,} of {every:,} slots stored, "
        f"{ledger.stored_bytes:,} bytes: {ledger.stored:.2f} kept]"
    )


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
