"""Measure ``vitrail serve``: round trips, load from many connections, memory; LitServe in turns.

    python benchmarks/serve.py --peer litserve/bin/python --output_path records/serve

It needs wrk, which generates the load, and for the peer a separate environment with LitServe:

    apt install wrk
    python -m venv litserve && litserve/bin/pip install litserve==0.2.19 -r requirements.txt

First LitServe's settings are compared under short loads; then the servers take turns (A B A B),
each alone on the machine. The body of every request is one picture of 32 x 32, a PNG of 2 kB.
"""

import http.client
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import resources
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import tyro
from PIL import Image

from vitrail.cli.process import IDLE_SPINS
from vitrail.runtime.hardware import describe_environment

ROUND_TRIPS, WARM_UP = 500, 30
REST = 2.0
"""Seconds between two servers."""
PEER_PORT = 8431
PREDICT, EXPLAIN = "/api/predict?top=1", "/api/explain?method=balanced&top=1"
PEER_SETTINGS = ((8, 0.002, 1), (16, 0.005, 1), (32, 0.01, 1), (8, 0.002, 2), (16, 0.005, 2))
"""LitServe's largest batch, the seconds it waits for one, and its processes with a model."""
TITLES = {
    "vitrail": "vitrail serve",
    "litserve": "LitServe",
    "litserve_traced": "LitServe with a traced network",
    "vitrail_with_httptools": "vitrail serve with httptools, uvloop",
}
SCRIPT = """
local file = io.open("{picture}", "rb")
wrk.method, wrk.body = "POST", file:read("*a")
wrk.headers["Content-Type"] = "application/octet-stream"
file:close()
function done(all, latency)
  local wrong = all.errors.status + all.errors.connect + all.errors.read + all.errors.write
  io.write(string.format('{{"requests": %d, "seconds": %.3f, "errors": %d, "timeouts": %d, ',
    all.requests, all.duration / 1e6, wrong, all.errors.timeout))
  io.write(string.format('"p50_ms": %.2f, "p95_ms": %.2f, "p99_ms": %.2f}}\\n',
    latency:percentile(50) / 1e3, latency:percentile(95) / 1e3, latency:percentile(99) / 1e3))
end
"""


@dataclass(frozen=True)
class Options:
    """Measure vitrail serve."""

    model: str = "cifar10"
    seconds: int = 60
    """Duration of each load."""
    connections: int = 32
    rounds: int = 2
    """Number of loads for each server."""
    requests: int = 100_000
    """After this many requests, the memory is read again."""
    trial: int = 8
    """Seconds of load for each of LitServe's settings."""
    peer: Path | None = None
    """Python interpreter with LitServe; without it, only vitrail serve is measured."""
    output_path: Path | None = None
    """Folder for README.md and serve.json; without it, the JSON is printed only."""


