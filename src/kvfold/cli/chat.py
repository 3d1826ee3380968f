"""`kvfold chat`: talk with a model whose history is folded after every turn.

Replies go to standard output, everything else (prompt of the terminal, status, errors) to standard error, so it also
works in a pipe: a line in, a reply out. What a chat is stands in `chat/`; this file reads lines and prints.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvfold.cli.commands import Talk, status, tell, tell_loaded
from kvfold.cli.hardware import Device, Dtype, load_model
from kvfold.cli.lines import Lines
from kvfold.errors import DataError, FileError, KvfoldError, PlanError

if TYPE_CHECKING:
    from kvfold.chat.chat import Chat

MODEL = "tiny"
PLAN = "int8(rotate=True)"  # as kvfold.open has it, which would bring torch
Model = Annotated[
    str | None,
    typer.Option(
        help="`smollm2`, `tiny`, a folder, a GGUF file, or a name on the Hub. "
        f"Default: {MODEL}, or the model of the saved chat."
    ),
]
PlanText = Annotated[
    str | None, typer.Option(help=f"How the history is folded. Default: {PLAN}, or the plan of the saved chat.")
]
Least = Annotated[
    int | None,
    typer.Option(min=0, help="Tokens that a plan with keep= leaves in any case. Default: 256, or the saved chat's."),
]
PositionsOption = Annotated[
    str | None,
    typer.Option(
        help="`kept`, or `compact`: each fold moves together what it keeps, so that a chat has no last position. "
        "Default: kept, or as the saved chat has it."
    ),
]


def chat(
    model: Model = None,
    plan: PlanText = None,
    system: Annotated[str | None, typer.Option(help="The system prompt. It is never folded.")] = None,
    load: Annotated[Path | None, typer.Option(help="Go on with this saved chat. Its model is loaded.")] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Accept a saved chat whose plan names folders or adapters.")
    ] = False,
    save: Annotated[Path | None, typer.Option(help="Save the chat to this file at the end.")] = None,
    least: Least = None,
    positions: PositionsOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest reply.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The seed of sampling, if the temperature is above 0.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Talk with a model. After each turn a line says how much the history takes. /help lists commands."""
    from kvfold.chat.chat import Chat
    from kvfold.hf.generation import reply_settings

    of_a_new_chat = {"--plan": plan, "--system": system, "--least": least, "--positions": positions}
    header = _refuse_early(of_a_new_chat, load=load, save=save)
    model, dtype = _of_the_file(header, model, dtype)
    base, tokenizer = load_model(model, device=device, dtype=dtype)
    generation = reply_settings(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    if load is None:
        settings = _given(least=least, positions=positions)
        begun = Chat(base, tokenizer, plan or PLAN, system=system, generation=generation, **settings)
    else:
        begun = Chat.load(load, base, tokenizer, generation=generation, trust=trust)
        tell_loaded(begun)
    talk = Talk(begun, save)
    try:
        failed = _talk(talk)
    finally:
        if save is not None:
            talk.chat.save(save)
            if sys.stdin.isatty():
                tell(f"saved: {save}")
    raise typer.Exit(2 if failed and not sys.stdin.isatty() else 0)


def _given(**settings: Any) -> dict[str, Any]:
    """Keep the settings that were given."""
    return {name: value for name, value in settings.items() if value is not None}


def _refuse_early(of_a_new_chat: dict[str, object], *, load: Path | None, save: Path | None) -> dict[str, Any] | None:
    """Refuse what can be known to fail before a model is read; the header of the saved chat, if there is one."""
    from kvfold.chat.file import read_header
    from kvfold.plan import Plan

    plan = of_a_new_chat["--plan"]
    if plan is not None:
        Plan.parse(str(plan))
    if load is not None:
        for name, value in of_a_new_chat.items():
            if value is not None:
                raise PlanError(f"{name} was given with --load; a saved chat brings its own; leave {name} away")
    header = None if load is None else read_header(load)
    if save is not None:
        _refuse_unwritable(save.expanduser().absolute())
    return header


def _refuse_unwritable(save: Path) -> None:
    """Raise FileError where a chat could not be saved in the end."""
    if not save.parent.is_dir():
        raise FileError(f"{save} was to be written; its folder is not there; make the folder first")
    if save.is_dir():
        raise FileError(f"{save} was to be written; it is a folder; give the name of a file in it")
    if not os.access(save.parent, os.W_OK):
        raise FileError(f"{save} was to be written; its folder cannot be written to; give another one")


def _of_the_file(header: dict[str, Any] | None, model: str | None, dtype: str) -> tuple[str, str]:
    """Choose model and precision: what is given, else those of a saved chat."""
    if header is None:
        return model or MODEL, dtype
    return model or _named(header["model"]), header["dtype"] if dtype == "auto" else dtype


def _named(saved: str) -> str:
    """The name by which the model of a saved chat is loaded: a shipped one lies elsewhere in another installation."""
    from kvfold.hf.load import is_shipped

    short = Path(saved).name
    return short if is_shipped(short) and not Path(saved).is_dir() else saved


def _talk(talk: Talk) -> bool:
    """Turn after turn until the input ends; whether any of them failed, or a script said nothing but empty lines."""
    lines, failed, said, empty = Lines(), False, False, False
    if lines.typed:
        tell(f"{talk.chat.plan}; /help lists commands; Ctrl-D leaves")
    while True:
        try:
            line = lines.read()
        except EOFError:
            if empty and not said and not lines.typed:
                raise DataError("an empty message was sent; there is nothing to reply to; say something") from None
            return failed
        except UnicodeDecodeError as error:
            failed = True
            tell(f"kvfold: a line was sent that is not UTF-8 ({error.reason}); it is left out; send text in UTF-8")
            continue
        said, empty = said or bool(line.strip()), empty or not line.strip()
        if line.strip() == "/quit":
            return failed
        try:
            _answer(talk, line)
        except KvfoldError as error:
            failed = True
            tell(f"kvfold: {' '.join(str(error).split())}")


def _answer(talk: Talk, line: str) -> None:
    """Do what one line wants: a command, or a turn that can be taken back afterwards."""
    if line.startswith("/"):
        talk.command(line)
        line, talk.again = talk.again or "", None
    if line.strip():
        before, turns = talk.chat.fork(), len(talk.chat.turns)
        _turn(talk.chat, line)
        if len(talk.chat.turns) > turns:
            talk.before = before


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
        tell(kept)
        return
    tell(status(talk.ledger()))
