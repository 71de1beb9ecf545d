"""Files and images: how they are read from a disk, and written so that a reader finds them whole or not at all.

    atomic         write a file or a folder in one step, checked before it appears under its name
    tensor_files   safetensors and JSON, read with every length checked
    pickles        pickled files: refused, or read for their tensors alone
    images         pictures in any format to pixels and back
    figures        labelled grids, overlays and sheets

Imports: nothing.
"""
