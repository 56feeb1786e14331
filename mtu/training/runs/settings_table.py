"""`python -m mtu.training.runs.settings_table > docs/training-settings.md` writes the page of all settings."""

import dataclasses
from collections.abc import Iterable

from mtu.training.runs.run_config import Setting, UpcycleConfig, ValidationConfig, settings_by_key
from mtu.training.runs.typed_values import describe_type, is_mapping_type

__all__ = ["format_settings_page"]

_HEADING = """# Settings of a training

These are the keys of a YAML file for `mtu train`, and, with hyphens, its flags. [Training](guides/training.md) says how
to use them. `python -m mtu.training.runs.settings_table` prints this page."""
_MAPPINGS = """## Keys of the mappings

| mapping | keys |
|---|---|
| `data` | a task's name; its value is `PATH`, `{folder: PATH}`, or `{icons: COUNT, split: train, seed: 0}` |
| `upcycle` | `num_experts`, `top_k`, `expert_ratio`, `norm`, `init`, `seed`: the arguments of `mtu.upcycle` |
| `validation` | `examples` (4 a task), `data` (as above), `inference_steps` (those of the task), `seed` (0) |
| `shares`, `loss_weights` | a task's name |
| an element of `tasks` | the fields of `TaskSpec`; a built-in task keeps the fields that are not given |"""


def format_settings_page() -> str:
    """The page as Markdown, with a table for each section of settings."""
    settings = list(settings_by_key().values())
    sections = dict.fromkeys(setting.section for setting in settings)
    tables = [_table(section, [s for s in settings if s.section == section]) for section in sections]
    return "\n\n".join([_HEADING, *tables, _MAPPINGS]) + "\n"


def _table(section: str, settings: Iterable[Setting]) -> str:
    lines = [f"## {section}", "", "| key | value | default | |", "|---|---|---|---|"]
    lines += [f"| `{s.key}` | {_value(s)} | {_default(s)} | {s.help} |" for s in settings]
    return "\n".join(lines)


def _value(setting: Setting) -> str:
    if setting.key == "tasks":
        return "list or null"
    if is_mapping_type(setting.annotation):
        return "mapping"
    return describe_type(setting.annotation).replace("an ", "").replace("a ", "").replace("|", "\\|")


def _default(setting: Setting) -> str:
    default = setting.default
    if default is dataclasses.MISSING:
        return "–"
    if isinstance(default, UpcycleConfig | ValidationConfig | dict):
        return ""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, tuple):
        return f"`{list(default)}`"
    return "`null`" if default is None else f"`{default}`"


if __name__ == "__main__":
    print(format_settings_page(), end="")
