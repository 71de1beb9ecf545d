"""Adapter files as they lie on a disk: read, judged, converted and checked, without loading an `Adapter`.

    adapter_folders           which folders are adapters, by names of files
    adapter_source            open what a person names: file, PEFT folder, shards, and what stands beside
    foreign_files             the one list of what an adapter file holds, for every command
    key_parts, lora_keys      keys taken apart; names of modules;  layouts: tensors by module and factor
    peft_settings             alpha / r from wherever a program keeps it
    algorithms                which algorithm a module's tensors are of;  trainers: which program wrote a file
    weight_changes, changed_layers   ΔW of every algorithm, and the layers it makes;  layer_kinds: of each family
    layer_sizes               what factors may multiply out to, checked before they do
    lora_files, peft_files    LoRA files and PEFT folders;  rank_reduction: the nearest LoRA of lower rank
    textual_inversion_files   learned tokens
    original_checkpoint       single-file base models
    timestep_rank             the rule of adapters with fewer components at high noise
    manifest                  adapter.json;  integrity: bytes that changed, absurd weights
    training_notes            what to know of an adapter's training
    reader_keys, source_reading, verification   independent readings, and the comparison with them
    verification_report       what it found
    quantized_merge           what a merge into a quantized base leaves of a LoRA
    compatibility, coverage   who can read a file, and what it changes;  block_names: whose names it has for blocks
    diffusion_transformers/   files for FLUX, Z-Image, Qwen-Image, SD 3 and others
    inspection, inspection_report, folder_inspection, conversion   say what a file is; rewrite it

Imports: io, models.
"""
