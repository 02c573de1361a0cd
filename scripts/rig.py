"""What scripts/load, scripts/soak and scripts/night share: a relay before a store, a mounted daemon and its numbers."""

import collections
import os
import random
import resource
import signal
import socket
import subprocess
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def raise_limits():
    """Lets this process and its children have as many open files as they may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def summary(seconds):
    if not seconds:
        return "none"
    seconds = sorted(seconds)
    rank = lambda share: seconds[min(len(seconds) - 1, int(share * len(seconds)))]
    return f"median {rank(0.5):.3f} s, 99 % {rank(0.99):.3f} s, largest {seconds[-1]:.3f} s"


def status_of(pid, name):
    """Bytes that /proc/PID/status has under a name: VmRSS, VmHWM."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


def threads_of(pid):
    return len(os.listdir(f"/proc/{pid}/task"))


def descriptors_of(pid):
    """How many descriptors a process has, but for the files in which it keeps what it has compressed."""
    return sum(count for name, count in open_of(pid).items() if "/state/lengths/" not in name)


def open_of(pid):
    """What the descriptors of a process are open on, with the count of each."""
    found = collections.Counter()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found[os.readlink(f"/proc/{pid}/fd/{name}").split(":")[0]] += 1
        except OSError:
            pass
    return dict(found)


def has_ended(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(") ")[2][0] in "ZX"
    except OSError:
        return True


class Relay:
    """Passes connections on to a server, until it is stopped: then nothing moves, and nothing is refused. It can also cut
    connections: all of them, or each piece that passes with some probability."""

    def __init__(self, endpoint, seed=0):
        host, port = endpoint.removeprefix("http://").split(":")
        self.server = (host, int(port))
        self.random = random.Random(seed)
        self.moving = threading.Event()
        self.moving.set()
        self.cut_share = 0
        self.open, self.lock = set(), threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            client, _ = self.listener.accept()
            threading.Thread(target=self.connect, args=(client,), daemon=True).start()

    def connect(self, client):
        self.moving.wait()
        try:
            server = socket.create_connection(self.server)
        except OSError:
            return client.close()
        with self.lock:
            self.open.update((client, server))
        for source, sink in ((client, server), (server, client)):
            threading.Thread(target=self.pump, args=(source, sink), daemon=True).start()

    def pump(self, source, sink):
        try:
            while data := source.recv(1 << 16):
                self.moving.wait()
                if self.random.random() < self.cut_share:
                    sink.sendall(data[: len(data) // 2])
                    break
                sink.sendall(data)
                self.passed(sink, len(data))
        except OSError:
            pass
        self.end(source)
        self.end(sink)

    def passed(self, sink, length):
        """So many bytes were passed on; for who counts them."""

    def end(self, connection):
        with self.lock:
            self.open.discard(connection)
        try:
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def cut(self):
        """Cuts all connections."""
        with self.lock:
            now = list(self.open)
        for connection in now:
            self.end(connection)


class Mount:
    """A daemon and what it has mounted, all below one directory."""

    def __init__(self, binary, work, catalog, buckets, environment, options=()):
        self.work, self.path = work, f"{work}/mnt"
        os.makedirs(self.path, exist_ok=True)
        arguments = [a for name, url in buckets.items() for a in ("--bucket", f"{name}={url}")]
        arguments += [a for option in options for a in ("-o", option)]
        subprocess.run([binary, "mount", catalog, self.path, "--state", f"{work}/state", *arguments],
                       check=True, env={**os.environ, **environment}, timeout=300)
        with open(f"{work}/state/lock") as file:
            self.pid = int(file.read())

    def ended(self, limit=300):
        """Waits until the daemon has ended; returns the seconds, or None."""
        start = time.monotonic()
        while not has_ended(self.pid):
            if time.monotonic() - start > limit:
                return None
            time.sleep(0.02)
        return time.monotonic() - start

    def signal(self, number=signal.SIGTERM):
        os.kill(self.pid, number)

    def unmount(self, *how):
        return subprocess.run(["fusermount3", "-u", "-q", *how, self.path], check=False).returncode == 0
