"""Corpora on disk, and the order in which training sees them.

- `prepare`: text -> a dataset directory; `sources`, `encoding`: its stages; `sample`: the text that ships with us
- `manifest`: what a dataset directory holds, checked without torch; `indexed`: Megatron-Core's .bin/.idx files
- `config`, `dataset`: a sample for every global position, whatever the layout; `blend`, `order`: the arithmetic of it
- `loader`: micro-batches on torch, prefetched; `consumed`: proof of what was trained on
"""
