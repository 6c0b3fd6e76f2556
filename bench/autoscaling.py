"""What does autoscaling cost and save? A simulation.  Run: python -m bench.autoscaling [--most 4] [--minutes 10]

The chats, replicas and step times of `bench.routing`, with a load that rises to a peak and falls again, as within a day. The same requests
are served by 1 replica, by the largest number, and by as many as `minivllm.engine.autoscaling` decides, each with the router. A started
replica is ready after `--start` seconds. A draining one counts until its last request has ended.
"""
from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence

from bench.routing import BLOCK, NUM_BLOCKS, RunningRequest, SimulatedReplica, TracedRequest, chats
from minivllm.engine.autoscaling import ReplicaScaler, ScalingPolicy
from minivllm.engine.routing import Router

MAX_RUNNING = 32  # requests of a batch: beyond it they wait
LOOK = 1.0  # seconds between two decisions


class CappedReplica(SimulatedReplica):
    """A replica whose batch is limited, so that it has a queue."""

    def step(self) -> tuple[list[RunningRequest], list[RunningRequest]]:
        room = MAX_RUNNING - len(self.running)
        kept = [self.waiting.pop() for _ in range(len(self.waiting) - max(room, 0))]
        result = super().step()
        self.waiting.extend(reversed(kept))
        return result


def ramp(seconds: float, peak: float, seed: int) -> list[TracedRequest]:
    """Chats whose rate rises from a tenth of `peak` (new chats per second) to it, and falls again."""
    dice = random.Random(seed)
    return [request for request in chats(seconds, peak, seed) if dice.random() < 0.1 + 0.9 * (1 - abs(2 * request.at / seconds - 1))]


def simulate(trace: Sequence[TracedRequest], policy: ScalingPolicy, start: float) -> tuple[list[float], float, list[tuple[float, int]]]:
    """Returns the sorted times to first token, the replica-seconds, and (time, replicas) at each change."""
    replicas = [CappedReplica() for _ in range(policy.most)]
    router, scaler = Router(policy.most, BLOCK, NUM_BLOCKS), ReplicaScaler(policy)
    live, draining, ready_at = set(range(policy.least)), set[int](), dict[int, float]()
    ttft, used, changes = list[float](), 0.0, [(0.0, policy.least)]

    def advance(until: float) -> None:
        while busy := [i for i, replica in enumerate(replicas) if replica.num_requests and replica.time < until]:
            replica = replicas[min(busy, key=lambda i: replicas[i].time)]
            begun, ended = replica.step()
            ttft.extend(replica.time - r.request.at for r in begun)
            for r in begun:
                router.begun(str(r.number))
            for r in ended:
                router.ended(str(r.number))

    def look(now: float) -> None:
        nonlocal used
        for number in [number for number, at in ready_at.items() if at <= now]:
            del ready_at[number]
            live.add(number)
            changes.append((now, len(live)))
        for number in [number for number in draining if not replicas[number].num_requests]:
            draining.remove(number)
            router.forget(number)
            replicas[number].held.clear()
        busy = sum(min(1.0, len(replicas[i].running) / MAX_RUNNING) for i in live)
        wanted = scaler.decide(now, queued=sum(len(replicas[i].waiting) for i in live), busy=busy, live=len(live), replicas=len(live),
                               starting=bool(ready_at))
        missing = wanted - len(live) - len(ready_at)
        if missing < 0:
            least = min(live, key=lambda i: (router.load(i), -i))
            live.remove(least)
            draining.add(least)
            changes.append((now, len(live)))
        for number in [i for i in range(policy.most) if i not in live | draining and i not in ready_at][:max(missing, 0)]:
            ready_at[number] = now + start
        used += LOOK * (len(live) + len(draining) + len(ready_at))

    now = 0.0
    for number, request in enumerate(trace):
        while now + LOOK <= request.at:
            now += LOOK
            advance(now)
            look(now)
        advance(request.at)
        replicas[router.choose(str(number), request.tokens, live)].add(request, number)
    advance(float("inf"))
    return sorted(ttft), used, changes


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=4, help="largest number of replicas")
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the trace")
    parser.add_argument("--chats", type=float, default=3.0, help="new chats per second and replica at the peak, of --most replicas")
    parser.add_argument("--start", type=float, default=60.0, help="seconds until a started replica is ready")
    parser.add_argument("--target-queue", type=float, default=5.0)
    parser.add_argument("--upscale-delay", type=float, default=30.0)
    parser.add_argument("--downscale-delay", type=float, default=120.0, help="shorter than the server's default, as the trace is")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    trace = ramp(60 * args.minutes, args.chats * args.most, args.seed)
    print(f"{len(trace)} requests in {trace[-1].at / 60:.0f} minutes, a start takes {args.start:g} s")
    print(f"{'replicas':12}{'replica-minutes':>16}{'TTFT p50':>12}{'p90':>12}{'p99':>12}")
    rows, changes = {}, [(0.0, 0)]
    for name, least, most in (("1", 1, 1), (str(args.most), args.most, args.most), (f"1 to {args.most}", 1, args.most)):
        ttft, used, changes = simulate(trace, ScalingPolicy(
            least=least, most=most, target_queue=args.target_queue, upscale_delay=args.upscale_delay,
            downscale_delay=args.downscale_delay), args.start)
        p50, p90, p99 = (1000 * ttft[int(share * (len(ttft) - 1))] for share in (0.5, 0.9, 0.99))
        rows[name] = {"minutes": round(used / 60, 1), "p50_ms": round(p50, 1), "p90_ms": round(p90, 1), "p99_ms": round(p99, 1)}
        print(f"{name:12}{used / 60:>16.1f}{p50:>9,.1f} ms{p90:>9,.1f} ms{p99:>9,.1f} ms")
    print("changes: " + ", ".join(f"{number} at {at / 60:.1f} min" for at, number in changes))
    print(json.dumps({"bench": "autoscaling", **vars(args), "requests": len(trace), "rows": rows, "changes": changes}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
