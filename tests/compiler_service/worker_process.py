"""A worker as a process of its own, for tests that kill or stop it: URL, folder, name.

It takes a build from another worker only after a minute of silence: who is taken for dead is up to the tests' own.
"""

import asyncio
import sys
from pathlib import Path

from tests.compiler_service.build_helpers import Folders, open_queue, working


async def main(url: str, root: str, owner: str) -> None:
    async with (
        open_queue(url, lease_s=60) as queue,
        working(queue, Folders(Path(root)), owner) as task,
    ):
        await task


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4]))
