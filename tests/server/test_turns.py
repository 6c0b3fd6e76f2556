"""A burst of one owner begins a few requests in each pass of the event loop, and another owner's request does not wait for it."""
from __future__ import annotations

import asyncio
from collections import Counter

from minivllm.server.turns import PER_PASS, RequestTurns


def test_a_burst_is_spread_over_passes_and_does_not_delay_another_owner() -> None:
    began: list[tuple[int, str]] = []  # (pass, owner)

    async def main() -> None:
        turns, passes = RequestTurns(), 0

        async def request(owner: str) -> None:
            await turns.wait(owner)
            began.append((passes, owner))

        tasks = [asyncio.create_task(request("hostile")) for _ in range(20)]
        canceled = tasks.pop()
        while not all(task.done() for task in tasks):
            if passes == 3:
                tasks.append(asyncio.create_task(request("good")))
                canceled.cancel()
            await asyncio.sleep(0)
            passes += 1
        assert not turns._waiting
        await turns.wait("hostile")  # the burst is over

    asyncio.run(main())
    assert len(began) == 20 and max(Counter(began).values()) <= PER_PASS
    assert [number for number, owner in began if owner == "good"] == [4 - 1]
