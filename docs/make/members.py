"""The generated parts of the pages about methods: settings, results, and the list of all members.

`make docs` runs this file. What a setting means is the comment beside its field; what a plan scored is in the records.
A page keeps what is written by hand: only what stands between two marks is renewed.
"""

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from kvfold.bench.report.tables import Table, better_scopes, is_full, is_none, ruled, tables, unbroken, without_scope
from kvfold.bench.run import journal
from kvfold.bench.run.record import Record
from kvfold.errors import KvfoldError
from kvfold.plan import members, said

DOCS = Path(__file__).resolve().parents[1]
AXES = {"select": "what stays", "encode": "how a slot is stored", "place": "where it lies"}
BUDGET = ("keep", "tokens", "max_bytes")
_NAME = re.compile(r"[A-Za-z_]\w*(?=\s*(?:\(|\+|$))")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting of a member: its name, what holds where it is left out, what it may be, and what it means."""

    name: str
    default: str
    values: str
    meaning: str


def settings(kind: type[Any]) -> list[Setting]:
    """List the settings of a member, the budget first."""
    meanings, hints = _comments(kind), get_type_hints(kind)
    without_budget = "keep" in hints and not _takes_budget(kind)
    return [
        Setting(
            name=field.name,
            default=_default(kind, field),
            values=said(hints[field.name]),
            meaning=meanings.get(field.name, ""),
        )
        for field in fields(kind)
        if field.init and not (without_budget and field.name in (*BUDGET, "scope"))
    ]


def _takes_budget(kind: type[Any]) -> bool:
    try:
        kind(keep=0.5)
    except KvfoldError:
        return False
    return True


def _default(kind: type[Any], field: Field) -> str:
    if field.default is MISSING:
        return "required"
    return "" if field.default is None else f"`{field.default!r}`"


def _comments(kind: type[Any]) -> dict[str, str]:
    """Read the comment beside each field; that of a class counts before that of its base."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__[:-1]):
        try:
            source = inspect.getsource(one)
        except (OSError, TypeError):  # a base that is not written in Python
            continue
        found |= dict(re.findall(r"^    (\w+): [^\n]*?  # (.+)$", source, flags=re.MULTILINE))
    return found


def settings_table(kind: type[Any]) -> str:
    """Write the settings of a member as a table."""
    listed = settings(kind)
    if not listed:
        return "It has no settings."
    lines = ["| setting | default | it may be | meaning |", "|---|---|---|---|"]
    lines += [f"| `{one.name}` | {one.default} | {one.values} | {one.meaning} |" for one in listed]
    if "keep" in {one.name for one in listed}:
        lines += ["", "Give one of `keep`, `tokens` and `max_bytes`."]
    return "\n".join(lines)


def first_sentence(kind: type[Any]) -> str:
    """Give the first sentence of a member's file, without the name before it."""
    words = inspect.getdoc(import_module(kind.__module__)) or ""
    paragraph = " ".join(words.partition("\n\n")[0].split())
    return paragraph.partition(": ")[2].partition(". ")[0].rstrip(".")


def needs_adapter(kind: type[Any]) -> bool:
    """Say whether a member works only with what was learned for a model."""
    return "adapter" in {field.name for field in fields(kind)}


def every_member() -> Iterator[tuple[str, str, type[Any]]]:
    """Yield axis, name and class of every member that ships."""
    for axis in AXES:
        for name, kind in members(axis).items():
            if Path(inspect.getfile(kind)).is_relative_to(DOCS.parent / "src"):  # tests add members of their own
                yield axis, name, kind


# Results -------------------------------------------------------------------------------------------------------------


def shown_records() -> list[Table]:
    """Read the tables of the shipped model, and those of the controls in a chat."""
    folders = sorted(path.parent for path in (DOCS / "records").glob("*-tiny/records.jsonl"))
    return tables(journal.gather(folders))


def control_records() -> list[Table]:
    """Read the tables in which controls stand: members that nobody would take, and that learning must beat."""
    return tables(journal.gather([DOCS / "records" / "sonic-chat", DOCS / "records" / "sonic-dialogue"]))


def names_in(plan: str) -> list[str]:
    """List the members that a plan's text names; a rival's plan names none of ours."""
    return [] if ":" in plan.partition("(")[0] else _NAME.findall(re.sub(r"\([^()]*\)", "", plan))


def results_table(name: str, own: Sequence[Table], controls: Sequence[Table]) -> str:
    """Write what the plans with this member scored: a row a plan, a column a suite."""
    for shown in (own, controls):
        rows = _rows(name, shown)
        if rows:
            return "\n".join([*_heads(shown), *rows, "", _note(shown)])
    return ""


