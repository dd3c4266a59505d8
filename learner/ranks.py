"""The processes of one learner as a group: rank 0 says what to do, all do it, and when one dies all die.

    share      bytes from rank 0 to all
    spread     a model's tensors from rank 0 to all
    summed     numbers added up over all
    lifeline   a connection between rank 0 and each other; where it breaks, both ends end their process

A rank that dies in a collective leaves the others waiting in it, on a GPU for as long as its time-out: the lifeline is
watched by threads that no collective blocks, and its end is the end of the process.
"""

import hmac
import os
import secrets
import select
import signal
import socket
import struct
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

_COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""Of one exchange within a step; a rank that is alive and takes longer hangs."""
_ORDERS_TIMEOUT = timedelta(days=365)
"""Between two orders: groups may take as long as they like."""
_JOIN_TIMEOUT_S = 60.0
_LAST_WORD_S = 1.0
_TOKEN_BYTES = 16
_PORT = struct.Struct("!H")
_BYE = b"bye"


class Ranks:
    """This process among the others of its learner."""

    def __init__(self) -> None:
        """Meet the others, where the environment says: that of DeepSpeed's launcher. Blocks until all are there."""
        self.device = torch.device("cpu")
        backend = "gloo"
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=_COLLECTIVE_TIMEOUT)
        self.rank = dist.get_rank()
        self.count = dist.get_world_size()
        self._orders = dist.new_group(backend="gloo", timeout=_ORDERS_TIMEOUT)
        self._lifelines: list[socket.socket] = []
        self._leaving = False
        self._hold()

    # -- saying ------------------------------------------------------------------------------------

    def share(self, data: bytes = b"") -> bytes:
        """What rank 0 says, on every rank."""
        size = torch.tensor([len(data)])
        dist.broadcast(size, 0, group=self._orders)
        content = torch.empty(int(size), dtype=torch.uint8)
        if self.rank == 0:
            content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(content, 0, group=self._orders)
        return content.numpy().tobytes()

    def spread(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite each tensor with rank 0's; all ranks give the same shapes in the same order."""
        for tensor in tensors:
            dist.broadcast(tensor, 0)

    def summed(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Each tensor added up over all ranks, in float64, on the CPU; all ranks give the same names and shapes."""
        flat = torch.cat([tensor.detach().cpu().double().flatten() for tensor in tensors.values()])
        dist.all_reduce(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors.values()])
        return {
            name: part.view(tensor.shape)
            for (name, tensor), part in zip(tensors.items(), parts, strict=True)
        }

    # -- ending ------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Rank 0 is about to end its process: the others end theirs, without complaint."""
        self._leaving = True
        for lifeline in self._lifelines:
            with suppress(OSError):  # it has ended already
                lifeline.sendall(_BYE)
                lifeline.shutdown(socket.SHUT_WR)

    def crash(self, why: str) -> NoReturn:
        """End this process, another than rank 0; rank 0 says why and ends the rest.

        When rank 0 has been killed, that is why, and this process ends as it did.
        """
        lifeline = self._lifelines[0]
        with suppress(OSError):
            select.select([lifeline], [], [], _LAST_WORD_S)
            if not lifeline.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                os.kill(os.getpid(), signal.SIGKILL)
        with suppress(OSError):  # so has rank 0
            lifeline.sendall(why.encode())
        os._exit(1)

    def _hold(self) -> None:
        """Connect rank 0 with each other, and watch the connections."""
        if self.rank == 0:
            self._accept()
        else:
            secret = self.share()
            address = (os.environ["MASTER_ADDR"], _PORT.unpack(secret[_TOKEN_BYTES:])[0])
            lifeline = socket.create_connection(address, timeout=_JOIN_TIMEOUT_S)
            lifeline.sendall(secret[:_TOKEN_BYTES] + _PORT.pack(self.rank))
            self._watch(lifeline, 0)

    def _accept(self) -> None:
        token = secrets.token_bytes(_TOKEN_BYTES)
        with socket.create_server((os.environ["MASTER_ADDR"], 0)) as server:
            server.settimeout(_JOIN_TIMEOUT_S)
            self.share(token + _PORT.pack(server.getsockname()[1]))
            while len(self._lifelines) < self.count - 1:
                lifeline, _ = server.accept()
                lifeline.settimeout(_JOIN_TIMEOUT_S)
                hello = lifeline.recv(_TOKEN_BYTES + _PORT.size, socket.MSG_WAITALL)
                if hmac.compare_digest(hello[:_TOKEN_BYTES], token):
                    self._watch(lifeline, _PORT.unpack(hello[_TOKEN_BYTES:])[0])
                else:
                    lifeline.close()

    def _watch(self, lifeline: socket.socket, other: int) -> None:
        lifeline.settimeout(None)
        # a host that lost its power closes nothing
        lifeline.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sys.platform == "linux":
            for option, seconds in ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 5)):
                lifeline.setsockopt(socket.IPPROTO_TCP, option, seconds)
        self._lifelines.append(lifeline)
        name = f"lifeline of rank {other}"
        threading.Thread(
            target=self._end_with, args=(lifeline, other), name=name, daemon=True
        ).start()

    def _end_with(self, lifeline: socket.socket, other: int) -> None:
        """End this process when the other has ended: as it was told to, with its error, or as it did, killed."""
        word = b""
        try:
            while part := lifeline.recv(1 << 12):
                word += part
        except OSError:
            pass  # reset or silent: it is gone without a word, too
        if self._leaving:
            return
        if word == _BYE:
            os._exit(0)
        why = word.decode(errors="replace") or "killed"
        sys.stderr.write(f"rank {other} of the learner: {why}\n")
        sys.stderr.flush()
        if word:
            os._exit(1)
        os.kill(os.getpid(), signal.SIGKILL)
