"""Writes folders and files so that they are never half there.

with locked(Path("runs/tiny")):                # no other process may write there meanwhile
    with staged(Path("runs/tiny")) as folder:  # a failure in here leaves runs/tiny as it was
        model.save_pretrained(folder)
with staged_file(Path("result.json")) as file:
    file.write_text("{}")
"""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps others who ask from a folder until the block ends, or the process, however it does."""
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise SystemExit(f"error: another process writes to '{folder}': wait for it, or name another folder") from error
    except OSError as error:
        raise SystemExit(f"error: '{folder}' cannot be written to: {error.strerror}") from error
    try:
        yield
    finally:
        if [file.name for file in folder.iterdir()] == [LOCK]:  # the block has written nothing
            (folder / LOCK).unlink()
            folder.rmdir()
        lock.release()


@contextmanager
def staged(folder: Path, publish: bool = True, whole: bool = False) -> Iterator[Path]:
    """Yields a new folder beside `folder`; when the block has ended well, its files move into `folder`.

    Of several processes that fill one folder, one has `publish`. With `whole`, what else is in `folder` goes.
    """
    new = folder.with_name(f".{folder.name}.incomplete")
    if publish:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    try:
        yield new
        if publish:
            folder.mkdir(exist_ok=True)
            names = {file.name for file in new.iterdir()}
            for name in sorted(names):
                (new / name).replace(folder / name)
            for file in [file for file in folder.iterdir() if whole and file.name not in names]:
                shutil.rmtree(file) if file.is_dir() else file.unlink()
    finally:
        if publish:
            shutil.rmtree(new, ignore_errors=True)


@contextmanager
def staged_file(file: Path) -> Iterator[Path]:
    """Yields the name of a file beside `file`; when the block has ended well, it takes the place of `file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f".{file.name}.{secrets.token_hex(4)}.incomplete")  # another process may write it as well
    try:
        yield new
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)
