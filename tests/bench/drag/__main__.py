"""Drags against their true outcome: `python -m tests.bench.drag`."""

import tyro

from tests.bench.drag.bench import DragBench, run

run(tyro.cli(DragBench, config=(tyro.conf.OmitArgPrefixes,)))
