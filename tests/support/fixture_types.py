"""What the fixtures start_server and start_process are."""

from __future__ import annotations

from collections.abc import Callable

import kecho
from support.server_process import ServerProcess

StartServer = Callable[..., kecho.Server]
StartProcess = Callable[..., ServerProcess]
