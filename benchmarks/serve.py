"""Text queries per second through the service against onnxruntime called in a plain loop, one text at a time.

    python benchmarks/serve.py --student demo/student [--clients 200] [--seconds 20] [--ray]

Prints JSON: throughput, p50 and p99 under that many concurrent clients, the loop's throughput in the same
run, their ratio, and the batch sizes that /metrics saw. --ray measures ray_jobs/serve.py (one replica)
instead. Server and clients share this machine's cores, so the ratio is a lower bound.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time

import httpx
import numpy as np

from dclip_qdrant.jobs.cluster import free_port
from dclip_qdrant.serving.student import Student

WORDS = [
    "a",
    "red",
    "blue",
    "green",
    "ball",
    "dog",
    "cat",
    "house",
    "on",
    "the",
    "left",
    "of",
    "two",
    "big",
    "small",
    "striped",
]


def texts(n: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, 6)) for _ in range(n)]


def loop(student: Student, seconds: float) -> float:
    """Texts per second of one thread that embeds one text after another."""
    some, n = texts(500), 0
    student.embed_texts(some[:1])
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        student.embed_texts([some[n % 500]])
        n += 1
    return n / (time.perf_counter() - began)


async def clients(url: str, model: str, count: int, seconds: float) -> tuple[list[float], int]:
    """Keep-alive connections over plain streams: an HTTP client library would cost more of this machine than
    the service."""
    host, port = url.removeprefix("http://").split(":")
    requests = []
    for t in texts(500):
        body = json.dumps(
            {
                "inputs": [{"data": t, "data_type": "text", "model": model, "options": None}],
                "inference": "search",
                "token": None,
            }
        ).encode()
        requests.append(
            (
                f"POST /inference HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: "
                f"application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            ).encode()
            + body
        )
    took: list[float] = []
    errors = 0
    until = time.perf_counter() + seconds

    async def one(k: int) -> None:
        nonlocal errors
        reader, writer = await asyncio.open_connection(host, int(port))
        i = k
        while time.perf_counter() < until:
            began = time.perf_counter()
            writer.write(requests[i % 500])
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
            took.append(time.perf_counter() - began)
            errors += not head.startswith(b"http/1.1 200")
            i += count
        writer.close()

    await asyncio.gather(*(one(k) for k in range(count)))
    return took, errors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", required=True)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--ray", action="store_true")
    args = parser.parse_args()
    student = Student.load(args.student)
    alone = loop(student, args.seconds / 2)
    command = [sys.executable, "-m", "dclip_qdrant.cli", "serve", "--port", "0"]
    if args.ray:  # replicas of all this machine's cores: one
        command = [
            sys.executable,
            "ray_jobs/serve.py",
            "--port",
            str(free_port()),
            "--max-replicas",
            "1",
            "--cpus",
            str(os.cpu_count()),
            "--target-requests",
            "100",
        ]
    with tempfile.TemporaryFile("w+") as log:
        measure(
            args,
            student,
            alone,
            subprocess.Popen([*command, "--student", args.student], stdout=log, stderr=log),
            log,
        )


def address(server: subprocess.Popen, log) -> str:
    """What the service says once it listens."""
    while server.poll() is None:
        log.seek(0)
        if found := re.search(r" at (http://\S+?)/inference", log.read()):
            return found.group(1)
        time.sleep(0.2)
    sys.exit("the service did not start")


def measure(args: argparse.Namespace, student: Student, alone: float, server: subprocess.Popen, log) -> None:
    try:
        url = address(server, log)
        for _ in range(200):
            if httpx.get(url + "/readyz").status_code == 200:
                break
            time.sleep(0.1)
        one, _ = asyncio.run(clients(url, student.model_name, 1, args.seconds / 4))
        took, errors = asyncio.run(clients(url, student.model_name, args.clients, args.seconds))
        figures = [
            line
            for line in httpx.get(url + "/metrics").text.splitlines()
            if line.startswith("dclip_batch_size_") and 'tower="text"' in line
        ]
    finally:
        server.terminate()
        server.wait()
    value = lambda name: float(next(line for line in figures if line.startswith(name)).split()[-1])
    ms = lambda v, q: round(float(np.percentile(v, q)) * 1000, 1)
    print(
        json.dumps(
            {
                "clients": args.clients,
                "requests": len(took),
                "errors": errors,
                "per_second": round(len(took) / args.seconds, 1),
                "p50_ms": ms(took, 50),
                "p99_ms": ms(took, 99),
                "one_client": {"per_second": round(len(one) / (args.seconds / 4), 1), "p50_ms": ms(one, 50)},
                "loop_per_second": round(alone, 1),
                "ratio": round(len(took) / args.seconds / alone, 2),
                "mean_batch": round(value("dclip_batch_size_sum") / value("dclip_batch_size_count"), 1),
                "batches": {
                    line.split('le="')[1].split('"')[0]: int(float(line.split()[-1]))
                    for line in figures
                    if "bucket" in line
                },
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
