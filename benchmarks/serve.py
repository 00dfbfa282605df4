"""Measure ``vitrail serve``: round trips of one client, then a load of several connections.

    python benchmarks/serve.py --seconds 10 --connections 32

The server is a process of its own; the clients are in this one, on the same machine.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import resources
from io import BytesIO
from statistics import median, quantiles

import tyro
from PIL import Image

ROUND_TRIPS = 200


@dataclass(frozen=True)
class Options:
    """Measure vitrail serve."""

    model: str = "cifar10"
    seconds: float = 10
    connections: int = 32


class Client:
    """One kept connection that posts one picture again and again."""

    def __init__(self, port: int, body: bytes) -> None:
        self.port, self.body = port, body

    async def open(self) -> None:
        """Connect to the server."""
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)

    async def post(self, path: str) -> tuple[int, float]:
        """Return the status of the answer, and the seconds it took."""
        began = time.perf_counter()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Length: "
        self.writer.write(f"{head}{len(self.body)}\r\n\r\n".encode() + self.body)
        answer = await self.reader.readuntil(b"\r\n\r\n")
        size = re.search(rb"content-length: (\d+)", answer, re.IGNORECASE)
        assert size is not None
        await self.reader.readexactly(int(size[1]))
        return int(answer.split()[1]), time.perf_counter() - began


async def round_trips(client: Client, path: str) -> dict[str, float]:
    for _ in range(10):
        await client.post(path)
    taken = [(await client.post(path))[1] for _ in range(ROUND_TRIPS)]
    return {"p50_ms": 1000 * median(taken), "p95_ms": 1000 * quantiles(taken, n=20)[-1]}


async def load(port: int, body: bytes, options: Options) -> dict[str, float]:
    clients = [Client(port, body) for _ in range(options.connections)]
    await asyncio.gather(*(client.open() for client in clients))
    end = time.perf_counter() + options.seconds

    async def repeat(client: Client) -> list[tuple[int, float]]:
        answers = []
        while time.perf_counter() < end:
            answers.append(await client.post("/api/predict?top=1"))
        return answers

    answers = [each for some in await asyncio.gather(*map(repeat, clients)) for each in some]
    return {
        "requests_per_second": len(answers) / options.seconds,
        "refused": sum(status != 200 for status, _ in answers),
        "p50_ms": 1000 * median(seconds for _, seconds in answers),
    }


async def measure(port: int, body: bytes, options: Options) -> dict[str, object]:
    client = Client(port, body)
    await client.open()
    return {
        "predict": await round_trips(client, "/api/predict?top=1"),
        "balanced": await round_trips(client, "/api/explain?method=balanced&top=1"),
        "load": await load(port, body, options),
    }


def main() -> None:
    options = tyro.cli(Options)
    file = resources.files("vitrail.serve") / "page" / "cifar10.png"
    picture = BytesIO()
    Image.open(BytesIO(file.read_bytes())).crop((0, 0, 32, 32)).save(picture, "PNG")
    words = ["serve", "--no_browser", "--port", "0", options.model]
    command = [sys.executable, "-m", "vitrail", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            port = re.search(r":(\d+)/", server.stdout.readline())
            assert port is not None
            before = os.getloadavg()[0]
            found = asyncio.run(measure(int(port[1]), picture.getvalue(), options))
        finally:
            server.terminate()
    print(json.dumps({"load_average_before": before, **found}, indent=1))


if __name__ == "__main__":
    main()
