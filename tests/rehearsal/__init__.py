"""A rehearsal on a GPU without one: torch's CPU build with a pretended device that is really called "cuda", or "mps".

Its memory is the host's and its kernels are the CPU's, so that values are true and code that depends on data runs.
Refused is what the real device refuses: tensors of two devices (also of cuda:0 and cuda:1), another device's
generators, float64 on MPS, and while a CUDA graph is captured every synchronisation and copy from the host.  Recorded
is what makes the host wait for the device, with the line of `personalize` that asked for it.

Not seen: speed, memory that runs out, kernels that only CUDA has or lacks, its rounding, NCCL, streams that race.

    build, device, streams, graphs, record    the device and its record
    plugin      the device in a run of pytest, which must be a process of its own: it is there before torch is imported
    flows_*.py  what is rehearsed; `pytest -m rehearsal` runs each file in such a process

One file, with what is printed:
    pytest -n 0 -s -p tests.rehearsal.plugin -o addopts= -o python_files='flows_*.py' -o python_functions='flow_*' \\
        tests/rehearsal/flows_editing.py
"""
