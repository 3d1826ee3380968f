"""Who may import whom: the table of ranks, held over every import statement of the package.

An import inside a function counts too: laziness changes when a module is read, not who knows whom. Imports that only
a type checker sees count as well. The table may change; it changes here, with its reason in the commit.
"""

import subprocess
import sys

import source

RANKS = (
    ("errors", "shapes", "version"),
    ("files", "integers", "seal"),
    ("budget", "data", "attention", "schema"),
    ("memory",),
    ("select", "encode", "place"),
    ("plan",),
    ("hf",),
    ("adapters",),
    ("open",),
    ("chat",),
    ("train", "bench", "serve"),
    ("cli",),
)
RANK = {folder: rank for rank, folders in enumerate(RANKS) for folder in folders}
EVERYWHERE = ("__init__", "__main__")  # the public face and the door of the command line name what they offer
NO_TORCH = ("errors", "files", "integers", "seal", "shapes", "version", "data", "cli", "__init__", "__main__")
FOREIGN = ("bench", "peers", "programs")  # run by rivals' interpreters, by path; no part of kvfold when it runs
HEAVY = {"torch", "transformers", "tokenizers", "safetensors", "numpy", "matplotlib", "jinja2", "accelerate", "rich"}
MAY = {"data": {"tokenizers"}}  # it makes the shipped tokenizer; tokenizers is small and brings no torch


def own(module: str) -> str | None:
    """The folder that an import of kvfold names; None for other people's modules and for kvfold itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "kvfold" and len(parts) > 1 else None


def is_foreign(path) -> bool:
    return path.relative_to(source.SOURCE).parts[: len(FOREIGN)] == FOREIGN


def test_every_folder_has_a_rank():
    folders = {source.folder(path) for path in source.files()} - {*EVERYWHERE, "models"}
    assert folders <= RANK.keys()


def test_a_file_imports_only_lower_ranks_and_its_own_folder():
    wrong = []
    for path in source.files():
        here = source.folder(path)
        if here in EVERYWHERE or here == "models":
            continue
        for found in source.imports(path):
            there = own(found.module)
            if there is None or there == here or there == "__version__":
                continue
            if there not in RANK:
                wrong.append(f"{source.at(path, found)} imports {found.module}, which has no rank")
            elif RANK[there] >= RANK[here]:
                wrong.append(f"{source.at(path, found)}: {here} may not know {there}")
    assert not wrong


def test_no_modules_import_each_other_in_a_circle():
    """Inside a folder too, and where the import stands in a function: who knows whom must be a ladder."""
    graph = {module: source.known_modules(path) - {module} for module, path in source.modules().items()}
    assert not source.circles(graph)


def test_a_circle_of_modules_is_found_as_one():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"e"}, "f": {"a"}}
    assert source.circles(graph) == [["a", "b", "c"], ["e"]]


def test_only_the_bridge_imports_transformers():
    others = [path for path in source.files() if source.folder(path) != "hf" and not is_foreign(path)]
    wrong = [
        source.at(path, found)
        for path in others
        for found in source.imports(path)
        if found.module.split(".")[0] == "transformers"
    ]
    assert not wrong, "only hf/ may import transformers"


def test_a_program_for_another_interpreter_imports_nothing_of_ours():
    foreign = [path for path in source.files() if is_foreign(path)]
    assert foreign
    assert not [
        source.at(path, found)
        for path in foreign
        for found in source.imports(path)
        if found.module.split(".")[0] == "kvfold"
    ]


def test_what_must_be_light_imports_nothing_heavy():
    wrong = []
    for path in source.files():
        here = source.folder(path)
        if here not in NO_TORCH:
            continue
        heavy = HEAVY - MAY.get(here, set())
        found = [i for i in source.imports(path) if i.at_import and i.module.split(".")[0] in heavy]
        wrong += [f"{source.at(path, i)} imports {i.module} when the module is read" for i in found]
    assert not wrong


def test_importing_kvfold_imports_no_torch_and_writes_nothing():
    program = """
import os, sys, threading
before = dict(os.environ), set(threading.enumerate())
import kvfold, kvfold.cli.main
assert (dict(os.environ), set(threading.enumerate())) == before
heavy = {"torch", "transformers", "numpy", "matplotlib", "tokenizers"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True)
