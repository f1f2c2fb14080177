"""Worker of test_ray.py: `python -m tests.pipeline.data.executor.run_ray_job FOLDER ADDRESS` runs the job of engine_steps.py.

A UserError is printed to stdout, with exit code 1.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.data.executor.jobs import Engine, run_tasks
from pipeline.errors import UserError
from tests.pipeline.data.executor import engine_steps


def main() -> None:
    folder, address = Path(sys.argv[1]), sys.argv[2]
    work, output = folder / "work", folder / "out"
    steps = [engine_steps.Read(folder / "plan.json"), engine_steps.Publish(output, work)]
    engine = Engine("ray", ray_address=address)
    try:
        run_tasks(steps, tasks=4, workers=2, workers_key="data.workers", engine=engine, work=work, output=output)
    except UserError as error:
        print(error)
        sys.exit(1)


if __name__ == "__main__":
    main()
