"""Tasks of lm-evaluation-harness, as it ships them, over local JSONL files or the hub.

Decision: a task is the shipped YAML, taken by `include:`; ours only names the data, and adds the normalized accuracies where
the shipped one has none. Its prompts and its scoring stay theirs. lm-eval's `acc_norm` divides by characters; the papers'
number is normalized by bytes, which is lm-eval's `acc_bytes`. Both are computed.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, UserError, first_line
from pipeline.inference.extras import require
from pipeline.io.storage import publish_bytes, render_json, sha256_json

STOCK = {  # task -> its folder in lm-eval, the names that its file of documents may have
    "arc_easy": ("arc", ("arc_easy.jsonl",)),
    "arc_challenge": ("arc", ("arc_challenge.jsonl",)),
    "hellaswag": ("hellaswag", ("hellaswag.jsonl",)),
    "openbookqa": ("openbookqa", ("openbookqa.jsonl",)),
    "piqa": ("piqa", ("piqa.jsonl",)),
    "social_iqa": ("siqa", ("social_iqa.jsonl", "siqa.jsonl")),
    "winogrande": ("winogrande", ("winogrande.jsonl",)),
    "truthfulqa_mc1": ("truthfulqa", ("truthfulqa.jsonl", "truthfulqa_mc1.jsonl")),
    "truthfulqa_mc2": ("truthfulqa", ("truthfulqa.jsonl", "truthfulqa_mc2.jsonl")),
    "lambada_openai": ("lambada", ("lambada_openai.jsonl",)),
}
FOLDERS = ("", "data_eval")  # of a data folder, where files are looked for
OUTPUTS = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")
NORMALIZED = ("acc_norm", "acc_bytes")
MAIN = {  # where the normalized accuracy is not the task's number
    "winogrande": "acc",  # both of its choices are judged by the same words, which follow them
    "truthfulqa_mc1": "acc",
}
PREFERRED = ("acc_bytes", "acc_norm", "acc")
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
NAMED = 3  # names in a message


class HubUnreachable(UserError):
    """No other task will come from the hub either."""


@dataclass(frozen=True)
class Definition:
    """A task before its documents are read. config: its YAML with what it includes; file: its documents, None for the hub."""

    name: str
    yaml: Path
    config: dict[str, Any]
    file: Path | None

    @property
    def sha256(self) -> str:
        """Of the definition; paths in it are relative to lm-eval's."""
        text = render_json({key: str(value) for key, value in self.config.items()}).decode("utf-8")
        return sha256_json([text.replace(str(_shipped()), ""), _version()])

    @property
    def where(self) -> str:
        """Where the documents are, for people."""
        return str(self.file) if self.file is not None else f"hub: {self.config.get('dataset_path')}"


def quiet(*, offline: bool) -> None:
    """Import lm-eval without its log lines. offline: nobody asks the hub; to be called before anything imports `datasets`."""
    if offline:
        os.environ.update(dict.fromkeys(OFFLINE, "1"))
    for noisy in ("lm_eval", "datasets", "huggingface_hub", "transformers", "evaluate"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    require("lm_eval", "datasets", extra="eval")
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it says of a file is in our line


def find(names: Sequence[str], data: Path | None) -> list[Definition]:
    """The definitions of these tasks, and where their documents are.

    Raises ConfigError for a name that lm-eval does not have (naming the nearest), for a group of tasks, and for a task of text
    generation; UserError where a file of documents is missing (naming where it was looked for).
    """
    repeated = [name for name in dict.fromkeys(names) if list(names).count(name) > 1]
    if repeated:
        raise ConfigError(f"--tasks: {repeated[0]} is named twice")
    if data is not None and not data.is_dir():
        raise UserError(f"--data {data}: no such folder; name one with JSONL files such as arc_easy.jsonl")
    index = _index(names)
    return [_definition(name, index, data) for name in names]


def _index(names: Sequence[str]) -> dict[str, Any]:
    """lm-eval's index of tasks: of the folders of the stock ones, or of everything (14,683 names, 20 s) for any other."""
    from lm_eval.tasks import TaskManager

    if all(name in STOCK for name in names):
        folders = sorted({str(_shipped() / STOCK[name][0]) for name in names})
        return dict(TaskManager(include_path=folders, include_defaults=False).task_index)
    return dict(TaskManager().task_index)


def _definition(name: str, index: dict[str, Any], data: Path | None) -> Definition:
    entry = index.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, [*STOCK, *index], n=1, cutoff=0.5)
        raise ConfigError(f"--tasks: lm-eval has no task {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
    kind = entry.kind.name
    if kind in ("GROUP", "TAG"):
        members = sorted(entry.tags) or [m if isinstance(m, str) else m.get("task") for m in entry.cfg.get("task", [])]
        some = ", ".join(str(member) for member in members[:NAMED])
        raise ConfigError(f"--tasks: {name} is a group of {len(members)} tasks; name its tasks: {some} …")
    config = entry.cfg or {}
    output = config.get("output_type", "generate_until")
    if kind != "TASK" or output not in OUTPUTS:
        raise ConfigError(
            f"--tasks: {name} is a task of {'Python code' if kind != 'TASK' else output}; only tasks that score given answers "
            f"({', '.join(OUTPUTS)}) can be evaluated"
        )
    if data is not None and config.get("num_fewshot"):
        raise ConfigError(
            f"--tasks: {name} shows {config['num_fewshot']} examples of another split, and a file of --data is one split; "
            "leave out --data to take it from the hub"
        )
    return Definition(name, Path(entry.yaml_path), config, None if data is None else file_of(name, data))


def file_of(name: str, data: Path) -> Path:
    """The file with a task's documents. Raises UserError naming where it was looked for."""
    names = STOCK[name][1] if name in STOCK else (f"{name}.jsonl",)
    looked = [data / folder / file for folder in FOLDERS for file in names]
    for file in looked:
        if file.is_file():
            return file
    raise UserError(
        f"{name}: no documents; looked for {', '.join(map(str, looked))}. Put the file there, leave {name} out of --tasks, or "
        "leave out --data to take it from the hub"
    )


def load(definition: Definition, folder: Path) -> Any:
    """lm-eval's task with its documents. folder: for its YAML and the cache of local documents.

    Nothing that comes with the data is executed. Raises UserError where the documents cannot be had, or do not fit the task.
    """
    from lm_eval.tasks import TaskManager

    own = folder / definition.name
    publish_bytes(own / f"{definition.name}.yaml", render_json(_ours(definition, own)))  # JSON is YAML
    try:
        loaded = TaskManager(include_path=str(own), include_defaults=False).load([definition.name])["tasks"]
        task = loaded[definition.name]
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)  # lm-eval's own
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; pip install 'pldr[eval]'", exit_code=2) from error
    except Exception as error:  # of the hub, of `datasets`, of a template: any kind
        raise _no_documents(definition, error) from error
    return task


