"""Opens generated class folders of 10,000 and 100,000 images, each in a fresh process: seconds and peak memory.

python benchmarks/open_folder.py [FOLDER]
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

PROBE = """
import json, resource, sys, time
from ltnb.sources import LongTail
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
data = LongTail.folder(sys.argv[1])
opened = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
facts = data.describe()
card = time.perf_counter() - start - opened
for i in range(0, len(data.train), max(1, len(data.train) // 5000)): data.train[i]
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"images": sum(facts["images"].values()), "open_s": round(opened, 2), "card_s": round(card, 2),
                  "mb_before": before // 1024, "mb_open": (peak - before) // 1024,
                  "mb_after_card_and_5000_decoded": (after - before) // 1024}))
"""


def generate(root, n, n_classes=1000):
    "n different PNG files in class folders: nine tenths train, one tenth test"
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(n):
        folder = root / ("test" if i % 10 == 0 else "train") / f"class{i // 10 % n_classes:04}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i}.png", compress_level=0)
    return root


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        rows = []
        for n in (10_000, 100_000):
            root = generate(Path(folder) / str(n), n)
            probe = [sys.executable, "-c", PROBE, str(root)]
            rows.append(json.loads(subprocess.run(probe, check=True, capture_output=True, text=True).stdout))
            print(rows[-1])
        slower, more = rows[1]["open_s"] / max(rows[0]["open_s"], 0.01), rows[1]["mb_open"] - rows[0]["mb_open"]
        print(f"ten times the images: {slower:.1f} x the time to open, {more} MB more")
