"""Values of settings, checked against the annotations of dataclass fields.

YAML files and flags both end here, so each setting has one type, and a wrong value gets one sentence. A flag's text is
read as YAML, except that commas make a list and that a text needs no quotes.
"""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union

import yaml

__all__ = ["convert_text", "convert_value", "describe_type", "field_types", "is_mapping_type", "nearest_name_hint"]


def convert_value(value: Any, annotation: Any, where: str) -> Any:
    """Convert a value of a YAML file to the type of a setting.

    Args:
        value: what `yaml.safe_load` gives.
        annotation: bool, int, float, str, Path, None, a Literal, a tuple, a Mapping, a dataclass, or a union of these.
            A dataclass may also take a text, by its class method `from_text`.
        where: the setting, as the message names it.

    Returns:
        The value as that type. Numbers may be written as 1e-4, which YAML takes for a text.

    Raises:
        ValueError: the value has another type.
    """
    options = _options(annotation)
    dataclass = next((option for option in options if dataclasses.is_dataclass(option)), None)
    if dataclass is not None and isinstance(value, Mapping):
        return _convert_fields(value, dataclass, where)
    from_text = getattr(dataclass, "from_text", None)
    if from_text is not None and isinstance(value, str):
        return from_text(value)
    mapping = next(
        (option for option in options if typing.get_origin(option) is not None and _is_mapping(option)), None
    )
    if mapping is not None and isinstance(value, Mapping):
        element = typing.get_args(mapping)[1]
        return {_name(key, where): convert_value(item, element, f"{where}: {key}") for key, item in value.items()}
    for option in options:
        found, converted = _try_option(value, option, where)
        if found:
            return converted
    raise ValueError(f"{where} must be {describe_type(annotation)}, but got {value!r}.")


def convert_text(text: str, annotation: Any, where: str) -> Any:
    """Convert the text of a flag to the type of a setting.

    Args:
        text: the argument of the flag.
        annotation: as in `convert_value`.
        where: the flag, as the message names it.

    Raises:
        ValueError: the text stands for no value of this type.
    """
    options = _options(annotation)
    if text in ("null", "none") and type(None) in options and not any(text in _choices(o) for o in options):
        return None
    if any(option in (str, Path) for option in options) or any(text in _choices(option) for option in options):
        return convert_value(text, annotation, where)
    if any(hasattr(option, "from_text") for option in options):
        return convert_value(text, annotation, where)
    is_list = "," in text and not text.startswith(("[", "{"))
    try:
        value = yaml.safe_load(f"[{text}]" if is_list else text)
    except yaml.YAMLError:
        value = text
    if isinstance(value, str) and any(typing.get_origin(option) is tuple for option in options):
        value = [value]
    return convert_value(value, annotation, where)


def describe_type(annotation: Any) -> str:
    """Describe a type in the words of a message: "an integer or null"."""
    words = [word for option in _options(annotation) for word in _describe_option(option)]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


@functools.cache
def field_types(dataclass: type) -> dict[str, Any]:
    """The type of each field of a dataclass by its name."""
    hints = typing.get_type_hints(dataclass)
    return {field.name: hints[field.name] for field in dataclasses.fields(dataclass)}


def is_mapping_type(annotation: Any) -> bool:
    """Whether a setting is a mapping or a dataclass, whose flag takes KEY=VALUE."""
    return any(_is_mapping(option) or dataclasses.is_dataclass(option) for option in _options(annotation))


def nearest_name_hint(name: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown name: the known name that is most like it, or all of them if none is."""
    names = list(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"the nearest known one is {nearest[0]!r}" if nearest else f"expected {', '.join(names)}"


def _options(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _choices(option: Any) -> tuple[Any, ...]:
    return typing.get_args(option) if typing.get_origin(option) is Literal else ()


def _is_mapping(option: Any) -> bool:
    origin = typing.get_origin(option)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _try_option(value: Any, option: Any, where: str) -> tuple[bool, Any]:
    """Whether a value has one type of a union, and the converted value."""
    if option is Any:
        return True, value
    if option is type(None):
        return value in (None, "none"), None
    if typing.get_origin(option) is Literal:
        # In YAML 1.1, a bare no is the truth value false.
        spelt = {False: "no", True: "yes"}.get(value, value) if isinstance(value, bool) else value
        return spelt in typing.get_args(option), spelt
    if typing.get_origin(option) is tuple:
        return _try_tuple(value, typing.get_args(option), where)
    if option is bool:
        return isinstance(value, bool), value
    if option is str:
        return isinstance(value, str), value
    if option is Path:
        return isinstance(value, str | Path), Path(value).expanduser() if isinstance(value, str | Path) else None
    if option in (int, float):
        number = _as_number(value)
        if number is None or (option is int and not number.is_integer()):
            return False, None
        return True, int(value) if option is int and isinstance(value, int) else option(number)
    return False, None


def _try_tuple(value: Any, elements: tuple[Any, ...], where: str) -> tuple[bool, Any]:
    if not isinstance(value, list | tuple):
        return False, None
    if elements[-1] is Ellipsis:
        elements = (elements[0],) * len(value)
    if len(value) != len(elements):
        return False, None
    return True, tuple(
        convert_value(v, e, f"{where}[{i}]") for i, (v, e) in enumerate(zip(value, elements, strict=True))
    )


def _as_number(value: Any) -> float | None:
    """A finite number, also one that YAML takes for a text, such as 1e-4."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _convert_fields(value: Mapping[Any, Any], dataclass: Any, where: str) -> Any:
    known = field_types(dataclass)
    for key in value:
        if key not in known:
            raise ValueError(f"{where} has no key {key!r}: {nearest_name_hint(str(key), known)}.")
    converted = {key: convert_value(item, known[key], f"{where}: {key}") for key, item in value.items()}
    return _call_with_place(dataclass, converted, where)


def _call_with_place(dataclass: Callable[..., Any], fields: dict[str, Any], where: str) -> Any:
    """Make the dataclass, whose own checks do not know the place of their values."""
    try:
        return dataclass(**fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _name(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise ValueError(f"{where} must have names as keys, but got {key!r}.")
    return key


def _describe_option(option: Any) -> list[str]:
    """The words for one type of a union; a Literal has several."""
    if typing.get_origin(option) is Literal:
        return [f"{choice}" for choice in typing.get_args(option)]
    if typing.get_origin(option) is tuple:
        elements = typing.get_args(option)
        if elements[-1] is Ellipsis:
            return [f"a list, each element of which is {describe_type(elements[0])}"]
        return [f"a list of {len(elements)} elements ({', '.join(describe_type(e) for e in elements)})"]
    if _is_mapping(option):
        return [f"a mapping of names, each to {describe_type(typing.get_args(option)[1])}"]
    if dataclasses.is_dataclass(option):
        keys = f"a mapping with some of the keys {', '.join(field_types(option))}"
        return [keys, "a text"] if hasattr(option, "from_text") else [keys]
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a text", Path: "a path"}
    return ["null" if option is type(None) else words.get(option, "any value")]
