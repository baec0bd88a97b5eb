"""Operations in flight, as callers see them."""

from __future__ import annotations

from typing import Generic, TypeVar

from ep_comm.backends.base import BegunOp
from ep_comm.errors import EPError
from ep_comm.received import Promised

T = TypeVar("T")


class Begun(Generic[T]):
    """An operation begun with `wait=False`: `wait()` returns what the call would have returned.

    The operation goes on whether or not anybody waits, and holds its tensors until it is over; do
    not change them before. Dropping a Begun drops the result, not the operation.
    """

    def __init__(self, op: BegunOp) -> None:
        self._op = op
        self._result: list[T] = []
        self._error: EPError | None = None

    def done(self) -> bool:
        """Whether `wait()` would return at once."""
        return bool(self._result) or self._error is not None or self._op.done()

    @property
    def promised(self) -> Promised | None:
        """The tensors `wait()` fills, already there: a slab on the cpu backend, else None.

        They are the ones it returns; until then their contents are undefined.
        """
        promised: Promised | None = getattr(self._op, "promised", None)
        return promised

    def wait(self) -> T:
        """Finish the operation and return its result.

        Begun operations may be waited for in any order, and again: the result is the same object.

        Raises:
            EPError: whatever the operation raised; again on every later call.
        """
        if self._error is not None:
            raise self._error
        if not self._result:
            try:
                self._result.append(self._op.finish())
            except EPError as error:
                self._error = error
                raise
        return self._result[0]
