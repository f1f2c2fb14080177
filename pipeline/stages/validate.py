"""Stage `validate`: weights, G_LM and held-out tokens -> certificate.json and certificate.html.

`judge` runs in one process, or in each rank where several validate together (`post.ranks`): this file is also their program,
`python -m pipeline.stages.validate JOB`, one process a rank, with the rendezvous in the environment as torchrun sets it. Rank 0
writes. The caller then makes the page from the certificate on disk.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from pipeline.config.load import parse_config
from pipeline.config.paths import RunPaths, data_paths
from pipeline.config.run import RunConfig
from pipeline.devices import has_gpu, num_devices
from pipeline.distributed import end_with_parent
from pipeline.environment import without_other_jobs
from pipeline.errors import ConfigError, UserError, first_line
from pipeline.io import storage
from pipeline.network import free_port
from pipeline.stages.described import sentence
from pipeline.stages.records import require_as_recorded
from pipeline.tracking.outbox import log_files
from pipeline.tracking.run import TrackedRun, known_run, require_no_copy, run_named
from pipeline.tracking.run_record import NOTE_TAG, TIER_TAG, VERDICT_TAG
from pipeline.train.signals import PARENT_PIPE

log = logging.getLogger(__name__)

CERTIFICATE, PAGE = "certificate.json", "certificate.html"
SHOWN_PROMPTS = 2  # held-out ones among the samples, beside post.sample_prompt
SHOWN_TOKENS = 32  # each costs full passes without a cache


def certify(config: RunConfig, paths: RunPaths) -> dict[str, Any]:
    """Measure and judge -> `certificate/certificate.{json,html}`, also artifacts of the MLflow run."""
    require_own_run(config, paths)
    certificate = certificate_of(config, paths)
    run = run_named(config, paths, certificate["lineage"]["mlflow_run_id"])
    target = paths.certificate / CERTIFICATE
    page = write_page(config, paths, certificate, run)
    log_files(
        run,
        {str(target): "certificate", str(page): "certificate"},
        tags={
            VERDICT_TAG: certificate["verdict"],
            TIER_TAG: certificate["tier"],
            NOTE_TAG: sentence(config, certificate),
        },
    )
    return {
        "verdict": certificate["verdict"],
        "tier": certificate["tier"],
        "relative_deviation_g": certificate["measures"]["relative_deviation_g"],
        "page": str(page),
        "failed": certificate["failed"],
        "certificate_sha256": storage.sha256_file(target),
    }


def require_own_run(config: RunConfig, paths: RunPaths) -> None:
    """Raise ConfigError in a copy of a run directory whose results would be attached to the original's run."""
    if (run := known_run(config, paths)) is not None:
        require_no_copy(run, publishes=False)


def certificate_of(config: RunConfig, paths: RunPaths) -> dict[str, Any]:
    """Measure and judge on `post.ranks` processes of this node; writes and returns the certificate."""
    ranks = config.post.ranks or (num_devices() if has_gpu() else 1)
    if ranks > 1:
        _judge_on(ranks, config, paths)
    else:
        storage.publish_json(paths.certificate / CERTIFICATE, judge(config, paths))
    return dict(storage.read_json(paths.certificate / CERTIFICATE))


def judge(config: RunConfig, paths: RunPaths) -> dict[str, Any]:
    """The certificate of the run's weights. Collective where torch.distributed has several ranks."""
    import torch

    from pipeline.bundle.extracted import load_g
    from pipeline.bundle.weights import load_weights
    from pipeline.post.validate import validate
    from pipeline.stages.extra_prompts import read_extra
    from pipeline.stages.trained import as_trained, held_out, lineage, require_same, spent_budget
    from pipeline.tokenizer import Tokenizer

    model, source = load_weights(paths.weights)
    require_same(config, paths, model.config, source)
    config = as_trained(config, paths, source)
    g_lm = load_g(paths.g_lm, model.config).g_lm
    if has_gpu():
        of_ranks = torch.distributed.is_initialized()  # otherwise LOCAL_RANK is another job's
        model.to(torch.device("cuda", int(os.environ["LOCAL_RANK"]) if of_ranks else 0))
    prompts = held_out(config, paths, half=1)
    tokenizer = Tokenizer.load(data_paths(config).tokenizer)
    return validate(
        model,
        g_lm,
        prompts.sequences_NT,
        config.post,
        lineage=lineage(source),
        budget=spent_budget(config, source),
        seed=config.seed,
        documents=prompts.documents,
        extra=read_extra(
            config.post.extra_prompts,
            tokenizer,
            context_length=model.config.context_length,
            limit=config.post.prompts,
        ),
        piece=lambda token: tokenizer.piece(token) if token < tokenizer.vocab_size else "no piece",
    )


