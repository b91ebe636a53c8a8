"""Training that torchrun has started, an agent on each machine: here both are this one."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import pytest
from calls import NETWORK, QUIET, ROOT, run_script
from killing import free_port

SMALL = [
    *NETWORK,
    *QUIET,
    "backbone.multipliers=[1]",
    "backbone.attention_resolutions=[]",
    "datamodule.batch_size=8",
    "trainer.max_steps=6",
    "trainer.threads=1",
    "callbacks.monitor.every=1",
    "callbacks.pictures=null",
]


def losses(run):
    with (run / "trace.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.slow
def test_two_machines_train_what_one_process_does(tmp_path):
    alone = run_script("train", *SMALL, "run=alone", cwd=tmp_path)
    assert alone.code == 0, alone.err
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
    ]
    meeting = [f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=mine", "--local-addr=127.0.0.1"]
    shape = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.num_nodes=2"]
    command = [*launcher, *meeting, str(ROOT / "scripts" / "train.py"), *SMALL, *shape, "run=mine", "resume=auto"]
    agents = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert "".join(outputs).count("processes: 2") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "mine"]
    summary = json.loads((tmp_path / "mine" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 6)
    assert (tmp_path / "mine" / "starts.jsonl").read_text().count("\n") == 1
    assert losses(tmp_path / "mine") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
