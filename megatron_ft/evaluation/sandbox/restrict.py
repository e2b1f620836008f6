"""Restrict this process by Landlock and seccomp, then become a command.

    python -I -S restrict.py RULES FAILURE_FD COMMAND...

The fallback where namespaces are forbidden. RULES, JSON: `read`, what may be read and executed, and
`write`, what may also be written. Sockets, and signals to processes other than itself, are refused.
Like the monitor, it is given to Python as text and uses the standard library only.
Sources: landlock(7), seccomp(2), linux/landlock.h, linux/seccomp.h, linux/filter.h.
"""

import ctypes
import json
import os
import platform
import struct
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture
READ_EXECUTE = 1 << 0 | 1 << 2 | 1 << 3  # EXECUTE, READ_FILE, READ_DIR
FILES_ONLY = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14  # of the rights, those that a file can have
ACCESS_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # ABI: number of access rights to files; later ones add IOCTL_DEV
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom", "/dev/full")

# x86_64 and aarch64: AUDIT_ARCH, and numbers of system calls.
ARCHITECTURES = {
    "x86_64": (
        0xC000003E,
        {"socket": 41, "kill": 62, "tkill": 200, "tgkill": 234, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297},
    ),
    "aarch64": (
        0xC00000B7,
        {"socket": 198, "kill": 129, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240},
    ),
}
# ptrace, process_vm_readv, process_vm_writev, shmget, io_uring_setup, pidfd_send_signal,
# userfaultfd
ALWAYS = {"x86_64": (101, 310, 311, 29, 425, 424, 323), "aarch64": (117, 270, 271, 194, 425, 424, 282)}
LOAD, JUMP_EQUAL, JUMP_LESS, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000  # REFUSE: EPERM
X32 = 0x40000000


def main() -> None:
    rules, failure, command = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    os.set_inheritable(failure, False)
    kind = "sandbox"
    try:
        checked(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        landlock(rules["read"], rules["write"])
        seccomp()
        kind = "toolchain"
        os.execve(command[0], command, os.environ)
    except OSError as error:
        os.write(failure, f"{kind}: {command[0]}: {error.strerror}".encode())
    os._exit(127)


def checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def landlock(read: list, write: list) -> None:
    """Allow only these paths, and no TCP where the kernel can forbid it."""
    abi = checked(LIBC.syscall(CREATE_RULESET, None, 0, 1))
    rights = (1 << ACCESS_RIGHTS.get(abi, 16)) - 1
    network = 3 if abi >= 4 else 0
    scoped = 3 if abi >= 6 else 0  # abstract sockets, signals
    attributes = struct.pack("=QQQ", rights, network, scoped)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = checked(LIBC.syscall(CREATE_RULESET, attributes, len(attributes), 0))
    for path in read:
        allow(ruleset, path, READ_EXECUTE & rights)
    for path in write:
        allow(ruleset, path, rights)
    for path in DEVICES:
        allow(ruleset, path, rights & FILES_ONLY)
    checked(LIBC.syscall(RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def allow(ruleset: int, path: str, rights: int) -> None:
    try:
        file = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    if not os.path.isdir(path):
        rights &= FILES_ONLY
    checked(LIBC.syscall(ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, file), 0))
    os.close(file)


def seccomp() -> None:
    """Refuse sockets, tracing, memory that outlives a process, and signals to others.

    A process may signal itself (abort does), where "itself" is the one that becomes the command.
    """
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise OSError(38, f"no system call numbers for {machine}")
    architecture, calls = ARCHITECTURES[machine]
    program = [
        (LOAD, 0, 0, 4),
        (JUMP_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, 0),
    ]
    if machine == "x86_64":
        program += [(JUMP_LESS, 0, 1, X32), (RETURN, 0, 0, KILL)]
    for number in (calls["socket"], *ALWAYS[machine]):
        program += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE)]
    for name in ("kill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"):
        program += [
            (JUMP_EQUAL, 0, 4, calls[name]),
            (LOAD, 0, 0, 16),  # the first argument: a process
            (JUMP_EQUAL, 0, 1, os.getpid()),
            (RETURN, 0, 0, ALLOW),
            (RETURN, 0, 0, REFUSE),
        ]
    program += [(JUMP_EQUAL, 0, 1, calls["tkill"]), (RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    checked(LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0))


if __name__ == "__main__":
    main()
