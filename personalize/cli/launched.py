"""`accelerate launch` as a process that ends with its parent: `python -m personalize.cli.launched [its options]`."""

import runpy

from personalize.cli.processes import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    runpy.run_module("accelerate.commands.launch", run_name="__main__", alter_sys=True)
