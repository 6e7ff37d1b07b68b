"""Where in a study file a run's key is written, for complaints about it."""

import re
from typing import Any

from .combinations import Combination
from .run_keys import Content
from .study_config import StudyConfig

_KEY = re.compile(r"[A-Za-z_][\w-]*(?:\.[\w-]+)*")


def written_as(study: StudyConfig, combination: Combination, complaint: str) -> str:
    """`` (written as run.model.width)`` for a complaint about ``model.width``; empty where no key of it is written.

    A complaint starts with a key; others that it speaks of have dots.
    """
    first, *others = _KEY.findall(complaint) or [""]
    keys = dict.fromkeys(_given(combination.content, key) for key in (first, *(key for key in others if "." in key)))
    places = [f"{_section(study, combination, key)}.{key}" for key in keys if key]
    return f" (written as {', '.join(places)})" if places else ""


def _given(content: Content, key: str) -> str:
    """As much of ``key`` as the run has; empty unless that is all of it, an entry of a list, or a section."""
    value: Any = content
    found: list[str] = []
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            break
        value = value[part]
        found.append(part)
    whole = len(found) == key.count(".") + 1 or isinstance(value, list)
    return ".".join(found) if whole else ""


def _section(study: StudyConfig, combination: Combination, key: str) -> str:
    """The part of the file that wins."""
    for section, keys in (("grid", combination.values), ("set", study.groups[combination.group].set)):
        if any(f"{key}.".startswith(f"{other}.") or other.startswith(f"{key}.") for other in keys):
            return f"groups.{combination.group}.{section}"
    return "run"
