"""`millrace store`: work on a store itself, done by the server's code in a process of its own."""

import json
import subprocess
import sys

from millrace.cli import output
from millrace.cli.failures import CommandFailed


def sweep(url: str, *, as_json: bool) -> None:
    """Removes from the store at `url` what nothing needs, and says how much.

    Raises:
        CommandFailed: the store says why not, or the server is not installed here.
    """
    done = subprocess.run(
        [sys.executable, "-m", "shared.store.sweep", url], capture_output=True, text=True
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["the sweep ended without a word"]
        missing = "No module named 'shared" in lines[-1]
        raise CommandFailed("millrace-server is not installed here" if missing else lines[-1])
    sys.stderr.write(done.stderr)
    swept = json.loads(done.stdout)
    if as_json:
        output.print_json(swept)
    else:
        freed = output.bytes_text(swept["bytes"])
        output.print_line(f"removed {output.count_text(swept['blobs'], 'blob')}, {freed}")
