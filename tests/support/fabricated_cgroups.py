"""A machine's control groups, made of plain files."""

from __future__ import annotations

from pathlib import Path

from kecho.system.cgroups import cgroup_cpu_quota, cgroup_memory_limit


def escaped(path: str) -> str:
    for character in "\\ \t\n":
        path = path.replace(character, f"\\{ord(character):03o}")
    return path


class Machine:
    """A /proc/self and control groups, fabricated under one directory."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.proc_self = top / "proc"
        self.proc_self.mkdir()
        self._mounts: list[str] = []

    def mounts(self, kind: str, mount_point: str, options: str = "", root: str = "/") -> Path:
        """Adds a line of proc_pid_mountinfo(5); returns where it is mounted."""
        directory = self.top / mount_point
        directory.mkdir(parents=True, exist_ok=True)
        self._mounts.append(
            f"{30 + len(self._mounts)} 24 0:26 {escaped(root)} {escaped(str(directory))} "
            f"rw,nosuid shared:9 - {kind} cgroup rw{',' if options else ''}{options}"
        )
        (self.proc_self / "mountinfo").write_text("\n".join(self._mounts) + "\n")
        return directory

    def is_in(self, *lines: str) -> None:
        """The lines of /proc/self/cgroup: cgroups(7)."""
        (self.proc_self / "cgroup").write_text("".join(f"{line}\n" for line in lines))

    @property
    def quota(self) -> float | None:
        return cgroup_cpu_quota(self.proc_self)

    @property
    def memory(self) -> int | None:
        return cgroup_memory_limit(self.proc_self)
