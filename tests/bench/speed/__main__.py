"""Speed of training and sampling: `python -m tests.bench.speed`."""

import tyro

from tests.bench.speed.bench import SpeedBench, main

print(main(tyro.cli(SpeedBench)))
