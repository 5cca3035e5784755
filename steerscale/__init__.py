"""steerscale: distributed training of language models and of the sparse autoencoders that explain and steer them."""

__version__ = "0.1.0"
