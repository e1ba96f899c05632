"""A build child that a test steers: it speaks the protocol and does what its model URI says.

It tells its own life in `<cache_dir>/started` (a line `pid arch` per start), and publishes by
creating `<store>/<key digest>`, which only the first can.

    fake:ok          builds
    fake:wait        builds once `<cache_dir>/release` exists
    fake:crash-once  dies without a word the first time, builds the second
    fake:crash       always dies without a word
    fake:disk-full   fails with DISK_FULL
"""

import base64
import json
import os
import signal
import sys
import time
from pathlib import Path

from shared.engine import EngineKey
from shared.errors import DiskFull, to_status
from shared.process import end_with_parent


def main() -> None:
    end_with_parent(os.getppid(), signal.SIGKILL)
    job = json.loads(sys.stdin.readline())
    cache, store = Path(job["cache_dir"]), Path(job["store"])
    key = EngineKey.from_dict(job["key"])
    with (cache / "started").open("a") as file:
        file.write(f"{os.getpid()} {key.arch}\n")
    behaviour = job["model_uri"].removeprefix("fake:")
    tell(stage="import", fraction=0.25, done_bytes=1, total_bytes=4)
    match behaviour:
        case "wait":
            while not (cache / "release").exists():
                time.sleep(0.01)
        case "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        case "crash-once" if not (cache / "crashed").exists():
            (cache / "crashed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        case "disk-full":
            status = to_status(DiskFull(path="/store")).SerializeToString()
            tell(error=base64.b64encode(status).decode())
            return
    print("a library prints this", flush=True)  # noqa: T201
    tell(stage="publish", fraction=0.9, done_bytes=4, total_bytes=4)
    (store / key.digest).touch()
    tell(engine=f"engines/{key.digest}")


def tell(**message: object) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
