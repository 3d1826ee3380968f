"""Tasks of lm_eval as samples: their documents, and the metrics of a model on some of these.

Tasks come by name or as YAML files; ones whose data lie in local files need no network. A task is read once a process.
It knows neither plans nor records; it works with any lm_eval class.
"""

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any

from kvfold.bench.choices import named
from kvfold.errors import DataError, SuiteError

SEED = 1234  # of examples in prompts, the one that lm_eval's command uses


@cache
def load(specs: tuple[str, ...], shots: int | None) -> Mapping[str, Any]:
    """Load tasks by their names, with so many examples in the prompt; None leaves it to the task.

    Raises SuiteError for a task that does not exist, DataError for one whose data cannot be had.
    """
    for spec in specs:
        if _is_file(spec) and not Path(spec).is_file():
            raise SuiteError(f"the task {spec} was asked for; there is no such file; give a YAML file that is there")
    try:
        tasks = _manager(named_ones=not all(map(_is_file, specs))).load(list(specs))["tasks"]
    except (KeyError, ValueError) as error:
        raise SuiteError(
            f"tasks {', '.join(specs)} were asked for; lm_eval cannot read them ({_first_line(error)}); give names of "
            "its tasks, or YAML files"
        ) from None
    except Exception as error:  # whatever the reader of data sets raises: no network, no file, no such split
        raise DataError(
            f"tasks {', '.join(specs)} were asked for; their data cannot be had ({_first_line(error)}); name "
            "data_files that are there"
        ) from None
    for task in tasks.values():
        if shots is not None:
            task.set_config(key="num_fewshot", value=shots)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return tasks


@cache
def _manager(*, named_ones: bool) -> Any:
    """Make lm_eval's index of tasks. Its built-in tasks are thousands of files, read only where one is named."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=named_ones)


def _is_file(spec: str) -> bool:
    return spec.endswith((".yaml", ".yml"))


def called(spec: str) -> str:
    """Name a task as records do: by its name, or by the name and digest of its file."""
    path = Path(spec)
    return named(path) if path.is_file() else spec


def data_of(task: Any) -> list[str]:
    """List the local files that a task reads, by name and digest."""
    settings = task.get_config("dataset_kwargs") or {}
    files = settings.get("data_files") or {}
    paths: list[Path] = []
    for split in files.values() if isinstance(files, Mapping) else [files]:
        names = split if isinstance(split, list | tuple) else [split]
        paths += [Path(name) for name in names]
    return sorted(named(path) for path in paths if path.is_file())


def chosen_metric(task: Any, wanted: str) -> str:
    """Choose the metric that is the score: `wanted`, or the task's first. Raises SuiteError for one that cannot be."""
    better: Mapping[str, bool] = task.higher_is_better()
    metric = wanted or next(iter(better), "")
    usable = [name for name, higher in better.items() if higher]
    if metric not in usable:
        raise SuiteError(
            f"{metric or 'a metric'} of the task {task.task_name} was to be the score; a score is a metric that is "
            f"better when higher, here {', '.join(usable) or 'none is'}; give --set metric=NAME, or use lm_eval's "
            "command: python -m kvfold.bench.harness"
        )
    return metric


def results(task: Any, indices: Sequence[int], model: Any, *, chat: bool) -> dict[int, Mapping[str, Any]]:
    """Let a model answer these documents of a task; give their metrics, by index."""
    order = sorted(indices)
    task.set_fewshot_seed(seed=SEED)  # else the examples of a document would follow from what was asked before
    with redirect_stderr(io.StringIO()):  # its progress bar would run over ours
        task.build_all_requests(
            samples=order,
            rank=0,
            world_size=1,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            chat_template=model.apply_chat_template if chat else None,
            tokenizer_name=model.tokenizer_name if chat else "",
        )
    kinds: dict[str, list[Any]] = {}
    for instance in task.instances:
        kinds.setdefault(instance.request_type, []).extend([instance] * instance.repeats)
    for kind, requests in kinds.items():
        answers = getattr(model, kind)(requests)  # lm_eval names the method after the kind of request
        for request, answer in zip(requests, answers, strict=True):
            request.resps.append(answer)
    task.apply_filters()
    found = {}
    for number, instances in _by_document(task).items():
        found[order[number]] = _metrics(task, instances)
    return found


def _by_document(task: Any) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for instance in sorted(task.instances, key=lambda instance: instance.idx):
        found.setdefault(instance.doc_id, []).append(instance)
    return found


def _metrics(task: Any, instances: Sequence[Any]) -> Mapping[str, Any]:
    """Under the task's first filter."""
    first = instances[0]
    name = next(iter(first.filtered_resps))
    answers = [instance.filtered_resps[name] for instance in instances]
    return task.process_results(first.doc, answers)


def _first_line(error: Exception) -> str:
    return (str(error.args[0]) if error.args else type(error).__name__).split("\n")[0]
