"""What training leaves behind, and how it is put into a base model and taken out again.

    adapter             LoRA weights, learned tokens and source embedding in one value; save and load
    apply               put adapters into a model for the length of a `with` block
    lora, lora_layers   LoRA on a UNet;  text_encoder_lora: on its text encoders
    timestep_mask, rank_mask   fewer rank components at high noise;  orthogonal_start: LoRA that starts orthonormal
    textual_inversion   new tokens and their rows
    forgetting          named rules that scale single LoRA layers
    merging, fuse       adapters into one; an adapter into its base model
    export              adapters in the layouts of other programs
    model_card, card_text   the card of an adapter;  hub: uploading it
    adapter_files       the files of an adapter folder;  captions: the one that an edit starts from
    lora_scales         scale LoRA layers for the length of a block
    trained_size        the size that an adapter says it was trained at
    subjects            concepts by their tokens and class phrases

Imports: io, models, formats.
"""
