"""Fuzz the operators and the sampler: random calls, valid and invalid, against references.

    python tools/fuzz.py --seconds 120 --seed 7    every case from 7:0 on, until the time is over
    python tools/fuzz.py --case 7:1234             that case again, exactly

A valid call must equal its reference. An invalid one works or raises TypeError, ValueError, RuntimeError or
NotImplementedError with a text that names an argument, and writes nothing. Cases run in a process of their
own: one that crashes or hangs is found too. Exit status 1: something was found.
"""

from __future__ import annotations

import argparse
import itertools
import queue
import subprocess
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
LONGEST_CASE = 120  # seconds
MOST_FINDINGS = 20  # then the rest would be more of the same


def run_case(seed: int, index: int) -> str | None:
    """Run one case and return the finding; None: nothing."""
    import torch
    from fuzzing import attention, layers, losses, spoiling, unmasking
    from fuzzing.draw import Draw

    import dllm_kernels as dk

    assert dk.block_attention and dk.linear_diffusion_cross_entropy  # they load what is written in Python
    assert dk.rms_norm and dk.silu_mul and dk.rotate_half
    calls = {**attention.CALLS, **unmasking.CALLS, **losses.CALLS, **layers.CALLS}
    draw, operator = Draw(seed, index), "sample"
    try:
        if draw.chance(0.05):
            from fuzzing import sampling  # it takes seconds to load

            draw.choice([sampling.valid, sampling.invalid])(draw)
        else:
            operator = draw.choice([*calls])
            make, check = calls[operator]
            call = make(draw)
            if draw.chance(0.5):
                spoiling.run(draw, operator, call)
            else:
                before = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in call.items()}
                result = getattr(torch.ops.dllm_kernels, operator)(**call)
                check(draw, call, result, *([before] if operator.endswith("_") else []))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{operator}: {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    return None


def work(seed: int, first: int) -> None:
    """Run cases for ever: a line with the number of each, and one with what was found in it."""
    for index in itertools.count(first):
        print(index, flush=True)
        if found := run_case(seed, index):
            print("found", found.replace("\n", " "), flush=True)


def watch(command: list[str], seconds: float) -> tuple[int | None, list[tuple[int, str]], bool]:
    """Run a worker for so long: the case it came to, what it found, and whether it died or hung there."""
    end, found, case = time.monotonic() + seconds, [], None
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as worker:
        lines, errors = queue.Queue(), []
        threads = [
            threading.Thread(target=lambda: [lines.put(line) for line in worker.stdout] + [lines.put(None)]),
            threading.Thread(target=lambda: errors.extend(worker.stderr)),
        ]
        for thread in threads:
            thread.start()
        try:
            while (left := end - time.monotonic()) > 0 and len(found) < MOST_FINDINGS:
                try:
                    line = lines.get(timeout=min(left, LONGEST_CASE))
                except queue.Empty:
                    if left < LONGEST_CASE:
                        break
                    return case, [*found, (case, f"no end after {LONGEST_CASE} s")], True
                if line is None:
                    status = worker.wait()
                    threads[1].join()
                    last = "".join(errors[-15:])
                    return case, [*found, (case, f"the process ended with status {status}:\n{last}")], True
                if line.startswith("found "):
                    found.append((case, line[len("found ") :].strip()))
                else:
                    case = int(line)
            return case, found, False
        finally:
            worker.kill()
            for thread in threads:  # they read pipes that are closed on leaving
                thread.join()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120, help="how long to go on")
    parser.add_argument("--seed", type=int, default=None, help="default: the time")
    parser.add_argument("--case", help="SEED:NUMBER: run this one alone")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.worker:
        work(*map(int, arguments.worker.split(":")))
    if arguments.case:
        found = run_case(*map(int, arguments.case.split(":")))
        print(found or "nothing was found")
        return int(found is not None)

    seed = int(time.time()) if arguments.seed is None else arguments.seed
    end, first, findings, dead = time.monotonic() + arguments.seconds, 0, [], True
    while dead and time.monotonic() < end and len(findings) < MOST_FINDINGS:
        command = [sys.executable, "-X", "faulthandler", __file__, "--worker", f"{seed}:{first}"]
        case, found, dead = watch(command, end - time.monotonic())
        findings += found
        first = (first if case is None else case) + 1
    for number, text in findings:
        print(f"{text}\n  again: python tools/fuzz.py --case {seed}:{number}")
    print(f"seed {seed}: {first} cases, {len(findings)} findings")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
