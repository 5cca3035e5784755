"""Every error a user can cause, under one base.

A message names the key and its value, says what was expected and what to do. Launchers and the CLI print a
`SteerscaleError` without a traceback and exit with status 2; anything else is a defect of ours and keeps its traceback.
"""


class SteerscaleError(Exception):
    """Base of all errors meant for users."""


class ConfigError(SteerscaleError):
    """A configuration value is unknown, of the wrong type, or contradicts another one."""


class LayoutError(ConfigError):
    """Parallel degrees or batch sizes that do not fit each other, the model or the number of ranks."""


class DataError(SteerscaleError):
    """A corpus, tokenizer or dataset is missing, unreadable, or does not belong to the others."""


class CheckpointError(SteerscaleError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class LaunchError(SteerscaleError):
    """Ranks could not be started, or one of them failed."""


class TrainingError(SteerscaleError):
    """Training stopped itself: too many non-finite steps in a row, or data that ran out."""
