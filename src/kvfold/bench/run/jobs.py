"""From what a user writes to what the runner runs: plan texts and sizes in, one job per plan and size out.

`--keep` sets the size of every plan that can have one, also where the plan's text names another. Without it a plan
keeps the size in its text, and a plan that names none is run at the default sizes. A plan that evicts is run in each
scope of the suite unless its text names a scope; tables show the better.
"""

import ast
from collections.abc import Sequence

from kvfold.bench.peers import plans as rivals
from kvfold.bench.peers.catalog import PEERS
from kvfold.bench.run.job import Job
from kvfold.errors import BudgetError, KvfoldError, PlanError
from kvfold.plan import Plan, members

_SIZES = {"keep", "tokens", "max_bytes"}


def parse_keeps(text: str | None) -> tuple[float, ...]:
    """Read `"0.5,0.2"` as numbers, in the order of writing; no text, no sizes."""
    try:
        keeps = tuple(float(word) for word in (text or "").split(",") if word.strip())
    except ValueError:
        keeps = (0.0,)
    if not all(0.0 < keep <= 1.0 for keep in keeps):
        raise BudgetError(
            f"keep {text!r} was asked for; a kept fraction lies above 0 and up to 1; give 0.5,0.2 or such"
        )
    return keeps


def sizes(text: str | None, *, usual: str) -> dict[str, tuple[float, ...]]:
    """Give the sizes of a `--keep` as arguments of `parse_jobs` and `parse_rivals`; None: it was left away."""
    return {"keeps": parse_keeps(text), "usual": parse_keeps(usual) if text is None else ()}


def parse_jobs(
    plans: str, *, keeps: Sequence[float] = (), usual: Sequence[float] = (), scopes: Sequence[str] = ()
) -> list[Job]:
    """List every job that `"A; B"` means at these sizes and in these scopes. Raises PlanError for what is no plan.

    `keeps` replace the sizes in the texts; without them, `usual` are the sizes of plans that name none.
    """
    texts = [text.strip() for text in plans.split(";") if text.strip()]
    if not texts:
        raise PlanError(
            f"plans {plans!r} were asked for; there is none in it; give one or more, like 'full; snapkv(keep=0.5)'"
        )
    return [job for text in texts for plan in _sized(text, keeps, usual) for job in _scoped(plan, text, scopes)]


def parse_rivals(texts: str, *, keeps: Sequence[float] = (), usual: Sequence[float] = ()) -> list[Job]:
    """List every job that `"kvpress:SnapKV; ..."` means at these sizes. Raises SuiteError for what is not there."""
    found = rivals.parse_all(texts, keeps=keeps, usual=usual)
    for peer in dict.fromkeys(plan.peer for plan in found):
        PEERS[peer].command()  # its interpreter must be there before anything runs
    return [
        Job(plan=str(plan), keep=plan.keep, looks_at_queries=PEERS[plan.peer].method(plan.method).looks_at_queries)
        for plan in found
    ]


def _sized(text: str, keeps: Sequence[float], usual: Sequence[float]) -> list[Plan]:
    keeps = keeps or (() if _keywords(text) & _SIZES else usual)
    if not keeps:
        return [Plan.parse(text)]
    plan = Plan.parse(_with_size(text, keeps[0]))
    return [plan.with_budget(keep=keep) for keep in keeps] if plan.has_budget else [plan]


def _scoped(plan: Plan, text: str, scopes: Sequence[str]) -> list[Job]:
    if not plan.has_budget or "scope" in _keywords(text):
        return [_job(plan)]
    return [_job(variant) for variant in _variants(plan, scopes) or [plan]]


def _variants(plan: Plan, scopes: Sequence[str]) -> list[Plan]:
    """The plan in each scope that it can be in; a one-shot method has one scope only."""
    found = []
    for scope in scopes:
        try:
            found.append(plan.with_scope(scope))
        except PlanError:
            continue
    return found


def _job(plan: Plan) -> Job:
    return Job(plan=str(plan), keep=plan.keep, looks_at_queries=plan.select.query_aware)


def _calls(text: str) -> list[ast.expr]:
    """The members of a plan's text; none where it cannot be read, which Plan.parse will say better."""
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call | ast.Name)]


def _keywords(text: str) -> set[str]:
    return {str(word.arg) for call in _calls(text) if isinstance(call, ast.Call) for word in call.keywords}


def _with_size(text: str, keep: float) -> str:
    """The text with `keep` for the member that must have a size and names none."""
    if _keywords(text) & _SIZES:
        return text
    for call in _calls(text):
        member = call.func if isinstance(call, ast.Call) else call
        if isinstance(member, ast.Name) and _must_have_size(member.id):
            settings = call.keywords if isinstance(call, ast.Call) else []
            words = ", ".join([f"keep={keep}", *(ast.unparse(word) for word in settings)])
            return text.replace(ast.get_source_segment(text, call) or "", f"{member.id}({words})", 1)
    return text


def _must_have_size(name: str) -> bool:
    """Whether a select method of this name cannot be built without a size."""
    kind = members("select").get(name)
    if kind is None:
        return False
    try:
        kind()
    except KvfoldError:
        return True
    return False
