"""The monitor: the first process of a sandbox, which runs a program's steps and reports on them.

    python -I -S -c STARTER CODE REPORT_FD < JOB

It is given to Python as code, so that it needs no file of this package in the sandbox, and imports
little, as it starts with every program. `Sandbox` writes the job and reads the report, both in
Python's marshal format. In bubblewrap it is process 1, which the program can neither signal nor
trace, and whose end kills all others; elsewhere it is the subreaper of all that the program starts.
"""

# Without the enumerations of `signal`, which take longer than all else; no type information.
import _signal as signal  # type: ignore[import-not-found]
import marshal
import os
import resource
import select
import sys
import time

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 4, 36
FIRST_CHECK, CHECK = 0.05, 0.1  # seconds between looks at the processes
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    job = marshal.loads(sys.stdin.buffer.read())
    report = int(sys.argv[1])
    for end in (report, *job["channel"]):
        os.set_inheritable(end, False)
    with open("/proc/self/oom_score_adj", "w", encoding="utf-8") as file:
        file.write("1000")  # the first to go when the node runs out of memory
    if os.getpid() != 1:
        signal.signal(signal.SIGTERM, end_at_once)
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        prctl(PR_SET_CHILD_SUBREAPER, 1)
    if os.getuid() != 0:
        prctl(PR_SET_DUMPABLE, 0)  # the program runs as the same user, and could write to the report
    os.umask(0)  # the program may run as another user
    write_files(job["directory"], job["files"])
    steps = []
    for step in job["steps"]:
        steps.append(run(step, job))
        if (steps[-1]["exit"] != 0 or steps[-1]["reason"]) and not step["independent"]:
            break
    with open(report, "wb") as file:
        file.write(marshal.dumps(steps))


def end_at_once(number, frame) -> None:
    kill_all()
    os._exit(128 + number)


def prctl(option: int, value: int) -> None:
    import ctypes  # takes long, and root's monitor in bubblewrap has no need of it

    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def write_files(directory: str, files: dict) -> None:
    """Write files of a job, whose names are relative."""
    os.makedirs(directory)
    for name, content in files.items():
        path = os.path.normpath(os.path.join(directory, name))
        if not path.startswith(directory + "/"):
            raise ValueError(f"{name!r} is outside the working directory")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)


def run(step: dict, job: dict) -> dict:
    """Run one command until it ends or exceeds a limit; kill all that it started."""
    out, err, failure, child_ends = os.pipe(), os.pipe(), os.pipe(), os.pipe()
    for end in child_ends:
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)  # so that it is written to the pipe
    signal.set_wakeup_fd(child_ends[1], warn_on_full_buffer=False)
    before, start = children_cpu(), time.monotonic()
    pid = os.fork()
    if pid == 0:
        become(step, job, out[1], err[1], failure[1])
    for end in (out[1], err[1], failure[1]):
        os.close(end)
    watch = Watch(step, before)
    output = {out[0]: b"", err[0]: b""}
    status, usage, reason = None, None, ""
    reading = [out[0], err[0]]
    while not reason:
        ready = select.select([*reading, child_ends[0]], [], [], watch.delay)[0]
        reading = [end for end in reading if end not in ready or read_some(end, output)]
        if child_ends[0] in ready:
            os.read(child_ends[0], 4096)
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            break
        if sum(map(len, output.values())) > step["output"]:
            reason = "output"
        else:
            reason = watch.exceeded()
    kill_all()
    if reason:
        status = None
    for end in reading:  # what is left in the pipes
        os.set_blocking(end, False)
        while len(output[end]) <= step["output"] and read_some(end, output):
            pass
    if not reason and sum(map(len, output.values())) > step["output"]:
        reason = "output"
    why_not_run = os.read(failure[0], 4096)
    for end in (out[0], err[0], failure[0], *child_ends):
        os.close(end)
    return {
        "exit": os.WEXITSTATUS(status) if status is not None and os.WIFEXITED(status) else None,
        "signal": os.WTERMSIG(status) if status is not None and os.WIFSIGNALED(status) else None,
        "cpu_s": round(children_cpu() - before, 3),
        "wall_s": round(time.monotonic() - start, 3),
        "rss": max(watch.rss, usage.ru_maxrss * 1024 if usage else 0),
        "stdout": output[out[0]][: step["output"]],
        "stderr": output[err[0]][: step["output"]],
        "reason": reason,
        "not_run": why_not_run.decode(errors="replace"),
    }


