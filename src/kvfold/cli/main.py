"""The door of the command line: which verbs there are, and what an error looks like.

Every error that a user can cause becomes one line on standard error and exit code 2; Ctrl-C becomes one line and
exit code 130. Verbs import what they need when they run; this file imports typer and nothing heavier.
"""

import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

import kvfold
from kvfold.cli import advise, bench, chat, delimiters, demo, inspect, listing, ranks, report, serve, train
from kvfold.cli.printing import escaped
from kvfold.errors import KvfoldError

INTERRUPTED = 130  # what shells expect of a program stopped by Ctrl-C
REFUSED = 2

app = typer.Typer(
    name="kvfold",
    help="Keep the key-value cache of a Hugging Face model small, with bytes that are really freed.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"kvfold {kvfold.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """Options that belong to no verb."""


app.command()(demo.demo)
app.command()(advise.advise)
app.command()(bench.bench)
app.command()(report.report)
app.command()(chat.chat)
app.command()(serve.serve)
app.command()(inspect.inspect)
app.command()(listing.plans)
app.command()(listing.suites)
app.command()(ranks.ranks)
app.command()(delimiters.delimiters)
app.add_typer(train.app, name="train")


def usage_line(error: typer.TyperException) -> str:
    """What typer has to say about a wrong command line, with where to read on."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "kvfold"
    return f"{error.format_message().rstrip('.')}; see {path} --help"


def complain(line: str) -> None:
    """Say it on standard error as one line, whatever line breaks the message carries."""
    print("kvfold:", escaped(" ".join(line.split())), file=sys.stderr)


def remark(message: Warning | str, *rest: object, **more: object) -> None:
    """Say a warning as one line, without the line of code that gave it."""
    complain(str(message))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code. Never lets a user's mistake end in a traceback."""
    command = typer.main.get_command(app)
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with warnings.catch_warnings():  # puts the way of showing them back
            warnings.showwarning = remark
            code = command.main(args=words or ["--help"], prog_name="kvfold", standalone_mode=False)
    except KvfoldError as error:
        complain(str(error))
        return REFUSED
    except typer.TyperException as error:
        complain(usage_line(error))
        return REFUSED
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        complain("stopped by Ctrl-C; files that were finished before are kept")
    return code if isinstance(code, int) else 0


def main() -> None:
    """The entry point that the installed `kvfold` command calls."""
    sys.exit(run())
