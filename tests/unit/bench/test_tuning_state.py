from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kecho.bench.tuning import applied
from kecho.bench.tuning.applied import Restored, Tuning, restore_leftover
from kecho.bench.tuning.state_file import Change, State, StateFile
from kecho.bench.tuning.uninterrupted import uninterrupted
from kecho.errors import TuningError
from kecho.system.processes import start_time
from support.privileges import needs_root

pytestmark = pytest.mark.python_only

SOMAXCONN = "net.core.somaxconn"
PORT_RANGE = "net.ipv4.ip_local_port_range"
WANTED = {SOMAXCONN: "8192", PORT_RANGE: "1024 65535"}
RAISED = {SOMAXCONN: "8192", PORT_RANGE: "1024 65535"}
BEFORE = {SOMAXCONN: "4096", PORT_RANGE: "32768 60999"}


class Sysctls:
    """A directory in the place of /proc/sys."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in BEFORE:
            self.path(name).parent.mkdir(parents=True)
        self.path(SOMAXCONN).write_text("4096\n")
        self.path(PORT_RANGE).write_text("32768\t60999\n")

    def path(self, name: str) -> Path:
        return self.root / name.replace(".", "/")

    def __getitem__(self, name: str) -> str:
        return " ".join(self.path(name).read_text().split())

    def __setitem__(self, name: str, text: str) -> None:
        self.path(name).write_text(f"{text}\n")

    def all(self) -> dict[str, str]:
        return {name: self[name] for name in BEFORE}


@pytest.fixture
def sysctls(tmp_path: Path) -> Sysctls:
    return Sysctls(tmp_path / "sys")


@pytest.fixture
def state_file(tmp_path: Path) -> Path:
    return tmp_path / "run" / "tuning.json"


@pytest.fixture
def tune(sysctls: Sysctls, state_file: Path) -> Callable[..., Tuning]:
    def make(wanted: object = WANTED, **options: object) -> Tuning:
        options = {"state_file": state_file, "root": sysctls.root} | options
        return Tuning(wanted, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture
def leave_behind(sysctls: Sysctls, state_file: Path) -> Callable[..., None]:
    """leave_behind(**fields) makes what a killed run leaves, with other fields in the state."""

    def leave(**fields: object) -> None:
        child = subprocess.Popen(["true"])
        child.wait()
        changes = {name: Change(BEFORE[name], RAISED[name]) for name in BEFORE}
        state = json.loads(State(changes, pid=child.pid, start_time=1).to_json()) | fields
        state_file.parent.mkdir(mode=0o700, exist_ok=True)
        state_file.write_text(json.dumps(state))
        state_file.chmod(0o600)
        for name, text in RAISED.items():
            sysctls[name] = text

    return leave


@contextmanager
def on_write(monkeypatch: pytest.MonkeyPatch, action: Callable[[str, str], None]) -> Iterator[None]:
    """Within it, action(name, text) runs before each sysctl is written."""
    write = applied.write_sysctl

    def instead(name: str, text: str, *, root: Path | None = None) -> None:
        action(name, text)
        write(name, text, root=root)

    with monkeypatch.context() as patched:
        patched.setattr(applied, "write_sysctl", instead)
        yield


# ---- within `with`, and after it ----------------------------------------------------------------


def test_values_are_raised_within_and_put_back_after(
    tune: Callable[..., Tuning], sysctls: Sysctls, state_file: Path
) -> None:
    with tune() as tuning:
        assert sysctls.all() == RAISED
        assert state_file.exists()
    assert sysctls.all() == BEFORE
    assert not any(state_file.parent.iterdir())
    assert [(one.name, one.outcome) for one in tuning.restored] == [
        (SOMAXCONN, "restored"),
        (PORT_RANGE, "restored"),
    ]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_values_are_put_back_after_an_exception(
    tune: Callable[..., Tuning], sysctls: Sysctls, state_file: Path, kind: type[BaseException]
) -> None:
    with pytest.raises(kind), tune():
        raise kind
    assert sysctls.all() == BEFORE
    assert not state_file.exists()


def test_state_is_on_the_disk_before_the_first_change(
    tune: Callable[..., Tuning],
    sysctls: Sysctls,
    state_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def look(name: str, text: str) -> None:
        seen.append((sysctls.all(), json.loads(state_file.read_text())))

    with on_write(monkeypatch, look), tune():
        pass
    values, state = seen[0]
    assert values == BEFORE
    assert state["version"] == 1
    assert state["pid"] == os.getpid()
    assert state["start_time"] == start_time(os.getpid())
    assert state["boot_id"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert f"net:[{state['netns']}]" == os.readlink("/proc/self/ns/net")
    assert state["values"] == {
        SOMAXCONN: {"old": "4096", "new": "8192"},
        PORT_RANGE: {"old": "32768 60999", "new": "1024 65535"},
    }


def test_state_is_for_its_owner_only(tune: Callable[..., Tuning], state_file: Path) -> None:
    before = os.umask(0)
    try:
        with tune():
            assert state_file.stat().st_mode & 0o777 == 0o600
            assert state_file.parent.stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


def test_nothing_is_lowered(tune: Callable[..., Tuning], sysctls: Sysctls) -> None:
    with tune({SOMAXCONN: "128", PORT_RANGE: "40000 65535"}) as tuning:
        assert sysctls.all() == {SOMAXCONN: "4096", PORT_RANGE: "32768 65535"}
        assert list(tuning.changes) == [PORT_RANGE]
    assert sysctls.all() == BEFORE


def test_run_that_changes_nothing_leaves_no_state(
    tune: Callable[..., Tuning], state_file: Path
) -> None:
    with tune({}) as tuning:
        assert state_file.exists()
    assert not state_file.exists()
    assert tuning.restored == []


def test_tuning_can_be_used_again(tune: Callable[..., Tuning], sysctls: Sysctls) -> None:
    tuning = tune()
    for _ in range(2):
        with tuning:
            assert sysctls.all() == RAISED
        assert sysctls.all() == BEFORE


def test_value_that_is_refused_undoes_those_before_it(
    tune: Callable[..., Tuning],
    sysctls: Sysctls,
    state_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(name: str, text: str) -> None:
        if name == PORT_RANGE:
            raise OSError(errno.EINVAL, "Invalid argument")

    refused = pytest.raises(TuningError, match=rf"^{PORT_RANGE} cannot be set to 1024 65535: Inv")
    with refused, on_write(monkeypatch, refuse), tune():
        pytest.fail("entered")
    assert sysctls.all() == BEFORE
    assert not state_file.exists()


def test_value_that_does_not_stay_is_an_error(
    tune: Callable[..., Tuning], sysctls: Sysctls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(applied, "write_sysctl", lambda name, text, *, root: None)
    with pytest.raises(TuningError, match="was set to 8192, but is 4096"), tune():
        pytest.fail("entered")
    assert sysctls.all() == BEFORE


def test_without_privileges_nothing_is_touched(
    tune: Callable[..., Tuning],
    sysctls: Sysctls,
    state_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(name: str, *, root: Path | None = None) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(applied, "check_writable", refuse)
    with pytest.raises(TuningError, match=f"^{SOMAXCONN} cannot be changed: .* needs root"), tune():
        pytest.fail("entered")
    assert sysctls.all() == BEFORE
    assert not state_file.parent.exists()


def test_foreign_change_is_left_alone_and_reported(
    tune: Callable[..., Tuning], sysctls: Sysctls, state_file: Path
) -> None:
    with tune() as tuning:
        sysctls[SOMAXCONN] = "512"
    assert sysctls.all() == {SOMAXCONN: "512", PORT_RANGE: BEFORE[PORT_RANGE]}
    assert [one.outcome for one in tuning.restored] == ["changed", "restored"]
    assert "set to 512 by another process" in str(tuning.restored[0])
    assert not state_file.exists()


@pytest.mark.parametrize("kind", [None, ValueError])
def test_value_that_cannot_be_put_back_is_told_and_kept_in_the_state(
    tune: Callable[..., Tuning],
    sysctls: Sysctls,
    state_file: Path,
    kind: type[Exception] | None,
) -> None:
    def run() -> None:
        with tune():
            sysctls.path(SOMAXCONN).unlink()
            sysctls.path(SOMAXCONN).mkdir()
            if kind:
                raise kind

    with pytest.raises(kind or TuningError) as caught:
        run()
    told = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert f"{SOMAXCONN}: not restored to 4096: Is a directory" in told
    assert sysctls[PORT_RANGE] == BEFORE[PORT_RANGE]
    assert state_file.exists()


def test_descriptors_that_are_used_up_do_not_keep_values_from_being_put_back(
    tune: Callable[..., Tuning], sysctls: Sysctls, state_file: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = []

    def run() -> None:
        with tune():
            highest = max(map(int, os.listdir("/proc/self/fd")))
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 10, hard))
            while True:
                opened.append(os.open("/dev/null", os.O_RDONLY))

    try:
        with pytest.raises(OSError, match="Too many open files"):
            run()
        assert len(opened) >= 9
    finally:
        for fd in opened:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sysctls.all() == BEFORE
    assert not state_file.exists()


def test_forked_child_puts_nothing_back(tune: Callable[..., Tuning], sysctls: Sysctls) -> None:
    tuning = tune()
    with tuning:
        child = os.fork()
        if child == 0:
            tuning.__exit__(None, None, None)
            os._exit(0)
        os.waitpid(child, 0)
        assert sysctls.all() == RAISED
    assert sysctls.all() == BEFORE


# ---- RLIMIT_NOFILE ------------------------------------------------------------------------------

LIMITS_IN_A_CHILD = """
import resource, sys
from pathlib import Path
from kecho.bench.tuning.applied import Tuning
root, soft, hard, wanted = sys.argv[1], *map(int, sys.argv[2:])
NOFILE = resource.RLIMIT_NOFILE
resource.setrlimit(NOFILE, (soft, hard))
with Tuning({}, descriptors=wanted, state_file=Path(root, "run/t.json"), root=Path(root)) as tuning:
    print(*resource.getrlimit(NOFILE))
