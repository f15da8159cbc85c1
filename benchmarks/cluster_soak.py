"""What may befall a job on a Ray cluster, for real: `make soak-cluster`.

    [SOAK_PARTS=killed,worker,...] python -m benchmarks.cluster_soak [OUT.md]

Each row is a training of two small shops by up to three workers, each on a Ray node of its own, that something befalls
at a named step: a node killed or cut off from the network, a worker killed or frozen, the dashboard killed, a node
added, drained, `ray job stop`, object storage that is all they share. It must end with the ledger and the losses of a
run that nothing befell, after as many attempts as that takes. Prints a table, writes it to OUT.md, and
ends with exit code 1 when any row failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import ray

from benchmarks.soak import out_of
from dtrain.cli.main import main as dtrain
from dtrain.core.config import load_config
from dtrain.core.storage import read_jsonl
from dtrain.train.config import RunConfig
from dtrain.train.runfiles import RunFiles
from dtrain.train.runfolder import read_outcome, read_timeline
from tests.conftest import make_tiny_encoder
from tests.hosts import Hosts, why_not
from tests.jobs import Job
from tests.ray_nodes import arm, nodes
from tests.ray_runs import OVERRIDES, config_of, ledger, on_cluster, same_run, unbroken_run
from tests.s3_server import s3_server
from tests.train_toys import ROOT, command, losses, write_shops

FROZEN_S = 300  # a freeze that the soak itself makes must not look like a hung worker


class Soak:
    """Folders, and the run that nothing befalls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.encoder = make_tiny_encoder(folder / "encoder")
        self.shops = write_shops(folder / "shops")
        self.points = folder / "failpoints.json"
        self.reference = unbroken_run(folder / "unbroken", self.shops, self.encoder)

    def job(self, address: str, name: str, *overrides: str) -> Job:
        return on_cluster(address, config_of(self.folder / name, self.shops, self.encoder), *overrides)

    def end(self, job: Job, name: str, attempts: int) -> list[str]:
        """What is wrong with the run `name` once `job` has ended."""
        code = job.end()
        wrong = [f"exit code {code}: {' '.join(job.lines[-5:])}"] if code else []
        found = attempts_of(job)
        causes = [line.strip() for line in job.lines if re.search(r"attempt \d+ lost", line)]
        wrong += [f"{found} attempts, not {attempts}: {' | '.join(causes)}"] if found != attempts else []
        run = self.folder / name / "run"
        return wrong + self.differences(run, run / "checkpoints")

    def differences(self, run: Path, checkpoints: str | Path) -> list[str]:
        """What a run has other than the one that nothing befell."""
        wrong = []
        try:
            same_run(run, self.reference, checkpoints)
        except AssertionError as error:
            wrong.append(str(error).splitlines()[0])
        if dtrain(["checkpoint", "verify", str(checkpoints)]):
            wrong.append("a checkpoint is damaged")
        return wrong

    def frozen(self, run: str | Path) -> psutil.Process:
        """Rank 0 of a run, once it has frozen itself."""
        rank = psutil.Process(read_outcome(RunFiles(run))["pid"])
        deadline = time.monotonic() + 60
        while rank.status() != psutil.STATUS_STOPPED:
            if time.monotonic() > deadline:
                raise SystemExit(f"{run}: rank 0 did not freeze")
            time.sleep(0.1)
        return rank


#: What befell a run, and what is wrong with it.
Row = tuple[str, list[str]]


def plain(soak: Soak) -> Iterator[Row]:
    """Nothing befalls it: bit for bit what other launchers give. Its evaluation; a failure of the program."""
    with nodes(2, soak.points) as cluster:
        with soak.job(cluster.address, "plain", "cluster.workers.min=2") as job:
            wrong = soak.end(job, "plain", 1)
        run = soak.folder / "plain/run"
        wrong += [] if losses(run) == losses(soak.reference) else ["losses or gradient norms are not bit-equal"]
        yield "nothing", wrong

        code = dtrain(["evaluate", str(run)])
        expected = json.loads((run / "metrics.json").read_text())
        (run / "metrics.json").unlink()
        where = [f"cluster.address={cluster.address}", "cluster.workers.min=2", "cluster.workers.max=2"]
        with Job(command("evaluate", str(run), *where)) as job:
            wrong = [f"exit codes {code}, {ended}"] if (ended := job.end()) or code else []
        wrong += [] if json.loads((run / "metrics.json").read_text()) == expected else ["other metrics"]
        yield "evaluated by two workers and by one process", wrong

        with soak.job(cluster.address, "failing", f"data.path={soak.folder}/nowhere") as job:
            code, attempts = job.end(), attempts_of(job)
        yield "a wrong data.path", [] if (code, attempts) == (3, 1) else [f"exit code {code}, {attempts} attempts"]


