"""Classes found by name: one file each in a folder, or `package.module:Class` elsewhere."""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import ClassVar, Generic, Protocol, TypeVar


class Named(Protocol):
    name: ClassVar[str]


T = TypeVar("T", bound=Named)


class Registry(Generic[T]):
    """A module of `package` defines one class that derives from `base` and sets `name`; nothing else has to change."""

    def __init__(self, kind: str, package: str, base: type[T]):
        self.kind, self.package, self.base = kind, package, base

    def names(self) -> list[str]:
        """All names of the folder, sorted."""
        return sorted(self._classes())

    def find(self, name: str) -> type[T]:
        """The class called `name`, or `package.module:Class`, which is imported. ValueError lists the known ones."""
        if ":" in name:
            return self._elsewhere(name)
        classes = self._classes()
        if name not in classes:
            known = ", ".join(sorted(classes))
            raise ValueError(f"{self.kind} must be one of {known}, or package.module:Class; got {name!r}")
        return classes[name]

    def _classes(self) -> dict[str, type[T]]:
        found: dict[str, type[T]] = {}
        for info in iter_modules(import_module(self.package).__path__):
            for cls in self._of(import_module(f"{self.package}.{info.name}")):
                if cls.name in found:
                    raise ValueError(f"{self.kind} name {cls.name!r} is taken twice: {found[cls.name]} and {cls}")
                found[cls.name] = cls
        return found

    def _of(self, module: ModuleType) -> list[type[T]]:
        classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, self.base)]
        return [cls for cls in classes if cls.__module__ == module.__name__ and cls is not self.base]

    def _elsewhere(self, name: str) -> type[T]:
        path, _, attribute = name.partition(":")
        try:
            cls = getattr(import_module(path), attribute)
        except (ImportError, AttributeError, ValueError, SyntaxError) as error:
            raise ValueError(f"{self.kind} {name!r} cannot be imported: {error}") from None
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise ValueError(
                f"{self.kind} {name!r} must be a class that derives from {self.base.__name__}; got {cls!r}"
            )
        return cls
