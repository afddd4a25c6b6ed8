"""The process of one stage of a trial: trains a run or measures it, as a JSON file says.

`python -m ditlab.studies.worker JOB.json` repeats a stage by hand; `ditlab.studies.runner` starts it for a study. Keys
of the file are

- "call": "train" or "analyze";
- "images": the folder of the image set;
- "device" ("cpu", "cuda", "cuda:N") and "threads";
- of "train": "config" (the settings of the run, as in config.json), "out" (the run's folder), and "command" (for its
  config.json);
- of "analyze": "analysis" (its name), "model" (the run's folder), "config" (the settings, under their names in files),
  "options", and "names" (the kind of model).

Exit status: 0 done, 2 refused, 130 interrupted. On SIGINT, on SIGTERM, and when the process that started it is gone
(DITLAB_PARENT), training saves and ends; an analysis ends at once.
"""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ditlab.errors import Damaged, DitlabError
from ditlab.files import read_json
from ditlab.progress import Interrupted, Reporter, RichReporter, SignalStop, StopFlag, Worker
from ditlab.studies.runner import JOB_KIND, JOB_VERSION
from ditlab.threads import use_threads

__all__ = ["main", "run_job"]

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
"""Errors of a disk that is full or may not be written to; others are defects."""


def run_job(job: Mapping[str, Any], reporter: Reporter, stop: StopFlag) -> None:
    """Does what the content of a job's file says; when `stop` is set, training saves and ends.

    Raises:
        DitlabError: the job cannot be done.
        Interrupted: training was stopped and saved.
    """
    calls = {"train": _train, "analyze": _analyze}
    if job.get("call") not in calls:
        raise Damaged(f"job: expected a call of {', '.join(calls)}, found {job.get('call')!r}")
    try:
        calls[job["call"]](job, reporter, stop)
    except KeyError as error:
        raise Damaged(f"job: expected the key {error}, which is missing") from error


def _train(job: Mapping[str, Any], reporter: Reporter, stop: StopFlag) -> None:
    from ditlab.config import RunConfig, from_json
    from ditlab.data.imageset import ImageSet
    from ditlab.models.creating import create_and_train

    use_threads(job["threads"])
    config = from_json(RunConfig, job["config"], "job")
    options = {"device": job["device"], "command": job["command"], "stop": stop, "reporter": reporter}
    create_and_train(config, ImageSet.open(job["images"]), job["out"], **options)


def _analyze(job: Mapping[str, Any], reporter: Reporter, stop: StopFlag) -> None:
    from ditlab.analyses import analysis
    from ditlab.analyses.stored import config_from_json
    from ditlab.models.comparing import open_models
    from ditlab.training.distributed import pick_device

    use_threads(job["threads"])
    room = analysis(job["analysis"])
    try:
        config, options = config_from_json(room.Config, job["config"]), room.Options(**job["options"])
    except (TypeError, AttributeError) as error:
        raise Damaged(f"job: expected settings of {room.name}, found others ({error})") from None
    device = pick_device(job["device"])
    models = open_models([job["model"]], job["images"], names=job["names"], device=device, reporter=reporter)
    room.run(models, config, options, reporter=reporter)


def main() -> NoReturn:
    """Runs the job whose file is named on the command line, and exits."""
    from rich.console import Console

    stop = SignalStop()

    def handle(number: int, frame: Any) -> None:
        if stop.signalled or not training:
            raise KeyboardInterrupt
        stop.signalled = True

    training = False
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    try:
        if len(sys.argv) != 2:
            raise DitlabError(f"worker: expected one job's file, found {len(sys.argv) - 1} arguments")
        job = read_json(Path(sys.argv[1]), JOB_KIND, JOB_VERSION)
        training = job.get("call") == "train"
        # A training that is orphaned must save first, which it does when the flag is set.
        reporter = (RichReporter if training else Worker)(Console(highlight=False, soft_wrap=True))
        run_job(job, reporter, stop)
    except DitlabError as error:
        print(f"ditlab: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stopped:
        print(f"ditlab: {stopped}; run the same command again to resume", file=sys.stderr)
        sys.exit(stopped.status)
    except KeyboardInterrupt:
        print("ditlab: interrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        print(f"ditlab: {error.filename or 'a file'}: could not be written: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


if __name__ == "__main__":
    main()