print(*resource.getrlimit(NOFILE))
print(tuning.notes)
"""


@pytest.mark.parametrize("wanted", [100, 128])
def test_soft_descriptor_limit_is_raised_and_put_back(tmp_path: Path, wanted: int) -> None:
    command = [sys.executable, "-c", LIMITS_IN_A_CHILD, tmp_path, "64", "128", str(wanted)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert child.stdout.splitlines() == [f"{wanted} 128", "64 128", "[]"]


def test_descriptor_limit_that_suffices_stays(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITS_IN_A_CHILD, tmp_path, "64", "128", "10"]
    child = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert child.stdout.splitlines() == ["64 128", "64 128", "[]"]


class Limit:
    """RLIMIT_NOFILE of a process that may raise its hard limit, or may not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, privileged: bool) -> None:
        self.value, self.privileged = (64, 128), privileged
        monkeypatch.setattr(resource, "getrlimit", lambda limit: self.value)
        monkeypatch.setattr(resource, "setrlimit", self.set)

    def set(self, limit: int, value: tuple[int, int]) -> None:
        if value[1] > self.value[1] and not self.privileged:
            raise ValueError("not allowed to raise maximum limit")
        self.value = value


def test_hard_descriptor_limit_is_raised_by_who_may(
    tune: Callable[..., Tuning], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = Limit(monkeypatch, privileged=True)
    with tune(descriptors=200) as tuning:
        assert limit.value == (200, 200)
    assert limit.value == (64, 128)
    assert tuning.notes == []


def test_hard_descriptor_limit_that_cannot_be_raised_is_said(
    tune: Callable[..., Tuning], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = Limit(monkeypatch, privileged=False)
    with tune(descriptors=200) as tuning:
        assert limit.value == (128, 128)
    assert limit.value == (64, 128)
    assert len(tuning.notes) == 1
    assert "raised only to 128, not to 200" in tuning.notes[0]


def test_descriptor_limit_that_somebody_else_has_set_is_left_alone(
    tune: Callable[..., Tuning], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = Limit(monkeypatch, privileged=True)
    with tune(descriptors=100) as tuning:
        limit.value = (90, 128)
    assert limit.value == (90, 128)
    assert "left alone" in tuning.notes[0]


# ---- signals ------------------------------------------------------------------------------------


def test_signals_take_effect_after_the_values_are_put_back(
    tune: Callable[..., Tuning],
    sysctls: Sysctls,
    state_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(name: str, text: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    tuning = tune().__enter__()
    with pytest.raises(KeyboardInterrupt), on_write(monkeypatch, interrupt):
        tuning.__exit__(None, None, None)
    assert sysctls.all() == BEFORE
    assert not state_file.exists()


def test_signal_while_values_are_set_undoes_them(
    tune: Callable[..., Tuning],
    sysctls: Sysctls,
    state_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(name: str, text: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), on_write(monkeypatch, interrupt), tune():
        pytest.fail("entered")
    assert sysctls.all() == BEFORE
    assert not state_file.exists()


def test_signal_that_another_thread_receives_waits_too() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)  # has no signal blocked
    thread.start()
    done = []

    def run() -> None:
        with uninterrupted():
            for _ in range(100):
                os.kill(os.getpid(), signal.SIGINT)
                done.append(sum(range(1000)))

    try:
        with pytest.raises(KeyboardInterrupt):
            run()
    finally:
        stop.set()
        thread.join()
    assert len(done) == 100
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_values_are_put_back_at_exit_where_the_end_was_never_reached(
    sysctls: Sysctls, state_file: Path
) -> None:
    code = f"""
from pathlib import Path
from kecho.bench.tuning.applied import Tuning
state_file, root = Path({str(state_file)!r}), Path({str(sysctls.root)!r})
Tuning({WANTED!r}, state_file=state_file, root=root).__enter__()
"""
    subprocess.run([sys.executable, "-c", code], timeout=30, check=True)
    assert sysctls.all() == BEFORE
    assert not state_file.exists()


# ---- what a killed run leaves behind ------------------------------------------------------------


def test_leftover_is_put_back(
    leave_behind: Callable[..., None], sysctls: Sysctls, state_file: Path
) -> None:
    leave_behind()
    restored = restore_leftover(state_file, root=sysctls.root)
    assert restored == [
        Restored(name, BEFORE[name], RAISED[name], RAISED[name], "restored") for name in BEFORE
    ]
    assert sysctls.all() == BEFORE
    assert not state_file.exists()
    assert restore_leftover(state_file, root=sysctls.root) == []


def test_no_leftover_is_no_error(sysctls: Sysctls, state_file: Path) -> None:
    assert restore_leftover(state_file, root=sysctls.root) == []
    assert not state_file.parent.exists()


def test_leftover_that_was_never_applied_is_untouched(
    leave_behind: Callable[..., None], sysctls: Sysctls, state_file: Path
) -> None:
    leave_behind()
    for name, text in BEFORE.items():
        sysctls[name] = text
    assert {one.outcome for one in restore_leftover(state_file, root=sysctls.root)} == {"untouched"}
    assert sysctls.all() == BEFORE
    assert not state_file.exists()


def test_next_run_puts_a_leftover_back_before_it_looks_at_the_values(
    leave_behind: Callable[..., None],
    tune: Callable[..., Tuning],
    sysctls: Sysctls,
) -> None:
    leave_behind()
    seen = []

    def wanted() -> dict[str, str]:
        seen.append(sysctls.all())
        return WANTED

    with tune(wanted) as tuning:
        assert sysctls.all() == RAISED
    assert [one.outcome for one in tuning.leftover] == ["restored", "restored"]
    assert seen[-1] == BEFORE
    assert sysctls.all() == BEFORE


def test_state_from_before_the_boot_is_removed_and_nothing_written(
    leave_behind: Callable[..., None], sysctls: Sysctls, state_file: Path
) -> None:
    leave_behind(boot_id="00000000-0000-0000-0000-000000000000")
    assert restore_leftover(state_file, root=sysctls.root) == []
    assert sysctls.all() == RAISED
    assert not state_file.exists()


def test_state_of_a_live_run_is_refused(
    tune: Callable[..., Tuning], sysctls: Sysctls, state_file: Path
) -> None:
    with tune():
        expected = rf"^another tuned run is under way: process {os.getpid()} "
        with pytest.raises(TuningError, match=expected):
            restore_leftover(state_file, root=sysctls.root)
        with pytest.raises(TuningError, match=expected), tune():
            pytest.fail("entered")
        assert sysctls.all() == RAISED
        assert state_file.exists()
    assert sysctls.all() == BEFORE


def test_pid_that_is_used_again_is_another_process(
    leave_behind: Callable[..., None], sysctls: Sysctls, state_file: Path
) -> None:
    started = start_time(os.getpid())
    assert started
    leave_behind(pid=os.getpid(), start_time=started - 1)
    restore_leftover(state_file, root=sysctls.root)
    assert sysctls.all() == BEFORE


def test_zombie_runs_no_more() -> None:
    child = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], {})
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert Path(f"/proc/{child}/stat").exists()
    assert start_time(child) is None
    os.waitpid(child, 0)
    assert start_time(child) is None


def test_state_of_another_network_namespace_is_refused(
    leave_behind: Callable[..., None], sysctls: Sysctls, state_file: Path
) -> None:
    leave_behind(netns=1)
    with pytest.raises(TuningError, match=r"from network namespace 1, .*nothing was changed"):
        restore_leftover(state_file, root=sysctls.root)
    assert sysctls.all() == RAISED
    assert state_file.exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"version": 2}',
        '{"version": 1, "values": []}',
        '{"version": 1, "values": {"net.core.somaxconn": "1"}}',
        '{"version": 1, "values": {"../../etc/passwd": {"old": "1", "new": "2"}}}',
        '{"version": 1, "values": {}, "pid": "1"}',
        "[" * 10_000,
        "\udcff",
    ],
)
def test_corrupt_state_is_refused_by_name(
    sysctls: Sysctls, state_file: Path, tune: Callable[..., Tuning], text: str
) -> None:
    state_file.parent.mkdir(mode=0o700)
    state_file.write_bytes(text.encode("utf-8", "surrogateescape"))
    state_file.chmod(0o600)
    for attempt in (lambda: restore_leftover(state_file, root=sysctls.root), tune().__enter__):
        with pytest.raises(TuningError, match=f"^{state_file}: not a state file .*") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert sysctls.all() == BEFORE
    assert state_file.exists()


