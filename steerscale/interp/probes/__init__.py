"""Probes: classifiers that read a label from activations, their fits, their data, and edits of activations by them."""