def _ours(definition: Definition, folder: Path) -> dict[str, Any]:
    """The YAML: what is not said here is the shipped task's. Local documents get a plain name in `folder`."""
    config = definition.config
    kwargs = {key: value for key, value in (config.get("dataset_kwargs") or {}).items() if key != "trust_remote_code"}
    ours: dict[str, Any] = {
        "include": str(definition.yaml),
        "task": definition.name,
        "metric_list": _metrics(config),
        "dataset_kwargs": kwargs or None,
    }
    if definition.file is not None:
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / "documents.jsonl"  # `datasets` reads names as patterns and URLs: `[1]`, `*`, `::`
        link.unlink(missing_ok=True)
        link.symlink_to(definition.file.absolute())
        split = "test_split" if config.get("test_split") else "validation_split"
        ours |= dict.fromkeys(("training_split", "validation_split", "test_split", "fewshot_split", "dataset_name"))
        ours |= {
            split: "documents",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"documents": str(link)}, "cache_dir": str(folder / "cache")},
        }
    return {key: value for key, value in ours.items() if value is not None or key in config}


def _metrics(config: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The shipped metrics; for a choice among answers, accuracy by characters and by bytes too."""
    metrics: list[dict[str, Any]] | None = config.get("metric_list")
    plain = config.get("output_type") == "multiple_choice" and "process_results" not in config
    if not metrics or not plain or all(metric["metric"] != "acc" for metric in metrics):
        return metrics
    known = [metric["metric"] for metric in metrics]
    return metrics + [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in NORMALIZED if name not in known
    ]


def _no_documents(definition: Definition, error: Exception) -> UserError:
    if definition.file is not None:
        cause = first_line(error.__cause__ or error)
        if not definition.file.read_bytes().strip():
            return UserError(f"{definition.file}: not the documents of {definition.name}: it is empty; make it again")
        return UserError(
            f"{definition.file}: not the documents of {definition.name} ({type(error).__name__}: {cause}); "
            "each line is one JSON object with the fields of its data set"
        )
    path, fix = definition.config.get("dataset_path"), f"name a folder that has {definition.name}.jsonl with --data DIR"
    if isinstance(error, ConnectionError):
        return HubUnreachable(
            f"{definition.name}: {path} is not in the cache of `datasets`, and the hub cannot be reached "
            f"({first_line(error)}); {fix}"
        )
    return UserError(f"the hub's {path} cannot be used ({type(error).__name__}: {first_line(error)}); {fix}")


def main_metric(name: str, metrics: Sequence[str]) -> str:
    """The metric that stands for a task: the papers' one where there is one."""
    if name in MAIN:
        return MAIN[name]
    return next((metric for metric in PREFERRED if metric in metrics), metrics[0])


def _shipped() -> Path:
    """lm-eval's folder of tasks."""
    import lm_eval

    return Path(lm_eval.__file__).parent / "tasks"


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")