def attempts_of(job: Job) -> int:
    return sum(bool(re.search(r"attempt \d+: \d+ workers", line)) for line in job.lines)


def killed(soak: Soak) -> Iterator[Row]:
    """A node killed before the first step, in the middle, and at the end."""
    for when, words, step in (
        ("in the first step", "on 2 ranks", 1),
        ("in the middle", "checkpoint of step 25", 28),
        ("in the last step", "checkpoint of step 55", 60),
    ):
        with nodes(2, soak.points) as cluster:
            arm(soak.points, (1, step, "stop"))
            name = f"killed-{step}"
            with soak.job(cluster.address, name, f"cluster.hang_s={FROZEN_S}") as job:
                job.until(words)
                cluster.kill(1)
                yield f"node killed {when}", soak.end(job, name, 2)


def worker(soak: Soak) -> Iterator[Row]:
    """Workers killed and frozen, each at a step of its own."""
    with nodes(2, soak.points) as cluster:
        for do in ("kill", "stop"):
            arm(soak.points, (1, 28, do))
            name = f"worker-{do}"
            with soak.job(cluster.address, name) as job:
                yield f"worker: SIG{do.upper()} of rank 1 at step 28", soak.end(job, name, 2)


def grown(soak: Soak) -> Iterator[Row]:
    """1 node, then two more, then one less."""
    with nodes(1, soak.points) as cluster:
        arm(soak.points, (0, 12, "hold"))
        name = "grown"
        more = ("cluster.workers.max=3", "cluster.grow_every_s=1", f"cluster.hang_s={FROZEN_S}")
        with soak.job(cluster.address, name, *more) as job:
            job.until("checkpoint of step 10")
            cluster.add()
            cluster.add()
            job.until("more workers: saving and stopping")
            arm(soak.points, (2, 40, "stop"))
            job.until("checkpoint of step 35")
            cluster.kill(2)
            wrong = soak.end(job, name, 3)
        sizes = [start["ranks"] for start in read_timeline(soak.folder / name / "run")]
        yield "1 node, two added, one killed", wrong + ([] if sizes == [1, 3, 2] else [f"ranks {sizes}, not 1, 3, 2"])


def drained(soak: Soak) -> Iterator[Row]:
    """A node that is announced to go."""
    with nodes(2, soak.points) as cluster:
        arm(soak.points, (0, 28, "stop"))
        name = "drained"
        with soak.job(cluster.address, name, f"cluster.hang_s={FROZEN_S}") as job:
            job.until("checkpoint of step 25")
            ray.init(cluster.address, log_to_driver=False)
            node = next(n for n in ray.nodes() if n["Resources"].get("CPU"))
            ray.shutdown()
            reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "soak"]
            limit = ["--deadline-remaining-seconds", "120"]
            command = ["ray", "drain-node", "--address", cluster.address, "--node-id", node["NodeID"], *reason, *limit]
            with Job(command) as drain:
                wrong = ["ray drain-node failed"] if drain.end() else []
            time.sleep(10)  # for Ray to tell its workers, which it does every 5 s
            soak.frozen(soak.folder / name / "run").resume()
            wrong += soak.end(job, name, 2)
        causes = [start["cause"] for start in read_timeline(soak.folder / name / "run")]
        yield "node drained", wrong + ([] if causes[1:] == ["preemption"] else [f"causes {causes}"])


def dashboard(soak: Soak) -> Iterator[Row]:
    """The dashboard killed in the middle."""
    with nodes(2, soak.points, include_dashboard=True, dashboard_port=0) as cluster:
        arm(soak.points, (0, 28, "stop"))
        name = "dashboard"
        with soak.job(cluster.address, name, f"cluster.hang_s={FROZEN_S}") as job:
            job.until("checkpoint of step 25")
            rank = soak.frozen(soak.folder / name / "run")
            below = psutil.Process().children(recursive=True)
            found = [p for p in below if "dashboard/dashboard.py" in " ".join(p.cmdline())]
            for process in found:
                process.kill()
            rank.resume()
            yield "dashboard killed", soak.end(job, name, 1) + ([] if found else ["there was no dashboard"])


