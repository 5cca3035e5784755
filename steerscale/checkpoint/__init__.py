"""Sharded, engine-neutral checkpoints in safetensors: `fragments` is the format, `store` the directories, `integrity` tells
whole ones from damaged ones.
"""
