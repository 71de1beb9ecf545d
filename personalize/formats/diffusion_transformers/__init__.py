"""LoRA files for diffusion transformers (FLUX, Z-Image, Qwen-Image, SD 3, …): inspected, converted and verified.

These models cannot be trained or edited with here; their files are read and written because people have them.

    families          the table: names of each family's layers in the original code and in diffusers
    skeletons         names and shapes of all layers, from `skeletons.json`;  make_skeletons: writes that file
    names             every spelling of a layer's name that programs use, and who reads which
    factors           one fused projection as several, several as one;  halves in another order
    reading, writing  a file to a LoRA by diffusers' names of layers, and back in any spelling
    readers           what diffusers and ComfyUI make of a file
    summary           what `inspect` says of a file;  conversion, checking: what `convert` and `verify` do

Imports: io, models.
"""
