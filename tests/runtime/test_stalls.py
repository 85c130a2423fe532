"""The watch over the loop does no harm to what it looks at."""

from __future__ import annotations

import asyncio
import sys

SOURCE = """
import _thread, asyncio, gc, threading, time
from hotdesk.runtime.stalls import StallWatch

def let_others_run(*_):
    if threading.current_thread().name == "hotdesk-stalls":
        time.sleep(0.01)  # a finalizer may do as much

async def main():
    seen = []
    watch = StallWatch(0.03, lambda *stall: seen.append(stall), lambda lag: None)
    watch.start()
    over = threading.Event()
    threads = [threading.Thread(target=over.wait) for _ in range(100)]  # of each the look takes the frame
    for thread in threads:
        thread.start()
    gc.callbacks.append(let_others_run)
    gc.collect()
    gc.set_threshold(80)
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        _thread.start_new_thread(int, ())
    await asyncio.sleep(0.05)
    gc.callbacks.clear()
    watch.close()
    over.set()
    for thread in threads:
        thread.join()
    assert gc.isenabled()
    print(len(seen))

asyncio.run(main())
"""


async def test_a_look_at_a_loop_that_stands_still_lets_threads_start() -> None:
    """Where a collection lets other threads run, and those start others, the process does not lock up."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", SOURCE, stdout=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(30):
            out, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.communicate()
        raise
    assert process.returncode == 0
    assert int(out) == 1
