"""Start, use and stop servers; LeakSanitizer looks at what is left at exit."""

import socket
import threading

import kecho
import kecho_build

ROUNDS = 3
CLIENTS = 8
MESSAGE = bytes(range(256)) * 64


def echo(port: int, finish: bool) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(MESSAGE)
        left = len(MESSAGE)
        while left:
            data = client.recv(left)
            if not data:
                raise RuntimeError("closed before the echo was complete")
            left -= len(data)
        if finish:
            client.shutdown(socket.SHUT_WR)
            if client.recv(1):
                raise RuntimeError("more was echoed than sent")


def one_server(dispatch: str) -> None:
    server = kecho.Server(host="127.0.0.1", port=0, dispatch=dispatch, threads=2)
    server.start()
    try:
        failures: list[Exception] = []

        def client(index: int) -> None:
            try:
                echo(server.port, finish=index % 2 == 0)
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=client, args=(i,)) for i in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        # One connection is still open, with data on its way, when the server stops.
        held = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        held.sendall(MESSAGE)
    finally:
        server.stop()
    held.close()


def main() -> None:
    print("leaks:", kecho_build.check())
    for _ in range(ROUNDS):
        for dispatch in ("shared", "percpu"):
            one_server(dispatch)
    # Neither is one that never started to leave anything behind.
    kecho.Server(host="127.0.0.1", port=0, dispatch="shared", threads=2)
    print(f"leaks: {2 * ROUNDS} servers were started, used and stopped")


if __name__ == "__main__":
    main()
