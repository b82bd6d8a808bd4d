"""A real S3-compatible server for tests: npm's s3rver, on loopback, with its objects on disk.

It survives `kill -9`: what was stored is there when it starts again. It is installed once, into
$DISTDL_TEST_CACHE or ~/.cache/distdl-tests; where node, npm or the registry is missing, tests are skipped and
say why.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "s3rver@3.7.1"
BUCKET = "shards"
_START_S = 30.0
_INSTALL_S = 180.0

# The pipe to its standard input ends when the tests' process does, however that ends; then it ends, too.
_PROGRAM = """
const S3rver = require(process.argv[1]);
const [folder, port, bucket] = process.argv.slice(2);
process.stdin.resume().on('end', () => process.exit(1));
const server = new S3rver({address: '127.0.0.1', port: Number(port), directory: folder, silent: true,
                           vhostBuckets: false, configureBuckets: [{name: bucket, configs: []}]});
server.run().then(({port}) => {
  server.httpServer.on('request', (request, response) => response.on('finish', () =>
    console.log('%s %s %d', request.method, request.url.split('?')[0], response.statusCode)));
  console.log('listening on %d', port);
});
"""
_REQUEST = re.compile(r"([A-Z]+) (/\S*) (\d{3})")


def installed() -> Path:
    """The folder of the installed package. Skips the test, with the reason, where it cannot be had."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: no S3 server to test with")
    root = Path(os.environ.get("DISTDL_TEST_CACHE") or Path.home() / ".cache" / "distdl-tests")
    folder = root / PACKAGE.replace("@", "-")
    module = folder / "node_modules" / "s3rver"
    if not (module / "package.json").is_file():
        building = folder.with_name(f"{folder.name}.{os.getpid()}")
        command = ["npm", "install", "--prefix", str(building), "--no-audit", "--no-fund", PACKAGE]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_S, check=False)
            if done.returncode == 0:
                with contextlib.suppress(OSError):  # another test session was first
                    building.rename(folder)
        except subprocess.TimeoutExpired as error:
            pytest.skip(f"cannot install {PACKAGE}: {error}")
        finally:
            shutil.rmtree(building, ignore_errors=True)
        if not (module / "package.json").is_file():
            pytest.skip(f"cannot install {PACKAGE} with npm: {done.stderr.strip()[-400:]}")
    return module


class S3Server:
    """A server with one bucket, `shards`. `kill` and `start` keep the objects and the port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = 0
        self._module = installed()
        self._log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "objects").mkdir(parents=True)
        self._log.touch()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to reach it, as for any S3."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "S3RVER",
            "AWS_SECRET_ACCESS_KEY": "S3RVER",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Start it and wait until it accepts connections: on a free port at first, then on the same one."""
        module = str(self._module)
        arguments = [module, str(self.folder / "objects"), str(self.port), BUCKET]
        seen = self._log.stat().st_size
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                ["node", "--no-deprecation", "-e", _PROGRAM, *arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        end = time.monotonic() + _START_S
        while time.monotonic() < end and self._process.poll() is None:
            text = self._log.read_bytes()[seen:].decode(errors="replace")
            if found := re.search(r"listening on (\d+)", text):
                self.port = int(found[1])
                socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
                return
            select.select([], [], [], 0.01)
        self.kill()
        raise AssertionError(f"the S3 server did not start:\n{self._log.read_text(errors='replace')[-2000:]}")

    def kill(self) -> None:
        """`kill -9`, and wait until it is gone. May be called again."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process = None

    def upload(self, source: Path, prefix: str) -> str:
        """Copy a folder into the bucket; returns its URL."""
        import s3fs

        store = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
        for file in sorted(p for p in source.rglob("*") if p.is_file()):
            store.put_file(str(file), f"{BUCKET}/{prefix}/{file.relative_to(source)}")
        return f"s3://{BUCKET}/{prefix}"

    def remove(self, key: str) -> None:
        """Delete one object."""
        import s3fs

        s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False).rm_file(f"{BUCKET}/{key}")

    def requests(self, method: str = "GET", status: int = 200) -> Counter[str]:
        """How often each key of the bucket was asked for, and answered so. (206 is a part of an object.)"""
        found: Counter[str] = Counter()
        if self._process is not None:
            self._fence()
        for line in self._log.read_text(errors="replace").splitlines():
            match = _REQUEST.fullmatch(line)
            if match and match[1] == method and int(match[3]) == status:
                found[match[2].removeprefix(f"/{BUCKET}/")] += 1
        return found

    def pause(self, paused: bool) -> None:
        """Stop the server so that it keeps its connections and answers nobody, or let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP if paused else signal.SIGCONT)

    def _fence(self) -> None:
        """Wait until everything answered so far is in the log: a line comes after its answer is sent."""
        name = f"/fence-{uuid.uuid4().hex}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", name)
        connection.getresponse().read()
        connection.close()
        end = time.monotonic() + _START_S
        while name not in self._log.read_text(errors="replace"):
            assert time.monotonic() < end, "the S3 server does not log"
            select.select([], [], [], 0.005)


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """A running server with its objects below `folder`; killed at the end, whatever happens."""
    server = S3Server(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