def become(step: dict, job: dict, out: int, err: int, failure: int) -> None:
    """In the child: take the limits and the user, and become the command. Never returns."""
    blamed = "sandbox"
    try:
        os.setsid()
        stdin, stdout = job["channel"] or (os.open(os.devnull, os.O_RDONLY), out)
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        os.dup2(err, 2)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.chdir(job["directory"])
        if os.getuid() == 0:
            os.setgroups([])
            os.setresgid(job["uid"], job["uid"], job["uid"])
            os.setresuid(job["uid"], job["uid"], job["uid"])
        seconds = int(step["cpu_s"]) + 2
        for name, value in {"CPU": seconds, **step["limits"]}.items():
            limit = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(limit)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(limit, (value, value))
        command = step["command"]
        if job["restrict"]:
            os.set_inheritable(failure, True)
            command = [*job["restrict"], str(failure), *command]
        blamed = "toolchain"
        os.execve(command[0], command, step["environment"])
    except BaseException as error:
        what = error.strerror if isinstance(error, OSError) else repr(error)
        os.write(failure, f"{blamed}: {step['command'][0]}: {what}".encode())
    finally:
        os._exit(127)


class Watch:
    """The limits on a running program: CPU time, time asleep, memory, wall-clock time.

    Time in which no process runs or could run counts as CPU time does. So a program that waits is
    stopped after as long as one that computes, however many others share the cores.
    """

    def __init__(self, step: dict, reaped: float):
        self.step, self.reaped = step, reaped
        self.start = self.last = time.monotonic()
        self.cpu = self.asleep = 0.0
        self.rss = 0
        self.delay = FIRST_CHECK

    def exceeded(self) -> str:
        """The limit that is exceeded, or ""."""
        now = time.monotonic()
        if now - self.last < self.delay:
            return ""
        cpu, rss, runnable = usage_of(descendants())
        cpu += children_cpu() - self.reaped
        if cpu - self.cpu < 1 / TICKS and not runnable:
            self.asleep += now - self.last
        self.cpu, self.rss, self.last, self.delay = max(cpu, self.cpu), max(rss, self.rss), now, CHECK
        if self.cpu + self.asleep > self.step["cpu_s"] or now - self.start > self.step["wall_s"]:
            return "timeout"
        return "memory" if rss > self.step["memory"] else ""


def usage_of(processes: list) -> tuple:
    """CPU seconds and resident bytes of processes, and whether any thread of theirs can run."""
    cpu, rss, runnable = 0, 0, False
    for process in processes:
        try:
            fields = stat_of(f"/proc/{process}/stat")
            cpu += sum(map(int, fields[11:15]))  # utime, stime, and those of children
            rss += int(fields[21]) * PAGE
            for thread in os.listdir(f"/proc/{process}/task"):
                runnable = runnable or stat_of(f"/proc/{process}/task/{thread}/stat")[0] in "RD"
        except (OSError, IndexError):
            continue  # it has ended
    return cpu / TICKS, rss, runnable


def stat_of(path: str) -> list:
    """The fields of a stat file after the name, which may hold anything."""
    with open(path, "rb") as file:
        return file.read().rpartition(b")")[2].decode().split()


def descendants() -> list:
    """Ids of all processes that the program has started and that still exist."""
    if os.getpid() == 1:
        return [name for name in os.listdir("/proc") if name.isdigit() and name != "1"]
    found, new = [], [str(os.getpid())]
    while new:
        process = new.pop()
        try:
            for thread in os.listdir(f"/proc/{process}/task"):
                with open(f"/proc/{process}/task/{thread}/children", encoding="utf-8") as file:
                    children = file.read().split()
                new += children
                found += children
        except OSError:
            continue
    return found


def kill_all() -> None:
    """Kill all that is left of the program, and wait until it has ended."""
    while True:
        if os.getpid() == 1:
            try:
                os.kill(-1, signal.SIGKILL)
            except ProcessLookupError:
                pass
        else:
            for process in descendants():
                try:
                    os.kill(int(process), signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def children_cpu() -> float:
    """CPU seconds of all processes that have ended and been waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def read_some(end: int, output: dict) -> bool:
    """Add what can be read to the output; whether there may be more."""
    try:
        data = os.read(end, 1 << 16)
    except BlockingIOError:
        return False
    output[end] += data
    return bool(data)


if __name__ == "__main__":
    main()
