"""Files and images: how they are read from a disk, and written so that a reader finds them whole or not at all.

    atomic         write a file or a folder so that it is old or new, checked before it appears under its name
    output_folder  output folders are tried before the work;  locks: between processes
    numbering      names that are not taken
    plain_files    every file from outside is opened here: no pipe, no device, no more bytes than stated
    json_files     JSON, parsed with limits, then checked by a schema
    tables, yaml_files   CSV tables and YAML options, read with limits
    tensor_files   safetensors and JSON, read with every length checked
    pickles        pickled files: refused, or read for their tensors alone
    image_files    pictures in any format, read by what their numbers mean;  mask_files: masks
    image_folders  every picture of a folder, and why a file is left out
    image_metadata suffixes, metadata rows and captions of pictures
    images         pictures to pixels and back
    provenance     that a model made a picture, and how;  content_credentials: signed (C2PA)
    figures        labelled grids, overlays and sheets
    progress       how far a long loop is, reported to a listener
    signals        a handler of those that end a process

Imports: nothing.
"""