def test_state_comes_back_as_it_was_written(state_file: Path) -> None:
    state = State({SOMAXCONN: Change("1", "2")})
    file = StateFile(state_file)
    assert file.open(create=True)
    try:
        assert file.read() is None
        file.write(state)
        assert file.read() == state
        file.remove()
        assert file.read() is None
    finally:
        file.close()


def test_half_written_state_of_a_killed_run_is_in_nobodys_way(
    tune: Callable[..., Tuning], sysctls: Sysctls, state_file: Path
) -> None:
    state_file.parent.mkdir(mode=0o700)
    state_file.with_name(f"{state_file.name}.new").write_text("{")
    with tune():
        assert sysctls.all() == RAISED
    assert not any(state_file.parent.iterdir())


@pytest.mark.parametrize("what", ["file", "directory"])
def test_what_others_may_write_is_not_trusted(
    leave_behind: Callable[..., None], sysctls: Sysctls, state_file: Path, what: str
) -> None:
    leave_behind()
    (state_file if what == "file" else state_file.parent).chmod(0o777)
    with pytest.raises(TuningError, match=r"others may write it \(mode 0777\)"):
        restore_leftover(state_file, root=sysctls.root)
    assert sysctls.all() == RAISED


@pytest.mark.parametrize("what", ["file", "directory"])
def test_symbolic_link_is_not_followed(
    leave_behind: Callable[..., None],
    sysctls: Sysctls,
    state_file: Path,
    tune: Callable[..., Tuning],
    what: str,
) -> None:
    leave_behind()
    linked = state_file if what == "file" else state_file.parent
    target = linked.rename(linked.with_name("elsewhere"))
    linked.symlink_to(target)
    for attempt in (lambda: restore_leftover(state_file, root=sysctls.root), tune().__enter__):
        with pytest.raises(TuningError, match=f"^{linked}: a symbolic link"):
            attempt()
    assert sysctls.all() == RAISED
    assert linked.is_symlink()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused(
    sysctls: Sysctls, state_file: Path, make: Callable[[Path], None]
) -> None:
    state_file.parent.mkdir(mode=0o700)
    make(state_file)
    with pytest.raises(TuningError, match=f"^{state_file}: "):
        restore_leftover(state_file, root=sysctls.root)


@needs_root
def test_state_of_another_user_is_not_trusted(
    leave_behind: Callable[..., None], sysctls: Sysctls, state_file: Path
) -> None:
    leave_behind()
    os.chown(state_file, 12345, 12345)
    with pytest.raises(TuningError, match=r"belongs to another user \(12345\)"):
        restore_leftover(state_file, root=sysctls.root)
    assert sysctls.all() == RAISED


def test_run_that_finds_another_one_beginning_gives_up(
    tune: Callable[..., Tuning],
    sysctls: Sysctls,
    state_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kecho.bench.tuning.state_file._LOCK_TIMEOUT_S", 0.05)
    state_file.parent.mkdir(mode=0o700)
    fd = os.open(state_file.parent, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(TuningError, match=f"^{state_file.parent}: locked by another"), tune():
            pytest.fail("entered")
    finally:
        os.close(fd)
    assert sysctls.all() == BEFORE
