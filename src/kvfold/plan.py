"""Plan: one member per axis (what stays, how it is stored, where it lies), and the text that builds it.

    snapkv(keep=0.125) + int8(group=32)

The text is read with `ast`: calls with literal keywords, nothing is evaluated. A member is the class of the file of
that name in select/, encode/ or place/; an axis that is not named is lossless. A plan prints as the text that
builds it.
"""

import ast
import difflib
import importlib
import pkgutil
import warnings
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from kvfold import encode, place, select
from kvfold.attention.rotary import Rotary
from kvfold.budget.budget import Budget
from kvfold.encode.base import Encode
from kvfold.encode.dense import Dense
from kvfold.errors import BudgetError, KvfoldError, PlanError
from kvfold.integers import MOST, MOST_BYTES, integer
from kvfold.memory.attention_sums import AttentionSums
from kvfold.memory.part import Layout, Placement
from kvfold.memory.recorders import Recorder
from kvfold.memory.rules import Rules
from kvfold.place.base import Place
from kvfold.place.device import Device
from kvfold.select.base import Select
from kvfold.select.full import Full

Member: TypeAlias = Select | Encode | Place

_FULL, _DENSE, _DEVICE = Full(), Dense(), Device()
_UNIONS = (UnionType, Union)  # `int | None` is of the first kind, `Literal["a"] | None` of the second
_AXES = {"select": (select, Select), "encode": (encode, Encode), "place": (place, Place)}