def metrics(soak: Soak) -> Iterator[Row]:
    """What Prometheus would read while a run trains; then `dtrain stop`."""
    with nodes(1, soak.points) as cluster:
        config = config_of(soak.folder / "metrics", soak.shops, soak.encoder, steps=100_000, checkpoint_every=100)
        with on_cluster(cluster.address, config) as job:
            job.until("steps/s")
            ray.init(cluster.address, log_to_driver=False)
            ports = [node["MetricsExportPort"] for node in ray.nodes()]
            address = ray.nodes()[0]["NodeManagerAddress"]
            ray.shutdown()
            deadline, missing = time.monotonic() + 60, set(METRICS)
            while missing and time.monotonic() < deadline:
                time.sleep(2)
                pages = [urllib.request.urlopen(f"http://{address}:{port}/metrics").read().decode() for port in ports]
                missing = {name for name in METRICS if not any(f"\n{name}{{" in page for page in pages)}
            wrong = [f"not there: {sorted(missing)}"] if missing else []
            wrong += ["dtrain stop failed"] if dtrain(["stop", str(soak.folder / "metrics/run")]) else []
            code = job.end()
        yield "metrics while it trains, then dtrain stop", wrong + ([f"exit code {code}, not 75"] if code != 75 else [])


METRICS = tuple(
    f"ray_dtrain_{name}"
    for name in (
        "step loss step_seconds checkpoint_seconds tokens_per_second targets_per_second padding_ratio data_wait_ratio "
        "restarts samples_total"
    ).split()
)


def cut(soak: Soak) -> Iterator[Row]:
    """A host cut off from the network, then joined again; and `ray job stop`."""
    if reason := why_not():
        print(f"hosts in network namespaces: not tried, {reason}", flush=True)
        return
    checkout = soak.folder / "checkout"
    checkout.mkdir()
    for part in ("dtrain", "launch"):
        (checkout / part).symlink_to(ROOT / part)
    with tempfile.TemporaryDirectory(prefix="h", dir="/tmp") as folder, Hosts(3, Path(folder)) as hosts:
        for number in (1, 2, 3):
            hosts.start_ray(number)

        def submit(name: str, *overrides: str) -> Job:
            config = config_of(checkout / "configs" / name, soak.shops, soak.encoder, **TRAIN.get(name, {}))
            run = f"run={soak.folder / name / 'run'}"
            place = ["--working-dir", str(checkout), *OVERRIDES, run, "cluster.placement=spread", *overrides]
            return hosts.job(1, [sys.executable, "-m", "dtrain.cli", "submit", str(config), *place])

        with submit("stopped") as job:
            job.until("submitted ")
            number = job.lines[-1].split()[-1]
            job.until("checkpoint of step 25")
            with hosts.job(1, ["ray", "job", "stop", "--address", "http://127.0.0.1:8265", number]) as stop:
                stop.end()
            job.end()
        outcome = json.loads((soak.folder / "stopped/run/outcome.json").read_text())
        wrong = [] if outcome.get("status") == "stopped" else [f"outcome {outcome}"]
        yield "ray job stop saves within checkpoint.grace_s", wrong

        with submit("cut") as job:
            job.until("checkpoint of step 10")
            hosts.cut(3)
            wrong = soak.end(job, "cut", 2)
        yield "host cut off from the network", wrong


def storage(soak: Soak) -> Iterator[Row]:
    """Driver and workers that share object storage alone. Stopped by SIGTERM to the driver, then gone on with."""
    with s3_server() as server, environment(server.env), nodes(2, soak.points) as cluster:
        url = f"{server.url}/shared/run"
        arm(soak.points, (0, 28, "hold"))
        with soak.job(cluster.address, "storage", f"run={url}", f"cluster.hang_s={FROZEN_S}") as job:
            job.until("checkpoint of step 25")
            job.process.send_signal(signal.SIGTERM)
            job.until("SIGTERM: saving and stopping")
            arm(soak.points)
            code, told = job.end(), job.lines[-1]
        wrong = [] if code == 75 and f"{url}: stopped as asked (SIGTERM)" in told else [f"exit code {code}: {told}"]
        with soak.job(cluster.address, "storage", f"run={url}") as job:
            wrong += [f"exit code {code}: {job.lines[-1]}"] if (code := job.end()) else []
        files = RunFiles(url)
        files.fetch()
        wrong += soak.differences(files.path, f"{url}/checkpoints")
        left = [name for name in files.blobs.names("") if name.startswith((".driver", "stop-", "ray"))]
        wrong += [f"left behind: {left}"] if left else []
        wrong += ["files beside the config"] if len(list((soak.folder / "storage").iterdir())) != 1 else []
        yield "run, checkpoints and requests in object storage alone", wrong


