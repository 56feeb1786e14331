"""Reading the settings of a training: a YAML file, the flags over it, and the sentence for each thing that is wrong."""

import dataclasses
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mtu.training.multitask.multitask_config import MultiTaskConfig
from mtu.training.runs.run_config import RunConfig, settings_by_key
from mtu.training.runs.typed_values import convert_text, convert_value, field_types, nearest_name_hint
from mtu.training.trainer_config import TrainerConfig

__all__ = ["SHIPPED_SETTINGS", "read_run_config"]

SHIPPED_SETTINGS = ("sd15", "sdxl", "icons")
# Each of two settings that say the same thing; a flag for one replaces the other of a file.
_ALTERNATIVES = {"steps": "epochs", "epochs": "steps"}


class _File(NamedTuple):
    """The contents of a YAML file.

    Attributes:
        name: the file, as messages name it.
        values: its keys and values.
        lines: the line of each key, from 1.
    """

    name: str
    values: dict[str, Any]
    lines: dict[str, int]

    def place(self, key: str) -> str:
        """The key with its line, as the beginning of a message."""
        return f"{key} (line {self.lines[key]} of {self.name})" if key in self.lines else key


def read_run_config(config: str | Path | None = None, flags: Mapping[str, Any] | None = None) -> RunConfig:
    """Read the settings of a training.

    Args:
        config: a YAML file; the output folder of a training, whose config.yaml is read; or the name of shipped
            settings, "sd15", "sdxl" or "icons". None: the flags alone give the settings. Relative paths in the file are
            relative to the current directory.
        flags: settings that replace those of the file, by key: values, or texts as on the command line. Settings that
            are mappings take a dictionary, whose keys replace those of the file one by one.

    Returns:
        The settings.

    Raises:
        ValueError: a key is unknown or missing, a value has another type, or settings contradict each other.

    Example:
        >>> config = read_run_config("sd15", {"model": "…/stable-diffusion-v1-5", "data": {"edit": "edits"}, …})
    """
    file = _File("", {}, {}) if config is None else _read_file(config)
    known = settings_by_key()
    values = {
        key: convert_value(value, known[key].annotation, file.place(key)) for key, value in _checked(file).items()
    }
    given = {key: _convert_flag(key, value, values.get(key)) for key, value in (flags or {}).items()}
    _check_one_length(values, file.place("steps"), file.place("epochs"))
    _check_one_length(given, known["steps"].flag, known["epochs"].flag)
    for key, other in _ALTERNATIVES.items():
        if given.get(key) is not None and other not in given:
            values.pop(other, None)
    return _make_config({**values, **given}, file)


def _read_file(config: str | Path) -> _File:
    path = Path(config)
    if str(config) in SHIPPED_SETTINGS:
        name, text = f"mtu's {config}.yaml", (files(__package__) / "settings" / f"{config}.yaml").read_text("utf-8")
    else:
        path = path / "config.yaml" if path.is_dir() else path
        name = str(path)
        text = _read_text(path)
    node, values = _parse(text, name)
    if values is None:
        raise ValueError(f"{name} is empty: expected lines of the form KEY: VALUE.")
    if not isinstance(node, yaml.MappingNode) or not isinstance(values, dict):
        raise ValueError(f"{name} holds {_describe_contents(values)}: expected lines of the form KEY: VALUE.")
    _check_keys(node, name)
    return _File(name, values, {str(key.value): key.start_mark.line + 1 for key, _ in node.value})


