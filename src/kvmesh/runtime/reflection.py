"""Server reflection of services that come and go, each with its descriptors in a pool of its own or in the default."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha import reflection

_Found = TypeVar("_Found")


class Reflection(reflection.aio.ReflectionServicer):  # type: ignore[misc]  # grpcio-reflection has no types
    """What one server says that it serves."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._by_name: dict[str, DescriptorPool] = {}
        super().__init__(())

    def add(self, full_name: str, pool: DescriptorPool | None = None) -> None:
        """List a service, in the place of one of the same name; `pool` has its descriptors, None = the default one."""
        self._by_name[full_name] = descriptor_pool.Default() if pool is None else pool
        self._renew()

    def remove(self, full_name: str) -> None:
        """List a service no longer. Idempotent."""
        self._by_name.pop(full_name, None)
        self._renew()

    def _renew(self) -> None:
        """Tell the base class, which takes names and pool in its constructor and nowhere else."""
        super().__init__(tuple(self._by_name), pool=_Pools(self._by_name.values()))


class _Pools:
    """Several pools, asked in order; has what grpc_reflection calls of a DescriptorPool."""

    def __init__(self, pools: Iterable[DescriptorPool]) -> None:
        self._pools: list[DescriptorPool] = [descriptor_pool.Default()]
        for pool in pools:
            if all(pool is not known for known in self._pools):
                self._pools.append(pool)

    def FindFileByName(self, name: str) -> Any:  # noqa: N802
        return self._first(lambda pool: pool.FindFileByName(name))

    def FindFileContainingSymbol(self, name: str) -> Any:  # noqa: N802
        return self._first(lambda pool: pool.FindFileContainingSymbol(name))

    def FindMessageTypeByName(self, name: str) -> Any:  # noqa: N802
        return self._first(lambda pool: pool.FindMessageTypeByName(name))

    def FindExtensionByNumber(self, message: Any, number: int) -> Any:  # noqa: N802
        return message.file.pool.FindExtensionByNumber(message, number)

    def FindAllExtensions(self, message: Any) -> Any:  # noqa: N802
        return message.file.pool.FindAllExtensions(message)

    def _first(self, find: Callable[[DescriptorPool], _Found]) -> _Found:
        for pool in self._pools[:-1]:
            try:
                return find(pool)
            except KeyError:
                continue
        return find(self._pools[-1])
