# SPDX-License-Identifier: Apache-2.0
"""A seccomp filter for a child process, as a container runtime sets one."""
import ctypes
import errno
import platform
import struct

import pytest

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO = 0x7FFF0000, 0x00050000
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
IO_URING_SETUP = 425  # the same on x86-64 and arm64


class SockFprog(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def forbid_io_uring(error):
    """For Popen's preexec_fn: io_uring_setup fails with that error."""
    if platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("the filter knows this architecture's system calls not")
    refused = SECCOMP_RET_ERRNO | getattr(errno, error)
    program = b"".join(struct.pack("<HBBI", *instruction) for instruction in (
        (LOAD_WORD, 0, 0, 0),  # the system call's number
        (JUMP_IF_EQUAL, 0, 1, IO_URING_SETUP),
        (RETURN, 0, 0, refused),
        (RETURN, 0, 0, SECCOMP_RET_ALLOW)))
    buffer = ctypes.create_string_buffer(program, len(program))
    filter_ = SockFprog(len(program) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    libc = ctypes.CDLL(None, use_errno=True)

    def apply():
        for call in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
                     (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(filter_), 0, 0)):
            if libc.prctl(*map(ctypes.c_ulong, call)) != 0:
                raise OSError(ctypes.get_errno(), "prctl")

    apply.keep = buffer
    return apply
