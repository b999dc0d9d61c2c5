"""The engine stands alone: none of its modules needs the server or a web framework."""

from __future__ import annotations

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
