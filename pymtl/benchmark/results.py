"""What a benchmark leaves behind: JSON with the machine, the versions and the date."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

from pymtl.benchmark.machine import facts


def stamped(**measured: Any) -> dict[str, Any]:
    """The measurements, with when and on what they were made."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"date": now, "machine": facts(), **measured}


def write(result: dict[str, Any], path: Path) -> None:
    """Writes the result, making the folder if need be; what stood there before is replaced as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
