"""A worker program that does what a job tells it, faults included: `fault_worker.py LOG [broken|stubborn]`.

It appends a line to LOG when it starts and for each job, so that tests see what really ran.
"""

import os
import signal
import sys
import time
from pathlib import Path

from api.src.backends import wire

LOG = Path(sys.argv[1])
MODE = sys.argv[2] if len(sys.argv) > 2 else ""


def note(line: str) -> None:
    with LOG.open("a") as log:
        log.write(f"{line}\n")


def act(job: dict) -> None:
    note(job["name"])
    match job.get("do"):
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "die once" if LOG.read_text().count(job["name"]) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(600)
        case "shout":
            sys.stderr.write("x" * 1_000_000)
        case "sleep":
            time.sleep(job["seconds"])
        case "wait":
            while not Path(job["for"]).exists():
                time.sleep(0.005)


def main() -> None:
    note("start")
    if MODE == "broken":
        sys.exit("no engine here")
    sys.stdout.buffer.write(wire.pack({"ready": True}))
    sys.stdout.flush()
    while (message := wire.read(sys.stdin.buffer)) is not None:
        job = message.header
        act(job)
        answer = {"error": "ValueError"} if job.get("do") == "fail" else {"name": job["name"], "pid": os.getpid()}
        sys.stdout.buffer.write(wire.pack(answer, b"\x01" * job.get("size", 0)))
        sys.stdout.flush()
    if MODE == "stubborn":
        time.sleep(600)


main()