@contextlib.contextmanager
def environment(more: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the length of the block, none of which was set before."""
    os.environ.update(more)
    try:
        yield
    finally:
        for name in more:
            del os.environ[name]


def readme(soak: Soak) -> Iterator[Row]:
    """The two real platforms of `make demo`, by `ray job submit` on two hosts and by the deepspeed launcher on one."""
    data, encoder = ROOT / "runs/data/demo", ROOT / load_config(RunConfig, DEMO).model.encoder.name
    if reason := why_not() or ("" if (data / "manifest.json").is_file() else f"no {data}; run make demo first"):
        print(f"the job of the README: not tried, {reason}", flush=True)
        return
    common = [f"data.path={data}", f"model.encoder.name={encoder}", f"train.steps={README_STEPS}", "stream.ledger=true"]
    common += ["schedule.total_steps=1000", "train.valid_every=0", "train.log_every=1", "dist.threads=1"]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", "PORT"]
    with Job([*launcher, "launch/train.py", str(DEMO), f"run={soak.folder}/launched", *common]) as job:
        wrong = [f"deepspeed: {job.lines[-5:]}"] if job.end() else []
    workers = ["cluster.workers.min=2", "cluster.workers.max=2", "cluster.placement=spread"]
    with tempfile.TemporaryDirectory(prefix="h", dir="/tmp") as folder, Hosts(3, Path(folder)) as hosts:
        for number in (1, 2, 3):
            hosts.start_ray(number)
        submit = ["ray", "job", "submit", "--address", "http://127.0.0.1:8265", "--working-dir", str(ROOT), "--"]
        train = ["python", "launch/ray_train.py", str(DEMO.relative_to(ROOT)), f"run={soak.folder}/submitted"]
        with hosts.job(1, [*submit, *train, *common, *workers]) as job:
            wrong += [f"submitted: {job.lines[-5:]}"] if job.end() else []
    runs = [soak.folder / name for name in ("launched", "submitted")]
    ledgers = [ledger(run / "checkpoints") for run in runs]
    figures = [[line[1:] for line in losses(run)] for run in runs]
    valid = [[line["valid"] for line in read_jsonl(run / "log.jsonl") if "valid" in line] for run in runs]
    wrong += [] if ledgers[0].equals(ledgers[1]) else ["other samples, or another order"]
    wrong += [] if figures[0] == figures[1] and len(figures[0]) == README_STEPS else ["other losses or gradient norms"]
    wrong += [] if valid[0] == valid[1] and valid[0] else [f"other metrics: {valid}"]
    yield f"the job of the README submitted to two hosts, {README_STEPS} steps", wrong


DEMO = ROOT / "configs/train/demo.yaml"
README_STEPS = 40
TRAIN = {"stopped": {"steps": 100_000, "checkpoint_every": 25}}
PARTS: dict[str, Callable[[Soak], Iterator[Row]]] = {
    part.__name__: part for part in (plain, killed, worker, grown, drained, dashboard, metrics, storage, cut, readme)
}


def run(parts: list[str], out: Path | None) -> int:
    rows: list[tuple[str, float, list[str]]] = []
    with tempfile.TemporaryDirectory(prefix="soak-", dir="/tmp") as folder:
        soak = Soak(Path(folder))
        for part in parts:
            began = time.monotonic()
            for name, wrong in PARTS[part](soak):
                rows.append((name, time.monotonic() - began, wrong))
                print(f"{name}: {'; '.join(wrong) or 'as it must be'} ({rows[-1][1]:.0f} s)", flush=True)
                began = time.monotonic()
    failed = [row for row in rows if row[2]]
    table = ["| what befell the job | seconds | |", "|---|---|---|"]
    table += [f"| {name} | {seconds:.0f} | {'; '.join(wrong) or 'as it must be'} |" for name, seconds, wrong in rows]
    table.append(f"\n{len(rows)} rows, {len(failed)} failed")
    print("\n".join(table))
    if out is not None:
        out.write_text("\n".join(table) + "\n", encoding="utf-8")
    return int(bool(failed))


if __name__ == "__main__":
    out = out_of(__doc__)
    asked = os.environ.get("SOAK_PARTS", ",".join(PARTS)).split(",")
    sys.exit(run(asked, out))
