"""Serves the page with a stub model: `python stub_server.py PORT STATUS.json [STEP_S]`.

Five times a second the file tells what the model has been asked, and how much memory the process holds.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, cast

from stub_model import StubModel

from mixmodal.serve.server import ServeConfig, launch
from mixmodal.serve.studio import Studio

COUNTERS = ("open", "most_open", "num_closed", "num_finished", "num_infilled")


def tell(model: StubModel, path: Path) -> None:
    """Writes the counters again and again."""
    while True:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found = {name: getattr(model, name) for name in COUNTERS}
        found["rss_mb"] = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
        found["num_files"] = sum(1 for _ in Path(os.environ.get("GRADIO_TEMP_DIR", "/nowhere")).rglob("*.png"))
        path.with_suffix(".new").write_text(json.dumps(found))
        path.with_suffix(".new").replace(path)
        time.sleep(0.2)


if __name__ == "__main__":
    port, status, *step = sys.argv[1:]
    model = StubModel(has_memory=True, step_s=float(step[0]) if step else 0.0)
    threading.Thread(target=tell, args=(model, Path(status)), daemon=True).start()
    launch(
        Studio(cast(Any, model)), ServeConfig(model="runs/stub/export", port=int(port), max_upload_mb=1, max_queue=4)
    )
