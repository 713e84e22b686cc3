"""Fields of settings sections: types, one sentence each, which of them shape a result, and the checks they share."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import math
import operator
import textwrap
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cluster.errors import UserError


def execution(default: Any) -> Any:
    """A field that affects how a stage runs and not its result: changing it makes nothing stale."""
    return dataclasses.field(default=default, metadata={"execution": True})


def outcome_settings(section: Any) -> dict[str, Any]:
    """The fields of a section that affect a stage's result; those of its execution are left out.

    A field with `outcome` in its metadata is represented by that function of its value.
    """
    return {field.name: field.metadata.get("outcome", lambda value: value)(getattr(section, field.name))
            for field in dataclasses.fields(section) if not field.metadata.get("execution", False)}


def require(holds: bool, key: str, value: Any, rule: str) -> None:
    """Raise UserError naming the key, its value and the rule that it breaks."""
    if not holds:
        raise UserError(f"{key}={value!r}: {rule}")


def positive(section: str, settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        require(value is None or (value > 0 and math.isfinite(value)), f"{section}.{name}", value, "must be above 0")


def not_negative(section: str, settings: Any, *names: str) -> None:
    for name in names:
        require(getattr(settings, name) >= 0, f"{section}.{name}", getattr(settings, name), "must not be negative")


def fraction(section: str, settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        require(0 <= value <= 1, f"{section}.{name}", value, "must be between 0 and 1")


def check_choices(name: str, section: Any) -> None:
    """Raise UserError for the first field whose value (or a list item of it) is not allowed by its `Literal` type."""
    for field, hint in get_type_hints(type(section)).items():
        if choices := _choices(hint):
            value = getattr(section, field)
            wrong = [item for item in (value if isinstance(value, list) else [value]) if item not in choices]
            allowed = ", ".join("null" if choice is None else choice for choice in choices)
            require(not wrong, f"{name}.{field}".lstrip("."), value, f"must be one of {allowed}")


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values that a `Literal` type, alone or within a list or a union with None, allows; () for other types."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    parts = get_args(hint)
    found = tuple(itertools.chain.from_iterable(_choices(part) for part in parts))
    return (*found, None) if found and types.NoneType in parts else found


def schema(section: type) -> type:
    """The section for OmegaConf, which does not support `Literal` types: such fields become str."""
    hints = get_type_hints(section)
    fields: list[Any] = [
        (field.name, _plain(hints[field.name]),
         dataclasses.field(default_factory=field.default_factory) if callable(field.default_factory)
         else dataclasses.field(default=field.default))
        for field in dataclasses.fields(section)]
    return dataclasses.make_dataclass(section.__name__, fields)


def _plain(hint: Any) -> Any:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return str
    if origin in (Union, types.UnionType):
        return functools.reduce(operator.or_, map(_plain, parts))
    return origin[tuple(map(_plain, parts))] if origin else hint


def descriptions(section: type) -> dict[str, str]:
    """The sentence under each field of a section."""
    found = {}
    for kind in reversed(section.__mro__[:-1]):
        [tree] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in itertools.pairwise(tree.body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) \
                    and isinstance(below.value, ast.Constant):
                assert isinstance(field.target, ast.Name)
                found[field.target.id] = " ".join(str(below.value.value).split())
    return found
