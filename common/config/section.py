"""Base class of all configuration sections."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A configuration section: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_section_means_defaults(cls, value: Any) -> Any:
        return {} if value is None else value  # YAML reads a section without keys as null

    def changed_settings(self) -> dict[str, Any]:
        """Return key path -> value (as JSON types) of the settings that differ from the defaults."""
        values = self.model_dump(mode="json")
        changed: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Section):
                changed |= {f"{name}.{key}": v for key, v in value.changed_settings().items()}
            elif isinstance(value, dict):
                for item, section in value.items():
                    changed |= {f"{name}.{item}.{key}": v for key, v in section.changed_settings().items()}
            elif value != field.default:
                changed[name] = values[name]
        return changed
