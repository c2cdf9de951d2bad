"""A pyarrow file system that waits out outages at every step, for those who use it directly, such as Tune."""

from collections.abc import Callable
from itertools import count
from typing import Any

import pyarrow as pa
import pyarrow.fs

from tune_bisenet.outages import Patience


class Patient(pyarrow.fs.FileSystemHandler):  # type: ignore[misc]
    """The file system `inner`, waited for. What is written is kept in memory until it can be put there whole."""

    def __init__(self, inner: pyarrow.fs.FileSystem, patience: Patience) -> None:
        self.inner = inner
        self.patience = patience

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Patient) and self.inner == other.inner

    __hash__ = None  # type: ignore[assignment]

    def get_type_name(self) -> str:
        return str(self.inner.type_name)

    def normalize_path(self, path: str) -> str:
        return str(self.inner.normalize_path(path))

    # --- reading ---

    def get_file_info(self, paths: list[str]) -> Any:
        return self.patience(lambda: self.inner.get_file_info(paths))

    def get_file_info_selector(self, selector: Any) -> Any:
        return self.patience(lambda: self.inner.get_file_info(selector))

    def open_input_stream(self, path: str) -> Any:
        return self.patience(lambda: self.inner.open_input_stream(path))

    def open_input_file(self, path: str) -> Any:
        return self.patience(lambda: self.inner.open_input_file(path))

    # --- writing ---

    def create_dir(self, path: str, recursive: bool) -> None:
        self._write(lambda: self.inner.create_dir(path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        self._write(_once_done(lambda: self.inner.delete_dir(path), lambda: not self._is_there(path)))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool) -> None:
        self._write(lambda: self.inner.delete_dir_contents(path, missing_dir_ok=missing_dir_ok))

    def delete_root_dir_contents(self) -> None:
        self._write(lambda: self.inner.delete_dir_contents("", accept_root_dir=True))

    def delete_file(self, path: str) -> None:
        self._write(_once_done(lambda: self.inner.delete_file(path), lambda: not self._is_there(path)))

    def move(self, src: str, dest: str) -> None:
        is_done = lambda: self._is_there(dest) and not self._is_there(src)  # noqa: E731
        self._write(_once_done(lambda: self.inner.move(src, dest), is_done))

    def copy_file(self, src: str, dest: str) -> None:
        self._write(lambda: self.inner.copy_file(src, dest))

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return pa.PythonFile(_Upload(lambda content: self.put(path, content, metadata)), mode="w")

    def put(self, path: str, content: bytes, metadata: Any = None) -> None:
        """Create or replace a file."""
        self._write(lambda: self._put(path, content, metadata))

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        return self.inner.open_append_stream(path, metadata=metadata)

    # --- inside ---

    def _write(self, attempt: Callable[[], None]) -> None:
        self.patience(attempt, writing=True)

    def _put(self, path: str, content: bytes, metadata: Any) -> None:
        with self.inner.open_output_stream(path, metadata=metadata) as stream:
            stream.write(content)

    def _is_there(self, path: str) -> bool:
        return bool(self.inner.get_file_info(path).type != pyarrow.fs.FileType.NotFound)


def _once_done(attempt: Callable[[], None], is_done: Callable[[], bool]) -> Callable[[], None]:
    """`attempt`, where a second one finds that the first had worked, and only its answer was lost."""
    attempts = count()

    def again() -> None:
        if next(attempts) == 0 or not is_done():
            attempt()

    return again


class _Upload:
    """What pyarrow takes for a file: it is put in its place on closing."""

    def __init__(self, put: Callable[[bytes], None]) -> None:
        self._put = put
        self._content = bytearray()
        self.closed = False

    def write(self, content: Any) -> int:
        self._content += content
        return len(content)

    def tell(self) -> int:
        return len(self._content)

    def flush(self) -> None:
        pass

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._put(bytes(self._content))
