"""A module on the pretended GPU: python -m tests.rehearsal -m tests.bench.speed --only graph."""

from __future__ import annotations

import runpy
import sys

from tests.rehearsal.device import begin

if __name__ == "__main__":
    begin("cuda", 2)
    flag, module, *arguments = sys.argv[1:]
    if flag != "-m":
        raise SystemExit(f"got {flag}, expected -m and a module")
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
