"""Reading of YAML files, with errors that name the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gridcap.common.errors import ConfigError


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML loader that rejects duplicate keys. Plain YAML silently uses the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.composer.ComposerError(None, None, f"duplicate key {key.value!r}", key.start_mark)
                seen.add(key.value)
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the sections in a YAML file; an empty file has none.

    Raises:
        ConfigError: the path is wrong, or the file is not valid YAML or does not contain sections.
        OSError: reading failed for another reason, which is not a usage error.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a UTF-8 text file"
        raise ConfigError(f"{path}: {reason}", "pass the path of a YAML file to --config or --recipe") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        message = f"{path}: invalid YAML: {' '.join(str(error).split())}"
        raise ConfigError(message, "fix the file at this position") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        message = f"{path}: must contain sections (seed, data, extract, train, caption)"
        raise ConfigError(message, "see pipeline.yaml for an example")
    return tree


def parse_value(text: str) -> Any:
    """Return the value of a YAML text, such as "1e-4" or "[a, b]".

    Raises:
        yaml.YAMLError, ValueError: the text is not valid YAML.
    """
    return yaml.load(text, _UniqueKeyLoader)
