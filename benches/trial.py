"""What the sections of mixers.py share: its arguments, the kernels, checks against a reference, and times."""
import argparse
import torch
from engine import Cuda, Emulated

ap = argparse.ArgumentParser()
ap.add_argument("kernels")
ap.add_argument("--only", default="scan,attention,decode,conv")
ap.add_argument("--emulate", action="store_true")
ap.add_argument("--sanitize", action="store_true")
ap.add_argument("--order", type=int, default=0)
ap.add_argument("--quick", action="store_true", help="the checks, and one size of times")
ap.add_argument("--profile", default="", help="scan, scan_backward, attention, attention_backward, decode: only this one, three times at full size (ncu --set full -k regex:selective_scan -s 1 -c 1)")
ap.add_argument("--define", action="append", default=[], help="NAME=VALUE for every kernel")
args = ap.parse_args()
DEV = "cpu" if args.emulate else "cuda"
CTYPE = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}

ENGINE = Emulated(args.kernels, args.sanitize, args.order) if args.emulate else Cuda(args.kernels)
DEFINES = dict(d.split("=") for d in args.define)
MULTIPROCESSORS = 4 if args.emulate else torch.cuda.get_device_properties(0).multi_processor_count
FAILED = []


def kernel(file, entry, **defines):
    return ENGINE.kernel(file, entry, {**defines, **DEFINES})


def check(name, got, want, tolerance):
    got, want = got.double(), want.double()
    scale = max(want.abs().max().item(), 1e-3)
    error = (got - want).abs().max().item() / scale
    bad = not (error <= tolerance)
    if bad:
        FAILED.append(name)
    print(f"  {'WRONG' if bad else 'ok   '} {name:40} error {error:.1e} of {scale:.2g} (may {tolerance:.0e})", flush=True)


def time_us(run, repeats=20, graph=False):
    if args.emulate:
        return float("nan")
    run(); torch.cuda.synchronize()
    if graph:
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            for _ in range(repeats):
                run()
        return time_us(recorded.replay, 1) / repeats
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    best = 1e30
    for _ in range(3):
        start.record()
        for _ in range(repeats):
            run()
        stop.record(); torch.cuda.synchronize()
        best = min(best, start.elapsed_time(stop) / repeats * 1000)
    return best


def segments_of(lengths, pasts=None):
    table, start, keys = [], 0, 0
    for i, n in enumerate(lengths):
        past = pasts[i] if pasts else 0
        table.append([start, n, past, i, keys])
        start += n
        keys += past + n
    return torch.tensor(table, dtype=torch.int32, device=DEV), start, keys
