"""Sharded, engine-neutral checkpoints in safetensors: `fragments` is the format, `store` the directories."""
