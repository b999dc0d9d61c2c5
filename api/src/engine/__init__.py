"""Qwen3-TTS in tensors: configuration, weights, language model, codec. Imports nothing of the server."""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    # Read when torch is loaded. A frame on a CPU has a thousand places where OpenMP's threads wait for one another. By
    # themselves they spin there for milliseconds, so that wherever another process wants a core the one that is waited
    # for does not run: 104 ms a frame on two free cores became 430 to 3600 ms beside a busy process. After some
    # microseconds they sleep now: 114 ms, and 290 ms.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
