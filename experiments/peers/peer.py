"""peer.py: what every peer's script shares: it answers JSON lines on standard input with JSON lines.

A peer's script defines functions that prepare a case and return what is timed:

    import peer, torch

    @peer.case
    def layernorm(rows, width):
        x = torch.randn(rows, width)
        return lambda: torch.nn.functional.layer_norm(x, (width,))    # or (function, {"what": "it tells"})

    peer.serve()

Requests: {"op": "case", "case": name, "arguments": {...}, "threads": n, "device": "cpu" or "cuda"} -> {"id", "info"};
{"op": "turn", "id", "seconds", "sample"} -> {"best", "calls"}: one untimed call, then samples of as many calls as
fill `sample` seconds until `seconds` are used, the fastest sample's seconds per call (on CUDA a sample ends when the
device is idle); {"op": "sustained", "id", "seconds"} -> {"median"}: seconds of calls that follow each other without a
pause, of the second half of them; {"op": "queued", "id", "times"} -> {"mean"}: seconds until a call returns that finds
the device idle, the mean after one that is not timed; {"op": "peak", "id"} -> {"bytes"}: growth of the resident set, or
of CUDA's memory, during one call; {"op": "drop", "id"}. This is the same procedure that lua/lacuna/bench.lua follows on
its side.
Standard output belongs to the protocol: prints of libraries go to standard error.
"""

import ctypes
import gc
import json
import os
import statistics
import struct
import sys
import time

try:
    import torch
except ImportError as error:
    sys.exit("no PyTorch in %s: %s" % (sys.executable, error))

_cases = {}
_live = {}
device = "cpu"  # of the case that is made: cases make their tensors there


def case(make):
    """Register a function that prepares a case; its name is the case's."""
    _cases[make.__name__] = make
    return make


def load(path):
    """Tensors of a safetensors file, as a dict."""
    types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
             "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
    with open(path, "rb") as file:
        data = bytearray(file.read())
    (size,) = struct.unpack("<Q", data[:8])
    header, result = json.loads(data[8:8 + size]), {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            flat = torch.frombuffer(data[8 + size + begin:8 + size + end], dtype=types[entry["dtype"]])
            result[name] = flat.reshape(entry["shape"]).clone()
    return result


def _sample(fn, n):
    start = time.perf_counter()
    for _ in range(n):
        fn()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / n


def _turn(state, seconds, sample):
    fn = state["fn"]
    gc.collect()
    gc.disable()
    once = _sample(fn, 1)
    if "n" not in state:
        once = min(once, _sample(fn, 1))
        state["n"] = max(1, int(-(-sample // max(once, 1e-8))))
        if state["n"] > 1:
            once = _sample(fn, state["n"])
            state["n"] = max(1, int(-(-sample // max(once, 1e-8))))
    best, spent, calls, n = float("inf"), 0.0, 0, state["n"]
    while True:
        t = _sample(fn, n)
        best, spent, calls = min(best, t), spent + t * n, calls + n
        if spent >= seconds:
            break
    gc.enable()
    return {"best": best, "calls": calls}


def _sustained(state, seconds):
    times, start = [], time.perf_counter()
    now = start
    while len(times) < 2 or now - start < seconds:
        state["fn"]()
        before, now = now, time.perf_counter()
        times.append(now - before)
    return {"median": statistics.median(times[len(times) // 2:])}


def _queued(fn, times):
    spent = 0.0
    fn()
    for _ in range(times):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        fn()
        spent += time.perf_counter() - start
    return {"mean": spent / times}


def _status(field):
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("no %s in /proc/self/status" % field)


def _peak(fn):
    """Bytes by which the resident set grows at most during a call (after one call that warms it up)."""
    fn()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status("VmRSS")
    fn()
    return max(0, _status("VmHWM") - before)


def _answer(request):
    global device
    op = request["op"]
    if op == "case":
        device = request.get("device", "cpu")
        torch.set_default_device(device)
        torch.set_num_threads(request["threads"])
        if request["case"] not in _cases:
            raise KeyError("no case '%s'; there are: %s" % (request["case"], ", ".join(sorted(_cases))))
        made = _cases[request["case"]](**request["arguments"])
        fn, info = made if isinstance(made, tuple) else (made, {})
        key = len(_live) + 1
        while key in _live:
            key += 1
        _live[key] = {"fn": fn, "threads": request["threads"]}
        return {"id": key, "info": info}
    if op == "drop":
        del _live[request["id"]]
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        return {}
    state = _live[request["id"]]
    torch.set_num_threads(state["threads"])
    if op == "turn":
        return _turn(state, request["seconds"], request["sample"])
    if op == "sustained":
        return _sustained(state, request["seconds"])
    if op == "queued":
        return _queued(state["fn"], request["times"])
    if op == "peak":
        return {"bytes": _peak(state["fn"])}
    raise ValueError("unknown request '%s'" % op)


def serve():
    """Answer requests until standard input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer):
        out.write(json.dumps(answer) + "\n")
        out.flush()

    say({"torch": torch.__version__, "python": sys.version.split()[0]})
    for line in sys.stdin:
        try:
            say(_answer(json.loads(line)))
        except Exception as error:  # the other side shows it
            say({"error": "%s: %s" % (type(error).__name__, str(error).split("\n")[0])})