def write_page(config: RunConfig, paths: RunPaths, certificate: dict[str, Any], run: TrackedRun) -> Path:
    """The page beside the certificate, with the curves of the training."""
    from pipeline.bundle.extracted import load_g
    from pipeline.bundle.weights import load_weights
    from pipeline.post.certificate.page import Evidence, certificate_page, show_sample
    from pipeline.post.measure.generation import samples
    from pipeline.report.links import links, mlflow_link
    from pipeline.stages.trained import as_trained, held_out, notes
    from pipeline.tokenizer import Tokenizer

    model, source = load_weights(paths.weights)
    config = as_trained(config, paths, source)
    extracted = load_g(paths.g_lm, model.config)
    if has_gpu():
        model.cuda()
    shown = []
    if not certificate["measures"]["not_finite"]:
        tokenizer = Tokenizer.load(data_paths(config).tokenizer)
        text = held_out(config, paths, half=1, limit=SHOWN_PROMPTS).sequences_NT
        text = text[:SHOWN_PROMPTS, : max(1, model.config.context_length // 4)]
        prompts = [*text.tolist(), tokenizer.encode(config.post.sample_prompt)]
        num_tokens = min(SHOWN_TOKENS, config.post.generate_tokens)
        made = samples(model, extracted.g_lm, [p for p in prompts if p], num_tokens=num_tokens, seed=config.seed)
        shown = [show_sample(one.how, (one.prompt, one.cached, one.live), tokenizer.decode) for one in made]
    target = paths.certificate / PAGE
    mlflow = mlflow_link(run.uri, run.record.run_id)
    evidence = Evidence(
        name=config.name,
        g_lm=extracted.g_lm,
        spread=extracted.spread,
        histories=_histories(run),
        samples=shown,
        twin=_twin(config, certificate),
        notes=notes(config, source),
        pages=links(target, paths.root, mlflow=mlflow, in_sweep=config.tracking.parent_run is not None),
    )
    storage.publish_bytes(target, certificate_page(certificate, evidence).encode("utf-8", errors="replace"))
    return target


def _histories(run: TrackedRun) -> dict[str, list[tuple[int, float]]]:
    """The training's metrics; none, with a warning, where MLflow is unreachable."""
    from pipeline.tracking.query import read_run

    try:
        return read_run(run.uri, run.id)[2]
    except UserError as error:
        log.warning("the certificate's page has no curves: %s", error)
        return {}


def _twin(config: RunConfig, certificate: dict[str, Any]) -> dict[str, Any]:
    """The held-out loss of the SDPA twin named by `post.twin`, and a note on whether it can be compared."""
    from pipeline.bundle.certificate.schema import read_certificate

    if config.post.twin is None:
        return {"loss": None, "note": None}
    path = RunPaths(config.post.twin).certificate / CERTIFICATE
    try:
        require_as_recorded(RunPaths(config.post.twin), "validate")
        twin = read_certificate(path)
    except UserError as error:
        return {"loss": None, "note": f"The SDPA twin cannot be shown: {first_line(error)}"}
    same = twin["prompts"]["sha256"] == certificate["prompts"]["sha256"]
    note = f"The SDPA twin is {config.post.twin} (G_LM: {twin['model']['g_source']}), " + (
        "over the same prompts." if same else "over OTHER prompts: the two losses cannot be compared."
    )
    return {"loss": (twin["measures"]["losses"] or {}).get("block"), "note": note}


def _judge_on(ranks: int, config: RunConfig, paths: RunPaths) -> None:
    """Start the ranks, and end them all when one fails. Raises the failed rank's message as UserError, or as ConfigError
    where it was one."""
    job = paths.logs / "validate.json"
    storage.publish_json(job, {"schema_version": 1, "config": config.as_dict()})
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    common = {"OMP_NUM_THREADS": threads, **without_other_jobs(os.environ)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    common |= {"GLOO_SOCKET_IFNAME": "lo", PARENT_PIPE: "1"}
    processes: list[subprocess.Popen[bytes]] = []
    with open(paths.logs / "validate.log", "wb") as stream:
        try:
            for rank in range(ranks):
                environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                command = [sys.executable, "-m", "pipeline.stages.validate", str(job)]
                pipe = subprocess.PIPE  # its end here closes with this process (end_with_parent)
                processes.append(subprocess.Popen(command, env=environment, stdin=pipe, stdout=stream, stderr=stream))
            _wait(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
                if process.stdin is not None:
                    process.stdin.close()
    if any(process.returncode for process in processes):
        lines = (paths.logs / "validate.log").read_text(errors="replace").strip().splitlines()
        error = next((line for line in lines if line.startswith("pldr: error: ")), lines[-1] if lines else "no message")
        message = f"validate: {error.removeprefix('pldr: error: ')} (full log: {paths.logs / 'validate.log'})"
        # A mistake in the configuration stays one: exit code 2, and the earlier output is kept (runner.py).
        raise ConfigError(message) if any(process.returncode == 2 for process in processes) else UserError(message)


def _wait(processes: list[subprocess.Popen[bytes]]) -> None:
    """Until all have ended, or one has failed."""
    while True:
        codes = [process.poll() for process in processes]
        if any(codes) or None not in codes:
            return
        time.sleep(0.1)


def main(argv: list[str], err: IO[str] = sys.stderr) -> int:
    """One rank."""
    import torch.distributed as dist

    if os.environ.get(PARENT_PIPE) == "1":
        end_with_parent()
    job = storage.read_json(argv[0], schema_version=1)
    config = parse_config(job["config"], where=argv[0])
    paths = RunPaths(config.run_dir)
    # gloo on GPUs too: accumulators on the CPU are exchanged. A rank may measure for long before it waits for the others.
    dist.init_process_group("gloo", timeout=timedelta(hours=12))
    try:
        certificate = judge(config, paths)
        if dist.get_rank() == 0:
            storage.publish_json(paths.certificate / CERTIFICATE, certificate)
        dist.barrier()
    except UserError as error:
        print(f"pldr: error: {error}", file=err, flush=True)
        return error.exit_code
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