_QUESTIONS = {"select": "what stays", "encode": "how a slot is stored", "place": "where it lies"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What stays, how it is stored, where it lies."""

    select: Select = _FULL
    encode: Encode = _DENSE
    place: Place = _DEVICE

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """The plan that a text names, `snapkv(keep=0.5) + int8`.

        Raises PlanError for an unknown name or setting, for two members of one axis, and for a text that is no plan.
        """
        chosen: dict[str, Member] = {}
        for name, settings in _calls(text):
            axis, kind = _find(name)
            if axis in chosen:
                raise PlanError(
                    f"{text!r} asks for {_name_of(type(chosen[axis]))} and {name}; both say {_QUESTIONS[axis]}; "
                    "give one of them"
                )
            chosen[axis] = _build(name, kind, settings)
        return cls(**chosen)  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        default = Plan()
        texts = [_text_of(member) for axis in _AXES if (member := getattr(self, axis)) != getattr(default, axis)]
        return " + ".join(texts) or "full"

    def rules(
        self,
        *,
        pinned: int,
        layers: int,
        least: int = 0,
        layout: Layout | None = None,
        opened: Placement | None = None,
        also: tuple[Recorder, ...] = (),
        rotary: Rotary | None = None,
    ) -> Rules:
        """What the layers of a model fold by; `layout` is the encode member's, bound to what was learned of the model,
        `opened` the place member's, if their cache has one already. Fractions leave `least` tokens in any case.
        `also` is recorded for other plans. With a model's `rotary` slots that stay are moved together.

        Raises BudgetError for a budget that cannot hold the pinned tokens, PlanError for slots that cannot be moved.
        """
        budget = self.select.budget
        if budget is not None:
            budget.check(pinned=pinned)
        rules = Rules(
            select=self.select,
            layout=layout or self.encode,
            raw=_DENSE,
            pinned=pinned,
            layers=layers,
            least=least,
            placement=self._placement(pinned, least) if opened is None else opened,
            also=also,
            rotary=rotary,
        )
        if rules.closes_gaps:
            self._refuse_unmovable(rules)
        return rules

    def rules_after(self, old: Rules) -> Rules:
        """What the same layers fold by from now on, after they folded by `old`, whose layout and place stay."""
        return self.rules(
            pinned=old.pinned,
            layers=old.layers,
            least=old.least,
            layout=old.layout,
            opened=old.placement,
            rotary=old.rotary,
        )

    def _refuse_unmovable(self, rules: Rules) -> None:
        """Refuse slots that cannot be moved together, or that are not what they were afterwards."""
        asked = f'{self} was asked for with positions="compact"'
        if rules.placement is not None:
            raise PlanError(
                f"{asked}; what lies in a tier cannot be turned there; leave {_name_of(type(self.place))} away"
            )
        if self.select.reads_ages:
            raise PlanError(
                f"{asked}; {_name_of(type(self.select))} reads how old a slot is from its position, which moves; "
                "give normalise=False"
            )
        if not rules.layout.lossless:
            code = _name_of(type(self.encode))
            raise PlanError(f"{asked}; slots move at every fold, and {code} would round them anew; leave {code} away")

    def _placement(self, pinned: int, least: int) -> Placement | None:
        placement = self.place.open(pinned=pinned, least=least)
        if placement is not None and any(isinstance(one, AttentionSums) for one in self.select.records):
            raise PlanError(
                f"{self} was asked for; {_name_of(type(self.select))} adds up the attention that every slot receives, "
                f"and with {_name_of(type(self.place))} most slots are not read; give one without such sums"
            )
        return placement

    @property
    def reaches(self) -> tuple[str, ...]:
        """The settings that name files, folders or adapters of others, as `name='value'`."""
        named = [(member, name) for member in (self.select, self.encode, self.place) for name in member.names_files]
        values = [(name, getattr(member, name), member) for member, name in named]
        defaults = {(type(member), field.name): field.default for member, _ in named for field in fields(member)}
        return tuple(
            f"{name}={value!r:.200}" for name, value, member in values if value != defaults[type(member), name]
        )

    def reads_what_is_saved_by(self, other: "Plan") -> bool:
        """Whether a memory that the other plan has folded can go on by this one: budgets and files may differ."""
        ours, theirs = self.encode, other.encode
        files = {name: getattr(ours, name) for name in ours.names_files}
        return (
            type(self.select) is type(other.select)
            and type(self.place) is type(other.place)
            and type(ours) is type(theirs)
            and replace(theirs, **files) == ours
        )

    @property
    def keep(self) -> float | None:
        """The nominal kept fraction of the select member, where it has one."""
        return self.select.keep

    @property
    def shares_prefill(self) -> bool:
        """Whether its cache holds a text, before the first fold, as other plans' caches do: nothing is placed."""
        return isinstance(self.place, Device)

    @property
    def has_budget(self) -> bool:
        """Whether the select member spends a budget, which `with_budget` may change."""
        return isinstance(self.select.budget, Budget)

    def with_budget(
        self, *, keep: float | None = None, tokens: int | None = None, max_bytes: int | None = None
    ) -> "Plan":
        """The same plan with another budget. Raises BudgetError where it has none."""
        if not self.has_budget:
            raise BudgetError(
                f"another budget was asked for; the plan {self} has none to change; give a plan that drops tokens"
            )
        return replace(self, select=replace(self.select, keep=keep, tokens=tokens, max_bytes=max_bytes))

    def with_limit(self, limit_bytes: int) -> "Plan":
        """The same plan with another limit of the file that its place keeps. Raises BudgetError where it has none."""
        return replace(self, place=self.place.with_limit(limit_bytes))

    def with_scope(self, scope: str) -> "Plan":
        """The same plan with its select member in another scope, "history" or "turn"."""
        return replace(self, select=replace(self.select, scope=scope))


def members(axis: str) -> dict[str, type[Member]]:
    """Every member of an axis by its name in plans: the files of its folder."""
    return dict(_members(axis))


@cache
def _members(axis: str) -> tuple[tuple[str, type[Member]], ...]:
    package, base = _AXES[axis]
    found = []
    for module in pkgutil.iter_modules(package.__path__):
        if module.name == "base":
            continue
        content = vars(importlib.import_module(f"{package.__name__}.{module.name}"))
        own = [
            kind
            for kind in content.values()
            if isinstance(kind, type) and issubclass(kind, base) and kind is not base
            and kind.__module__ == f"{package.__name__}.{module.name}"
        ]  # fmt: skip
        found += [(module.name, kind) for kind in own[:1]]
    return tuple(found)


def _find(name: str) -> tuple[str, type[Member]]:
    known = {own: (axis, kind) for axis in _AXES for own, kind in _members(axis)}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3) or sorted(known)
    raise PlanError(f"a plan names {name!r}; there is no such member; near it are {', '.join(near)}")


