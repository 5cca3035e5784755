"""Activations of a frozen language model, streamed while it stays sharded.

- `config`: what a user writes under `stream:` (torch-free)
- `source`: token batches -> activations at hook points, from our GPT or any transformers model
- `order`: which token of which sequence comes when; a function of seed, lanes, buffer size and position alone
- `buffer`: the shuffle buffer, sharded over the tensor group
- `passes`, `lanes`: forward passes, and the blocks of each lane that they fill
- `stream`: the three together, with cursors for checkpoints; `build_stream`
- `placement`, `remote`, `producer`, `commands`, `facts`: a model on ranks of its own, apart from those that train
- `cache`: activations kept on disk, for small cases
- `cost`: what storing them would cost, and what streaming costs (torch-free)
"""
