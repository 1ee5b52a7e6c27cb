"""Plans prompts for 1000 classes and cuts them into shards: CPU seconds and peak memory, each size in a fresh process.

python benchmarks/prompts.py [PROMPTS ...]
"""

import json
import subprocess
import sys

PROBE = """
import json, resource, sys, tempfile, time
from pathlib import Path
import numpy as np
from ltnb.jobs import Job, open_job
from ltnb.knowledge import clip_tokenizer, shipped
from ltnb.prompts import compose, prompt_plan, wheels


def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


n = int(sys.argv[1])
known = [k.model_copy(update={"name": f"{k.name} {i}", "called": f"{k.called} {i}"})
         for i in range(10) for k in shipped("cifar100").values()]
start = time.process_time()
clip_tokenizer()
row = {"prompts": n, "tokenizer_s": time.process_time() - start, "mb_before": peak()}
start = time.process_time()
lists = [wheels(k) for k in known]
row["wheels_s"] = time.process_time() - start
start = time.process_time()
for w in lists: compose(w, np.arange(n // len(known)))
row |= {"compose_s": time.process_time() - start, "mb_compose": peak() - row["mb_before"]}
start = time.process_time()
plan = prompt_plan(known, [n // len(known)] * len(known))
row |= {"plan_s": time.process_time() - start, "mb_plan": peak() - row["mb_before"]}
start = time.process_time()
with tempfile.TemporaryDirectory() as folder:
    job = open_job(folder, plan, "a model", Job())
    row |= {"shards": len(job.shards), "list_mb": (Path(folder) / "shards.jsonl").stat().st_size / 1e6}
row |= {"shard_s": time.process_time() - start, "mb_shard": peak() - row["mb_before"]}
row["different"] = len(set(plan["prompt"].tolist()))
print(json.dumps({k: round(v, 1) for k, v in row.items()}))
"""

if __name__ == "__main__":
    for n in map(int, sys.argv[1:] or (35_000, 350_000)):
        probe = [sys.executable, "-c", PROBE, str(n)]
        print(json.loads(subprocess.run(probe, check=True, capture_output=True, text=True).stdout))
