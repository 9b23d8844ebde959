"""A store whose values are signed, since PyTorch's TCPStore serves anyone who connects."""

from __future__ import annotations

import hmac
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megahp.errors import Fault
from megahp.launch.secret import REMEDY

SIZE = 32  # bytes of a signature


class SignedStore(dist.Store):
    """Wraps a store so that its values carry an HMAC-SHA256 of key and value. What a stranger has set is refused.

    Not signed are counters (`add`) and whether a key exists (`wait`): a stranger can make ranks wait, or not wait.
    """

    def __init__(self, store: dist.Store, key: bytes) -> None:
        super().__init__()
        self.store: Any = store  # Any: its annotations lack bytes
        self.key = key
        self.clones: list[SignedStore] = []  # kept alive: C++ may hold its own half alone

    def set(self, key: str, value: str | bytes) -> None:
        self.store.set(key, self._signed(key, value))

    def get(self, key: str) -> bytes:
        """Return a value. Raises Fault for one that is not signed, or with another secret."""
        return self._verified(key, self.store.get(key))

    def compare_set(self, key: str, expected_value: str | bytes, desired_value: str | bytes) -> bytes:
        expected = self._signed(key, expected_value) if expected_value else b""
        return self._verified(key, self.store.compare_set(key, expected, self._signed(key, desired_value)))

    def check(self, keys: list[str]) -> bool:
        """Return whether all keys exist. Raises Fault, as `get` does."""
        return self.store.check(keys) and all(self.get(key) is not None for key in keys)

    def set_timeout(self, timeout: timedelta) -> None:
        super().set_timeout(timeout)
        self.store.set_timeout(timeout)

    def add(self, key: str, value: int) -> int:
        return self.store.add(key, value)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self.store.wait(keys, timeout) if timeout else self.store.wait(keys)

    def delete_key(self, key: str) -> bool:
        return self.store.delete_key(key)

    def clone(self) -> SignedStore:
        """Return a store with a connection of its own."""
        self.clones.append(SignedStore(self.store.clone(), self.key))
        return self.clones[-1]

    def _signed(self, key: str, value: str | bytes) -> bytes:
        data = value.encode() if isinstance(value, str) else bytes(value)
        return data + self._signature(key, data)

    def _verified(self, key: str, signed: bytes) -> bytes:
        data, signature = signed[:-SIZE], signed[-SIZE:]
        if not hmac.compare_digest(signature, self._signature(key, data)):
            raise Fault(
                f"{key!r} in the ranks' store is not signed with this run's secret: it is a stranger's, or left from "
                f"an earlier attempt, or a rank has another secret; {REMEDY}"
            )
        return data

    def _signature(self, key: str, data: bytes) -> bytes:
        name = key.encode()  # with its length before it, or another key and value could have the same bytes
        return hmac.digest(self.key, len(name).to_bytes(8, "big") + name + data, "sha256")
