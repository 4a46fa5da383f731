"""PID 1 of a private pid namespace: reaps every orphan at once and does nothing else.

libvirt waits for the end of a QEMU by asking whether its pid still exists; below a PID 1 that reaps slowly
each ``destroy`` takes a second and more. Run as a script, never imported.
"""

import os
import signal


def main() -> None:
    """Reap until killed."""
    # Blocked and waited for, not handled: no SIGCHLD is lost between the last waitpid and the next wait.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0] > 0:
                pass
        except ChildProcessError:
            pass
        signal.sigwait({signal.SIGCHLD})


if __name__ == "__main__":
    main()
