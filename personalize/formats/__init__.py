"""Adapter files as they lie on a disk: read, judged, converted and checked, without a live adapter.

    layouts, lora_keys        how programs name LoRA tensors
    lora_files, peft_files    LoRA files and PEFT folders
    textual_inversion_files   learned tokens
    original_checkpoint       single-file base models
    manifest                  adapter.json
    reader_keys, verification an independent reading, and the comparison with it
    compatibility, coverage   who can read a file, and what it changes
    inspection, conversion    say what a file is; rewrite it for another program

Imports: io, models.
"""
