"""Sparse autoencoders side by side on the tasks they are used for."""
