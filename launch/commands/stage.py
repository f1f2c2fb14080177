"""What `pldr run` says at its end: the verdict, a sample, what each stage took, and what to do next."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from typing import Any

from pipeline.io.storage import read_json
from pipeline.post.certificate.build import summary_lines
from pipeline.stages.runner import Pipeline
from pipeline.stages.table import NAMES
from pipeline.tracking.client import tracking_uri


def summary(pipeline: Pipeline, records: dict[str, dict[str, Any]], show: Callable[[str], None]) -> dict[str, Any]:
    """Show the end of a run; returns the run's result for --json."""
    from pipeline.inference.runtime import Bundle

    config, paths = pipeline.config, pipeline.paths
    certificate = read_json(paths.bundle / "certificate.json")
    bundle = Bundle.load(paths.bundle)
    sample = bundle.generate(
        [config.post.sample_prompt], max_new_tokens=80, temperature=0.8, top_p=0.9, seed=config.seed
    )
    show("\n" + "\n".join(summary_lines(certificate)))
    show(f"\nA sample from the bundle (temperature 0.8, top-p 0.9, seed {config.seed}):\n")
    show("    " + (config.post.sample_prompt + sample[0]).replace("\n", "\n    "))
    show(f"\n{'stage':<12} {'seconds':>8}  ")
    for name in NAMES:
        note = "skipped, was complete" if records[name]["skipped"] else ""
        show(f"{name:<12} {records[name]['seconds']:>8.1f}  {note}")
    show(f"{'total':<12} {sum(records[name]['seconds'] for name in NAMES):>8.1f}")
    uri = tracking_uri(config)
    tools = os.path.relpath(os.path.dirname(sys.executable))
    tools = tools if not tools.startswith("..") else os.path.dirname(sys.executable)
    view = (
        f"{tools}/mlflow ui --backend-store-uri {shlex.quote(uri)} --port 5000"
        if uri.startswith("sqlite")
        else f"open {uri}"
    )
    model = f"models:/{config.post.register_as}@certified"
    serve = f"mlflow models serve -m {model} --env-manager local --port 5001"
    environment = f"PATH={tools}:$PATH MLFLOW_TRACKING_URI={shlex.quote(uri)}"  # mlflow starts uvicorn by name
    show(f"\nbundle      {paths.bundle}")
    show(f"look        {view}    (run {records['train']['result']['run_id']})")
    show(
        f"generate    {tools}/pldr generate {shlex.quote(str(paths.bundle))} --prompt 'To be, or not to be' --temperature 0.8"
    )
    if config.post.register_as is not None:
        body = json.dumps({"dataframe_split": {"columns": ["prompt"], "data": [["To be"]]}})
        show(f"serve       {environment} {serve}")
        show(
            f"  and ask   curl -s 127.0.0.1:5001/invocations -H 'Content-Type: application/json' -d {shlex.quote(body)}"
        )
    return {
        "bundle": str(paths.bundle),
        "certified": bundle.certified,
        "bundle_sha256": records["bundle"]["result"]["bundle_sha256"],
        "run_id": records["train"]["result"]["run_id"],
        "sample": sample[0],
        "stages": {
            name: {
                "seconds": records[name]["seconds"],
                "skipped": records[name]["skipped"],
                "result": records[name]["result"],
            }
            for name in NAMES
        },
    }
