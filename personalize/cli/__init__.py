"""The command line: options are parsed and checked before torch is imported.

    main            dispatch, exit codes and one-line errors
    parser          dataclasses to options, YAML presets
    options, edit_options, drag_options   the options of the commands
    progress        bars with the time left
    wording         messages name options as they are written
    lists, terminal options that take several values; what is printed: control characters are shown as codes
    faults          exceptions as one line and an exit code
    processes       signals that end this process; processes that end with their parent
    launched        `accelerate launch` as a process that ends with its parent
    launch          scripts of train/ and export/, and `accelerate launch`
    commands/       one file per command
    redrawing       `edit --from PICTURE`: the options in a picture
    words           words of prompts on a command line: cat=dog, fluffy=3
    checks          paths, prompts and combinations of options, checked before torch is imported
    unused          options that have no effect without another one;  places: points and boxes as they are written
    drag_settings   the settings of a drag that its options give
    pages           freed memory is kept by the command line's own process

Imports: io, embedded, models, formats, adapters, sampling, evaluation, editing, training.
"""