def _name_of(kind: type[Member]) -> str:
    return kind.__module__.rpartition(".")[2]


def _settings_of(kind: type[Member]) -> list[str]:
    return [field.name for field in fields(kind) if field.init]


def _build(name: str, kind: type[Member], settings: dict[str, Any]) -> Member:
    known = _settings_of(kind)
    settings = _renamed(name, kind, settings)
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise PlanError(
            f"{name} was given {', '.join(unknown)}; it has no such setting; it knows {', '.join(known) or 'none'}"
        )
    hints = get_type_hints(kind)
    for key, value in settings.items():
        if not _fits(value, hints[key]):
            raise PlanError(f"{name} was given {key}={value!r}; it cannot be that; give {said(hints[key])}")
        if isinstance(value, int) and not isinstance(value, bool):
            integer(f"{name}: {key}", value, least=-MOST, most=MOST_BYTES if "bytes" in key else MOST, error=PlanError)
    try:
        return kind(**settings)
    except KvfoldError as error:
        raise type(error)(f"{name}: {error}") from error


def _renamed(name: str, kind: type[Member], settings: dict[str, Any]) -> dict[str, Any]:
    """Give settings their names of today; an older name works for this version, with one warning line."""
    renamed = {}
    for key, value in settings.items():
        today = kind.renamed.get(key, key)
        if today != key:
            warnings.warn(f"{name}({key}=...) is now {name}({today}=...); give {today}=", FutureWarning, stacklevel=6)
        renamed[today] = value
    return renamed


def _fits(value: object, hint: Any) -> bool:
    """Whether a literal may stand where a setting has this annotation; True and False are no numbers."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) in _UNIONS:
        return any(_fits(value, one) for one in get_args(hint))
    allowed = (int, float) if hint is float else (hint,)
    return isinstance(value, allowed) and (hint is bool or not isinstance(value, bool))


def said(hint: Any) -> str:
    """An annotation in words."""
    if get_origin(hint) is Literal:
        return " or ".join(repr(one) for one in get_args(hint))
    if get_origin(hint) in _UNIONS:
        return " or ".join(said(one) for one in get_args(hint))
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", NoneType: "None"}
    return words.get(hint, str(hint))


def _text_of(member: Member) -> str:
    given = [
        f"{field.name}={getattr(member, field.name)!r}"
        for field in fields(member)
        if field.init and (field.default is MISSING or getattr(member, field.name) != field.default)
    ]
    return _name_of(type(member)) + (f"({', '.join(given)})" if given else "")


def _calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The members that a text names, with their settings."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise PlanError(
            f"{text[:200]!r} was given as a plan; it cannot be read; write it like 'snapkv(keep=0.5) + int8'"
        ) from error
    terms: list[ast.expr] = []
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        terms.append(tree.right)
        tree = tree.left
    return [_call(term, text) for term in (tree, *reversed(terms))]


def _call(term: ast.expr, text: str) -> tuple[str, dict[str, Any]]:
    if isinstance(term, ast.Name):
        return term.id, {}
    if isinstance(term, ast.Constant) and term.value is None:
        return "none", {}
    try:
        if isinstance(term, ast.Call) and isinstance(term.func, ast.Name) and not term.args and _named(term.keywords):
            return term.func.id, {str(word.arg): ast.literal_eval(word.value) for word in term.keywords}
    except (ValueError, TypeError) as error:
        raise PlanError(
            f"{ast.unparse(term)!r} in {text!r} has a value that is no literal; give a number or a quoted text"
        ) from error
    raise PlanError(
        f"{ast.unparse(term)!r} in {text!r} is no member; write a name with keywords, like 'snapkv(keep=0.5)'"
    )


def _named(keywords: list[ast.keyword]) -> bool:
    """Whether each keyword has a name of its own."""
    names = [word.arg for word in keywords]
    return None not in names and len(set(names)) == len(names)