@dataclass
class Bench:
    """What every measurement needs."""

    options: Options
    folder: Path
    port: int = 0

    @property
    def picture(self) -> Path:
        """The picture that is sent."""
        return self.folder / "picture.png"

    def prepare(self) -> None:
        """Write the picture, and wrk's script that sends it."""
        strip = (resources.files("vitrail.serve") / "page" / "cifar10.png").read_bytes()
        Image.open(BytesIO(strip)).crop((0, 0, 32, 32)).save(self.picture)
        script = SCRIPT.format(picture=self.picture)
        (self.folder / "post.lua").write_text(script, encoding="utf-8")

    def load(self, path: str, seconds: float) -> dict[str, float]:
        """Send requests for some seconds, with wrk in a process of its own."""
        command = ["wrk", "-t1", f"-c{self.options.connections}", f"-d{math.ceil(seconds)}s"]
        command += ["-s", str(self.folder / "post.lua"), f"http://127.0.0.1:{self.port}{path}"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
        return found | {"per_second": found["requests"] / found["seconds"]}

    def round_trips(self, path: str) -> dict[str, float]:
        """Time one client with a keep-alive connection."""
        client = http.client.HTTPConnection("127.0.0.1", self.port)
        body, taken = self.picture.read_bytes(), []
        for _ in range(WARM_UP + ROUND_TRIPS):
            began = time.perf_counter()
            client.request("POST", path, body, {"Content-Type": "application/octet-stream"})
            answer = client.getresponse()
            answer.read()
            taken.append(1000 * (time.perf_counter() - began))
            assert answer.status == 200
        places = quantiles(taken[WARM_UP:], n=100)
        return {"p50_ms": median(taken[WARM_UP:]), "p95_ms": places[94], "p99_ms": places[98]}


@contextmanager
def running(command: list[str], **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Start a server in a process group, which is stopped at the end."""
    environment["PYTHONPATH"] = str(Path(__file__).parents[1] / "src")
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | environment,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            print("the server did not stop: killed", file=sys.stderr)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(REST)


@contextmanager
def vitrail_server(bench: Bench, python: str = sys.executable) -> Iterator[int]:
    """Serve with Vitrail; yield the process id."""
    words = ["serve", "--no_browser", "--port", "0", bench.options.model]
    with running([python, "-m", "vitrail", *words]) as server:
        assert server.stdout is not None
        port = re.search(r":(\d+)/", server.stdout.readline())
        assert port is not None
        bench.port = int(port[1])
        yield server.pid


@contextmanager
def litserve_server(
    bench: Bench, settings: tuple[int, float, int], *, traced: bool = False
) -> Iterator[None]:
    """Serve with LitServe."""
    script = str(Path(__file__).parent / "litserve_peer.py")
    words = [str(PEER_PORT), bench.options.model, *map(str, settings), *["traced"] * traced]
    spins = str(IDLE_SPINS)  # as Vitrail's own commands do
    with running([str(bench.options.peer), script, *words], GOMP_SPINCOUNT=spins):
        bench.port = PEER_PORT
        for _ in range(120):
            time.sleep(0.5)
            try:
                client = http.client.HTTPConnection("127.0.0.1", PEER_PORT)
                client.request("GET", "/health")
                if client.getresponse().status == 200:
                    break
            except OSError:
                continue
        bench.load("/predict", 1)
        yield


def memory(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) / 1024


def choose_settings(bench: Bench) -> tuple[tuple[int, float, int], list[dict[str, Any]]]:
    """Return LitServe's fastest settings, and the results of all trials."""
    trials = []
    for settings in PEER_SETTINGS:
        with litserve_server(bench, settings):
            trials.append({"settings": settings, **bench.load("/predict", bench.options.trial)})
        print(json.dumps(trials[-1]), file=sys.stderr)
    return max(trials, key=lambda trial: trial["per_second"])["settings"], trials


def measure(bench: Bench) -> dict[str, Any]:
    """Run everything; a server that is waiting its turn is paused."""
    options = bench.options
    found: dict[str, Any] = {"load_average_before": os.getloadavg()[0]}
    if options.peer:
        found |= {"litserve": [], "litserve_traced": []}
        found["settings"], found["trials"] = choose_settings(bench)
    ours: list[dict[str, float]] = []
    with vitrail_server(bench) as pid:
        port = bench.port
        found["memory"] = {"idle_MiB": memory(pid)}
        sent = int(bench.load(PREDICT, 1)["requests"])
        while sent < min(1000, options.requests):
            sent += int(bench.load(PREDICT, 1)["requests"])
        found["memory"] |= {"first_requests": sent, "first_MiB": memory(pid)}
        found["predict"] = bench.round_trips(PREDICT)
        found["balanced"] = bench.round_trips(EXPLAIN)
        sent += WARM_UP + ROUND_TRIPS
        for _ in range(options.rounds):
            bench.port = port
            ours.append(bench.load(PREDICT, options.seconds))
            sent += int(ours[-1]["requests"])
            print(json.dumps({"vitrail": ours[-1]}), file=sys.stderr)
            if options.peer:
                os.kill(pid, signal.SIGSTOP)
                for name in ("litserve", "litserve_traced"):
                    traced = name == "litserve_traced"
                    with litserve_server(bench, found["settings"], traced=traced):
                        found[name].append(bench.load("/predict", options.seconds))
                    print(json.dumps({name: found[name][-1]}), file=sys.stderr)
                os.kill(pid, signal.SIGCONT)
        bench.port = port
        while sent < options.requests:
            rate = ours[-1]["per_second"]
            sent += int(bench.load(PREDICT, (options.requests - sent) / rate + 1)["requests"])
        found["memory"] |= {"last_requests": sent, "last_MiB": memory(pid)}
    found["vitrail"] = ours
    if options.peer:  # its environment has httptools and uvloop, which uvicorn then uses
        with vitrail_server(bench, str(options.peer)):
            bench.load(PREDICT, 2)
            found["vitrail_with_httptools"] = [bench.load(PREDICT, options.seconds)]
    return found


def output_of(*command: str) -> str:
    """Return what a command prints."""
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def about(options: Options) -> dict[str, Any]:
    """Return the commit, the versions and the machine."""
    machine = describe_environment(torch.device("cpu"), "float32")
    versions = machine["versions"] | {name: version(name) for name in ("starlette", "uvicorn")}
    if options.peer:
        code = "from importlib.metadata import version; print(version('litserve'))"
        versions["litserve"] = output_of(str(options.peer), "-c", code)
    return {
        "commit": output_of("git", "rev-parse", "--short", "HEAD"),
        "versions": versions,
        "system": machine["system"],
        "processor": machine["processor"],
        "cores": os.cpu_count(),
    }


def describe(found: dict[str, Any], options: Options) -> str:
    """Return the README of the record."""
    kept, trips = found["memory"], {"predict": found["predict"]}
    trips["explain, `balanced`"] = found["balanced"]
    waits = [f"{each['p50_ms']:.1f} ms" for each in trips.values()]
    rate = {name: median(each["per_second"] for each in found[name]) for name in TITLES
            if found.get(name)}  # fmt: skip
    compared = ""
    if options.peer:
        plain, traced = (rate["vitrail"] / rate[f"litserve{kind}"] for kind in ("", "_traced"))
        compared = f", {plain:.2f} times as many as LitServe ({traced:.2f} with a traced network)"
    machine, growth = found["machine"], 100 * (kept["last_MiB"] / kept["first_MiB"] - 1)
    versions = ", ".join(f"{name} {text}" for name, text in machine["versions"].items())
    lines = [
        "# Predictions and maps over HTTP",
        "",
        f"**Claim.** `vitrail serve` answers {rate['vitrail']:.0f} predictions/s to "
        f"{options.connections} connections{compared}; a single client waits {waits[0]} for a "
        f"prediction and {waits[1]} for a map by `balanced`.",
        "",
        f"    python benchmarks/serve.py {shlex.join(sys.argv[1:])}",
        "",
        f"Commit {machine['commit']}; {machine['cores']} cores of an {machine['processor']}, "
        f"{machine['system']}, load average before: {found['load_average_before']:.2f}; "
        f"{versions}. Raw numbers in `serve.json`.",
        "",
        *_times(found, trips, options),
        "",
        f"The server has {kept['first_MiB']:.0f} MiB of resident memory after "
        f"{kept['first_requests']:,} requests, and {kept['last_MiB']:.0f} MiB after "
        f"{kept['last_requests']:,} ({growth:+.1f}%).",
        *_peer(found),
    ]
    return "".join(f"{_wrap(line)}\n" for line in lines)


def _times(found: dict[str, Any], trips: dict[str, Any], options: Options) -> list[str]:
    """Return the tables of round trips and of loads."""
    lines = [
        "One client with a keep-alive connection:",
        "",
        *_row("", "p50, ms", "p95, ms", "p99, ms"),
        *_row("---", *["---:"] * 3),
    ]
    for name, each in trips.items():
        lines += _row(name, *(f"{each[f'p{p}_ms']:.1f}" for p in (50, 95, 99)))
    lines += ["", f"{options.connections} connections for {options.seconds} s, a line for each "
              "load; the servers took turns, each alone on the machine:", ""]  # fmt: skip
    lines += _row("", "predictions/s", "p50, ms", "p95, ms", "p99, ms", "errors", "timeouts")
    lines += _row("---", *["---:"] * 6)
    for name, title in TITLES.items():
        for each in found.get(name, []):
            columns = ("per_second", "p50_ms", "p95_ms", "p99_ms", "errors", "timeouts")
            lines += _row(title, *(f"{each[column]:.0f}" for column in columns))
    return lines


def _peer(found: dict[str, Any]) -> list[str]:
    """Return how LitServe was set up."""
    if "trials" not in found:
        return []
    lines = [
        "",
        "LitServe reads and predicts with the same functions of Vitrail, in processes of its own: "
        "the model as `vitrail.load` returns it, or the graph that `vitrail serve` makes of it. It "
        "brings httptools and uvloop, which uvicorn uses where they are installed. Its "
        "settings are the fastest of these:",
        "",
        *_row("largest batch", "waits for it, s", "processes", "predictions/s"),
        *_row(*["---:"] * 4),
    ]
    for trial in found["trials"]:
        lines += _row(*map(str, trial["settings"]), f"{trial['per_second']:.0f}")
    return lines


def _row(*cells: str) -> list[str]:
    return [f"| {' | '.join(cells)} |"]


def _wrap(line: str) -> str:
    return line if line.startswith(("|", "    ")) else textwrap.fill(line, 120)


def main() -> None:
    """Measure, print the JSON, and write the record."""
    options = tyro.cli(Options, config=(tyro.conf.FlagConversionOff,), use_underscores=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        bench.prepare()
        found = measure(bench)
    found["machine"] = about(options)
    found["options"] = {name: str(value) for name, value in asdict(options).items()}
    print(json.dumps(found, indent=1))
    if options.output_path:
        options.output_path.mkdir(parents=True, exist_ok=True)
        (options.output_path / "serve.json").write_text(json.dumps(found, indent=1) + "\n")
        (options.output_path / "README.md").write_text(describe(found, options))


if __name__ == "__main__":
    main()
