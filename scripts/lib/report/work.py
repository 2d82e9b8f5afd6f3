"""A folder of finished measurements, each of which is made once."""

import hashlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib import environment
from lib.staging import staged_file


class Work:
    """A folder of finished measurements. `dates` of those that were asked for, each with the commit it was made at."""

    def __init__(self, folder: Path):
        marker = folder / "measurements.json"
        if folder.is_dir() and any(folder.iterdir()) and not marker.is_file():
            raise SystemExit(
                f"error: --work '{folder}' holds other things than this script's measurements; name another"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if not marker.is_file():
            with staged_file(marker) as file:
                file.write_text('{"of": "scripts/report.py"}\n')
        self.folder, self.dates = folder, set[str]()

    def file(self, name: str, settings: dict) -> Path:
        text = json.dumps(settings, sort_keys=True, default=str)
        return self.folder / f"{slug(name)}-{hashlib.sha256(text.encode()).hexdigest()[:10]}.json"

    def measured(self, name: str, settings: dict, measure: Callable[[], Any]) -> Any:
        """What `measure` gives, or gave at an earlier call with the same settings."""
        file = self.file(name, settings)
        if file.is_file():
            print(f"{name}: used again")
        else:
            print(f"{name} …")
            began = time.perf_counter()
            content = {"name": name, "settings": settings, "result": measure()}
            content |= {"date": environment.now(), "commit": environment.commit()}
            with staged_file(file) as new:
                new.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
            print(f"{name}: {time.perf_counter() - began:.0f} s")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            result, date, commit = (content[key] for key in ("result", "date", "commit"))
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(
                f"error: '{file}' is damaged ({error!r}); delete it, and it alone is measured again"
            ) from error
        self.dates.add(f"{date}, commit {commit}" if commit else date)
        return result


def slug(name: str) -> str:
    return re.sub("[^a-z0-9.]+", "-", name.lower()).strip("-")
