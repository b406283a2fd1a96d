"""A run in the eyes of a sweep, in milliseconds: python fake_trial.py RUN reads config.json and writes a run's files.

The metric grows with the steps towards the learning rate. temperature 0.5 fails at half-way; width 7 gives another metric.
SIGTERM saves and ends with 143, as a run does; a start continues from what is saved.
"""

import json
import signal
import sys
import time
from pathlib import Path

run = Path(sys.argv[1])
config = json.loads((run / "config.json").read_text())
steps, every, rate = config["train"]["steps"], config["evals"]["val"]["every"], config["optim"]["learning_rate"]
metric = "val/other" if config["method"]["width"] == 7 else "val/score"
saved, log = run / "saved", run / "metrics.jsonl"
terminated = []
signal.signal(signal.SIGTERM, lambda *_: terminated.append(1))
step = int(saved.read_text()) if saved.exists() else 0
print("starting at", step, flush=True)
if log.exists():
    kept = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= step]
    (run / "part").write_text("".join(line + "\n" for line in kept))
    (run / "part").replace(log)
while step < steps and not terminated:
    time.sleep(config["log"]["every"] / 1000)
    step += 1
    if config["method"]["temperature"] == 0.5 and step > steps // 2:
        sys.exit("the loss was 3 apples")
    with log.open("a") as file:
        print(json.dumps({"step": step, "samples": step, "loss": 1.0}), file=file)
        if step % every == 0 or step == steps:
            print(json.dumps({"step": step, metric: rate * step / steps, "val/also": float(config["seed"])}), file=file)
saved.write_text(str(step))
sys.exit(143 if terminated and step < steps else 0)
