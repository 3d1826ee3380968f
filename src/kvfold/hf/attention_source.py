"""What the source of a model's attention says: whether it stores rows in a cache, and whether kvfold can stand between.

kvfold hands the model a handle in place of the rows that it stored, and takes over at transformers' attention
interface. Attention that goes another way, or looks at those rows first, cannot be served. Both can be read in the
source of its class, before a token is fed. Source that is not there is taken on trust.
"""

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn
from transformers import Cache

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_CACHES = {"past_key_values", "past_key_value", "layer_past", "cache"}  # what forwards call their cache


def storing_classes(decoder: nn.Module) -> list[type[nn.Module]]:
    """List the classes of a decoder's modules that store keys and values in a cache."""
    return [kind for kind in dict.fromkeys(map(type, decoder.modules())) if stores_rows(kind)]


@cache
def stores_rows(kind: type[nn.Module]) -> bool:
    """Tell whether the forward of a class updates a cache."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and "update" in code.co_names and not _CACHES.isdisjoint(code.co_varnames)


@cache
def obstacle(kind: type[nn.Module]) -> str | None:
    """Say why the attention of a class cannot be served; None where it can, or where its source is not there."""
    try:
        own = kind.__mro__[: kind.__mro__.index(nn.Module)]
        sources = [inspect.getsource(base) for base in own]
        forward = textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward)))
    except (OSError, TypeError):
        return None
    if not any(_INTERFACE in source for source in sources):
        return "computes attention by itself, not through transformers' attention interface"
    if "get_mask_sizes" in inspect.unwrap(kind.forward).__code__.co_names:
        return "adds to its mask by itself, such as a bias of positions"
    use = next(_uses_of_stored(ast.parse(forward)), None)
    return None if use is None else f"works on the rows that it stored before it attends ({use})"


@cache
def own_cache(kind: type[nn.Module]) -> str | None:
    """Name the cache of its own that the forward of a model insists on; None where it takes any cache."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward))))
    except (OSError, TypeError):
        return None
    refusing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise)]
    calls = [call for node in refusing for call in ast.walk(node.test) if isinstance(call, ast.Call)]
    for call in calls:
        if ast.unparse(call.func) == "isinstance" and ast.unparse(call.args[0]) in _CACHES:
            wanted = getattr(sys.modules.get(kind.__module__), ast.unparse(call.args[1]), None)
            if isinstance(wanted, type) and not issubclass(Cache, wanted):
                return wanted.__name__
    return None


def _uses_of_stored(tree: ast.AST) -> Iterator[str]:
    """Find what is done with the answer of `cache.update` besides handing it to attention, in order of the source."""
    stored = [node for node in ast.walk(tree) if isinstance(node, ast.Assign) and _is_update(node.value)]
    if not stored:
        return
    names = {name.id for node in stored for name in ast.walk(node.targets[0]) if isinstance(name, ast.Name)}
    after = max(node.lineno for node in stored)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names):
            continue
        if node.lineno > after and not (_is_handed_on(node, parents) or _is_optional(node, after, parents)):
            yield ast.unparse(parents[node])


def _is_update(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "update"


def _is_optional(node: Any, after: int, parents: dict[ast.AST, ast.AST]) -> bool:
    """Tell whether a use depends on a condition: layers of another kind share the class, and store nothing here."""
    while node in parents:
        node = parents[node]
        if isinstance(node, ast.If | ast.IfExp) and node.lineno > after:
            return True
    return False


def _is_handed_on(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Tell whether a name is an argument of an attention function, or only given another place."""
    parent = parents[node]
    if isinstance(parent, ast.keyword | ast.Tuple):
        node, parent = parent, parents[parent]
    if isinstance(parent, ast.Call):
        called = ast.unparse(parent.func)
        return parent.func is not node and ("attn" in called or "attention" in called)
    return isinstance(parent, ast.Assign)
