"""The engine stands alone: none of its modules needs the server or a web framework."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import importlib, pkgutil, sys
import api.src.engine
for module in pkgutil.iter_modules(api.src.engine.__path__):
    importlib.import_module(f"api.src.engine.{module.name}")
strangers = {"fastapi", "starlette", "pydantic", "httpx", "uvicorn", "transformers", "av"} & sys.modules.keys()
ours = [name for name in sys.modules if name.startswith("api.src.") and not name.startswith("api.src.engine")]
print(sorted(strangers), ours)
"""


def test_the_engine_imports_nothing_of_the_server():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] []"


def test_torch_s_threads_are_told_to_wait_calmly_before_it_is_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", SPY], capture_output=True, text=True, check=True, env=_plain())
    assert done.stdout.split() == ["5000"]
    asked = _plain() | {"OMP_WAIT_POLICY": "active"}
    done = subprocess.run([sys.executable, "-c", SPY], capture_output=True, text=True, check=True, env=asked)
    assert done.stdout.split() == ["None"]


SPY = """
import importlib.abc, os, sys

class Spy(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)  # the rest takes seconds

sys.meta_path.insert(0, Spy())
import api.src.backends.qwen3_tts
"""


def _plain() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