def _read_text(path: Path) -> str:
    try:
        contents = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(
            f"There is no file {str(path)!r}: expected a YAML file, the output folder of a training, or one of "
            f"{', '.join(SHIPPED_SETTINGS)}."
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from None
    try:
        return contents.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = contents.count(b"\n", 0, error.start) + 1
        raise ValueError(f"Line {line} of {path} is not UTF-8 text: save the file in UTF-8.") from None


def _parse(text: str, name: str) -> tuple[yaml.Node | None, Any]:
    """The nodes and the values of a YAML text."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = name if mark is None else f"Line {mark.line + 1} of {name}"
        raise ValueError(f"{place} is not YAML: {error.problem or error.context}.") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"Line {line} of {name} is not YAML: it has a character that no text has.") from None
    except (yaml.YAMLError, ValueError) as error:  # such as a date with a thirteenth month
        raise ValueError(f"{name} is not YAML: {' '.join(str(error).split())}.") from None


def _describe_contents(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"the single value {value!r}"


def _check_keys(node: yaml.Node, name: str) -> None:
    """Raise a ValueError if a mapping of a file has a key twice, or a key that is null."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item, name)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key_node, value in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key_node.tag == "tag:yaml.org,2002:null":
            raise ValueError(f"Line {line} of {name} has {key or 'nothing'} as a key: expected a name.")
        if key in lines:
            place = f"line {line}" if line == lines[key] else f"lines {lines[key]} and {line}"
            raise ValueError(f"{name} gives {key!r} twice, in {place}.")
        lines[key] = line
        _check_keys(value, name)


def _checked(file: _File) -> dict[str, Any]:
    """The values of a file, all of whose keys are known."""
    known = settings_by_key()
    for key in file.values:
        if key not in known:
            raise ValueError(
                f"Line {file.lines.get(str(key), '?')} of {file.name} has the unknown key {key!r}: "
                f"{nearest_name_hint(str(key), known)}."
            )
    return file.values


def _convert_flag(key: str, value: Any, below: Any) -> Any:
    """The value of a flag; a mapping's keys are put over those of the file."""
    setting = settings_by_key().get(key)
    if setting is None:
        raise ValueError(f"There is no setting {key!r}: {nearest_name_hint(key, settings_by_key())}.")
    if isinstance(value, str):
        return convert_text(value, setting.annotation, setting.flag)
    if not isinstance(value, Mapping):
        return convert_value(value, setting.annotation, setting.flag)
    if not dataclasses.is_dataclass(setting.annotation):
        element = setting.annotation.__args__[1]
        own = {name: _convert_item(item, element, f"{setting.flag} {name}") for name, item in value.items()}
        return {**(below or {}), **own}
    types = field_types(setting.annotation)
    for name in value:
        if name not in types:
            raise ValueError(f"{setting.flag} has no key {name!r}: {nearest_name_hint(name, types)}.")
    own = {name: _convert_item(item, types[name], f"{setting.flag} {name}") for name, item in value.items()}
    try:
        return dataclasses.replace(setting.default if below is None else below, **own)
    except ValueError as error:
        raise ValueError(f"{setting.flag}: {error}") from None


def _convert_item(value: Any, annotation: Any, where: str) -> Any:
    return (convert_text if isinstance(value, str) else convert_value)(value, annotation, where)


def _check_one_length(values: Mapping[str, Any], *places: str) -> None:
    if values.get("steps") is not None and values.get("epochs") is not None:
        raise ValueError(f"{' and '.join(places)} both give the length of the training: expected one of them.")


def _make_config(values: dict[str, Any], file: _File) -> RunConfig:
    """Make the configuration out of flat values, and say what is missing."""
    for key in ("model", "output"):
        if key not in values:
            raise ValueError(f"The setting {key!r} is missing: give it as {settings_by_key()[key].flag} or in a file.")
    if values.get("epochs") is None and values.get("steps") is None:
        raise ValueError("The length of the training is missing: give steps or epochs.")
    # Where epochs give the length, the data will tell the number of steps.
    values = {**values, "steps": 1 if values.get("steps") is None else values["steps"]}
    parts = {}
    for name, part in (("trainer", TrainerConfig), ("objective", MultiTaskConfig)):
        parts[name] = part(**{f.name: values[f.name] for f in dataclasses.fields(part) if f.name in values})
    own = {f.name: values[f.name] for f in dataclasses.fields(RunConfig) if f.name in values}
    return RunConfig(**own, **parts)
