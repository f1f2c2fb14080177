"""What `pldr run` prints at its end: the verdict, a sample, the time of each stage, and what to do next."""

from __future__ import annotations

import json
import os
import shlex
import sys
from typing import TYPE_CHECKING, Any

from launch.commands.verbs import Report, Result
from pipeline.inference.runtime import Bundle
from pipeline.post.certificate.build import summary_lines
from pipeline.stages.table import NAMES
from pipeline.tracking.client import tracking_uri
from pipeline.tracking.run import known_run

if TYPE_CHECKING:
    from pipeline.stages.runner import Pipeline


def summary(pipeline: Pipeline, records: dict[str, dict[str, Any]], report: Report) -> Result:
    """Report the end of a run; returns the run's result for --json."""
    config, paths = pipeline.config, pipeline.paths
    bundle = Bundle.load(paths.bundle)
    sample = bundle.generate(
        [config.post.sample_prompt], max_new_tokens=80, temperature=0.8, top_p=0.9, seed=config.seed
    )
    assert bundle.certificate is not None
    report("\n" + "\n".join(summary_lines(bundle.certificate)))
    report(f"\nA sample from the bundle (temperature 0.8, top-p 0.9, seed {config.seed}):\n")
    report("    " + (config.post.sample_prompt + sample[0]).replace("\n", "\n    "))
    done = [name for name in NAMES if not records[name]["skipped"]]
    if done:
        report(f"\n{'stage':<12} {'seconds':>8}")
        for name in done:
            report(f"{name:<12} {records[name]['seconds']:>8.1f}")
        report(f"{'total':<12} {sum(records[name]['seconds'] for name in done):>8.1f}")
    uri = tracking_uri(config)
    tools = os.path.relpath(os.path.dirname(sys.executable))
    tools = tools if not tools.startswith("..") else os.path.dirname(sys.executable)
    run, served = known_run(config, paths), uri.startswith("http")
    page = run.page(uri if served else "http://127.0.0.1:5000") if run is not None else uri
    view = f"open {page}" if served else f"{tools}/mlflow ui --backend-store-uri {shlex.quote(uri)} --port 5000"
    model = f"models:/{config.post.register_as}@certified"
    serve = f"mlflow models serve -m {model} --env-manager local --port 5001"
    environment = f"PATH={tools}:$PATH MLFLOW_TRACKING_URI={shlex.quote(uri)}"  # mlflow starts uvicorn by name
    report(
        f"\ncertificate {paths.certificate / 'certificate.html'}    (open it in a browser: verdict, evidence, samples)"
    )
    report(f"bundle      {paths.bundle}")
    report(f"look        {view}    (run {records['train']['result']['run_id']})")
    if not served and run is not None:
        report(f"  and open  {page}")
    report(
        f"generate    {tools}/pldr generate {shlex.quote(str(paths.bundle))} --prompt 'To be, or not to be' --temperature 0.8"
    )
    if config.post.register_as is not None:
        body = json.dumps({"dataframe_split": {"columns": ["prompt"], "data": [["To be"]]}})
        load = f"import mlflow; mlflow.set_tracking_uri({uri!r}); model = mlflow.pyfunc.load_model({model!r})"
        report(f"in Python   {load}")
        report(f"serve       {environment} {serve}")
        report(
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