def _heads(shown: Sequence[Table]) -> list[str]:
    heads = ("plan", "stored", "attended", *(table.rows[0].record.suite for table in shown))
    return [_line(heads), ruled(len(heads))]


def _rows(name: str, shown: Sequence[Table]) -> list[str]:
    """Write the rows of `full`, `none` and the plans with a member; none where no plan has it."""
    found: dict[str, list[Record | None]] = {}
    for at, table in enumerate(shown):
        for record in better_scopes(row.record for row in table.rows if row.record.failure is None):
            found.setdefault(without_scope(record.plan), [None] * len(shown))[at] = record
    edges = [label for label, records in found.items() if any(one and _is_edge(one) for one in records)]
    own = [label for label in found if name in names_in(label) and label not in edges]
    if not own and name not in ("full", "none"):
        return []
    return [_row(label, found[label]) for label in (*sorted(edges), *sorted(own, key=lambda one: _size(found[one])))]


def _is_edge(record: Record) -> bool:
    return is_full(record) or is_none(record)


def _size(records: Sequence[Record | None]) -> tuple[float, str]:
    one = next(record for record in records if record is not None)
    return -(one.keep or one.stored), one.plan


def _row(label: str, records: Sequence[Record | None]) -> str:
    there = [record for record in records if record is not None]
    scores = ["" if record is None else _score(record) for record in records]
    return _line([f"`{label}`", _range(r.stored for r in there), _range(r.attended for r in there), *scores])


def _score(record: Record) -> str:
    digits = 2 if record.full >= 0.1 else 4
    low, high = record.interval
    return unbroken(f"{record.score:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})")


def _range(values: Iterator[float]) -> str:
    written = sorted({f"{value:.2f}" for value in values})
    return written[0] if len(written) == 1 else unbroken(f"{written[0]} to {written[-1]}")


def _note(shown: Sequence[Table]) -> str:
    titles = "; ".join(table.title for table in shown)
    return (
        f"*Stored* and *attended* are fractions of the full cache. Scores have their 95 % intervals. Runs: {titles}. "
        "[Results](../results.md) has every plan, and says how to run them again."
    )


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# Pages ---------------------------------------------------------------------------------------------------------------


def renewed(page: str, what: str, text: str) -> str:
    """Put a text between the marks of a page."""
    begin, end = f"<!-- kvfold {what}: begin -->", f"<!-- kvfold {what}: end -->"
    head, found, rest = page.partition(begin)
    assert found, f"a page has a mark where {what} begin"
    assert end in rest, f"a page has a mark where {what} end"
    return f"{head}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}"


def index_table() -> str:
    """Write the list of all members, axis by axis."""
    lines = []
    for axis, question in AXES.items():
        lines += [f"## {axis}: {question}", "", "| member | what it does | models |", "|---|---|---|"]
        for of_axis, name, kind in every_member():
            if of_axis == axis:
                models = "needs an adapter" if needs_adapter(kind) else "any model"
                lines.append(f"| [`{name}`]({name}.md) | {first_sentence(kind)} | {models} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def all_settings() -> str:
    """Write one page with the settings of every member."""
    lines = [
        "# Plan settings",
        "",
        "Generated by `make docs` from the members themselves; a test fails when it is stale.",
        "",
    ]
    lines += ["A plan names at most one member of each axis: `snapkv(keep=0.5) + int8(group=64)`.", ""]
    for axis, question in AXES.items():
        lines += [f"## {axis}: {question}", ""]
        for of_axis, name, kind in every_member():
            if of_axis == axis:
                lines += [f"### {name}", "", f"[{name}](../methods/{name}.md): {first_sentence(kind)}.", ""]
                lines += [settings_table(kind), ""]
    return "\n".join(lines).rstrip() + "\n"


def pages() -> dict[Path, str]:
    """Give every page with generated parts, as it should be."""
    own, controls = shown_records(), control_records()
    index = DOCS / "methods" / "index.md"
    made = {
        DOCS / "reference" / "settings.md": all_settings(),
        index: renewed(index.read_text(encoding="utf-8"), "members", index_table()),
    }
    for _, name, kind in every_member():
        path = DOCS / "methods" / f"{name}.md"
        text = renewed(path.read_text(encoding="utf-8"), "settings", settings_table(kind))
        results = results_table(name, own, controls)
        made[path] = renewed(text, "results", results) if results else text
    return made


if __name__ == "__main__":
    for path, text in pages().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"renewed: {path.relative_to(DOCS.parent)}", file=sys.stderr)
