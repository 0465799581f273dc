"""A name in a config is a file of a room, or the dotted path of the user's own class.

``rewards[].type: clip`` is the class in ``stage_ray/rewards/clip.py`` whose name ends in ``Reward``. So a new scorer,
recipe, family or benchmark is one new file: no list of names is kept anywhere.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stage_ray.errors import ConfigError, suggest


@dataclass(frozen=True, slots=True)
class Registry:
    """The names that one room offers. Importing a file waits until its name is asked for.

    Attributes:
        room: package that holds one file (or folder) a name.
        suffix: what the class of each file ends in.
        what: the field's word for it, for messages.
    """

    room: str
    suffix: str
    what: str

    def names(self) -> list[str]:
        """Every name that a config may give, in alphabetical order."""
        return sorted(self._files())

    def find(self, name: str, key: str) -> Any:
        """The class of a name or dotted path.

        Args:
            key: the config's, for messages.

        Raises:
            ConfigError: no such file (with the nearest name), module or attribute.
        """
        files = self._files()
        if name in files:
            return getattr(importlib.import_module(f"{self.room}.{name}"), files[name])
        if "." in name:
            return import_dotted(name, key)
        own = "(or give the dotted path of your own class)"
        raise ConfigError(f"{key} = {name!r} is no known {self.what}; {suggest(name, files)} {own}")

    def _files(self) -> dict[str, str]:
        """Name -> class, read from the sources without running them."""
        room = Path(str(importlib.import_module(self.room).__file__)).parent
        pattern = re.compile(rf"^(?:class|from \S+ import) (\w+{self.suffix})\b", re.MULTILINE)
        found = {}
        for path in [*room.glob("*.py"), *room.glob("*/__init__.py")]:
            name = path.parent.name if path.name == "__init__.py" else path.stem  # a folder by its own name
            matches = pattern.finditer(path.read_text(encoding="utf-8"))
            # A file's class is the first that it defines; a folder's is named by importing it in its `__init__`.
            own = [match[1] for match in matches if match[0].startswith("class") or path.name == "__init__.py"]
            if own and name != "base":  # `base` defines what the others are
                found[name] = own[0]
        return found


def import_dotted(name: str, key: str) -> Any:
    """Import ``package.module.Name``; ``key`` is the config's, for messages.

    Raises:
        ConfigError: not a dotted name, no such module, or no such attribute.
    """
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ConfigError(f"{key} {name!r} is no dotted path of a class (package.module.Class)")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{key} {name!r}: no module named {error.name!r}") from error
    except AttributeError as error:
        raise ConfigError(f"{key} {name!r}: module {module!r} has no {attribute!r}") from error


def require_extra(extra: str, *modules: str) -> None:
    """Raise a ConfigError that names the extra where one of its modules is not installed."""
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        raise ConfigError(f"{', '.join(missing)} is not installed here; pip install 'stage-ray[{extra}]'")
