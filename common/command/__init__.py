"""Declaration of commands: shared options, configuration, error reporting, and help.

A command is declared with ``@pipeline_command(...)`` and ``@flag("--batch-size", "extract.batch_size")``. The help and
the default of a flag come from the configuration, so each is defined once.
"""

from gridcap.common.command.command import (
    CONTEXT_SETTINGS,
    NO_SETTINGS,
    PipelineCommand,
    Uses,
    as_invoked,
    pipeline_command,
    reword_help_option,
    show_config,
)
from gridcap.common.command.options import ConfigFlag, flag, subset_options
from gridcap.common.command.settings import given_settings, reject_ignored, reject_ignored_by_sampling, reload_config

__all__ = [
    "CONTEXT_SETTINGS",
    "NO_SETTINGS",
    "ConfigFlag",
    "PipelineCommand",
    "Uses",
    "as_invoked",
    "flag",
    "given_settings",
    "pipeline_command",
    "reject_ignored",
    "reject_ignored_by_sampling",
    "reload_config",
    "reword_help_option",
    "show_config",
    "subset_options",
]
