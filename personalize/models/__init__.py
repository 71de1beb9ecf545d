"""Base models of the Stable Diffusion family, and handles on their parts.

    stable_diffusion   one handle for SD 1.x, SD 2.x and SDXL: encode, predict, decode
    ranges             the range of every number among the options
    parameterization   what a UNet predicts (ε or v), turned into the other and into the clean latents
    supported          bases of another kind are refused; what a UNet predicts, if no file says it
    loading, config    from a folder, the hub or a single file; configs/ holds what single files lack
    weight_files       whether the files of a base can be read, and hold every weight that it has
    blocks             which layers belong to the encoder, the middle and the decoder
    attention          hooks on attention layers;  attention_maps: record and average what they look at
    vae                the autoencoder's precision, and its tiles
    words              the words of prompts, read before torch
    prompts, token_ids prompts as tokens and as words; their ids, in chunks of 75;  conditioning: their embeddings
    image_processor    pictures of any size, padded to what the base model can encode, and back
    known_bases        where the bases of this machine lie, by their hash;  offline: loading without the network
    fast_paths         the same results in less time;  gradient_checkpointing: in less memory
    loss_scaling       gradients in fp16
    cuda_graphs        work recorded as one CUDA graph
    empty              a model's shapes without its weights
    quantization       4-bit base models;  rounding: the numbers that they can hold
    offloading         where layers compute whose weights are moved
    idle_parts, memory text encoders and autoencoder off the device while unused; what is free, what is needed
    map_filters        attention maps scaled and smoothed
    identity           a base's hash;  transfer: copies to a GPU for which the host does not wait
    lora_modules       which modules are LoRA layers;  quiet: other libraries' messages and bars, hidden while loading

Imports: io.
"""
