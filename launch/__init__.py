"""Launchers: compose a configuration with Hydra, check it, write the run directory, start the ranks."""
