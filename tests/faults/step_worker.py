"""A worker that stops at a step of a model, says so, and waits to be killed; its steps are made of files.

Arguments: home, URL of the catalog, store, folder of the model, step.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from onnx_config.export import isolate
from tasks.job import Job
from tasks.pipeline import convert_model
from tasks.report import Step
from tests.faults.harness import request, workspace
from tests.tasks.test_pipeline import Files

if __name__ == "__main__":
    home, url, store, model, wanted = sys.argv[1:]

    def stop(step: Step, _job: Job) -> None:
        if step.value == wanted:
            sys.stdout.write("reached\n")
            sys.stdout.flush()
            time.sleep(600)

    isolate.warm_up = lambda: None
    places = replace(workspace(Path(home)), catalog_url=url, store=Path(store))
    convert_model(request(model), places, steps=Files(hook=stop).steps)
