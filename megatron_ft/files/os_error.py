"""The remedy for a failed system call: an error message must not blame a file for what the
process, its user or the disk lacks."""

import errno

REMEDIES = {
    errno.EMFILE: "this process has too many open files: raise the limit with ulimit -n 65536",
    errno.ENFILE: "this machine has too many open files: close other programs",
    errno.ENOMEM: "this machine has no free memory: close other programs, or use a larger machine",
    errno.EAGAIN: "a limit of this machine is reached: close other programs",
    errno.EACCES: "get permission for it",
    errno.EPERM: "get permission for it",
    errno.EROFS: "mount the file system for writing, or choose another directory",
    errno.ENOSPC: "free disk space or inodes",
    errno.EDQUOT: "free disk space or inodes of your quota",
    errno.EFBIG: "raise the limit with ulimit -f",
    errno.EIO: "the disk or its server failed: try again, then ask the administrator",
    errno.ESTALE: "the file server has replaced it: run the command again",
    errno.ETIMEDOUT: "the file server does not answer: try again later",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def remedy(error: OSError, otherwise: str) -> str:
    """What to do about an error of the operating system; `otherwise` if the cause is none of
    REMEDIES, such as a missing file.

    >>> remedy(OSError(errno.ENOSPC, "No space left on device"), "copy it again")
    'free disk space or inodes'
    """
    return REMEDIES.get(error.errno or 0, otherwise)
