"""Runs as Slurm jobs: the script (`script`), its submission (`submit`), what it asks for while it runs (`batch`), and how
runs stand (`observe`). Torch-free.
"""
