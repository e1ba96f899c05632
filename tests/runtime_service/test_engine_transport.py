"""What an engine process says last arrives, whatever is sent to it meanwhile."""

import asyncio
import socket
import threading

import pytest

from runtime_service.engine_messages import Failed, Shutdown
from runtime_service.engine_transport import EngineSide, FrontSide, PeerGone


async def test_last_reply_is_read_though_the_front_writes_after_it() -> None:
    ours, theirs = socket.socketpair()
    front = await FrontSide.open(ours)

    def end() -> None:
        EngineSide(theirs).send_last(Failed(b"why"))
        theirs.close()

    ending = threading.Thread(target=end)
    ending.start()
    ending.join(0.2)  # this loop reads nothing meanwhile, and an end that does not wait has closed
    for _ in range(3):
        front.send([Shutdown()])
    assert await front.receive() == Failed(b"why")
    with pytest.raises(PeerGone):
        await front.receive()
    front.close()
    await asyncio.to_thread(ending.join)
