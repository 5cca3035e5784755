"""Reading and changing what a model computes: evaluation of SAEs on its activations."""
