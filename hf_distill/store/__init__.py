"""A teacher's outputs in a folder: written once, read by any number of students and epochs.

    manifest.json                what the store is: teacher, tokenizer, method, fidelity
    index-0001-00000.safetensors the documents of a shard, and a checksum for each 64 KB of its data
    data-0001-00000.safetensors  what the teacher says about them
    head.safetensors             its output layer, in stores of hidden states
    tokenizer/                   its tokenizer

What is looked up is a *document*: one text as the teacher reads it, and which of its tokens bear a label. So the order
of rows, packing, batches, epochs and the number of processes never matter, and a data set needs no column of its own.

No model is known here: arrays in, arrays out.
"""
